//! The commands as their users meet them: the built program, its output, exit codes, signals, and what it leaves behind.
//!
//! Every test has a [`world::World`]: a mount namespace with a /run, /tmp and /dev/fuse of its own, so that no test sees the
//! agents of another one, or of this machine. It needs root. Files of a mount are read by the test process, which serves none.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up fails that test, with the reason")]
#![allow(clippy::print_stdout, reason = "a test that cannot run here says so")]

/// `agent`, `mounts --from-shim`, `abort`, with a shim that the tests play.
mod agent;
/// `dev`.
mod dev;
/// Logs: JSON lines, filters, what is told of an outage.
mod log;
/// `mount`.
mod mount;
/// `mounts`.
mod mounts;
/// Child processes: lines as they come, signals, the end.
mod process;
/// A real store in this process, with what the tests ask of it.
mod store;
/// Help, `check`, `doctor`, wrong command lines.
mod text;
/// A mount namespace per test.
mod world;
