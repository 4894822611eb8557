//! Benches: programs of the release profile, which nothing else builds, measured as processes.

use std::process::{Command, ExitCode};

use crate::command::{self, Error};
use crate::tools;

/// Measures the product against what it promises (docs/measures.md)
///
/// Prints a table; JSON and a picture come to target/bench. Takes some minutes on a quiet machine of two cores; the first
/// time it builds everything in the release profile.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Which,
}

#[derive(clap::Subcommand)]
enum Which {
    /// Reads, mounts, memory, sharing: beside a bare file system and tmpfs
    Read {
        /// Few short rounds: to see that it works, not for figures
        #[arg(long)]
        quick: bool,
    },
}

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    let Which::Read { quick } = args.which;
    let packages = ["--package", "fuse-secrets", "--package", "fuse-tests"];
    command::run(command::cargo().args(["build", "--release", "--bins"]).args(packages))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| tools::root().join("target"), Into::into);
    let mut bench = Command::new(target.join("release/bench-read"));
    bench.args(quick.then_some("--quick")).arg(target.join("bench"));
    command::run(&mut bench)?;
    Ok(ExitCode::SUCCESS)
}
