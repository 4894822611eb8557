//! The machine: all rules of the cache, no I/O, no clock, no value, no secret. Its driver tells it what happened
//! (`Event`) and does what it says (`Action`); between two events it is asked when to wake it (`Machine::wake_at`).
//!
//! ```text
//!   due, or a reader waits                                            answered: Publish, wake the readers
//!        │                                                                 ▲
//!        ▼       no token                    its turn                      │
//!   start a read ────────▶ AwaitingLogin ──▶ Queued ────────▶ Sent ────────┼──▶ failed: back off, wake the readers
//!        └────────── token held ─────────────▲ ▲                │ 403      │
//!                              the newer one │ └── once ────────┴──────────┘ twice
//! ```
//! Every request that was sent has a moment after which the machine takes it for failed: a driver that loses one costs a
//! delay, never a value.

pub use event::{Action, Event};

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;

use super::budget::{Budget, Lane};
use super::entry::{Entry, Flight, Stage};
use super::id::{EntryId, FlightId, HolderId, IdentityId, WantId};
use super::identity::{How, Session};
use super::schedule::Schedule;
use super::{CacheError, Limits};
use crate::reference::{Freshness, Identity, Key};
use crate::time::Moment;

/// Readers that may wait for one entry, and for all of them; what comes beyond is answered at once.
const WAITERS_PER_ENTRY: usize = 256;
const WAITERS: usize = 4_096;
/// A reader who waited at least this long in vain says something of the store.
const IN_VAIN: Duration = Duration::from_millis(500);

