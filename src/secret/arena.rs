//! Many small secrets packed into few secret pages. (First body: plain memory; the real one follows.)

use std::sync::Arc;

use super::SecretBytes;
use super::pages::{MemoryError, SecretMemory};

/// Packs blobs into pages.
pub struct Arena {
    _memory: Arc<SecretMemory>,
}

impl Arena {
    /// An empty arena; it takes its first page with the first blob and gives the last one back.
    #[must_use]
    pub fn new(memory: Arc<SecretMemory>) -> Arc<Self> {
        Arc::new(Self { _memory: memory })
    }

    /// Moves a secret in; its source is wiped.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn store(self: &Arc<Self>, secret: SecretBytes) -> Result<Blob, MemoryError> {
        Ok(Blob { bytes: secret, _arena: Arc::clone(self) })
    }
}

/// One secret in an arena; wiped on drop, and its room given back.
pub struct Blob {
    bytes: SecretBytes,
    _arena: Arc<Arena>,
}

impl Blob {
    /// The bytes.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.bytes.expose()
    }
}
