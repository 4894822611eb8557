//! What `dev` and `mount` share.

use std::io;
use std::path::{Path, PathBuf};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::panics::Panicked;
use crate::agent::Served;
use crate::fuse::mount::{Occupant, detach_dead, occupant};
use crate::fuse::session;

/// A directory that cannot be used as a mount point.
#[derive(Debug, thiserror::Error)]
pub(super) enum DirectoryError {
    /// It is served.
    #[error(
        "{0} is a mount of fuse-secrets already; `fuse-secrets mounts` shows whose, unmount it or name another directory"
    )]
    Served(String),
    /// It is something else's mount point.
    #[error("{0} is a mount point of another file system; name another directory")]
    Foreign(String),
    /// It cannot be used.
    #[error("cannot mount on {path}: {error}; {remedy}")]
    Unusable {
        /// The directory.
        path: String,
        /// Why.
        error: io::Error,
        /// What to do.
        remedy: &'static str,
    },
}

/// Makes sure that a directory can be mounted on: a dead mount that an earlier run left is taken away first. Returns the path
/// in full, without links.
pub(super) fn prepare(path: &Path) -> Result<PathBuf, DirectoryError> {
    let unusable = |error| DirectoryError::Unusable {
        path: path.display().to_string(),
        error,
        remedy: "name a directory that exists",
    };
    let full = locate(path).map_err(unusable)?;
    match occupant(&full).map_err(unusable)? {
        Occupant::Nobody => {}
        Occupant::Dead => {
            tracing::info!(path = %full.display(), "taking away a dead mount of an earlier run");
            detach_dead(&full).map_err(|error| DirectoryError::Unusable {
                path: full.display().to_string(),
                error,
                remedy: "a dead mount of another user is there: unmount it, or name another directory",
            })?;
        }
        Occupant::Alive => return Err(DirectoryError::Served(full.display().to_string())),
        Occupant::Foreign => return Err(DirectoryError::Foreign(full.display().to_string())),
    }
    let found = std::fs::metadata(&full).map_err(unusable)?;
    if found.is_dir() { Ok(full) } else { Err(unusable(io::ErrorKind::NotADirectory.into())) }
}

/// Makes a directory, and those above it, if nothing is there. One that is there is left alone: it may be a dead mount.
#[cfg(feature = "dev")]
pub(super) fn make(directory: &Path) -> Result<(), DirectoryError> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::fs::create_dir_all(directory),
        other => other,
    }
    .map_err(|error| DirectoryError::Unusable {
        path: directory.display().to_string(),
        error,
        remedy: "it cannot be made: name a directory that you may write to",
    })
}

/// The path in full, without links, as mountinfo names it. What is mounted there is not touched: it may be dead, or hang.
pub(super) fn locate(path: &Path) -> io::Result<PathBuf> {
    /// As many links as the kernel follows.
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        // No name: the root, the working directory, or one above.
        let Some(name) = path.file_name() else { return path.canonicalize() };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = parent.canonicalize()?;
        let full = parent.join(name);
        match std::fs::read_link(&full) {
            Ok(target) => path = parent.join(target),
            // Not a link, or nothing.
            Err(_) => return Ok(full),
        }
    }
    Err(io::ErrorKind::InvalidInput.into())
}

/// Whether other users may see a mount, if nobody said: root's mounts are for all, as the modes say; an ordinary user's only
/// where /etc/fuse.conf permits, and then only on request.
#[must_use]
pub(super) fn allow_other(said: Option<bool>) -> bool {
    said.unwrap_or_else(|| rustix::process::geteuid().is_root())
}

/// Why serving ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// SIGINT or SIGTERM.
    Signal,
    /// Somebody unmounted it.
    Unmounted,
    /// It cannot be served any more.
    Failed,
    /// A fault of this program.
    Panic,
}

/// The signals that end a command, heard from now on.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    /// Begins to hear them.
    ///
    /// # Errors
    /// As sigaction(2).
    pub(super) fn hear() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Returns when one came.
    pub(super) async fn came(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// Serves until something ends it.
pub(super) async fn until_the_end(served: &Served, signals: &mut Signals, panicked: &mut Panicked) -> End {
    tokio::select! {
        () = signals.came() => End::Signal,
        end = served.ended() => match end {
            session::End::Unmounted | session::End::Drained => End::Unmounted,
            session::End::Failed => End::Failed,
        },
        () = panicked.happened() => End::Panic,
    }
}
