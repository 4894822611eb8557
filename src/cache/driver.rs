//! The tokio user of the machine. (To be built.)

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Slot;
use crate::reference::{Freshness, Key};
use crate::store::{Credential, StoreError};

/// Why.
#[derive(Debug, thiserror::Error)]
#[error("limit")]
pub struct CacheError;
/// Hears.
pub trait Subscriber: Send + Sync + 'static {
    /// New answers.
    fn changed(&self, keys: &[Key]);
}
/// The cache.
#[derive(Clone)]
pub struct Cache;
impl Cache {
    /// Registers.
    pub async fn register(
        &self,
        _: Vec<Key>,
        _: Arc<Credential>,
        _: Freshness,
        _: Arc<dyn Subscriber>,
    ) -> Result<Registration, CacheError> {
        Err(CacheError)
    }
}
/// Held keys.
pub struct Registration;
impl Registration {
    /// Waits.
    pub async fn ready(&self, _: Instant) -> Result<(), Vec<(Key, StoreError)>> {
        Ok(())
    }
    /// A slot.
    pub fn slot(&self, _: &Key) -> Option<Arc<Slot>> {
        None
    }
    /// Refresh.
    pub fn refresh(&self, _: &[Key], _: Duration, done: Box<dyn FnOnce() + Send>) {
        done();
    }
    /// Credential.
    pub fn set_credential(&self, _: Arc<Credential>) {}
}
