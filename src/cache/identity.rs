//! One identity's login at its store, shared by all who have the identity.
//!
//! ```text
//!                ┌───── a read, back-off passed ──────┐
//!                ▼                                    │
//!   Absent ───▶ Asked ──────── failed ───────────▶ Failed
//!     ▲  a read │   ▲ ▲
//!     │         │   │ └──── denied, or end of life ────┐
//!     │ answered│   │ denied                           │
//!     │         ▼   │                                  │
//!     └─ end ── Held ◀── answered, or failed for now ── Replacing ◀─┐
//!        of      └───── 2/3 of life, or a new ───────▶     └────────┘
//!        life           store token                   renewal refused: by a login
//! ```
//! Reads move it to the right of Absent, the store's answers down and up, time out of Held. A new credential ends the
//! back-off of Failed. Whatever waits for a login that failed, fails with its error.
//!
//! A token that is being replaced still serves reads. A token that a read was denied with serves none any more, and is
//! replaced once, however many reads were denied: they carry the token's number.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::{Rng, RngExt as _};

use super::budget::Lane;
use super::id::{EntryId, FlightId};
use super::schedule;
use crate::reference::{self, Subject};
use crate::store::StoreError;

/// A login that was refused for good is tried again no faster than this: somebody may have repaired the role.
const REFUSED_RETRY: Duration = Duration::from_secs(60);
/// New credentials come with every republish of every volume: they do not make logins more frequent than this.
const CREDENTIAL_FLOOR: Duration = Duration::from_secs(5);
/// A token that is said to live shorter is used this long all the same, or reads would log in without end.
const SHORTEST_LIFE: Duration = Duration::from_secs(1);

/// What a login or renewal gave, without the token itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Whether it may be renewed.
    pub renewable: bool,
    /// How long it lives from now; `None`: for ever.
    pub ttl: Option<Duration>,
}

/// How a token is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Prolonged.
    Renewal,
    /// By a new login.
    Login,
}

/// The token in use: its number and its life.
#[derive(Clone, Copy, Debug)]
struct Held {
    number: u64,
    since: Instant,
    /// The life that its login gave; a renewal that gives less than half of it has met the store's maximum.
    first_ttl: Option<Duration>,
    due: Option<Instant>,
    end: Option<Instant>,
    how: How,
}

/// The drawn states. A `flight` of `None` is a request that is queued and not yet sent.
#[derive(Debug)]
enum State {
    /// No token, and nobody asked for one.
    Absent,
    /// No token to read with; a login is under way.
    Asked { flight: Option<FlightId> },
    /// A token to read with.
    Held(Held),
    /// A token to read with, and its replacement is under way.
    Replacing { held: Held, how: How, flight: Option<FlightId> },
    /// No token; the last login failed, and none is tried before `until`.
    Failed { error: StoreError, until: Instant },
}

/// What a read finds that wants a token.
pub(super) enum Admission {
    /// There is one.
    Token,
    /// One is under way; `submit`: by a login that must be queued now.
    Wait { submit: bool },
    /// The last login failed; the next one is not tried before `until`.
    Refused { error: StoreError, until: Instant },
}

/// What a failed login or renewal means.
pub(super) enum Setback {
    /// The token in use stays, or nothing hung on it.
    Bearable,
    /// The token in use stays; a login must be queued now.
    Submit,
    /// There is no token: all waiting reads fail.
    Fatal { error: StoreError, until: Instant },
}

/// One identity as the machine sees it.
pub(super) struct Session {
    /// Who.
    pub(super) identity: Arc<reference::Identity>,
    /// Whose turn its requests take.
    pub(super) lane: Lane,
    /// All entries that read with it; never empty.
    pub(super) entries: BTreeSet<EntryId>,
    /// Those that wait for its token.
    pub(super) waiting: Vec<EntryId>,
    /// A credential came that no login has used yet.
    pub(super) credential_changed: bool,
    state: State,
    /// Logins and renewals that failed in a row.
    failures: u32,
    tokens: u64,
    tried: Option<Instant>,
}

impl Session {
    /// Without a token.
    pub(super) fn new(identity: Arc<reference::Identity>) -> Self {
        let lane = match &identity.subject {
            Subject::ServiceAccount { namespace, .. } => Lane::from(namespace.as_str()),
            Subject::Local(source) => Lane::from(source.as_str()),
        };
        Self {
            identity,
            lane,
            entries: BTreeSet::new(),
            waiting: Vec::new(),
            credential_changed: false,
            state: State::Absent,
            failures: 0,
            tokens: 0,
            tried: None,
        }
    }

    /// The number of the token to read with.
    pub(super) fn token(&self) -> Option<u64> {
        match &self.state {
            State::Held(held) | State::Replacing { held, .. } => Some(held.number),
            _ => None,
        }
    }

    /// How long the token to read with has been in use.
    pub(super) fn token_age(&self, now: Instant) -> Duration {
        match &self.state {
            State::Held(held) | State::Replacing { held, .. } => now.saturating_duration_since(held.since),
            _ => Duration::ZERO,
        }
    }

