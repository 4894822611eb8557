//! `kubectl fuse-secrets`: arguments, allocator, hardening, exit code. What the commands do is in [`fuse_secrets::cli::kubectl`].

use std::process::ExitCode;

use clap::Parser;
use fuse_secrets::cli::{exit, kubectl::Arguments};
use fuse_secrets::secret::harden::harden;
use fuse_secrets::sys::alloc::{self, Wiping};

#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

fn main() -> ExitCode {
    alloc::pin();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to standard output and are no failure.
            let code = if error.use_stderr() { exit::USAGE } else { exit::OK };
            return exit::printed(error.print(), code);
        }
    };
    // `check` has a service account's token in its hands for a moment. What cannot be had does not stop it: on a person's machine
    // the person's own credentials lie open to the same programs.
    drop(harden());
    arguments.run()
}
