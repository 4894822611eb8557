//! Who is told of changes, and which of them the kernel has taken note of.
//!
//! ```text
//!   a generation is installed ──Changed──▶ Notify ──▶ the kernel drops old attributes and pages ──▶ acknowledged
//!                                                                                                      │
//!   an open that waits for the new value  ◀── goes on ─────────────────────────────────────────────────┘
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::id::Inode;

/// Something that the kernel, or an application's watcher, has to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A generation came, in which attributes and bytes of these inodes are others. Whoever keeps the kernel informed calls
    /// [`super::Fs::acknowledge`] when it is.
    Changed {
        /// The generation.
        generation: u32,
        /// Live inodes.
        inodes: Vec<Inode>,
    },
    /// This name in the root names nothing any more.
    Removed(String),
}

/// Who passes notices on: the kernel's invalidator today, a poker of watchers later.
pub trait Notify: Send + Sync {
    /// Must not block: it is called by whoever changed the volume or by a handler.
    fn notify(&self, notice: &Notice);
}

/// What one file system announces.
#[derive(Default)]
pub(super) struct Announcements {
    notify: RwLock<Vec<Arc<dyn Notify>>>,
    /// The newest generation of which the kernel knows that older attributes are void.
    acknowledged: AtomicU32,
    /// Who waits for that. No more than readers wait for refreshes, which the cache bounds.
    settling: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl Announcements {
    pub(super) fn add(&self, notify: Arc<dyn Notify>) {
        self.notify.write().unwrap_or_else(PoisonError::into_inner).push(notify);
    }

    pub(super) fn announce(&self, notice: &Notice, newest: u32) {
        let notify = self.notify.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let (Notice::Changed { generation, .. }, true) = (notice, notify.is_empty()) {
            // Nobody's kernel believes anything.
            self.acknowledge(*generation, newest);
        }
        notify.iter().for_each(|notify| notify.notify(notice));
    }

    pub(super) fn acknowledge(&self, generation: u32, newest: u32) {
        self.acknowledged.fetch_max(generation, Ordering::AcqRel);
        if self.is_settled(newest) {
            let settled = std::mem::take(&mut *self.settling.lock().unwrap_or_else(PoisonError::into_inner));
            settled.into_iter().for_each(|then| then());
        }
    }

    pub(super) fn when_settled(&self, newest: u32, then: Box<dyn FnOnce() + Send>) {
        let mut settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock that `acknowledge` takes after its note: nobody is forgotten between the two.
        if self.is_settled(newest) {
            drop(settling);
            then();
        } else {
            settling.push(then);
        }
    }

    pub(super) fn is_settled(&self, newest: u32) -> bool {
        self.acknowledged.load(Ordering::Acquire) >= newest
    }
}
