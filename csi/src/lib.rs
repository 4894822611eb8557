//! What the privileged shim and the agent of fuse-secrets say to each other on a node: types and bytes, no I/O.
//!
//! Nothing speaks it yet: shim and agent use it from the next version on. It stands here first so that both are built on one
//! definition, and so that the bytes of version 1 are recorded before anybody depends on them.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

/// Frames, messages, limits.
pub mod wire;
