//! A running file system on a FUSE descriptor.
//!
//! There is one way to a session, for a fresh mount as for one that another process served before: *adoption*. fuser insists
//! on an INIT exchange, which the kernel holds once per mount; so it gets one end of a socket pair and a made-up INIT from
//! the other end. When its threads run, each is fed a made-up FORGET: its handler tells which thread it is, and the last one puts
//! the real descriptor under fuser's number. Nothing unmounts when a session ends.
//!
//! ```text
//!   start ─▶ INIT, FORGET made up ─▶ serving ──unmounted, or cannot go on──▶ ended
//!                                       └──drain──▶ reads no more ──last reply passed on──▶ ended (drained)
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::sync::watch;

use super::busy::Busy;
use super::notify::{Invalidator, Wire};
use super::{Adapter, drain, handshake};
use crate::fs::Fs;
use crate::secret::bounce::Pool;
use crate::sys;
use crate::sys::fd::Kept;
use crate::sys::wake::Thread;

/// fuser's threads take their FORGETs at once.
const STARTING: Duration = Duration::from_secs(5);

/// A file system that answers on a descriptor. It ends when the file system is unmounted everywhere, when it is drained, or with
/// the process.
pub struct Session {
    ended: watch::Receiver<Option<End>>,
    wire: Arc<Wire>,
    start: Arc<Start>,
    /// fuser's descriptor, until it is drained.
    reading: Arc<Mutex<Option<Kept<fuser::Notifier>>>>,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its file system was unmounted.
    Unmounted,
    /// It was drained: its file system is there, for somebody else to serve.
    Drained,
    /// It could not go on; its mount, if it is still there, is dead.
    Failed,
}

/// What a session serves with.
pub struct Parts<'a> {
    /// Buffers for replies.
    pub pool: &'a Arc<Pool>,
    /// Who tells the kernel.
    pub invalidator: &'a Invalidator,
    /// How many threads read requests.
    pub threads: usize,
}

/// Wiped when a thread that reads requests ends: what lies deeper in its stack, which outlives it. The signal that drains leaves
/// there the registers of the thread, and in them may be the last bytes of a value that it copied.
struct Depths;

/// More than a handler needs.
const DEEP: usize = 64 << 10;

thread_local!(static AT_THE_END: Depths = const { Depths });

impl Drop for Depths {
    #[inline(never)]
    fn drop(&mut self) {
        std::hint::black_box(&mut [0_u8; DEEP]);
    }
}

/// Where fuser's threads meet before the first real request.
pub(super) struct Start {
    meeting: Barrier,
    /// Each thread that reads, and what it is at. No more than were asked for: a FORGET too many is none of ours.
    readers: Mutex<Vec<(Thread, Arc<Busy>)>>,
    threads: usize,
    /// What the last to come does.
    switch: Mutex<Option<Switch>>,
}

struct Switch {
    reading: Kept<fuser::Notifier>,
    real: Arc<Wire>,
    tell: SyncSender<io::Result<()>>,
}

impl Start {
    fn new(threads: usize) -> Self {
        let meeting = Barrier::new(threads);
        Self { meeting, readers: Mutex::default(), threads, switch: Mutex::default() }
    }

    /// A thread of fuser's has come. Returns when all have and the real descriptor is in place.
    pub(super) fn arrive(&self) -> Arc<Busy> {
        let busy = Arc::<Busy>::default();
        {
            let mut readers = self.readers();
            if readers.len() >= self.threads {
                return busy;
            }
            readers.push((Thread::current(), Arc::clone(&busy)));
        }
        AT_THE_END.with(|_| ());
        if self.meeting.wait().is_leader()
            && let Some(Switch { reading, real, tell }) = self.switch().take()
        {
            // Whoever waited too long has given the session up.
            let _ = tell.send(reading.replace(real.as_fd()));
        }
        // A thread that reads before the switch would read the socket for ever.
        self.meeting.wait();
        busy
    }

