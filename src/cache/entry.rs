//! One value's states, as [`super`] draws them, without the value: what it was answered last, who holds it, what is due.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;

use super::State;
use super::budget::Ticket;
use super::id::{HolderId, IdentityId, WantId};
use super::schedule;
use crate::reference::{Freshness, Key};
use crate::store::{Lease, StoreError};

/// A failure this young answers a new volume too: a hundred volumes that come together ask once.
pub(super) const RECENT: Duration = Duration::from_secs(1);

/// How far a read is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its identity has no token yet.
    AwaitingLogin,
    /// It waits for its turn.
    Queued(Ticket),
    /// It was sent with the token of this number.
    Sent {
        /// The token's number.
        token: u64,
    },
}

/// One read under way: from the decision to read to its answer, over a new login if need be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    /// How far it is.
    pub(super) stage: Stage,
    /// Whether somebody waits for it.
    pub(super) wanted: bool,
    /// Whether it was denied once, and is now asked with a newer token.
    pub(super) retried: bool,
}

/// What all holders of an entry together ask.
#[derive(Clone, Copy)]
struct Merged {
    /// The shortest of all.
    interval: Duration,
    /// The shortest of all.
    max_age: Duration,
    /// The longest of all; a volume with a shorter one looks at [`super::Slot::age`] itself.
    grace: Option<Duration>,
}

/// One entry. It always has a holder.
pub(super) struct Entry {
    /// What is asked.
    pub(super) key: Arc<Key>,
    /// Who asks.
    pub(super) identity: IdentityId,
    /// The read under way.
    pub(super) flight: Option<Flight>,
    /// Readers that wait for it; bounded by the machine.
    pub(super) waiters: Vec<WantId>,
    /// Nearly always one: a map's first node alone is larger than all the rest of an entry.
    holders: Vec<(HolderId, Freshness)>,
    merged: Merged,
    state: State,
    answered: Option<Instant>,
    lease: Lease,
    /// Failures in a row.
    failures: u32,
    failed: Option<Instant>,
    denied: bool,
    /// A reader gave up on the read under way: until it is answered nobody else waits for it.
    overdue: bool,
    due: Instant,
}

impl Entry {
    /// An entry with its first holder; a read is due.
    pub(super) fn new(
        key: Arc<Key>,
        identity: IdentityId,
        holder: HolderId,
        freshness: Freshness,
        now: Instant,
    ) -> Self {
        let Freshness { interval, max_age, stale_grace: grace, .. } = freshness;
        Self {
            key,
            identity,
            flight: None,
            waiters: Vec::new(),
            holders: vec![(holder, freshness)],
            merged: Merged { interval, max_age, grace },
            state: State::Empty,
            answered: None,
            lease: Lease::default(),
            failures: 0,
            failed: None,
            denied: false,
            overdue: false,
            due: now,
        }
    }

    /// The drawn state.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Who holds it.
    pub(super) fn holders(&self) -> impl Iterator<Item = HolderId> {
        self.holders.iter().map(|(holder, _)| *holder)
    }

    /// Whether a value is held, however old.
    pub(super) fn has_value(&self) -> bool {
        matches!(self.state, State::Fresh | State::Stale)
    }

    /// Whether the last read failed.
    pub(super) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// Whether the last read was denied, with a token that a login had just made.
    pub(super) fn is_denied(&self) -> bool {
        self.denied
    }

    /// Whether reading it again makes a new secret at the store.
    pub(super) fn is_leased(&self) -> bool {
        self.has_value() && self.lease.id.is_some()
    }

    /// Whether a reader had better take the last known value than wait.
    pub(super) fn is_in_trouble(&self) -> bool {
        self.is_failing() || self.overdue
    }

    /// One more volume holds it. What it may not wait for becomes due: a first value, or a fresher one.
    pub(super) fn join(&mut self, holder: HolderId, freshness: Freshness, now: Instant, rng: &mut dyn Rng) {
        self.holders.retain(|(other, _)| *other != holder);
        self.holders.push((holder, freshness));
        self.merge();
        let recently_failed = self.failed.is_some_and(|at| now.saturating_duration_since(at) < RECENT);
        if !self.has_value() && !recently_failed {
            self.due = now;
        } else if let (false, Some(answered)) = (self.is_failing(), self.answered) {
            self.due = self.due.min(answered + self.refresh_delay(rng));
        }
    }

