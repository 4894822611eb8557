//! Benches: programs of the release profile, which nothing else builds, measured as processes; and tests that run longer here
//! than in the test run.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::command::{self, Error};
use crate::{cluster, tools};

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
    /// A node with shim and agent: publishing, agents that die or hand over, memory, idling
    Node {
        /// Few short rounds: to see that it works, not for figures
        #[arg(long)]
        quick: bool,
        /// Only these: publish, stalls, memory
        #[arg(long, value_name = "SECTION")]
        only: Vec<String>,
    },
    /// A real cluster of one node: starts of pods, requests, upgrades, everything killed at once, what the driver takes
    Cluster {
        /// Few rounds: to see that it works, not for figures
        #[arg(long)]
        quick: bool,
        /// Only these: starts, upgrades, deaths, capacity
        #[arg(long, value_name = "SECTION")]
        only: Vec<String>,
    },
    /// Random input for the readers of frames, snapshots, records and classes
    Fuzz {
        /// For each of them
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Agents killed under readers, again and again
    Kills {
        /// How often, in each of the tests
        #[arg(long, default_value_t = 100)]
        times: u32,
    },
}

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    match &args.which {
        Which::Read { quick } => command::run(&mut bench("bench-read", &[], *quick, &[])?)?,
        Which::Node { quick, only } => command::run(&mut bench("bench-node", &[], *quick, only)?)?,
        Which::Cluster { quick, only } => {
            let mut bench = bench("bench-cluster", &["test-cluster"], *quick, only)?;
            cluster::provide(&mut bench)?;
            command::run(&mut bench)?;
        }
        Which::Fuzz { seconds } => {
            for package in ["fuse-secrets-csi", "fuse-secrets"] {
                let mut cargo = command::cargo();
                cargo.args(["test", "--package", package, "--test", "fuzz", "--", "--nocapture"]);
                command::run(cargo.env("FUZZ_SECONDS", seconds.to_string()))?;
            }
        }
        Which::Kills { times } => {
            // Tests start the programs of this workspace, which `cargo test` alone would not build.
            command::run(command::cargo().args(["build", "--workspace", "--bins"]))?;
            let mut cargo = command::cargo();
            cargo.args(["test", "--package", "fuse-tests", "--test", "node", "kills", "--", "--nocapture"]);
            command::run(cargo.env("FUSE_SECRETS_TEST_KILLS", times.to_string()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A program of `fuse-tests` in the release profile, to be run; with these others beside it, none means all.
fn bench(program: &str, others: &[&str], quick: bool, only: &[String]) -> Result<Command, Error> {
    let programs = if others.is_empty() { Vec::new() } else { [&[program], others].concat() };
    let mut bench = Command::new(built(&["--release"], &programs)?.join("release").join(program));
    bench.args(quick.then_some("--quick")).args(only).arg(tools::target().join("bench"));
    Ok(bench)
}

/// Builds these programs, none means all; returns cargo's directory.
pub(crate) fn built(profile: &[&str], programs: &[&str]) -> Result<PathBuf, Error> {
    let mut cargo = command::cargo();
    cargo.args(["build", "--workspace"]).args(profile);
    cargo.args(programs.iter().flat_map(|program| ["--bin", program]));
    if programs.is_empty() {
        cargo.arg("--bins");
    }
    command::run(&mut cargo)?;
    Ok(tools::target())
}
