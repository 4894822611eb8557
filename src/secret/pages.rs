//! Pages for secrets at rest. (First body: plain memory; the real one follows.)

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why no page could be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The limit is reached.
    #[error("secret memory is full: {used} of {limit} bytes in use, {wanted} more wanted; {remedy}")]
    Full {
        /// Bytes in use.
        used: usize,
        /// Bytes that may be used.
        limit: usize,
        /// Bytes asked for, in whole pages.
        wanted: usize,
        /// What to change.
        remedy: &'static str,
    },
    /// The kernel refused.
    #[error("the kernel gave no secret memory: {0}")]
    Kernel(#[source] std::io::Error),
}

/// Where secret pages come from and how many there may be. One per process.
pub struct SecretMemory {
    used: AtomicUsize,
    limit: usize,
}

impl SecretMemory {
    /// Asks the kernel what it has.
    ///
    /// # Errors
    /// [`MemoryError::Kernel`]: neither secret memory nor a locked page can be had.
    pub fn new() -> Result<Arc<Self>, MemoryError> {
        Ok(Arc::new(Self { used: AtomicUsize::new(0), limit: usize::MAX }))
    }

    /// Bytes in use, in whole pages.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that may be used.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// `length` bytes, zeroed, in whole pages of their own.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn allocate(self: &Arc<Self>, length: usize) -> Result<Pages, MemoryError> {
        self.used.fetch_add(length, Ordering::Relaxed);
        Ok(Pages { bytes: vec![0; length], memory: Arc::clone(self) })
    }
}

/// A mapping of whole secret pages; wiped and unmapped on drop.
pub struct Pages {
    bytes: Vec<u8>,
    memory: Arc<SecretMemory>,
}

impl Pages {
    /// The bytes.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, to be written once.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Makes the mapping read-only: a generation is written once.
    pub fn seal(&mut self) {}
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}
