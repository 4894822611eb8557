//! Buffers for replies: the kernel copies a reply out of them, which it refuses to do out of secret pages (EFAULT).
//! (First body: plain memory; the real one follows.)

use std::sync::Arc;
use std::time::Duration;

use super::pages::{MemoryError, SecretMemory};

/// A fixed number of locked buffers, shared by all sessions.
pub struct Pool {
    buffer: usize,
}

impl Pool {
    /// `count` buffers of `buffer` bytes; fewer and smaller ones where locked memory is short, never less than one page.
    ///
    /// # Errors
    /// [`MemoryError`]: not even one page can be locked.
    pub fn new(_memory: &Arc<SecretMemory>, buffer: usize, _count: usize) -> Result<Arc<Self>, MemoryError> {
        Ok(Arc::new(Self { buffer }))
    }

    /// Size of each buffer in bytes: the largest reply.
    #[must_use]
    pub fn buffer_size(&self) -> usize {
        self.buffer
    }

    /// Copies as much of `secret` as fits into a free buffer, lends it to `reply`, and wipes it. `None`: no buffer came
    /// free within `patience`.
    pub fn lend<R>(&self, secret: &[u8], _patience: Duration, reply: impl FnOnce(&[u8]) -> R) -> Option<R> {
        Some(reply(&secret[..secret.len().min(self.buffer)]))
    }
}
