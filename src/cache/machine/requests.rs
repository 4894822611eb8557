//! The machine's requests: who may ask, when it is sent, what its end means. Each is in one place at a time: in a session's
//! waiting list, in the budget's queue, or sent.

use std::time::{Duration, Instant};

use rand::Rng;

use super::{Action, EntryId, FlightId, IdentityId, Job, Machine, Timer};
use crate::cache::budget::Rank;
use crate::cache::entry::{Flight, Stage};
use crate::cache::identity::{Admission, How, Setback, Terms};
use crate::store::{ErrorKind, Lease, StoreError};

/// A request that nobody waits for is given this long, retries of the store client included.
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(30);
/// One that somebody waits for: longer than a reader waits, so that the next reader finds its answer.
const WANTED_PATIENCE: Duration = Duration::from_secs(10);
/// A request whose end was not told this long after its deadline has failed.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// A path that stays forbidden does not cost a login at each of its reads: only when the token is older than this.
const DISTRUST_AFTER: Duration = Duration::from_secs(300);

impl Machine {
    /// Starts a read of an entry that has none under way.
    pub(super) fn start(&mut self, id: EntryId, wanted: bool, now: Instant, rng: &mut dyn Rng) {
        self.proceed(id, Flight { stage: Stage::AwaitingLogin, wanted, retried: false }, now, rng);
    }

