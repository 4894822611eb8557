//! What readers see of an entry without asking the machine: one [`Slot`] per key, shared by the driver (the only writer)
//! and every volume that holds the key. Reading its freshness is two atomic loads: `open(2)` does it each time.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant, SystemTime};

use crate::secret::arena::Blob;
use crate::store::Lease;
use crate::time::Moment;

/// A held answer.
pub struct Value {
    /// The response's JSON text, in secret pages.
    pub body: Blob,
    /// Its lease.
    pub lease: Lease,
    /// KV v2: the version.
    pub version: Option<u64>,
    /// KV v2: when that version was written.
    pub created: Option<SystemTime>,
    /// When it was read.
    pub read_at: Moment,
}

/// The drawn states, as people and readers see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Never answered.
    Empty = 0,
    /// Answered, and the last refresh did not fail.
    Fresh = 1,
    /// Answered once, not since; the last known value is served.
    Stale = 2,
    /// Unanswered for longer than the grace; nothing is served.
    Gone = 3,
}

/// What people ask about an entry: when it was answered last, since when it has failed, and with which words.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// When the store last answered (with the same value or another).
    pub refreshed: Option<SystemTime>,
    /// Since when refreshes fail; `None` while they succeed.
    pub failing_since: Option<SystemTime>,
    /// The last failure's text; kept after a success until the next one.
    pub last_error: Option<String>,
}

/// One entry as readers see it.
pub struct Slot {
    state: AtomicU8,
    /// Milliseconds on [`epoch`]'s clock when the store last answered; 0: never.
    refreshed_at: AtomicU64,
    value: RwLock<Option<Arc<Value>>>,
    report: RwLock<Report>,
}

fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

impl Default for Slot {
    fn default() -> Self {
        let _ = epoch();
        Self {
            state: AtomicU8::new(State::Empty as u8),
            refreshed_at: AtomicU64::new(0),
            value: RwLock::new(None),
            report: RwLock::new(Report::default()),
        }
    }
}

impl Slot {
    /// The present state.
    #[must_use]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            1 => State::Fresh,
            2 => State::Stale,
            3 => State::Gone,
            _ => State::Empty,
        }
    }

    /// Time since the store last answered; `None`: it never did.
    #[must_use]
    pub fn age(&self, now: Moment) -> Option<Duration> {
        match self.refreshed_at.load(Ordering::Acquire) {
            0 => None,
            at => Some(now.monotonic.saturating_duration_since(epoch() + Duration::from_millis(at - 1))),
        }
    }

    /// The held value; `None` while Empty or Gone.
    #[must_use]
    pub fn value(&self) -> Option<Arc<Value>> {
        self.value.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// What people ask.
    #[must_use]
    pub fn report(&self) -> Report {
        self.report.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}
