//! What `dev` and `mount` share.

use std::io;
use std::path::{Path, PathBuf};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::panics::Panicked;
use crate::agent::Served;
use crate::fuse::mount::{Occupant, detach_dead, occupant};

/// A directory that cannot be used as a mount point.
#[derive(Debug, thiserror::Error)]
pub(super) enum DirectoryError {
    /// It is served.
    #[error(
        "{0} is a mount of fuse-secrets already; `fuse-secrets mounts` shows whose, unmount it or name another directory"
    )]
    Served(PathBuf),
    /// It is something else's mount point.
    #[error("{0} is a mount point of another file system; name another directory")]
    Foreign(PathBuf),
    /// It cannot be used.
    #[error("cannot mount on {path}: {error}; name a directory that exists")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
}

/// Makes sure that a directory can be mounted on: a dead mount that an earlier run left is taken away first. Returns the path
/// in full, without links.
pub(super) fn prepare(path: &Path) -> Result<PathBuf, DirectoryError> {
    let unusable = |error| DirectoryError::Unusable { path: path.to_owned(), error };
    // The parent is resolved, not the directory itself: that may be a dead mount, which must not be touched.
    let name = path.file_name().ok_or_else(|| unusable(io::ErrorKind::InvalidInput.into()))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let full = parent.canonicalize().map_err(unusable)?.join(name);
    match occupant(&full).map_err(unusable)? {
        Occupant::Nobody => {}
        Occupant::Dead => {
            tracing::info!(path = %full.display(), "taking away a dead mount of an earlier run");
            detach_dead(&full).map_err(unusable)?;
        }
        Occupant::Alive => return Err(DirectoryError::Served(full)),
        Occupant::Foreign => return Err(DirectoryError::Foreign(full)),
    }
    let full = full.canonicalize().map_err(unusable)?;
    if full.is_dir() { Ok(full) } else { Err(unusable(io::ErrorKind::NotADirectory.into())) }
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
        () = served.ended() => End::Unmounted,
        () = panicked.happened() => End::Panic,
    }
}
