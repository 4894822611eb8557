# The program `fuse-secrets` alone in an empty image: no shell, no libc, no embedded store. The shim is not in it.
#
#   docker build --target agent -t fuse-secrets .
#   docker run --rm fuse-secrets doctor
#   docker run --rm -i fuse-secrets check - < class.yaml
#
# Mounting from a container needs what mounting needs anywhere, and a directory through which the mount reaches others:
#
#   docker run --rm --user 0 --cap-add SYS_ADMIN --device /dev/fuse --security-opt apparmor=unconfined \
#     --ulimit memlock=67108864 --mount type=bind,source=/srv/app,target=/srv/app,bind-propagation=shared \
#     -v /etc/fuse-secrets:/etc/fuse-secrets:ro fuse-secrets mount \
#     --config /etc/fuse-secrets/mount.yaml --class /etc/fuse-secrets/class.yaml \
#     --token-file /etc/fuse-secrets/token /srv/app/secrets

# `cargo xtask test` checks the program with these features on the machine it runs on; it does not build this image.

# musl: the only libc that still resolves host names when it is linked statically.
FROM rust:1.95-alpine AS build
# A C compiler for the TLS library aws-lc, and the public CAs for stores without one of their own.
RUN apk add --no-cache build-base ca-certificates
WORKDIR /src
COPY . .
# The image's own toolchain, which is the one that rust-toolchain.toml names.
ENV RUSTUP_TOOLCHAIN=1.95.0
RUN cargo build --release --locked --no-default-features --package fuse-secrets
# The debug socket of root is made below /run, that of another user below /tmp.
RUN install -D target/release/fuse-secrets /image/fuse-secrets \
    && install -D -m 0644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
    && install -d -m 0755 /image/run && install -d -m 1777 /image/tmp

FROM scratch AS agent
COPY --from=build /image/ /
# A number, so that `runAsNonRoot` can see that it is not root.
USER 65532:65532
ENTRYPOINT ["/fuse-secrets"]
