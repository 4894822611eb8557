//! Buffers for replies: the kernel copies a reply out of them, which it refuses to do out of secret pages (EFAULT, and the
//! reader gets EIO). Every read goes through here, so a loan is two short critical sections, one copy and one wipe of what
//! was copied. The buffer that came back last goes out first: with small secrets a few pages stay warm and the rest of the
//! pool is never touched.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::pages::{MemoryError, Reservation, SecretMemory};
use super::wipe;
use crate::sys::mapping::{Extent, Mapping};
use crate::sys::page_size;

/// The pool may take one part in this many of all secret memory: the rest is for values.
const SHARE: usize = 4;

/// A fixed number of locked buffers, shared by all sessions.
pub struct Pool {
    shelf: Mutex<Shelf>,
    came_back: Condvar,
    buffer: usize,
    // Given back after the buffers are gone: fields are dropped in this order.
    _reservation: Reservation,
}

struct Shelf {
    free: Vec<Extent>,
    /// Who waits for one to come back: waking is a system call even if there is nobody, five times a small loan's cost.
    waiting: usize,
}

impl Pool {
    /// `count` buffers of `buffer` bytes; where locked memory is short, smaller ones, then fewer: never more than a quarter of
    /// it, never less than one page.
    ///
    /// # Errors
    /// [`MemoryError`]: not even one page can be locked.
    pub fn new(memory: &Arc<SecretMemory>, buffer: usize, count: usize) -> Result<Arc<Self>, MemoryError> {
        let page = page_size();
        let share = (memory.limit() / SHARE).max(page);
        let (mut buffer, mut count) = (buffer.max(1).next_multiple_of(page), count.max(1));
        let (whole, reservation) = loop {
            let size = buffer.saturating_mul(count);
            if size <= share {
                match lock(memory, size) {
                    Err(MemoryError::Full { .. }) if size > page => {}
                    locked => break locked?,
                }
            }
            if buffer > page {
                buffer = (buffer / 2).next_multiple_of(page);
            } else {
                count = (count / 2).max(1);
            }
        };
        let mut free = vec![whole];
        while free.len() < count {
            let rest = free.last_mut().map(|last| last.split_off(buffer));
            free.extend(rest);
        }
        Ok(Arc::new(Self {
            shelf: Mutex::new(Shelf { free, waiting: 0 }),
            came_back: Condvar::new(),
            buffer,
            _reservation: reservation,
        }))
    }

    /// Size of each buffer in bytes: the largest reply.
    #[must_use]
    pub fn buffer_size(&self) -> usize {
        self.buffer
    }

    /// Copies as much of `secret` as fits into a free buffer, lends it to `reply`, and wipes it. `None`: no buffer came
    /// free within `patience`.
    pub fn lend<R>(&self, secret: &[u8], patience: Duration, reply: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let length = secret.len().min(self.buffer);
        let mut loan = Loan { buffer: Some(self.take(patience)?), length, pool: self };
        let bytes = loan.buffer.as_deref_mut().map_or(&mut [][..], |buffer| &mut buffer[..length]);
        bytes.copy_from_slice(&secret[..bytes.len()]);
        Some(reply(bytes))
    }

