//! fuse-secrets: secrets of a Vault-compatible store as files, answered from wiped memory.
//!
//! Two ways run through this crate; the modules stand in the order in which data passes them.
//!
//! ```text
//! publish   kubelet ─▶ shim ─▶ node ─▶ class ─▶ policy ─▶ reference ─▶ volume ─▶ cache ─▶ store ─▶ Vault API
//! read      read(2) ─▶ kernel ─▶ fuse ─▶ fs ─▶ volume ◀─ cache ◀─ store ◀─ Vault API
//! ```
//!
//! A value enters at `store`, at once as a secret type, rests in `cache` and in a volume's generations, both in
//! secret pages, and leaves through `fuse` by way of a bounce buffer that is wiped after the write. Nothing else sees it.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

/// Secret types, and the pages that are locked, unreadable for others and never dumped.
pub mod secret;
/// Time as it is passed in: one moment on both clocks.
pub mod time;
/// What an operator sets, typed: units, defaults, ranges; from flags, environment and file; every fault at once.
pub mod config;
/// What a volume asks for: validated newtypes that every layer below uses.
pub mod reference;
/// Publish 1: class documents of both kinds to what they ask for, all faults at once.
pub mod class;
/// Which of what a class says of store and login its namespace may say.
pub mod policy;
/// Read 1: speaks the Vault API.
pub mod store;
/// Read 2: values with their freshness: one login per identity, one read per path.
pub mod cache;
/// Read 3: one volume: its spec and its generations.
pub mod volume;
/// Read 4: names, inodes, handles and attributes on a volume; no FUSE in it.
pub mod fs;
/// Read 5: the adapter between the kernel's protocol and `fs`; the only place with fuser's types.
pub mod fuse;
/// The composition root: the parts wired in the order of the way, and the volumes that are served.
pub mod agent;
/// Publish 1 on Kubernetes: what the API server says: classes, whose tokens are good; and what it is told.
pub mod kubernetes;
/// Publish 2: the agent's side of the node protocol, and its two processes.
pub mod node;
/// The counters: name, unit, labels, help; nothing is counted elsewhere.
pub mod metrics;
/// The command line: thin commands that print tables.
pub mod cli;
/// The embedded store: the Vault API in memory, for `dev` and for tests.
#[cfg(feature = "dev")]
pub mod dev;
/// The wiping allocator, and system calls that rustix lacks: the only unsafe code of this crate.
pub mod sys;
