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
/// Sockets of root's, and how gRPC is served on them.
#[cfg(feature = "shim")]
pub mod rpc;
/// CSI Identity.
#[cfg(feature = "shim")]
pub mod identity;
/// CSI Node.
#[cfg(feature = "shim")]
pub mod node;
/// How kubelet finds the shim.
#[cfg(feature = "shim")]
pub mod registration;
