//! The command line: thin commands that print tables. Standard output is for what was asked, standard error for the log and for
//! what went wrong.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing is what a command line is for")]

/// `agent`: serves the volumes of a node's pods.
pub mod agent;
/// `check`: reads class documents and says what they ask for, or everything that is wrong with them.
pub mod check;
/// `dev`: the whole read path on this machine, on an embedded store.
#[cfg(feature = "dev")]
pub mod dev;
/// `doctor`: what this node gives, and what is lost without it.
pub mod doctor;
/// Exit codes, and the one line that goes with them.
pub mod exit;
/// `kubectl fuse-secrets`: the same tables for a cluster.
pub mod kubectl;
/// Logging: text or JSON, and what is never logged.
pub mod log;
/// `mount`: one class of a real store, without Kubernetes.
pub mod mount;
/// `mounts`: what is mounted, by whichever agent.
pub mod mounts;
/// `abort`, and `mounts --from-shim`: what root asks the shim.
pub mod observe;
/// Panics: logged without their message, and a reason to unmount.
pub mod panics;
/// What `dev` and `mount` share: the directory, signals, serving until the end.
mod serving;
/// Tables.
mod table;
/// Text for terminals.
mod text;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// Secrets of a Vault-compatible store as files, answered from wiped memory
///
/// The files live in a FUSE file system: every read is answered by this program, from memory that is locked, unreadable for
/// other processes and wiped after use. Nothing is written to disk, tmpfs or the page cache.
#[derive(Parser)]
#[command(name = "fuse-secrets", version, after_long_help = EXAMPLES, max_term_width = 100)]
pub struct Arguments {
    /// How to log.
    #[command(flatten)]
    pub log: log::Options,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Try it, on an embedded store:
      fuse-secrets dev
  Check a class before it is mounted:
      fuse-secrets check app.yaml
  Mount a class of a real store:
      fuse-secrets mount --class app.yaml --address https://vault:8200 \\
          --token-file ~/.vault-token /mnt/app
  See what is mounted, and one mount file by file:
      fuse-secrets mounts
      fuse-secrets mounts /mnt/app
  Serve the pods of this node, beside the shim fuse-secrets-csi:
      fuse-secrets agent --classes /etc/fuse-secrets/classes

Exit codes:
  0   done
  1   failed; the message says what and why
  64  the command line, the environment or the configuration file is wrong
  65  a class document has faults
  66  a file that was named cannot be read
  69  the store or the API server cannot be reached, or does not answer
  70  a fault of this program (please report it)
  73  the directory cannot be mounted on
  75  a limit of memory or of the cache is reached
  77  the store or the API server refused";

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Serve demo secrets from an embedded store, to try things out
    #[cfg(feature = "dev")]
    Dev(dev::Options),
    /// Serve one class of a real store at a directory, without Kubernetes
    Mount(Box<mount::Options>),
    /// Serve the volumes of this node's pods, for the shim fuse-secrets-csi
    Agent(Box<agent::Options>),
    /// List what is mounted: freshness, generations, opens, errors; never a value
    Mounts(mounts::Options),
    /// End a volume that the shim keeps: its readers get an error until it is published again
    #[command(after_long_help = observe::HELP)]
    Abort {
        /// The volume's name, as `fuse-secrets mounts --from-shim` shows it
        #[arg(value_name = "VOLUME")]
        volume: String,
        /// Whom to ask.
        #[command(flatten)]
        shim: observe::Shim,
    },
    /// Check class documents, with every fault at once
    Check(check::Options),
    /// Tell what this machine gives (FUSE, secret memory, limits), and what is lost
    Doctor(doctor::Options),
}

/// How to print a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Print {
    /// For people, at 80 columns.
    #[default]
    Table,
    /// For programs.
    Json,
}

impl Command {
    /// Whether it needs more than one thread.
    #[must_use]
    pub fn needs_threads(&self) -> bool {
        !matches!(self, Self::Agent(options) if !options.serves())
    }

    /// What must be done while there is one thread.
    ///
    /// # Errors
    /// The code to exit with; what is wrong is told.
    pub fn confine(&self) -> Result<(), ExitCode> {
        if let Self::Agent(options) = self { options.confine() } else { Ok(()) }
    }

    /// Runs the command to its end.
    pub async fn run(self, panicked: panics::Panicked) -> ExitCode {
        match self {
            #[cfg(feature = "dev")]
            Self::Dev(options) => dev::run(options, panicked).await,
            Self::Mount(options) => mount::run(*options, panicked).await,
            Self::Agent(options) => agent::run(*options, panicked).await,
            Self::Mounts(options) => mounts::run(options).await,
            Self::Abort { volume, shim } => observe::abort(&shim, volume).await,
            Self::Check(options) => check::command(options).await,
            Self::Doctor(options) => doctor::run(&options),
        }
    }
}