    /// When it must be looked at again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        match &self.state {
            State::Held(held) => held.due.into_iter().chain(held.end).min(),
            State::Replacing { held, .. } => held.end,
            _ => None,
        }
    }

    /// A read wants a token.
    pub(super) fn admit(&mut self, now: Instant) -> Admission {
        match &self.state {
            State::Held(_) | State::Replacing { .. } => Admission::Token,
            State::Asked { .. } => Admission::Wait { submit: false },
            State::Failed { error, until } if *until > now => {
                Admission::Refused { error: error.clone(), until: *until }
            }
            State::Absent | State::Failed { .. } => {
                self.state = State::Asked { flight: None };
                Admission::Wait { submit: true }
            }
        }
    }

    /// A read was denied with the token in use, which serves no more. Returns whether a login must be queued now.
    pub(super) fn distrust(&mut self) -> bool {
        match self.state {
            State::Replacing { how: How::Login, flight, .. } => {
                self.state = State::Asked { flight };
                false
            }
            _ => {
                self.state = State::Asked { flight: None };
                true
            }
        }
    }

    /// A new credential came; `replaces` if it is the token itself. Returns whether a login must be queued now, and from
    /// when on reads that failed may be tried again.
    pub(super) fn credential(&mut self, replaces: bool, now: Instant) -> (bool, Option<Instant>) {
        let at = self.tried.map_or(now, |tried| (tried + CREDENTIAL_FLOOR).max(now));
        match &mut self.state {
            State::Failed { until, .. } => {
                *until = at.min(*until);
                (false, Some(*until))
            }
            State::Asked { .. } => {
                self.credential_changed = true;
                (false, None)
            }
            State::Held(held) if replaces => {
                self.credential_changed = true;
                self.state = State::Replacing { held: *held, how: How::Login, flight: None };
                (true, None)
            }
            State::Replacing { how, flight, .. } if replaces && *how == How::Renewal => {
                self.credential_changed = true;
                (*how, *flight) = (How::Login, None);
                (true, None)
            }
            _ => (false, None),
        }
    }

    /// A queued login or renewal has its turn. Returns whether it is still wanted.
    pub(super) fn sent(&mut self, what: How, id: FlightId, now: Instant) -> bool {
        let flight = match &mut self.state {
            State::Asked { flight } if what == How::Login => flight,
            State::Replacing { how, flight, .. } if what == *how => flight,
            _ => return false,
        };
        if flight.is_some() {
            return false;
        }
        *flight = Some(id);
        if what == How::Login {
            self.tried = Some(now);
        }
        true
    }

    /// Whether this flight's result is still waited for.
    pub(super) fn expects(&self, id: FlightId) -> bool {
        matches!(&self.state, State::Asked { flight } | State::Replacing { flight, .. } if *flight == Some(id))
    }

    /// An expected login or renewal was answered. Returns whether the token is another one than before.
    pub(super) fn answered(&mut self, what: How, terms: Terms, now: Instant, rng: &mut dyn Rng) -> bool {
        let before = match &self.state {
            State::Replacing { held, .. } if what == How::Renewal => Some(*held),
            _ => None,
        };
        self.failures = 0;
        let terms = Terms { ttl: terms.ttl.map(|ttl| ttl.clamp(SHORTEST_LIFE, schedule::EVER)), ..terms };
        let first_ttl = before.map_or(terms.ttl, |held| held.first_ttl);
        let at_maximum = terms.ttl.zip(first_ttl).is_some_and(|(ttl, first)| ttl < first / 2);
        let renew = terms.renewable && !at_maximum;
        self.tokens += u64::from(before.is_none());
        self.state = State::Held(Held {
            number: self.tokens,
            since: before.map_or(now, |held| held.since),
            first_ttl,
            due: terms.ttl.map(|ttl| now + schedule::ahead_of(ttl, rng)),
            end: terms.ttl.map(|ttl| now + ttl),
            how: if renew { How::Renewal } else { How::Login },
        });
        before.is_none()
    }

    /// An expected login or renewal failed.
    pub(super) fn failed(&mut self, error: &StoreError, now: Instant, rng: &mut dyn Rng) -> Setback {
        self.failures += 1;
        let delay = if error.is_retryable() {
            schedule::retry_after(self.failures, schedule::RETRY_CAP, error.retry_after, rng)
        } else {
            REFUSED_RETRY.mul_f64(rng.random_range(1.0..1.2))
        };
        match self.state {
            State::Replacing { held, how: How::Renewal, .. } if !error.is_retryable() => {
                self.state = State::Replacing { held, how: How::Login, flight: None };
                Setback::Submit
            }
            State::Replacing { held, .. } => {
                self.state = State::Held(Held { due: Some(now + delay), ..held });
                Setback::Bearable
            }
            State::Asked { .. } => {
                let floor = if std::mem::take(&mut self.credential_changed) {
                    delay.min(CREDENTIAL_FLOOR)
                } else {
                    delay
                };
                let until = now + floor;
                self.state = State::Failed { error: error.clone(), until };
                Setback::Fatal { error: error.clone(), until }
            }
            _ => Setback::Bearable,
        }
    }

    /// The wake-up came. Returns what must be queued now.
    pub(super) fn woken(&mut self, now: Instant) -> Option<How> {
        let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        match self.state {
            State::Held(held) if passed(held.end) => {
                self.state = State::Absent;
                None
            }
            State::Held(held) if passed(held.due) => {
                self.state = State::Replacing { held, how: held.how, flight: None };
                Some(held.how)
            }
            State::Replacing { held, .. } if passed(held.end) => self.distrust().then_some(How::Login),
            _ => None,
        }
    }
}
