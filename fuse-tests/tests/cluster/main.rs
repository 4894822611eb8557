//! A real cluster of one node: kubelet, containerd, API server, Vault, and pods.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// The cluster by itself, without the driver.
mod bare;
/// The manifests, as they are installed.
mod deploy;
/// What pods read.
mod reading;
/// Why pods wait.
mod refusals;
/// Publishes that nobody but kubelet may make.
mod forged;
/// How pods end.
mod ends;
/// Parts that end and come back.
mod restarts;
/// What nothing survives.
mod heal;
/// What people do to nodes and to the driver.
mod operations;
/// Pods that read meanwhile.
mod stage;
/// Another driver of the same name.
mod takeover;
/// `kubectl fuse-secrets`.
mod plugin;