    /// Brings a read to where it can wait: for a token, for its turn; or fails it.
    fn proceed(&mut self, id: EntryId, flight: Flight, now: Instant, rng: &mut dyn Rng) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let identity = entry.identity;
        let Some(session) = self.sessions.get_mut(&identity) else { return };
        match session.admit(now) {
            Admission::Token => {
                let rank = if flight.wanted { Rank::Wanted } else { Rank::Background };
                let ticket = self.budget.push(&session.lane, rank, Job::Read(id));
                entry.flight = Some(Flight { stage: Stage::Queued(ticket), ..flight });
            }
            Admission::Wait { submit } => {
                session.waiting.push(id);
                entry.flight = Some(Flight { stage: Stage::AwaitingLogin, ..flight });
                if submit {
                    self.submit(identity, How::Login);
                }
            }
            Admission::Refused { error, until } => self.fail(id, error, Some(until), now, rng),
        }
    }

    /// Queues a login or renewal.
    pub(super) fn submit(&mut self, identity: IdentityId, how: How) {
        if let Some(session) = self.sessions.get(&identity) {
            self.budget.push(&session.lane, Rank::Wanted, Job::Login(identity, how));
        }
    }

    /// Sends what the budget has room for.
    pub(super) fn dispatch(&mut self, now: Instant, rng: &mut dyn Rng) {
        while let Some((lane, job)) = self.budget.take() {
            let flight = FlightId(self.number());
            let sent = match job {
                Job::Login(identity, how) => self.send_login(identity, how, flight, now),
                Job::Read(id) => self.send_read(id, flight, now, rng),
            };
            match sent {
                Some(deadline) => {
                    self.flights.insert(flight, (lane, job));
                    self.timers.set(Timer::Flight(flight), Some(deadline + LOST_AFTER));
                }
                None => self.budget.release(&lane),
            }
        }
    }

    fn send_login(
        &mut self,
        identity: IdentityId,
        how: How,
        flight: FlightId,
        now: Instant,
    ) -> Option<Instant> {
        let session = self.sessions.get_mut(&identity)?;
        if !session.sent(how, flight, now) {
            return None;
        }
        let deadline = now + BACKGROUND_PATIENCE;
        self.actions.push(match how {
            How::Login => Action::Login { flight, identity, deadline },
            How::Renewal => Action::Renew { flight, identity, deadline },
        });
        Some(deadline)
    }

    fn send_read(
        &mut self,
        id: EntryId,
        flight: FlightId,
        now: Instant,
        rng: &mut dyn Rng,
    ) -> Option<Instant> {
        let entry = self.entries.get_mut(&id)?;
        let under_way = entry.flight.as_mut()?;
        let Some(token) = self.sessions.get(&entry.identity)?.token() else {
            let under_way = *under_way;
            self.proceed(id, under_way, now, rng);
            return None;
        };
        under_way.stage = Stage::Sent { token };
        let deadline = now + if under_way.wanted { WANTED_PATIENCE } else { BACKGROUND_PATIENCE };
        self.actions.push(Action::Read { flight, identity: entry.identity, entry: id, deadline });
        Some(deadline)
    }

    /// A request is over, however it ended: its room in the budget is free.
    fn land(&mut self, flight: FlightId) -> Option<Job> {
        let (lane, job) = self.flights.remove(&flight)?;
        self.timers.set(Timer::Flight(flight), None);
        self.budget.release(&lane);
        Some(job)
    }

    /// The driver never told how a request ended.
    pub(super) fn lost(&mut self, flight: FlightId, now: Instant, rng: &mut dyn Rng) {
        let Some((_, job)) = self.flights.get(&flight) else { return };
        let asked = match job {
            Job::Login(..) => "login".to_owned(),
            Job::Read(id) => self.key(*id).map_or_else(String::new, |key| key.request.to_string()),
        };
        let error = StoreError {
            kind: ErrorKind::Deadline,
            asked,
            answered: "no end was reported".to_owned(),
            remedy: None,
            retry_after: None,
        };
        match job {
            Job::Login(..) => self.logged_in(flight, Err(error), now, rng),
            Job::Read(_) => self.answered(flight, Err(error), now, rng),
        }
    }

    pub(super) fn logged_in(
        &mut self,
        flight: FlightId,
        result: Result<Terms, StoreError>,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        let Some(Job::Login(identity, how)) = self.land(flight) else { return };
        let Some(session) = self.sessions.get_mut(&identity).filter(|session| session.expects(flight)) else {
            return;
        };
        match result {
            Ok(terms) => self.hold(identity, how, terms, now, rng),
            Err(error) => match session.failed(&error, now, rng) {
                Setback::Bearable => {}
                Setback::Submit => self.submit(identity, How::Login),
                Setback::Fatal { error, until } => {
                    for id in std::mem::take(&mut session.waiting) {
                        self.fail(id, error.clone(), Some(until), now, rng);
                    }
                }
            },
        }
        self.watch(identity);
    }

    /// A registration came with a login of its own. An identity that has a token keeps that one.
    pub(super) fn logged_in_before(
        &mut self,
        identity: IdentityId,
        terms: Terms,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        if self.sessions.get(&identity).is_some_and(|session| session.token().is_none()) {
            self.hold(identity, How::Login, terms, now, rng);
            self.watch(identity);
        }
    }

    /// There is a token: whatever waited for it goes on.
    fn hold(&mut self, identity: IdentityId, how: How, terms: Terms, now: Instant, rng: &mut dyn Rng) {
        let Some(session) = self.sessions.get_mut(&identity) else { return };
        let new = session.answered(how, terms, now, rng);
        let waiting = std::mem::take(&mut session.waiting);
        let changed = std::mem::take(&mut session.credential_changed);
        let entries = if new { session.entries.clone() } else { Default::default() };
        self.actions.push(Action::Hold { identity });
        for id in waiting {
            if let Some(flight) = self.entries.get(&id).and_then(|entry| entry.flight) {
                self.proceed(id, flight, now, rng);
            }
        }
        for id in entries {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            // The store ends leases with the token that they were read with.
            if entry.is_leased() || (changed && entry.is_failing()) {
                entry.hurry(now);
                self.reschedule(id);
            }
        }
    }

    pub(super) fn credential(&mut self, identity: IdentityId, replaces_token: bool, now: Instant) {
        let Some(session) = self.sessions.get_mut(&identity) else { return };
        let (submit, retry) = session.credential(replaces_token, now);
        if let Some(at) = retry {
            for id in session.entries.clone() {
                if let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.is_failing()) {
                    entry.hurry(at);
                    self.reschedule(id);
                }
            }
        }
        if submit {
            self.submit(identity, How::Login);
        }
        self.watch(identity);
    }

    pub(super) fn answered(
        &mut self,
        flight: FlightId,
        result: Result<Lease, StoreError>,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        let Some(Job::Read(id)) = self.land(flight) else { return };
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Some(under_way) = entry.flight else { return };
        let Stage::Sent { token } = under_way.stage else { return };
        match result {
            Ok(lease) => {
                entry.answered(lease, now, rng);
                self.actions.push(Action::Publish { entry: id });
                self.settle_all(id, now);
            }
            Err(error) if error.is_denied() && !under_way.retried => self.denied(id, token, error, now, rng),
            Err(error) => self.fail(id, error, None, now, rng),
        }
    }

    /// A read was denied for the first time: perhaps it is the token's fault.
    fn denied(&mut self, id: EntryId, token: u64, error: StoreError, now: Instant, rng: &mut dyn Rng) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Some(mut flight) = entry.flight else { return };
        let identity = entry.identity;
        let Some(session) = self.sessions.get_mut(&identity) else { return };
        if session.token() == Some(token) {
            if entry.is_denied() && session.token_age(now) < DISTRUST_AFTER {
                return self.fail(id, error, None, now, rng);
            }
            if session.distrust() {
                self.submit(identity, How::Login);
            }
            self.watch(identity);
        }
        flight.retried = true;
        self.proceed(id, flight, now, rng);
    }

    fn fail(
        &mut self,
        id: EntryId,
        error: StoreError,
        not_before: Option<Instant>,
        now: Instant,
        rng: &mut dyn Rng,
    ) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.failed(&error, not_before, now, rng);
        self.actions.push(Action::Fail { entry: id, state: entry.state(), error });
        self.settle_all(id, now);
    }

    /// Lets all readers go on that wait for an entry's read, and sets its wake-up.
    fn settle_all(&mut self, id: EntryId, now: Instant) {
        let waiters = self.entries.get_mut(&id).map(|entry| std::mem::take(&mut entry.waiters));
        for want in waiters.unwrap_or_default() {
            self.settle(want, now);
        }
        self.reschedule(id);
    }
}
