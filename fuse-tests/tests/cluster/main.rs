//! A real cluster of one node: kubelet, containerd, API server, Vault, and pods.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// The cluster by itself, without the driver.
mod bare;
/// How pods end.
mod ends;
/// Publishes that nobody but kubelet may make.
mod forged;
/// What pods read.
mod reading;
/// Why pods wait.
mod refusals;
/// `kubectl fuse-secrets`.
mod plugin;
