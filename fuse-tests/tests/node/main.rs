//! The shim and the agent together, as on a node: real processes, real mounts, kubelet's calls, a store.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

use std::time::Duration;

use fuse_tests::node::{Holdings, Node};
use fuse_tests::wait;

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
/// Tokens that are not the pod's.
mod forged;
/// The death of everything.
mod heal;
mod life;
/// Processes in namespaces of their own.
mod pod;
/// Targets on which something else lies.
mod takeover;
/// Requests that no kubelet sends.
mod hostile;
/// What a thousand volumes leave behind.
mod leaks;
/// Who is on the node socket, and is not an agent.
mod peers;
/// Why a pod has no volume, as its owner reads it.
mod refusals;
/// Kubernetes' own programs.
mod sanity;
/// Where a token and a value are, and where not.
mod tokens;

/// The shim stands beside it.
const SIBLING: &str = env!("CARGO_BIN_EXE_test-agent");

/// Longest wait for what comes by itself, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is held once two looks agree.
fn settled(node: &Node) -> Holdings {
    let mut last = node.holdings();
    wait::until("a node at rest", PATIENCE, || {
        wait::pause(Duration::from_millis(200));
        let before = std::mem::replace(&mut last, node.holdings());
        (before == last).then_some(before)
    })
}
