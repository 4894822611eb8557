//! What only the real kernel, and real stores, can tell. Each test says what a reader gets; docs/semantics.md names them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// Sizes, times, owners, modes, extended attributes.
mod attributes;
/// Calls other than `read(2)`: maps, splices, locks, seeks.
mod calls;
/// A secret is searched for everywhere.
mod canary;
/// Which bytes a reader gets, and of which version.
mod contents;
/// docs/semantics.md is compared with the tests.
mod document;
/// Agents that are killed, and that hand over.
mod handover;
/// Names and directories.
mod names;
/// A store that hangs.
mod outage;
/// Pages in the page cache: none.
mod page_cache;
/// A handler that panics.
mod panics;
/// Whatever would change something.
mod read_only;
/// Readers while values change, and while the mount goes.
mod rotation;
/// A hundred volumes that share.
mod sharing;
/// The same on every store.
mod stores;

use fuse_tests::agent::Agent;
use fuse_tests::needs;

const AGENT: &str = env!("CARGO_BIN_EXE_test-agent");

/// A child that serves; `None`: not on this machine.
fn agent() -> Option<Agent> {
    needs::kernel().then(|| Agent::start(AGENT))
}
