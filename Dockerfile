# The program alone in an empty image: no shell, no libc, no embedded store.
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

# musl: the only libc that still resolves host names when it is linked statically.
FROM rust:1.95-alpine AS build
# A C compiler for the TLS library aws-lc, and the public CAs for stores without one of their own.
RUN apk add --no-cache build-base ca-certificates
WORKDIR /src
COPY . .
# The image's own toolchain, which is the one that rust-toolchain.toml names.
ENV RUSTUP_TOOLCHAIN=1.95.0
RUN cargo build --release --locked --no-default-features --package fuse-secrets

FROM scratch AS agent
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/target/release/fuse-secrets /fuse-secrets
# A number, so that `runAsNonRoot` can see that it is not root.
USER 65532:65532
ENTRYPOINT ["/fuse-secrets"]