    /// A volume lets go of it. Returns whether another one still holds it.
    pub(super) fn leave(&mut self, holder: HolderId) -> bool {
        self.holders.retain(|(other, _)| *other != holder);
        self.merge();
        !self.holders.is_empty()
    }

    /// Whether the value is young enough for this holder.
    pub(super) fn is_young(&self, holder: HolderId, now: Instant) -> bool {
        let held = self.holders.iter().find(|(other, _)| *other == holder);
        let max_age = held.map_or(self.merged.max_age, |(_, freshness)| freshness.max_age);
        self.has_value() && now <= self.ages_at(max_age)
    }

    /// Makes a read due by `at`.
    pub(super) fn hurry(&mut self, at: Instant) {
        self.due = self.due.min(at);
    }

    /// A reader gave up.
    pub(super) fn lose_patience(&mut self) {
        self.overdue = true;
    }

    /// The read was answered.
    pub(super) fn answered(&mut self, lease: Lease, now: Instant, rng: &mut dyn Rng) {
        self.flight = None;
        self.state = State::Fresh;
        self.answered = Some(now);
        self.lease = lease;
        self.failures = 0;
        self.failed = None;
        self.denied = false;
        self.overdue = false;
        self.due = now + self.refresh_delay(rng);
    }

    /// The read failed; it is not tried again before `not_before`.
    pub(super) fn failed(
        &mut self,
        error: &StoreError,
        not_before: Option<Instant>,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        self.flight = None;
        self.failures = self.failures.saturating_add(1);
        self.failed = Some(now);
        self.denied = error.is_denied() && not_before.is_none();
        self.due = match not_before {
            Some(at) => at.max(now) + schedule::retry_after(1, self.merged.interval, None, rng),
            None if error.is_retryable() => {
                let Merged { interval, .. } = self.merged;
                now + schedule::retry_after(self.failures, interval, error.retry_after, rng)
            }
            None => now + schedule::recheck_after(self.merged.interval, rng),
        };
        if self.state == State::Fresh {
            self.state = State::Stale;
        }
    }

    /// Lets time pass. Returns whether the state changed.
    pub(super) fn age(&mut self, now: Instant) -> bool {
        let before = self.state;
        if self.state == State::Fresh && now > self.ages_at(self.merged.max_age) {
            self.state = State::Stale;
        }
        if self.state == State::Stale && self.gone_at().is_some_and(|at| now >= at) {
            self.state = State::Gone;
        }
        self.state != before
    }

    /// Whether a read must start.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.flight.is_none() && self.due <= now
    }

    /// When it must be looked at again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let due = self.flight.is_none().then_some(self.due);
        let ages = match self.state {
            State::Fresh => Some(self.ages_at(self.merged.max_age) + Duration::from_millis(1)),
            State::Stale => self.gone_at(),
            State::Empty | State::Gone => None,
        };
        due.into_iter().chain(ages).min()
    }

    fn refresh_delay(&self, rng: &mut dyn Rng) -> Duration {
        let Lease { duration, ref id, .. } = self.lease;
        schedule::refresh_after(
            self.merged.interval,
            duration.filter(|life| !life.is_zero()),
            id.is_some(),
            rng,
        )
    }

    /// The value is as old as it may get; a leased one may get as old as its lease.
    fn ages_at(&self, max_age: Duration) -> Instant {
        let limit = super::slot::age_limit(&self.lease, max_age);
        self.answered.map_or(self.due, |answered| answered + limit)
    }

    fn gone_at(&self) -> Option<Instant> {
        self.merged.grace.map(|grace| self.ages_at(self.merged.max_age) + grace.min(schedule::EVER))
    }

    fn merge(&mut self) {
        let all = || self.holders.iter().map(|(_, freshness)| freshness);
        let Some(interval) = all().map(|freshness| freshness.interval).min() else { return };
        let Some(max_age) = all().map(|freshness| freshness.max_age).min() else { return };
        let grace =
            all().map(|freshness| freshness.stale_grace).reduce(|a, b| Some(a?.max(b?))).unwrap_or_default();
        self.merged = Merged { interval, max_age, grace };
    }
}
