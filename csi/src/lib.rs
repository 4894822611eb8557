//! What the privileged shim of fuse-secrets and its unprivileged agent share: the wire between them, and the port on which each
//! tells how it is. The shim itself is the program beside this library (`main.rs`).

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

/// Frames, messages, limits, connections.
pub mod wire;
/// `/healthz`, `/readyz`, `/metrics` on one port.
pub mod health;
/// CSI and kubelet's plugin registration, as far as a node plugin needs them.
#[cfg(feature = "shim")]
pub mod proto;
