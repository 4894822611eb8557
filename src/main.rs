//! `fuse-secrets`: arguments, allocator, hardening, logging, runtime, exit code. What the commands do is in [`fuse_secrets::cli`].

use std::process::ExitCode;

use clap::Parser;
use fuse_secrets::cli::{Arguments, exit, log, panics};
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
    if let Err(error) = log::start(&arguments.log) {
        return exit::report(exit::USAGE, &error);
    }
    let panicked = panics::watch();
    for measure in harden() {
        log::measure(&measure);
    }
    if let Err(code) = arguments.command.confine() {
        return code;
    }
    // One provider for every TLS connection of the process. It is the first call, so it cannot find another one installed.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut builder = if arguments.command.needs_threads() {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    match builder.worker_threads(2).max_blocking_threads(16).thread_name("agent").enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(arguments.command.run(panicked));
            // A thread that still waits for the kernel must not keep the process.
            runtime.shutdown_background();
            code
        }
        Err(error) => exit::report(exit::FAILED, &error),
    }
}