    fn take(&self, patience: Duration) -> Option<Extent> {
        let mut shelf = self.shelf();
        if shelf.free.is_empty() {
            shelf.waiting += 1;
            let waited = self.came_back.wait_timeout_while(shelf, patience, |shelf| shelf.free.is_empty());
            shelf = waited.unwrap_or_else(PoisonError::into_inner).0;
            shelf.waiting -= 1;
        }
        shelf.free.pop()
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lock(memory: &Arc<SecretMemory>, size: usize) -> Result<(Extent, Reservation), MemoryError> {
    let reservation = memory.reserve(size)?;
    let mapping = Mapping::locked(size).map_err(|error| memory.refused(error, size))?;
    Ok((Extent::whole(mapping), reservation))
}

/// A buffer that is out; wiped and given back on drop, also when the reply panics.
struct Loan<'pool> {
    /// `None` only while it is being given back.
    buffer: Option<Extent>,
    length: usize,
    pool: &'pool Pool,
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        if let Some(mut buffer) = self.buffer.take() {
            wipe(&mut buffer[..self.length]);
            let mut shelf = self.pool.shelf();
            shelf.free.push(buffer);
            let somebody_waits = shelf.waiting > 0;
            drop(shelf);
            if somebody_waits {
                self.pool.came_back.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn pool(pages: usize, buffer: usize, count: usize) -> (Arc<SecretMemory>, Arc<Pool>) {
        let memory = SecretMemory::with_limit(pages * page_size()).unwrap();
        let pool = Pool::new(&memory, buffer, count).unwrap();
        (memory, pool)
    }

    #[test]
    fn a_reply_sees_the_secret_and_the_buffer_is_wiped_after_it() {
        let (_memory, pool) = pool(16, page_size(), 2);
        assert_eq!(pool.lend(b"hunter2", Duration::ZERO, <[u8]>::to_vec).unwrap(), b"hunter2");
        assert!(pool.shelf().free.iter().all(|buffer| buffer.iter().all(|byte| *byte == 0)));
    }

    #[test]
    fn a_secret_longer_than_a_buffer_is_cut_and_an_empty_one_is_lent() {
        let (_memory, pool) = pool(16, page_size(), 1);
        assert_eq!(pool.lend(&vec![7; 3 * page_size()], Duration::ZERO, <[u8]>::len), Some(page_size()));
        assert_eq!(pool.lend(b"", Duration::ZERO, <[u8]>::len), Some(0));
    }

    #[test]
    fn a_reply_that_panics_gives_its_buffer_back_wiped() {
        let (_memory, pool) = pool(16, page_size(), 1);
        let lend = || pool.lend(b"hunter2", Duration::ZERO, |_| panic!("a reply panics"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(lend)).is_err());
        assert_eq!(pool.shelf().free.len(), 1);
        assert!(pool.shelf().free[0].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn patience_ends_when_all_buffers_are_out_and_one_that_comes_back_is_lent() {
        let (_memory, pool) = pool(16, page_size(), 1);
        let (out, is_out) = mpsc::channel();
        let (back, may_come_back) = mpsc::channel();
        std::thread::scope(|scope| {
            let pool = &pool;
            scope.spawn(move || {
                pool.lend(b"a", Duration::ZERO, |_| {
                    out.send(()).unwrap();
                    may_come_back.recv().unwrap();
                })
            });
            is_out.recv().unwrap();
            assert_eq!(pool.lend(b"b", Duration::ZERO, |_| ()), None);
            let waiter = scope.spawn(move || pool.lend(b"b", Duration::from_secs(60), |_| ()));
            back.send(()).unwrap();
            assert_eq!(waiter.join().unwrap(), Some(()));
        });
    }

    #[test]
    fn buffers_do_not_overlap() {
        let (_memory, pool) = pool(64, 2 * page_size(), 4);
        let free = &pool.shelf().free;
        assert_eq!(free.len(), 4);
        let mut starts: Vec<_> = free.iter().map(|buffer| buffer.offset()).collect();
        starts.sort_unstable();
        assert_eq!(starts, [0, 2, 4, 6].map(|pages| pages * page_size()));
        assert!(free.iter().all(|buffer| buffer.len() == 2 * page_size()));
    }

    #[test]
    fn the_pool_takes_a_quarter_at_most_first_smaller_then_fewer_buffers() {
        let (memory, few) = pool(16, 32 * page_size(), 8);
        assert_eq!((few.buffer_size(), few.shelf().free.len()), (page_size(), 4));
        assert_eq!(memory.used(), 4 * page_size());
        let (_memory, smaller) = pool(64, 32 * page_size(), 2);
        assert_eq!((smaller.buffer_size(), smaller.shelf().free.len()), (8 * page_size(), 2));
        let (_memory, last) = pool(1, 32 * page_size(), 8);
        assert_eq!((last.buffer_size(), last.shelf().free.len()), (page_size(), 1));
    }
}
