//! Tells the kernel what it must not believe any more: attributes and pages of changed inodes, names that are gone, and every
//! page of the page cache that an `mmap(2)` or `sendfile(2)` filled.
//!
//! Notifications wait for inode and page locks that a request in flight may hold, so a handler must never send one. One
//! thread sends for all sessions, each notice once.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::busy::Busy;
use crate::fs::{Fs, Inode, Notice, Notify};

/// `FUSE_NOTIFY_INVAL_INODE`, `FUSE_NOTIFY_INVAL_ENTRY` and `FUSE_NOTIFY_RESEND` of include/uapi/linux/fuse.h.
const INVAL_INODE: i32 = 2;
const INVAL_ENTRY: i32 = 3;
const RESEND: i32 = 7;

/// A session's descriptor, to write notifications to.
pub struct Wire(OwnedFd);

impl Wire {
    /// Takes a descriptor of its own.
    #[must_use]
    pub fn new(fuse: OwnedFd) -> Self {
        Self(fuse)
    }

    /// Has the kernel send again what a predecessor had read and not answered.
    ///
    /// # Errors
    /// `EINVAL`: the kernel is older than 6.9.
    pub fn resend(&self) -> io::Result<()> {
        self.send(RESEND, &[])
    }

    fn send(&self, code: i32, body: &[&[u8]]) -> io::Result<()> {
        let length = 16 + body.iter().map(|part| part.len()).sum::<usize>();
        let mut message = Vec::with_capacity(length);
        message.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        message.extend(code.to_le_bytes());
        message.extend(0u64.to_le_bytes());
        body.iter().for_each(|part| message.extend_from_slice(part));
        match rustix::io::write(&self.0, &message) {
            Ok(_) => Ok(()),
            // The kernel does not know the inode or name: nothing is believed that is wrong. Or the mount is gone.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTCONN | rustix::io::Errno::NODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One thing to tell.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Item {
    Inode(Inode),
    Name(String),
}

/// One session's notices that wait. A set: what is there already need not be told twice, and there are never more than
/// inodes and names.
struct Pending {
    wire: Weak<Wire>,
    fs: Weak<Fs>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    items: HashSet<Item>,
    /// The newest generation of which all these together tell.
    generation: u32,
}

/// Sessions with notices that wait, each at most once.
#[derive(Default)]
struct Queue {
    sessions: Mutex<VecDeque<Arc<Pending>>>,
    wake: Condvar,
    closed: AtomicBool,
    /// Since when the thread tells one thing.
    busy: Busy,
}

/// The thread that sends. Ends when it is dropped.
pub struct Invalidator {
    queue: Arc<Queue>,
}

impl Invalidator {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread left.
    pub fn start() -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let work = Arc::clone(&queue);
        std::thread::Builder::new().name("invalidate".to_owned()).spawn(move || work.run())?;
        Ok(Self { queue })
    }

    /// For how long the thread has been telling the kernel one thing.
    #[must_use]
    pub fn busy_for(&self) -> Duration {
        self.queue.busy.lasts()
    }

    /// The way for one session's notices.
    #[must_use]
    pub fn attach(&self, wire: &Arc<Wire>, fs: &Arc<Fs>) -> Invalidations {
        let pending =
            Pending { wire: Arc::downgrade(wire), fs: Arc::downgrade(fs), waiting: Mutex::default() };
        Invalidations { queue: Arc::clone(&self.queue), pending: Arc::new(pending) }
    }
}

impl Drop for Invalidator {
    fn drop(&mut self) {
        // Under the lock, so that the thread is either before its check or waiting.
        let _sessions = self.queue.lock();
        self.queue.closed.store(true, Ordering::Release);
        self.queue.wake.notify_all();
    }
}

/// Takes one session's notices.
#[derive(Clone)]
pub struct Invalidations {
    queue: Arc<Queue>,
    pending: Arc<Pending>,
}

impl Invalidations {
    /// A page of this inode was filled with secret bytes: it is to be thrown away.
    pub fn page_filled(&self, inode: Inode) {
        self.push([Item::Inode(inode)], 0);
    }

    fn push(&self, new: impl IntoIterator<Item = Item>, generation: u32) {
        let mut waiting = self.pending.lock();
        let was_empty = waiting.items.is_empty();
        waiting.items.extend(new);
        waiting.generation = waiting.generation.max(generation);
        if was_empty && !waiting.items.is_empty() {
            self.queue.lock().push_back(Arc::clone(&self.pending));
            self.queue.wake.notify_one();
        }
    }
}

impl Notify for Invalidations {
    fn notify(&self, notice: &Notice) {
        match notice {
            Notice::Changed { generation, inodes } => {
                self.push(inodes.iter().copied().map(Item::Inode), *generation);
            }
            Notice::Removed(name) => self.push([Item::Name(name.clone())], 0),
        }
    }
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Pending>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Arc<Pending>> {
        let mut sessions = self.lock();
        loop {
            if let Some(session) = sessions.pop_front() {
                return Some(session);
            }
            if self.closed.load(Ordering::Acquire) {
                return None;
            }
            sessions = self.wake.wait(sessions).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self) {
        while let Some(session) = self.next() {
            // Taken out before they are sent: a page that is filled from now on is told of again.
            let Waiting { items, generation } = std::mem::take(&mut *session.lock());
            // A session or volume that is gone has nobody left to be told.
            let (Some(wire), Some(fs)) = (session.wire.upgrade(), session.fs.upgrade()) else { continue };
            for item in &items {
                fs.volume().metrics().fs_invalidations.increment();
                let told = self.busy.while_in(|| tell(&wire, item));
                if let Err(error) = told {
                    tracing::warn!(%error, volume = %fs.volume().id().0, "an invalidation was not taken");
                }
            }
            fs.acknowledge(generation);
        }
    }
}

fn tell(wire: &Wire, item: &Item) -> io::Result<()> {
    match item {
        // Offset 0, length 0: attributes and every page.
        Item::Inode(inode) => wire.send(INVAL_INODE, &[&inode.0.to_le_bytes(), &[0; 16]]),
        Item::Name(name) => {
            let length = u32::try_from(name.len()).unwrap_or(0).to_le_bytes();
            wire.send(INVAL_ENTRY, &[&Inode::ROOT.0.to_le_bytes(), &length, &[0; 4], name.as_bytes(), &[0]])
        }
    }
}
