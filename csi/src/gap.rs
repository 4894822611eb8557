//! Answers for agents that stay away: every request of a volume that has been without one for too long gets EIO, so that its readers
//! can end and its pod and its node can go. One thread for all such volumes.
//!
//! A read here may block although `poll` said that a request waits, when its caller gave up in between. So whoever stops the thread
//! signals it until it has ended; only then may an agent read.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::thread::{Pid, gettid};

use crate::keeper::Name;
use crate::metrics::Metrics;
use crate::sys;

/// The kernel refuses to read into less than the largest write that the agent negotiated; its own default for that is at most 1 MiB.
const BUFFER: usize = (1 << 20) + 4096;
const RESEND: i32 = 7;
const EIO: i32 = -5;
/// FORGET, INTERRUPT, BATCH_FORGET: nobody waits for an answer.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// Between two signals to a thread that is to end.
const AGAIN: Duration = Duration::from_millis(1);

/// Descriptors of mounts that fail.
pub(crate) type Failing = BTreeMap<Name, Arc<OwnedFd>>;

/// The thread, while there is something to answer.
pub(crate) struct Gap {
    resend: bool,
    metrics: Arc<Metrics>,
    running: Option<Running>,
}

struct Running {
    failing: Arc<Failing>,
    stop: Arc<OwnedFd>,
    thread: std::thread::JoinHandle<()>,
    id: Pid,
    ended: std::sync::mpsc::Receiver<Pid>,
}

impl Gap {
    /// Nobody is answered yet. `resend`: what dead agents had read is asked for again first.
    #[must_use]
    pub(crate) fn new(resend: bool, metrics: Arc<Metrics>) -> Self {
        Self { resend, metrics, running: None }
    }

    /// Answers for these and no longer for any other: what was answered for before and is not among them has no reader when this
    /// returns. Blocks for about a millisecond.
    ///
    /// # Errors
    /// No thread or descriptor can be had: nobody is answered, and nobody reads.
    pub(crate) fn answer(&mut self, failing: Failing) -> io::Result<()> {
        let same = |now: &Failing| {
            let pairs = || now.iter().zip(&failing);
            now.len() == failing.len() && pairs().all(|((a, x), (b, y))| a == b && Arc::ptr_eq(x, y))
        };
        if self.running.as_ref().map_or(failing.is_empty(), |running| same(&running.failing)) {
            return Ok(());
        }
        if let Some(running) = self.running.take() {
            running.stop();
        }
        if failing.is_empty() {
            return Ok(());
        }
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (alive, ended) = sync_channel(1);
        let (told, metrics, resend) = (stop.clone(), self.metrics.clone(), self.resend);
        let failing = Arc::new(failing);
        let answered = Arc::clone(&failing);
        let work = move || answer(&answered, told.as_fd(), resend, &metrics, &alive);
        let thread = std::thread::Builder::new().name("gap".to_owned()).spawn(work)?;
        let id = ended.recv().map_err(|_| io::Error::other("the thread that answers EIO ended at once"))?;
        self.running = Some(Running { failing, stop, thread, id, ended });
        Ok(())
    }
}

impl Running {
    fn stop(self) {
        // Fails only when it has been written 2^64 times.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        // Its side of the channel ends with it; from then on there is no thread to be woken.
        while self.ended.recv_timeout(AGAIN) == Err(RecvTimeoutError::Timeout) {
            let _ = sys::wake(self.id);
        }
        if self.thread.join().is_err() {
            tracing::error!("the thread that answered EIO failed");
        }
    }
}

fn answer(failing: &Failing, stop: BorrowedFd<'_>, resend: bool, metrics: &Metrics, alive: &SyncSender<Pid>) {
    if alive.send(gettid()).is_err() {
        return;
    }
    let mut buffer = vec![0; BUFFER];
    let mut files: Vec<(&Name, BorrowedFd<'_>)> =
        failing.iter().map(|(name, file)| (name, file.as_fd())).collect();
    if resend {
        for (volume, file) in &files {
            if let Err(error) = reply(*file, RESEND, 0) {
                tracing::warn!(%volume, %error, "requests of the last agent cannot be had again");
            }
        }
    }
    loop {
        let mut polled: Vec<_> = files.iter().map(|(_, file)| PollFd::new(file, PollFlags::IN)).collect();
        polled.push(PollFd::new(&stop, PollFlags::IN));
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "readers without an agent get no answer"),
        }
        let ready: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        if ready.last().is_none_or(|stop| !stop.is_empty()) {
            return;
        }
        let mut of = ready.into_iter();
        files.retain(|(volume, file)| match of.next().unwrap_or(PollFlags::empty()) {
            ready if ready.is_empty() => true,
            ready if ready.contains(PollFlags::IN) => one(volume, *file, &mut buffer, metrics),
            // The mount is gone.
            _ => false,
        });
    }
}

/// Answers one request; whether there may be another.
fn one(volume: &str, file: BorrowedFd<'_>, buffer: &mut [u8], metrics: &Metrics) -> bool {
    let read = match rustix::io::read(file, &mut *buffer) {
        Ok(read) => read,
        // Its caller gave up, or this thread is to end.
        Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => return true,
        Err(error) => {
            tracing::info!(volume, %error, "the mount is gone; nobody is answered any more");
            return false;
        }
    };
    // fuse_in_header: length, opcode, unique.
    let Some(([_, _, _, _, o0, o1, o2, o3], [u0, u1, u2, u3, u4, u5, u6, u7])) = buffer[..read]
        .split_first_chunk::<8>()
        .and_then(|(head, rest)| Some((head, rest.first_chunk::<8>()?)))
    else {
        return true;
    };
    let unique = u64::from_ne_bytes([*u0, *u1, *u2, *u3, *u4, *u5, *u6, *u7]);
    if !UNANSWERED.contains(&u32::from_ne_bytes([*o0, *o1, *o2, *o3])) {
        // An error here means that the caller gave up.
        if reply(file, EIO, unique).is_ok() {
            metrics.failed.increment();
        }
    }
    true
}

/// Writes a bare `fuse_out_header`.
fn reply(file: BorrowedFd<'_>, error: i32, unique: u64) -> Result<usize, Errno> {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&16_u32.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    rustix::io::write(file, &header)
}
