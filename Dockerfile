# Two images, each one program alone: no shell, no libc, no embedded store.
#
#   docker build --target agent -t REGISTRY/fuse-secrets-agent:0.1.0 .
#   docker build --target shim  -t REGISTRY/fuse-secrets-csi:0.1.0 .
#
# `cargo xtask images` makes the same two without a container engine; the tests run those.

# The GNU libc, linked statically: it still resolves names in an empty image, and its allocator is the one that memory was measured with.
FROM rust:1.95-bookworm AS build
# A C compiler and CMake for the TLS library aws-lc, and the public CAs for stores without one of their own.
RUN apt-get update && apt-get install -y --no-install-recommends cmake ca-certificates
WORKDIR /src
COPY . .
# The image's own toolchain, which is the one that rust-toolchain.toml names.
ENV RUSTUP_TOOLCHAIN=1.95.0 RUSTFLAGS="-C target-feature=+crt-static"
# With a target, so that the flags are not those of build scripts and macros.
RUN target=$(rustc -vV | sed -n 's/^host: //p') \
    && cargo build --profile image --locked --target "$target" --no-default-features --package fuse-secrets --bin fuse-secrets \
    && cargo build --profile image --locked --target "$target" --package fuse-secrets-csi \
    && install -D "target/$target/image/fuse-secrets" /agent/fuse-secrets \
    && install -D "target/$target/image/fuse-secrets-csi" /shim/fuse-secrets-csi \
    && install -D -m 0644 /etc/ssl/certs/ca-certificates.crt /agent/etc/ssl/certs/ca-certificates.crt \
    && install -d -m 1777 /agent/tmp

# Mounts, and keeps what is mounted. Root, because it mounts.
FROM scratch AS shim
COPY --from=build /shim/ /
ENTRYPOINT ["/fuse-secrets-csi"]

# Has the secrets, and no right.
FROM scratch AS agent
COPY --from=build /agent/ /
# A number, so that `runAsNonRoot` can see that it is not root.
USER 65532:65532
ENTRYPOINT ["/fuse-secrets"]
