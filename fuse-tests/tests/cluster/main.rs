//! A real cluster of one node: kubelet, containerd, API server, Vault, and pods.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// The cluster by itself, without the driver.
mod bare;
/// The manifests, as they are installed.
mod deploy;
/// Parts that end and come back.
mod restarts;
/// Another driver of the same name.
mod takeover;