/// What goes into the machine and what comes out.
mod event;
/// Requests: from the decision to ask to what came back.
mod requests;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Login(IdentityId, How),
    Read(EntryId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Timer {
    Want(WantId),
    Flight(FlightId),
    Session(IdentityId),
    Entry(EntryId),
}

struct Want {
    holder: HolderId,
    since: Instant,
    entries: Vec<EntryId>,
    /// Those it still waits for.
    open: usize,
}

/// See the module.
pub struct Machine {
    limits: Limits,
    last_id: u64,
    keys: HashMap<Arc<Key>, EntryId>,
    /// Boxed: the table does not shrink, so it had better be a small one.
    entries: HashMap<EntryId, Box<Entry>>,
    identities: HashMap<Arc<Identity>, IdentityId>,
    sessions: HashMap<IdentityId, Session>,
    holders: HashMap<HolderId, Vec<EntryId>>,
    wants: BTreeMap<WantId, Want>,
    flights: HashMap<FlightId, (Lane, Job)>,
    budget: Budget<Job>,
    timers: Schedule<Timer>,
    actions: Vec<Action>,
}

impl Machine {
    /// Holding nothing.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            last_id: 0,
            keys: HashMap::new(),
            entries: HashMap::new(),
            identities: HashMap::new(),
            sessions: HashMap::new(),
            holders: HashMap::new(),
            wants: BTreeMap::new(),
            flights: HashMap::new(),
            budget: Budget::new(limits.in_flight),
            timers: Schedule::new(),
            actions: Vec::new(),
        }
    }

    /// Whether these keys may be registered together.
    ///
    /// # Errors
    /// [`CacheError::Keys`]: none, or of several identities. [`CacheError::Limit`]: too many entries.
    pub fn admit(&self, keys: &[Key]) -> Result<(), CacheError> {
        let Some(first) = keys.first() else {
            return Err(CacheError::Keys { rule: "must name at least one key" });
        };
        if keys.iter().any(|key| key.identity != first.identity) {
            return Err(CacheError::Keys { rule: "must all have the same identity" });
        }
        let new = keys.iter().filter(|key| !self.keys.contains_key(*key)).count();
        let used = self.entries.len();
        if used + new > self.limits.entries {
            return Err(CacheError::Limit {
                what: "entries",
                used,
                wanted: new,
                limit: self.limits.entries,
                remedy: "mount fewer different secrets on this node or raise the cache's limit of entries",
            });
        }
        Ok(())
    }

    /// Takes an event, lets time pass until `now`, and says what to do.
    pub fn on(&mut self, event: Event, now: Moment, rng: &mut dyn Rng) -> Vec<Action> {
        let now = now.monotonic;
        match event {
            Event::Register { holder, keys, freshness, login } => {
                let identity = keys.first().map(|key| Arc::clone(&key.identity));
                self.register(holder, keys, freshness, now, rng);
                let identity = identity.and_then(|identity| self.identity(&identity));
                if let Some((identity, terms)) = identity.zip(login) {
                    self.logged_in_before(identity, terms, now, rng);
                }
            }
            Event::Unregister { holder } => self.unregister(holder, now),
            Event::Want { want, holder, entries, until } => {
                self.want(want, holder, entries, until, now, rng);
            }
            Event::Credential { identity, replaces_token } => {
                self.credential(identity, replaces_token, now);
            }
            Event::LoggedIn { flight, result } => self.logged_in(flight, result, now, rng),
            Event::Answered { flight, result } => self.answered(flight, result, now, rng),
            Event::Tick => {}
        }
        while let Some(timer) = self.timers.pop(now) {
            self.fire(timer, now, rng);
        }
        self.dispatch(now, rng);
        std::mem::take(&mut self.actions)
    }

    /// When the next [`Event::Tick`] is due; `None` only while nothing is held or under way.
    #[must_use]
    pub fn wake_at(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// The entry of a held key.
    #[must_use]
    pub fn entry(&self, key: &Key) -> Option<EntryId> {
        self.keys.get(key).copied()
    }

    /// The key of a held entry.
    #[must_use]
    pub fn key(&self, entry: EntryId) -> Option<&Arc<Key>> {
        self.entries.get(&entry).map(|entry| &entry.key)
    }

    /// The number of an identity in use.
    #[must_use]
    pub fn identity(&self, identity: &Identity) -> Option<IdentityId> {
        self.identities.get(identity).copied()
    }

    /// Who holds an entry.
    pub fn holders(&self, entry: EntryId) -> impl Iterator<Item = HolderId> {
        self.entries.get(&entry).into_iter().flat_map(|entry| entry.holders())
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn register(
        &mut self,
        holder: HolderId,
        keys: Vec<Key>,
        freshness: Freshness,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        let mut held = Vec::with_capacity(keys.len());
        for key in keys {
            let id = match self.keys.get(&key) {
                Some(&id) => {
                    if let Some(entry) = self.entries.get_mut(&id) {
                        entry.join(holder, freshness, now, rng);
                    }
                    id
                }
                None => self.enter(Arc::new(key), holder, freshness, now),
            };
            self.reschedule(id);
            held.push(id);
        }
        held.sort_unstable();
        held.dedup();
        self.holders.insert(holder, held);
    }

    fn enter(&mut self, key: Arc<Key>, holder: HolderId, freshness: Freshness, now: Instant) -> EntryId {
        let identity = match self.identities.get(&key.identity) {
            Some(&identity) => identity,
            None => {
                let identity = IdentityId(self.number());
                self.identities.insert(Arc::clone(&key.identity), identity);
                self.sessions.insert(identity, Session::new(Arc::clone(&key.identity)));
                identity
            }
        };
        let id = EntryId(self.number());
        if let Some(session) = self.sessions.get_mut(&identity) {
            session.entries.insert(id);
        }
        self.keys.insert(Arc::clone(&key), id);
        self.entries.insert(id, Box::new(Entry::new(key, identity, holder, freshness, now)));
        id
    }

    fn unregister(&mut self, holder: HolderId, now: Instant) {
        for id in self.holders.remove(&holder).unwrap_or_default() {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            if entry.leave(holder) {
                self.reschedule(id);
            } else {
                self.drop_entry(id, now);
            }
        }
    }

    fn drop_entry(&mut self, id: EntryId, now: Instant) {
        let Some(mut entry) = self.entries.remove(&id) else { return };
        self.keys.remove(&entry.key);
        self.timers.set(Timer::Entry(id), None);
        for want in std::mem::take(&mut entry.waiters) {
            self.settle(want, now);
        }
        self.actions.push(Action::Drop { entry: id });
        let Some(session) = self.sessions.get_mut(&entry.identity) else { return };
        session.entries.remove(&id);
        if let Some(Flight { stage: Stage::Queued(ticket), .. }) = entry.flight {
            self.budget.remove(&session.lane, ticket);
        }
        if session.entries.is_empty() {
            self.identities.remove(&session.identity);
            self.sessions.remove(&entry.identity);
            self.timers.set(Timer::Session(entry.identity), None);
            self.actions.push(Action::Forget { identity: entry.identity });
        }
    }

    fn want(
        &mut self,
        want: WantId,
        holder: HolderId,
        entries: Vec<EntryId>,
        until: Instant,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        let full = self.wants.len() >= WAITERS;
        self.wants.insert(want, Want { holder, since: now, entries: Vec::new(), open: 0 });
        let mut joined = Vec::new();
        for &id in &entries {
            let Some(entry) = self.entries.get(&id) else { continue };
            let hopeless = entry.is_in_trouble() && (entry.has_value() || entry.flight.is_none());
            let crowded = full || entry.waiters.len() >= WAITERS_PER_ENTRY || joined.contains(&id);
            if entry.is_young(holder, now) || hopeless || crowded {
                continue;
            }
            if entry.flight.is_none() {
                self.start(id, true, now, rng);
            }
            if self.join(id, want) {
                joined.push(id);
            }
        }
        if let Some(waiting) = self.wants.get_mut(&want) {
            waiting.open = joined.len();
            waiting.entries = entries;
        }
        if joined.is_empty() {
            self.wake(want, false, now);
        } else {
            self.timers.set(Timer::Want(want), Some(until));
        }
    }

    /// Lets a reader wait for the read under way; false if it has just failed.
    fn join(&mut self, id: EntryId, want: WantId) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else { return false };
        let Some(flight) = &mut entry.flight else { return false };
        flight.wanted = true;
        entry.waiters.push(want);
        if let (Stage::Queued(ticket), Some(session)) = (flight.stage, self.sessions.get(&entry.identity)) {
            flight.stage = Stage::Queued(self.budget.promote(&session.lane, ticket));
        }
        true
    }

    /// One of the reads that a reader waits for is over.
    fn settle(&mut self, want: WantId, now: Instant) {
        let Some(waiting) = self.wants.get_mut(&want) else { return };
        waiting.open = waiting.open.saturating_sub(1);
        if waiting.open == 0 {
            self.wake(want, true, now);
        }
    }

    fn wake(&mut self, want: WantId, waited: bool, now: Instant) {
        let Some(Want { holder, entries, .. }) = self.wants.remove(&want) else { return };
        self.timers.set(Timer::Want(want), None);
        let young = |id: &EntryId| self.entries.get(id).is_some_and(|entry| entry.is_young(holder, now));
        let fresh = entries.iter().all(young);
        for id in &entries {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.waiters.retain(|other| *other != want);
            }
        }
        self.actions.push(Action::Wake { want, waited, fresh });
    }
    fn fire(&mut self, timer: Timer, now: Instant, rng: &mut dyn Rng) {
        match timer {
            Timer::Want(want) => {
                let in_vain = |want: &&Want| now.saturating_duration_since(want.since) >= IN_VAIN;
                let waiting = self.wants.get(&want).filter(in_vain);
                for id in waiting.map(|want| want.entries.clone()).unwrap_or_default() {
                    let entry = self.entries.get_mut(&id);
                    if let Some(entry) = entry.filter(|entry| entry.waiters.contains(&want)) {
                        entry.lose_patience();
                    }
                }
                self.wake(want, true, now);
            }
            Timer::Flight(flight) => self.lost(flight, now, rng),
            Timer::Session(identity) => {
                let job = self.sessions.get_mut(&identity).and_then(|session| session.woken(now));
                if let Some(how) = job {
                    self.submit(identity, how);
                }
                self.watch(identity);
            }
            Timer::Entry(id) => {
                let Some(entry) = self.entries.get_mut(&id) else { return };
                if entry.age(now) {
                    self.actions.push(Action::Age { entry: id, state: entry.state() });
                }
                let (due, wanted) = (entry.is_due(now), !entry.has_value());
                if due {
                    self.start(id, wanted, now, rng);
                }
                self.reschedule(id);
            }
        }
    }

    /// Sets the entry's wake-up anew, after whatever happened to it.
    fn reschedule(&mut self, id: EntryId) {
        let at = self.entries.get(&id).and_then(|entry| entry.wake_at());
        self.timers.set(Timer::Entry(id), at);
    }

    /// Sets the session's wake-up anew.
    fn watch(&mut self, identity: IdentityId) {
        let at = self.sessions.get(&identity).and_then(Session::wake_at);
        self.timers.set(Timer::Session(identity), at);
    }

    fn number(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

#[cfg(test)]
mod tests;
