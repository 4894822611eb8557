//! `cargo xtask bench read`: what a read, a mount and a volume cost, beside the least that they could cost.
//!
//! This process holds the store and asks; whoever is measured is another process.
//!
//! ```text
//!   bench-read ─┬─ embedded store ◀── wire (times each round trip) ◀── fuse-secrets mount, bench-agent
//!               ├─ readers: child processes, pinned to one core
//!               └─ peers, pinned to the other: fuse-secrets mount │ bench-floor │ (tmpfs has no process)
//! ```
//!
//! | file | what it measures |
//! |---|---|
//! | `reading.rs` | time and agent CPU per read, in interleaved rounds |
//! | `mounting.rs` | from `mount` to the first byte, without the store's time |
//! | `memory.rs` | PSS of the agent, by number of volumes |
//! | `sharing.rs` | requests at the store for many volumes of one identity |

// It prints tables.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod memory;
mod mounting;
mod peers;
mod reader;
mod reading;
mod sharing;
mod store;
mod wire;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fuse_tests::report::{Error, Report};

/// How long and how often.
struct Plan {
    /// Rounds of each peer and scenario.
    rounds: usize,
    /// Length of a round.
    round: Duration,
    /// Mounts that are timed.
    mounts: usize,
    /// Volumes in one process.
    volumes: &'static [usize],
}

const FULL: Plan = Plan { rounds: 9, round: Duration::from_secs(1), mounts: 15, volumes: &[100, 500] };
const QUICK: Plan = Plan { rounds: 3, round: Duration::from_millis(200), mounts: 5, volumes: &[20, 100] };

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["reader", operation, path, milliseconds] => reader::run(operation, path, milliseconds),
        ["--quick", to] => bench(&QUICK, Path::new(to)),
        [to] => bench(&FULL, Path::new(to)),
        _ => Err("usage: bench-read [--quick] DIR_OF_RESULTS (call it by `cargo xtask bench read`)".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench read: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(plan: &Plan, to: &Path) -> Result<(), Error> {
    let scratch = tempfile::tempdir()?;
    let store = store::Store::start(scratch.path())?;
    let mut report = Report::new("read", plan.rounds);
    report.show("reading, one or eight processes", reading::measure(plan, &store)?);
    report.show("from mount to the first byte", mounting::measure(plan, &store)?);
    report.show("memory of the agent", memory::measure(plan, &store)?);
    report.show("many volumes of one identity", sharing::measure(plan, &store)?);
    report.save(to)
}
