//! What the process gives up before it serves, what it warns of, and how it logs.

use std::io;

use clap::ValueEnum;
use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit, umask,
};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::sys;

/// How lines of the log look.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Logs to stderr: the shim's own lines and nobody else's, as those of h2, hyper and tonic can show what kubelet sent.
pub(crate) fn log(level: tracing::Level, format: Format) {
    let ours = Targets::new().with_target("fuse_secrets_csi", level);
    let lines = fmt::layer().with_writer(io::stderr).with_target(false);
    let lines = match format {
        Format::Text => lines.with_ansi(false).boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(ours)).init();
}

/// No core, no debugger without privileges, files that only root writes, as many descriptors as may be; and the settings of the kernel
/// that end mounts are named.
///
/// # Errors
/// A limit cannot be set, or a signal handler.
pub(crate) fn harden() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    // Sockets get their own modes; a directory above the node socket is one that the agent must be able to enter.
    umask(Mode::WGRP | Mode::WOTH);
    // A volume has up to a dozen.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
    sys::install_wake_signal()?;
    sys::pin_heaps();
    for name in ["default_request_timeout", "max_request_timeout"] {
        // Kernels before 6.15 do not have them.
        let Ok(text) = std::fs::read_to_string(format!("/proc/sys/fs/fuse/{name}")) else { continue };
        if text.trim() != "0" {
            tracing::warn!(
                seconds = text.trim(),
                "fs.fuse.{name} is set: a mount whose agent is away for so long dies with all its readers, instead of \
                 waiting for the next agent; set it to 0 on this node"
            );
        }
    }
    Ok(())
}

/// Reads a size: `1048576`, `64KiB`, `256MiB`, `1GiB`.
///
/// # Errors
/// What a size looks like.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => Some(0),
        "KiB" => Some(10),
        "MiB" => Some(20),
        "GiB" => Some(30),
        _ => None,
    };
    let size = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    size.ok_or_else(|| "not a size; write 268435456 or 256MiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_a_unit_or_is_in_bytes() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("256MiB"), Ok(256 << 20));
        assert_eq!(bytes("1GiB"), Ok(1 << 30));
        for wrong in ["", "MiB", "1MB", "-1", "1.5GiB", "99999999999GiB", "1 MiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