    pub(super) fn readers(&self) -> std::sync::MutexGuard<'_, Vec<(Thread, Arc<Busy>)>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn switch(&self) -> std::sync::MutexGuard<'_, Option<Switch>> {
        self.switch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// Serves `fs` on a mounted descriptor whose INIT was answered. With `resend`, what a predecessor had read and not answered
    /// is sent again first.
    ///
    /// # Errors
    /// No descriptor or thread left.
    pub fn start(fuse: OwnedFd, fs: &Arc<Fs>, parts: &Parts<'_>, resend: bool) -> io::Result<Self> {
        let wire = Arc::new(Wire::new(fuse));
        let invalidations = parts.invalidator.attach(&wire, fs);
        fs.notify_through(Arc::new(invalidations.clone()));
        let threads = parts.threads.max(1);
        let start = Arc::new(Start::new(threads));
        let adapter = Adapter {
            fs: Arc::clone(fs),
            pool: Arc::clone(parts.pool),
            invalidate: invalidations,
            start: Arc::clone(&start),
        };
        let (session, ours) = introduce(adapter, threads)?;
        for _ in 0..threads {
            rustix::io::write(&ours, &handshake::synthetic_forget())?;
        }
        let (tell, switched) = sync_channel(1);
        let reading = |session: &fuser::Session<_>| Kept::new(session.as_fd(), session.notifier());
        *start.switch() = Some(Switch { reading: reading(&session), real: Arc::clone(&wire), tell });
        let reading = Arc::new(Mutex::new(Some(reading(&session))));
        if resend && let Err(error) = wire.resend() {
            tracing::warn!(%error, volume = %fs.volume().id().0, "requests of the agent before may be lost");
        }
        let (tell_end, ended) = watch::channel(None);
        let volume = fs.volume().id().0.clone();
        let kept = Arc::downgrade(&reading);
        std::thread::Builder::new().name("fuse".to_owned()).spawn(move || {
            let end = match session.run() {
                Ok(()) => End::Unmounted,
                Err(error) => {
                    // The end of a drained one looks the same, and is told by who drains it.
                    if kept.upgrade().is_some_and(|kept| is_kept(&kept)) {
                        tracing::error!(volume, %error, "the session failed");
                    }
                    End::Failed
                }
            };
            tell_end.send_if_modified(|told| told.replace(end).is_none());
        })?;
        let switched = switched.recv_timeout(STARTING);
        switched
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the session's threads do not start"))??;
        Ok(Self { ended, wire, start, reading })
    }

    /// The descriptor on which it answers.
    #[must_use]
    pub fn fuse(&self) -> &Arc<Wire> {
        &self.wire
    }

    /// For how long a handler has been at one request: the longest of all.
    #[must_use]
    pub fn busy_for(&self) -> Duration {
        self.start.readers().iter().map(|(_, busy)| busy.lasts()).max().unwrap_or_default()
    }

    /// Reads no more requests, and returns when those that were read are answered. Then the file system is anybody's who has
    /// the descriptor. A second call, or one after the session has ended, has nothing to do.
    ///
    /// # Errors
    /// `TimedOut`: a request is not answered by `deadline`. The session ends all the same.
    pub async fn drain(&self, deadline: Instant) -> io::Result<()> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(reading) = reading else { return Ok(()) };
        let readers = self.start.readers().iter().map(|(thread, _)| *thread).collect();
        let (wire, ended) = (Arc::clone(&self.wire), self.ended.clone());
        let (tell, drained) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("drain".to_owned()).spawn(move || {
            let drained = drain::run(reading, readers, &wire, || ended.borrow().is_some(), deadline);
            // Whoever waited may have stopped waiting.
            let _ = tell.send(drained);
        })?;
        drained.await.unwrap_or_else(|_| Err(io::Error::other("a thread of this program ended by a fault")))
    }

    /// Returns when the session has ended, and how.
    pub async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        // An error means that the thread ended without a word.
        let end = ended.wait_for(Option::is_some).await.map_or(End::Failed, |end| end.unwrap_or(End::Failed));
        if is_kept(&self.reading) { end } else { End::Drained }
    }
}

/// Whether a session was not drained.
fn is_kept(reading: &Mutex<Option<Kept<fuser::Notifier>>>) -> bool {
    reading.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Puts a file system on a mounted descriptor whose INIT was answered. It serves when it is run, with `threads` threads. For
/// measures: who wants to drain it starts a [`Session`].
///
/// # Errors
/// No descriptor left.
pub fn adopt<F: fuser::Filesystem>(
    fuse: OwnedFd,
    filesystem: F,
    threads: usize,
) -> io::Result<fuser::Session<F>> {
    let (session, _ours) = introduce(filesystem, threads)?;
    sys::fd::replace(session.as_fd(), fuse.as_fd())?;
    Ok(session)
}

/// Introduces a file system to fuser, by an INIT that nobody else hears of. Returns the other end of what it reads.
fn introduce<F: fuser::Filesystem>(
    filesystem: F,
    threads: usize,
) -> io::Result<(fuser::Session<F>, OwnedFd)> {
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
    Ok((session, ours))
}

#[cfg(test)]
pub(crate) mod tests;
