//! One command per task of this repository. `cargo xtask --help` lists them; CI calls the same.
//!
//! | file | what it knows |
//! |---|---|
//! | `setup.rs` | what a machine must have, and how to get it |
//! | `test.rs` | the steps of the test run, their order, the sum at the end |
//! | `tools.rs` | what is built once and kept under `target/tools` |
//! | `bench.rs` | which programs are measured, in which profile |
//! | `demo.rs` | what can be watched |
//! | `go.rs` | building what is written in Go |
//! | `vault.rs` | how the real Vault server for the tests is built |
//! | `sanity.rs` | which programs call the shim as Kubernetes does |
//! | `images.rs` | what is in the driver's two images |
//! | `oci.rs` | images of one layer |
//! | `kubernetes.rs` | how the real Kubernetes for the tests is built, and the images of its pods |
//! | `cluster.rs` | a cluster that stays for a person |
//! | `command.rs` | running other programs |

// This is a program that talks to people in a terminal.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod cluster;
mod command;
mod demo;
mod go;
mod images;
mod kubernetes;
mod oci;
mod sanity;
mod setup;
mod test;
mod tools;
mod vault;

use std::process::ExitCode;

use clap::Parser;

/// Tasks of the fuse-secrets repository.
#[derive(Parser)]
#[command(
    bin_name = "cargo xtask",
    after_help = "A fresh machine:\n  \
        cargo xtask setup        says what is missing, and installs what it may\n  \
        cargo xtask test         everything that CI runs; the first time it builds Vault and Kubernetes (20-30 min)\n\n\
        While you write:\n  \
        cargo xtask test --only unit\n  \
        cargo xtask test --only clippy --only fmt"
)]
enum Task {
    Bench(bench::Args),
    Cluster(cluster::Args),
    Demo(demo::Args),
    Images(images::Args),
    Setup(setup::Args),
    Test(test::Args),
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Bench(args) => bench::run(&args),
        Task::Cluster(args) => cluster::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Images(args) => images::run(&args),
        Task::Setup(args) => setup::run(&args),
        Task::Test(args) => test::run(&args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cargo xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
