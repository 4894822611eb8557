//! What the tests with a real kernel and real servers are made of. A process must never look into its own mount, so here the
//! server is always a child: the test itself reads.
//!
//! ```text
//!   test ──JSON lines──▶ test-agent (agent.rs): mounts without a store, or many classes in one process
//!     │  ├─arguments───▶ fuse-secrets mount (product.rs): the real program
//!     │  └─CSI, signals▶ fuse-secrets-csi and fuse-secrets agent (node.rs): a whole node
//!     ├──HTTP, kubectl─▶ a real cluster of one node (cluster.rs)
//!     ├──HTTP──────────▶ stores (backend.rs): embedded, Vault, OpenBao
//!     └──read(2)───────▶ kernel ──▶ one of the first two
//! ```
//! Whatever a test starts is a value that cleans up when it is dropped, also when the test fails.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// A child that serves volumes as it is told.
pub mod agent;
/// Stores: one set of calls for all kinds.
pub mod backend;
/// A real Kubernetes cluster of one node.
pub mod cluster;
/// A stand-in for kubectl.
pub mod kubectl;
/// What a process's memory holds.
pub mod memory;
/// A directory with a mount that goes when it is dropped.
pub mod mounted;
/// What this machine must have.
pub mod needs;
/// A node of real processes: store, shim, agents, kubelet's calls.
pub mod node;
/// The real program as a child.
pub mod product;
/// Threads that read and judge what they read.
pub mod readers;
/// What a bench found.
pub mod report;
/// Who mounts, and keeps what agents leave.
pub mod shim;
/// Values that can be checked.
pub mod stamp;
/// System calls that rustix lacks: the only unsafe code of this crate.
pub mod sys;
pub mod usage;
/// Waiting for conditions, with deadlines.
pub mod wait;
