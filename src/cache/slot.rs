//! What readers see of an entry without asking the machine: one [`Slot`] per key, shared by the driver (the only writer)
//! and every volume that holds the key. Reading its freshness is a few atomic loads: `open(2)` does it each time.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime};

use crate::secret::arena::Blob;
use crate::store::{Lease, StoreError};
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
    /// Milliseconds that a leased value may be used from then; 0: it is not leased.
    leased_for: AtomicU64,
    value: RwLock<Option<Arc<Value>>>,
    report: RwLock<Report>,
    failure: RwLock<Option<(Instant, StoreError)>>,
}

/// How old a value may get: `max_age`, but a leased one its lease, since reading it again makes a new secret.
pub(super) fn age_limit(lease: &Lease, max_age: Duration) -> Duration {
    let leased = lease.id.as_ref().and(lease.duration).filter(|life| !life.is_zero());
    leased.unwrap_or(max_age).min(super::schedule::EVER)
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
            leased_for: AtomicU64::new(0),
            value: RwLock::new(None),
            report: RwLock::new(Report::default()),
            failure: RwLock::new(None),
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

    /// Whether a value is held that is no older than `max_age` (a leased one: than its lease). If not, an `open` asks for a
    /// refresh.
    #[must_use]
    pub fn is_young(&self, max_age: Duration, now: Moment) -> bool {
        let limit = match self.leased_for.load(Ordering::Acquire) {
            0 => max_age,
            leased => Duration::from_millis(leased),
        };
        matches!(self.state(), State::Fresh | State::Stale) && self.age(now).is_some_and(|age| age <= limit)
    }

    /// Whether the last read failed, so that asking again at once is of little use.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        read(&self.report).failing_since.is_some()
    }

    /// The held value; `None` while Empty or Gone.
    #[must_use]
    pub fn value(&self) -> Option<Arc<Value>> {
        read(&self.value).clone()
    }

    /// When the store last answered (with the same value or another).
    #[must_use]
    pub fn refreshed(&self) -> Option<SystemTime> {
        read(&self.report).refreshed
    }

    /// What people ask.
    #[must_use]
    pub fn report(&self) -> Report {
        read(&self.report).clone()
    }

    /// The last failure, if no answer came after it and it is no older than `since`.
    pub(super) fn failure(&self, since: Instant) -> Option<StoreError> {
        read(&self.failure).as_ref().filter(|(at, _)| *at >= since).map(|(_, error)| error.clone())
    }

    /// The store answered: with another value, or (`None`) with the one that is held.
    pub(super) fn publish(&self, value: Option<Arc<Value>>, lease: &Lease, now: Moment) {
        if let Some(value) = value {
            *write(&self.value) = Some(value);
        }
        *write(&self.failure) = None;
        {
            let mut report = write(&self.report);
            report.refreshed = Some(now.wall);
            report.failing_since = None;
        }
        self.leased_for.store(millis(age_limit(lease, Duration::ZERO)), Ordering::Release);
        let at = now.monotonic.saturating_duration_since(epoch());
        self.refreshed_at.store(millis(at).saturating_add(1), Ordering::Release);
        self.state.store(State::Fresh as u8, Ordering::Release);
    }

    /// A read failed.
    pub(super) fn fail(&self, state: State, error: StoreError, now: Moment) {
        {
            let mut report = write(&self.report);
            report.failing_since.get_or_insert(now.wall);
            report.last_error = Some(error.to_string());
        }
        *write(&self.failure) = Some((now.monotonic, error));
        self.age_to(state);
    }

    /// Time passed.
    pub(super) fn age_to(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
        if matches!(state, State::Empty | State::Gone) {
            *write(&self.value) = None;
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
