//! The shim and the agent together, as on a node: real processes, real mounts, kubelet's calls, a store.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// Processes that are killed.
mod kills;
/// Agents beside agents.
mod handover;
/// Agents and stores that stay away, and states that are broken.
mod outage;
/// What these begin with.
mod stage;
/// What root does by hand, and volumes that go while they are used.
mod abort;
/// The death of everything.
mod heal;
mod life;
/// Processes in namespaces of their own.
mod pod;
/// Targets on which something else lies.
mod takeover;

/// The shim stands beside it.
const SIBLING: &str = env!("CARGO_BIN_EXE_test-agent");
