//! Read 2: values with their freshness. One login per identity, one read per `Key`, whoever asks and how often.
//!
//! The rules live in a machine without I/O, `machine::Machine`: `(state, event, now, rng) → (state, actions)`.
//! `driver::Cache` feeds it from tokio and does what it says; a simulation may do the same with invented time.
//!
//! ```text
//!            first answer            max_age passes, or a refresh fails
//!   Empty ─────────────────▶ Fresh ─────────────────────────────────────▶ Stale
//!                              ▲                                            │  │
//!                              └──────────── refresh answered ──────────────┘  │ stale_grace passes
//!                              ▲                                               ▼
//!                              └──────────── refresh answered ─────────────── Gone   (wiped; reads get EIO)
//! ```
//! The store moves a value to the right by its silence and to the left by its answers; nobody else does. A value that no
//! volume holds any more is wiped at once.
//!
//! - Whatever fails, the last known value is served: also when the store says 404 or 403. Deleting a secret or a permission
//!   in the store must not break a pod that runs; to end that, set `stale_grace`. The grace begins when `max_age` has passed.
//! - Volumes that share a value share its state: the shortest interval and max age, the longest grace of them. A volume with
//!   a shorter grace compares `Slot::age` with its own.
//! - A leased value (one with a lease id) is read again only ahead of its lease's end, whatever the interval: each read makes
//!   another secret at the store. Its lease is its max age.

/// Which request goes next: so many in flight, lanes by turns.
mod budget;
/// The tokio user of the machine.
pub mod driver;
/// One value's states.
mod entry;
/// Numbers of entries, identities, requests, registrations and readers.
pub mod id;
/// One identity's login: absent, asked, held, being replaced, failed.
pub mod identity;
/// The sans-IO machine.
pub mod machine;
/// When what is due: jitter, refresh ahead of expiry, back-off.
mod schedule;
/// What readers see of an entry, without asking the machine.
pub mod slot;

pub use driver::{Cache, Registration, Subscriber};
pub use slot::{Slot, State, Value};

use crate::store::StoreError;

/// Why keys cannot be registered.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A limit is reached.
    #[error("the cache is full: {used} of {limit} {what} in use, {wanted} more wanted; {remedy}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is in use.
        used: usize,
        /// How much more was asked for.
        wanted: usize,
        /// How much there may be.
        limit: usize,
        /// What to change.
        remedy: &'static str,
    },
    /// The keys cannot stand in one registration.
    #[error("keys of one registration {rule}")]
    Keys {
        /// The broken rule.
        rule: &'static str,
    },
    /// The login that was to prove the credential failed.
    #[error(transparent)]
    Unproven(StoreError),
    /// The agent is stopping.
    #[error("the cache has stopped: nothing can be registered any more")]
    Stopped,
}

/// Bounds of the cache; what goes beyond is refused with the limit's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all cached answers. Default 64 MiB.
    pub bytes: usize,
    /// Number of cached answers. Default 10,000.
    pub entries: usize,
    /// Requests in flight to stores. Default 32.
    pub in_flight: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 20, entries: 10_000, in_flight: 32 }
    }
}
