//! Things to watch in a terminal.

use std::process::{Command, ExitCode};

use crate::bench::built;
use crate::command::{self, Error};

/// Shows what the product does, in a terminal
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Which,
}

#[derive(clap::Subcommand)]
enum Which {
    /// A reader goes on while every process below it is killed (needs root and /dev/fuse)
    Crash {
        /// How long
        #[arg(long, default_value_t = 30)]
        seconds: u32,
    },
}

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    let Which::Crash { seconds } = args.which;
    let mut demo = Command::new(built(&[], &[])?.join("debug/demo-crash"));
    command::run(demo.arg(seconds.to_string()))?;
    Ok(ExitCode::SUCCESS)
}
