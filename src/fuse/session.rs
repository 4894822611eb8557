//! A running file system on a FUSE descriptor.
//!
//! There is one way to a session, for a fresh mount as for one that another process served before: *adoption*. fuser insists
//! on an INIT exchange, which the kernel holds once per mount; so it gets one end of a socket pair, a made-up INIT from
//! the other end, and when that is done, the real descriptor under the same number. Nothing unmounts when a session ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::notify::{Invalidator, Wire};
use super::{Adapter, handshake};
use crate::fs::Fs;
use crate::secret::bounce::Pool;
use crate::sys;

/// A file system that answers on a descriptor. It ends when the file system is unmounted everywhere, or with the process.
pub struct Session {
    ended: tokio::sync::watch::Receiver<Option<End>>,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its file system was unmounted.
    Unmounted,
    /// It could not go on; its mount, if it is still there, is dead.
    Failed,
}

impl Session {
    /// Serves `fs` on a mounted descriptor whose INIT was answered, with `threads` threads.
    ///
    /// # Errors
    /// No descriptor or thread left.
    pub fn start(
        fuse: OwnedFd,
        fs: &Arc<Fs>,
        pool: &Arc<Pool>,
        invalidator: &Invalidator,
        threads: usize,
    ) -> io::Result<Self> {
        let wire = Arc::new(Wire::new(fuse.try_clone()?));
        let invalidations = invalidator.attach(&wire, fs);
        fs.notify_through(Arc::new(invalidations.clone()));
        let adapter = Adapter { fs: Arc::clone(fs), pool: Arc::clone(pool), invalidate: invalidations };
        let session = adopt(fuse, adapter, threads)?;
        let (tell, ended) = tokio::sync::watch::channel(None);
        let volume = fs.volume().id().0.clone();
        std::thread::Builder::new().name("fuse".to_owned()).spawn(move || {
            // The clone of the descriptor lives as long as the session does.
            let _wire = wire;
            let end = match session.run() {
                Ok(()) => End::Unmounted,
                Err(error) => {
                    tracing::error!(volume, %error, "the file system cannot be served any more");
                    End::Failed
                }
            };
            tell.send_replace(Some(end));
        })?;
        Ok(Self { ended })
    }

    /// Returns when the session has ended, and how.
    pub async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        // An error means that the thread ended without a word.
        ended.wait_for(Option::is_some).await.map_or(End::Failed, |end| end.unwrap_or(End::Failed))
    }
}

/// Puts a file system on a mounted descriptor whose INIT was answered. It serves when it is run, with `threads` threads.
///
/// # Errors
/// No descriptor left.
pub fn adopt<F: fuser::Filesystem>(
    fuse: OwnedFd,
    filesystem: F,
    threads: usize,
) -> io::Result<fuser::Session<F>> {
    let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::write(&ours, &handshake::synthetic_request())?;
    let mut config = fuser::Config::default();
    config.acl = fuser::SessionACL::All;
    config.n_threads = Some(threads.max(1));
    // `All`: who may is decided by the mount (`allow_other`) and by the kernel (`default_permissions`); behind an id-mapped
    // mount the header's uid is -1, which any other rule would refuse.
    let session = fuser::Session::from_fd(filesystem, its, fuser::SessionACL::All, config)?;
    let mut reply = [0; 256];
    rustix::io::read(&ours, &mut reply)?;
    sys::fd::replace(session.as_fd(), fuse.as_fd())?;
    Ok(session)
}
