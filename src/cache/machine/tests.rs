//! The machine with invented time: [`World`] is its driver, its clock and its stores.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;

use super::*;
use crate::cache::State;
use crate::cache::identity::Terms;
use crate::reference::{Method, Request, Subject};
use crate::store::{ErrorKind, Lease, StoreError, scripted};

const MINUTE: Duration = Duration::from_secs(60);
const FOREVER: Terms = Terms { renewable: false, ttl: None };

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn identity(namespace: &str) -> Arc<Identity> {
    let subject =
        Subject::ServiceAccount { namespace: namespace.into(), name: "app".into(), uid: "1".into() };
    Arc::new(Identity { subject, ..Identity::clone(&scripted::identity()) })
}

fn key(identity: &Arc<Identity>, path: &str) -> Key {
    let request = Request { method: Method::Get, path: path.into(), query: None, args: None };
    Key { identity: Arc::clone(identity), request, volume: None }
}

fn error(kind: ErrorKind) -> StoreError {
    StoreError { kind, asked: "GET".into(), answered: "no".into(), remedy: None, retry_after: None }
}

/// What a store says to a read or a login.
type Says<T> = Box<dyn FnMut(&Key, u64) -> Option<Result<T, StoreError>>>;

struct World {
    machine: Machine,
    start: Moment,
    now: Moment,
    rng: SmallRng,
    /// Sent and not ended, in order.
    logins: Vec<(FlightId, IdentityId, bool)>,
    reads: Vec<(FlightId, EntryId)>,
    /// How many logins each identity had held, its token's number.
    tokens: BTreeMap<IdentityId, u64>,
    states: BTreeMap<EntryId, State>,
    /// Every login, renewal and read sent, with its second.
    login_times: Vec<f64>,
    renewals: usize,
    read_times: Vec<(EntryId, f64)>,
    woken: BTreeMap<WantId, (bool, bool)>,
    forgotten: Vec<IdentityId>,
    errors: Vec<(EntryId, ErrorKind)>,
    last: u64,
    login: Box<dyn FnMut() -> Option<Result<Terms, StoreError>>>,
    /// Key and the token's number; `None`: hangs.
    read: Says<Lease>,
}

impl World {
    fn new(limits: Limits) -> Self {
        let start = Moment::now();
        Self {
            machine: Machine::new(limits),
            start,
            now: start,
            rng: SmallRng::seed_from_u64(42),
            logins: Vec::new(),
            reads: Vec::new(),
            tokens: BTreeMap::new(),
            states: BTreeMap::new(),
            login_times: Vec::new(),
            renewals: 0,
            read_times: Vec::new(),
            woken: BTreeMap::new(),
            forgotten: Vec::new(),
            errors: Vec::new(),
            last: 0,
            login: Box::new(|| Some(Ok(FOREVER))),
            read: Box::new(|_, _| Some(Ok(Lease::default()))),
        }
    }

    fn healthy() -> Self {
        Self::new(Limits::default())
    }

    fn on(&mut self, event: Event) {
        let at = self.now.since(self.start).as_secs_f64();
        for action in self.machine.on(event, self.now, &mut self.rng) {
            match action {
                Action::Login { flight, identity, .. } => {
                    self.login_times.push(at);
                    self.logins.push((flight, identity, true));
                }
                Action::Renew { flight, identity, .. } => {
                    self.renewals += 1;
                    self.logins.push((flight, identity, false));
                }
                Action::Hold { identity } => *self.tokens.entry(identity).or_default() += 1,
                Action::Forget { identity } => self.forgotten.push(identity),
                Action::Read { flight, entry, .. } => {
                    self.read_times.push((entry, at));
                    self.reads.push((flight, entry));
                }
                Action::Publish { entry } => {
                    self.states.insert(entry, State::Fresh);
                }
                Action::Fail { entry, state, error } => {
                    self.states.insert(entry, state);
                    self.errors.push((entry, error.kind));
                }
                Action::Age { entry, state } => {
                    self.states.insert(entry, state);
                }
                Action::Drop { entry } => {
                    self.states.remove(&entry);
                }
                Action::Wake { want, waited, fresh } => {
                    assert!(self.woken.insert(want, (waited, fresh)).is_none(), "woken twice");
                }
            }
        }
    }

    /// Ends what the stores answer, until only what hangs is left.
    fn answer(&mut self) {
        loop {
            let mut hanging = 0;
            for (flight, identity, is_login) in std::mem::take(&mut self.logins) {
                match (self.login)() {
                    Some(result) => self.on(Event::LoggedIn { flight, result }),
                    None => {
                        hanging += 1;
                        self.logins.push((flight, identity, is_login));
                    }
                }
            }
            for (flight, entry) in std::mem::take(&mut self.reads) {
                let said = match self.machine.key(entry).cloned() {
                    Some(key) => {
                        let identity = self.machine.identity(&key.identity).unwrap();
                        (self.read)(&key, self.tokens[&identity])
                    }
                    None => Some(Ok(Lease::default())),
                };
                match said {
                    Some(result) => self.on(Event::Answered { flight, result }),
                    None => {
                        hanging += 1;
                        self.reads.push((flight, entry));
                    }
                }
            }
            if self.logins.len() + self.reads.len() == hanging {
                return;
            }
        }
    }

    /// Lets time pass, from wake-up to wake-up.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        self.answer();
        while let Some(at) = self.machine.wake_at().filter(|at| *at <= end.monotonic) {
            self.now = self.now + at.saturating_duration_since(self.now.monotonic);
            self.on(Event::Tick);
            self.answer();
        }
        self.now = end;
    }

    fn register(&mut self, keys: &[Key], freshness: Freshness) -> HolderId {
        self.last += 1;
        let holder = HolderId(self.last);
        self.machine.admit(keys).unwrap();
        self.on(Event::Register { holder, keys: keys.to_vec(), freshness, login: None });
        holder
    }

    fn want(&mut self, holder: HolderId, keys: &[Key], patience: Duration) -> WantId {
        self.last += 1;
        let want = WantId(self.last);
        let entries = keys.iter().filter_map(|key| self.machine.entry(key)).collect();
        self.on(Event::Want { want, holder, entries, until: (self.now + patience).monotonic });
        want
    }

    fn state(&self, key: &Key) -> State {
        let entry = self.machine.entry(key).unwrap();
        assert_eq!(
            self.machine.entries[&entry].state(),
            self.states.get(&entry).copied().unwrap_or(State::Empty)
        );
        self.machine.entries[&entry].state()
    }

    fn reads_go_down(&mut self, kind: ErrorKind) {
        self.read = Box::new(move |_, _| Some(Err(error(kind))));
    }

    fn reads_hang(&mut self) {
        self.read = Box::new(|_, _| None);
    }

    fn reads_come_back(&mut self) {
        self.read = Box::new(|_, _| Some(Ok(Lease::default())));
    }
}

fn every(interval: u64) -> Freshness {
    Freshness { interval: seconds(interval), max_age: seconds(interval), ..Freshness::default() }
}

#[test]
fn a_hundred_volumes_of_one_identity_are_one_login_and_one_read_per_path() {
    let mut world = World::healthy();
    let identity = identity("a");
    let keys = [key(&identity, "one"), key(&identity, "two")];
    for n in 0..100 {
        // An identity that is equal, not the same.
        let twins: Vec<_> =
            keys.iter().map(|k| Key { identity: Arc::new((*identity).clone()), ..k.clone() }).collect();
        world.register(&twins, Freshness::default());
        if n == 50 {
            world.pass(seconds(1));
        }
    }
    world.pass(seconds(1));
    assert_eq!((world.login_times.len(), world.read_times.len()), (1, 2));
    world.pass(seconds(56));
    assert_eq!((world.login_times.len(), world.read_times.len()), (1, 4), "one refresh each for all");
}

#[test]
fn another_service_account_shares_nothing() {
    let mut world = World::healthy();
    world.register(&[key(&identity("a"), "one")], Freshness::default());
    world.register(&[key(&identity("b"), "one")], Freshness::default());
    world.pass(seconds(1));
    assert_eq!((world.login_times.len(), world.read_times.len()), (2, 2));
}

#[test]
fn a_healthy_value_is_refreshed_before_its_max_age_and_stays_fresh() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    world.register(std::slice::from_ref(&key), every(60));
    for _ in 0..3_600 {
        world.pass(seconds(1));
        assert_eq!(world.state(&key), State::Fresh);
    }
    let gaps: Vec<_> = world.read_times.windows(2).map(|pair| pair[1].1 - pair[0].1).collect();
    assert!(gaps.len() > 60 && gaps.iter().all(|gap| (48.0..=57.1).contains(gap)), "{gaps:?}");
}

#[test]
fn the_shortest_interval_of_all_holders_counts_and_goes_with_its_holder() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    world.register(std::slice::from_ref(&key), every(600));
    world.pass(seconds(1));
    let hasty = world.register(std::slice::from_ref(&key), every(10));
    world.pass(seconds(100));
    assert!((10..=14).contains(&world.read_times.len()), "{:?}", world.read_times);
    world.on(Event::Unregister { holder: hasty });
    let before = world.read_times.len();
    world.pass(seconds(400));
    assert!(world.read_times.len() <= before + 1, "{:?}", world.read_times);
}

#[test]
fn a_lease_is_refreshed_ahead_of_its_end_and_not_before() {
    let mut world = World::healthy();
    world.read = Box::new(|_, _| {
        Some(Ok(Lease { id: Some("db/1".into()), duration: Some(seconds(3_600)), renewable: true }))
    });
    let key = key(&identity("a"), "database/creds/app");
    let holder = world.register(std::slice::from_ref(&key), every(60));
    world.pass(seconds(1_800));
    assert_eq!(world.read_times.len(), 1, "a read would make another database user");
    let want = world.want(holder, std::slice::from_ref(&key), seconds(2));
    assert_eq!(world.woken[&want], (false, true));
    world.pass(seconds(700));
    assert_eq!(world.read_times.len(), 2);
    assert_eq!(world.state(&key), State::Fresh);
}

#[test]
fn an_outage_makes_values_stale_and_its_end_makes_them_fresh() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    let holder = world.register(std::slice::from_ref(&key), every(60));
    world.pass(seconds(1));
    world.reads_go_down(ErrorKind::Unreachable);
    world.pass(seconds(60));
    assert_eq!(world.state(&key), State::Stale);
    let want = world.want(holder, std::slice::from_ref(&key), seconds(2));
    assert_eq!(world.woken[&want], (false, false), "a reader does not wait for a store that is down");
    let tries = world.read_times.len();
    world.pass(seconds(3_600));
    let per_hour = world.read_times.len() - tries;
    assert!((60..=125).contains(&per_hour), "back-off is bounded on both sides: {per_hour}");
    assert_eq!(world.state(&key), State::Stale, "without a grace the last known value is served for ever");
    world.reads_come_back();
    world.pass(seconds(60));
    assert_eq!(world.state(&key), State::Fresh);
    world.reads_go_down(ErrorKind::Unreachable);
    let before = world.read_times.len();
    world.pass(seconds(62));
    let again = world.read_times.len() - before;
    assert!(again >= 3, "a new outage is asked after from the shortest delay on: {again}");
}

#[test]
fn a_read_that_somebody_waits_for_goes_before_queued_refreshes() {
    let mut world = World::new(Limits { in_flight: 1, ..Limits::default() });
    let identity = identity("a");
    let keys: Vec<_> = (0..20).map(|n| key(&identity, &format!("path{n}"))).collect();
    let holder = world.register(&keys, every(60));
    world.pass(seconds(1));
    world.reads_hang();
    world.pass(seconds(60));
    let busy = world.reads[0].1;
    let entries: Vec<_> = keys.iter().filter_map(|key| world.machine.entry(key)).collect();
    let last = *entries.iter().rev().find(|id| **id != busy).unwrap();
    let key = (**world.machine.key(last).unwrap()).clone();
    world.want(holder, &[key], seconds(2));
    let (flight, _) = world.reads.remove(0);
    world.on(Event::Answered { flight, result: Ok(Lease::default()) });
    assert_eq!(world.read_times.last().unwrap().0, last);
}

#[test]
fn after_the_grace_a_value_is_gone_until_an_answer_comes() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    let freshness = Freshness { stale_grace: Some(seconds(300)), ..every(60) };
    world.register(std::slice::from_ref(&key), freshness);
    world.pass(seconds(1));
    world.reads_go_down(ErrorKind::Unavailable);
    world.pass(seconds(358));
    assert_eq!(world.state(&key), State::Stale);
    world.pass(seconds(2));
    assert_eq!(world.state(&key), State::Gone);
    world.reads_come_back();
    world.pass(seconds(60));
    assert_eq!(world.state(&key), State::Fresh);
}

#[test]
fn one_holder_without_a_grace_keeps_the_value_for_all() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    world.register(
        std::slice::from_ref(&key),
        Freshness { stale_grace: Some(seconds(10)), ..Freshness::default() },
    );
    let lenient = world.register(std::slice::from_ref(&key), Freshness::default());
    world.pass(seconds(1));
    world.reads_go_down(ErrorKind::Unavailable);
    world.pass(seconds(1_000));
    assert_eq!(world.state(&key), State::Stale);
    world.on(Event::Unregister { holder: lenient });
    world.pass(seconds(1));
    assert_eq!(world.state(&key), State::Gone);
}

#[test]
fn a_secret_deleted_in_the_store_stays_served_and_is_asked_no_faster_than_the_interval() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    world.register(std::slice::from_ref(&key), every(60));
    world.pass(seconds(1));
    world.reads_go_down(ErrorKind::Missing);
    world.pass(seconds(3_600));
    assert_eq!(world.state(&key), State::Stale);
    assert!(world.read_times.len() <= 62, "{}", world.read_times.len());
}

#[test]
fn retry_after_is_honoured() {
    let mut world = World::healthy();
    world.read =
        Box::new(|_, _| Some(Err(StoreError { retry_after: Some(MINUTE), ..error(ErrorKind::RateLimited) })));
    world.register(&[key(&identity("a"), "one")], every(10));
    world.pass(seconds(59));
    assert_eq!(world.read_times.len(), 1);
    world.pass(seconds(14));
    assert_eq!(world.read_times.len(), 2);
}

#[test]
fn a_burst_of_denied_reads_makes_one_login_and_one_retry_each() {
    let mut world = World::healthy();
    let identity = identity("a");
    let keys: Vec<_> = (0..10).map(|n| key(&identity, &format!("path{n}"))).collect();
    world.register(&keys, every(60));
    world.pass(seconds(1));
    assert_eq!((world.login_times.len(), world.read_times.len()), (1, 10));
    // The token is revoked: only the second one is good.
    world.read = Box::new(|_, token| {
        Some(if token >= 2 { Ok(Lease::default()) } else { Err(error(ErrorKind::Denied)) })
    });
    let holder = world.register(&keys, every(1));
    world.pass(seconds(1));
    assert_eq!(world.login_times.len(), 2);
    world.on(Event::Unregister { holder });
    assert!(keys.iter().all(|key| world.state(key) == State::Fresh));
    assert!(world.errors.is_empty(), "nobody saw a failure");
}

#[test]
fn a_path_that_stays_forbidden_costs_one_login_and_fails() {
    let mut world = World::healthy();
    let identity = identity("a");
    let (good, bad) = (key(&identity, "good"), key(&identity, "bad"));
    world.read = Box::new(|key, _| {
        Some(if key.request.path == "good" { Ok(Lease::default()) } else { Err(error(ErrorKind::Denied)) })
    });
    world.register(&[good.clone(), bad.clone()], every(60));
    world.pass(seconds(1));
    assert_eq!(world.login_times.len(), 2);
    assert_eq!(
        world
            .read_times
            .iter()
            .filter(|(id, _)| world.machine.key(*id).unwrap().request.path == "bad")
            .count(),
        2
    );
    assert_eq!((world.state(&good), world.state(&bad)), (State::Fresh, State::Empty));
    world.pass(seconds(3_600));
    assert!(world.login_times.len() <= 2 + 12, "one login in five minutes: {}", world.login_times.len());
}

#[test]
fn a_refused_login_fails_the_reads_and_is_tried_each_minute_and_at_once_with_a_new_credential() {
    let mut world = World::healthy();
    world.login = Box::new(|| Some(Err(error(ErrorKind::Denied))));
    let identity = identity("a");
    let key = key(&identity, "one");
    world.register(std::slice::from_ref(&key), every(10));
    world.pass(seconds(1));
    assert_eq!(world.errors.len(), 1);
    world.pass(seconds(600));
    assert!((8..=11).contains(&world.login_times.len()), "{:?}", world.login_times);
    assert!(world.read_times.is_empty());
    world.login = Box::new(|| Some(Ok(FOREVER)));
    let id = world.machine.identity(&identity).unwrap();
    world.on(Event::Credential { identity: id, replaces_token: false });
    world.pass(seconds(5));
    assert_eq!(world.state(&key), State::Fresh);
}

#[test]
fn republishes_do_not_make_a_refused_login_frequent() {
    let mut world = World::healthy();
    world.login = Box::new(|| Some(Err(error(ErrorKind::Denied))));
    let identity = identity("a");
    world.register(&[key(&identity, "one")], every(60));
    let id = world.machine.identity(&identity).unwrap();
    for _ in 0..600 {
        world.pass(Duration::from_millis(100));
        world.on(Event::Credential { identity: id, replaces_token: false });
    }
    assert!(world.login_times.len() <= 13, "{:?}", world.login_times);
}

#[test]
fn a_token_is_renewed_at_two_thirds_and_replaced_when_the_store_shortens_it() {
    let mut world = World::healthy();
    let mut ttls = vec![600, 600, 100, 600].into_iter();
    world.login =
        Box::new(move || Some(Ok(Terms { renewable: true, ttl: Some(seconds(ttls.next().unwrap_or(600))) })));
    let key = key(&identity("a"), "one");
    world.register(std::slice::from_ref(&key), every(60));
    world.pass(seconds(300));
    assert_eq!((world.login_times.len(), world.renewals), (1, 0));
    world.pass(seconds(110));
    assert_eq!((world.login_times.len(), world.renewals), (1, 1));
    world.pass(seconds(410));
    assert_eq!((world.login_times.len(), world.renewals), (1, 2), "now it lives 100 s");
    world.pass(seconds(70));
    assert_eq!((world.login_times.len(), world.renewals), (2, 2));
    assert!(world.errors.is_empty());
}

#[test]
fn a_token_that_cannot_be_renewed_is_replaced_by_a_login_before_its_end() {
    let mut world = World::healthy();
    world.login = Box::new(|| Some(Ok(Terms { renewable: false, ttl: Some(seconds(90)) })));
    world.register(&[key(&identity("a"), "one")], every(60));
    world.pass(seconds(900));
    assert_eq!(world.renewals, 0);
    assert!((14..=20).contains(&world.login_times.len()), "{:?}", world.login_times);
}

#[test]
fn a_token_whose_replacement_fails_serves_to_its_end() {
    let mut world = World::healthy();
    world.login = Box::new(|| Some(Ok(Terms { renewable: true, ttl: Some(seconds(300)) })));
    let key = key(&identity("a"), "one");
    world.register(std::slice::from_ref(&key), every(60));
    world.pass(seconds(1));
    world.login = Box::new(|| Some(Err(error(ErrorKind::Unavailable))));
    world.pass(seconds(298));
    assert_eq!(world.state(&key), State::Fresh);
    world.pass(seconds(120));
    assert_eq!(world.state(&key), State::Stale);
    assert!(world.errors.iter().all(|(_, kind)| *kind == ErrorKind::Unavailable));
}

#[test]
fn a_new_store_token_replaces_the_one_in_use_while_reads_go_on() {
    let mut world = World::healthy();
    let identity = identity("a");
    world.register(&[key(&identity, "one")], every(60));
    world.pass(seconds(1));
    let id = world.machine.identity(&identity).unwrap();
    world.on(Event::Credential { identity: id, replaces_token: true });
    world.pass(seconds(1));
    assert_eq!((world.login_times.len(), world.tokens[&id]), (2, 2));
    assert!(world.errors.is_empty());
}

#[test]
fn readers_of_an_old_value_share_one_read() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    let holder = world.register(std::slice::from_ref(&key), Freshness { max_age: seconds(1), ..every(60) });
    world.pass(seconds(10));
    world.reads_hang();
    let wants: Vec<_> = (0..20).map(|_| world.want(holder, std::slice::from_ref(&key), seconds(2))).collect();
    world.pass(seconds(1));
    assert_eq!(world.read_times.len(), 2);
    assert!(world.woken.is_empty());
    world.reads_come_back();
    world.pass(Duration::ZERO);
    assert!(wants.iter().all(|want| world.woken[want] == (true, true)));
}

#[test]
fn a_hanging_store_costs_only_the_first_readers_their_patience() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    let holder = world.register(std::slice::from_ref(&key), Freshness { max_age: seconds(1), ..every(60) });
    world.pass(seconds(10));
    world.reads_hang();
    let first = world.want(holder, std::slice::from_ref(&key), seconds(2));
    world.pass(seconds(2));
    assert_eq!(world.woken[&first], (true, false));
    let second = world.want(holder, std::slice::from_ref(&key), seconds(2));
    assert_eq!(world.woken[&second], (false, false));
}

#[test]
fn a_reader_without_patience_does_not_spoil_the_wait_of_another() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    let holder = world.register(std::slice::from_ref(&key), Freshness { max_age: seconds(1), ..every(60) });
    world.pass(seconds(10));
    world.reads_hang();
    let hasty = world.want(holder, std::slice::from_ref(&key), Duration::ZERO);
    assert_eq!(world.woken[&hasty], (true, false));
    let patient = world.want(holder, std::slice::from_ref(&key), seconds(2));
    assert!(!world.woken.contains_key(&patient));
}

#[test]
fn waiting_readers_are_bounded() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    let holder = world.register(std::slice::from_ref(&key), every(60));
    world.reads_hang();
    world.pass(Duration::ZERO);
    for _ in 0..WAITERS_PER_ENTRY + 10 {
        world.want(holder, std::slice::from_ref(&key), seconds(2));
    }
    assert_eq!(world.woken.len(), 10);
    world.pass(seconds(3));
    assert_eq!(world.woken.len(), WAITERS_PER_ENTRY + 10);
}

#[test]
fn a_want_of_several_values_ends_with_the_last_of_them() {
    let mut world = World::healthy();
    let identity = identity("a");
    let keys = [key(&identity, "fast"), key(&identity, "slow")];
    let holder = world.register(&keys, Freshness { max_age: seconds(1), ..every(60) });
    world.pass(seconds(10));
    world.read = Box::new(|key, _| (key.request.path == "fast").then(|| Ok(Lease::default())));
    let want = world.want(holder, &keys, seconds(2));
    world.pass(seconds(1));
    assert!(!world.woken.contains_key(&want));
    world.reads_come_back();
    world.pass(Duration::ZERO);
    assert_eq!(world.woken[&want], (true, true));
}

#[test]
fn a_volume_that_comes_after_a_failure_asks_again() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    world.reads_go_down(ErrorKind::Missing);
    world.register(std::slice::from_ref(&key), every(600));
    world.pass(seconds(10));
    world.reads_come_back();
    world.register(std::slice::from_ref(&key), every(600));
    world.pass(Duration::ZERO);
    assert_eq!(world.state(&key), State::Fresh);
}

#[test]
fn volumes_that_come_together_share_a_failure_too() {
    let mut world = World::healthy();
    let key = key(&identity("a"), "one");
    world.reads_go_down(ErrorKind::Missing);
    for _ in 0..100 {
        world.register(std::slice::from_ref(&key), every(600));
        world.pass(Duration::from_millis(5));
    }
    assert_eq!(world.read_times.len(), 1);
}

#[test]
fn leased_values_are_read_anew_with_the_token_that_replaces_theirs() {
    let mut world = World::healthy();
    world.login = Box::new(|| Some(Ok(Terms { renewable: false, ttl: Some(seconds(300)) })));
    world.read = Box::new(|key, _| {
        let id = key.request.path.starts_with("database").then(|| "lease".to_owned());
        Some(Ok(Lease { id, duration: Some(seconds(86_400)), renewable: false }))
    });
    let identity = identity("a");
    let keys = [key(&identity, "database/creds/app"), key(&identity, "plain")];
    world.register(&keys, every(600));
    world.pass(seconds(210));
    let leased = world.machine.entry(&keys[0]).unwrap();
    assert_eq!(world.login_times.len(), 2);
    let again: Vec<_> = world.read_times[2..].iter().map(|(id, _)| *id).collect();
    assert_eq!(again, [leased]);
}

#[test]
fn a_request_whose_end_is_never_told_costs_a_delay_and_frees_the_budget() {
    let mut world = World::new(Limits { in_flight: 1, ..Limits::default() });
    let keys = [key(&identity("a"), "one")];
    world.login = Box::new(|| None);
    world.register(&keys, every(60));
    world.pass(seconds(36));
    assert_eq!(world.errors.len(), 1, "the login is given up");
    world.login = Box::new(|| Some(Ok(FOREVER)));
    world.reads_hang();
    world.pass(seconds(36));
    world.reads_come_back();
    world.pass(seconds(5));
    assert_eq!(world.state(&keys[0]), State::Fresh);
}

#[test]
fn ten_thousand_values_that_began_together_spread_out() {
    let mut world = World::new(Limits { in_flight: 10_000, ..Limits::default() });
    let identity = identity("a");
    let keys: Vec<_> = (0..10_000).map(|n| key(&identity, &format!("path{n}"))).collect();
    world.register(&keys, every(60));
    world.pass(seconds(600));
    world.read_times.clear();
    world.pass(seconds(60));
    let mut per_second = BTreeMap::<u64, usize>::new();
    for (_, at) in &world.read_times {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds of a test")]
        let second = *at as u64;
        *per_second.entry(second).or_default() += 1;
    }
    let peak = per_second.values().max().unwrap();
    assert!(*peak <= 600, "at an even spread 190 in a second: {peak}");
    assert!(per_second.len() >= 50, "{}", per_second.len());
}

#[test]
fn an_outage_of_ten_thousand_values_stays_within_the_budget_and_ends() {
    let mut world = World::healthy();
    let identity = identity("a");
    let keys: Vec<_> = (0..10_000).map(|n| key(&identity, &format!("path{n}"))).collect();
    world.register(&keys, every(600));
    world.pass(seconds(1));
    world.reads_hang();
    world.pass(seconds(1_200));
    assert!(world.machine.flights.len() <= 32);
    world.reads_come_back();
    world.pass(seconds(120));
    assert!(keys.iter().all(|key| world.state(key) == State::Fresh));
}

#[test]
fn a_namespace_whose_store_hangs_does_not_stop_another() {
    let mut world = World::new(Limits { in_flight: 4, ..Limits::default() });
    let (hung, well) = (identity("hung"), identity("well"));
    world.read = Box::new(|key, _| match &key.identity.subject {
        Subject::ServiceAccount { namespace, .. } if namespace == "hung" => None,
        _ => Some(Ok(Lease::default())),
    });
    let many: Vec<_> = (0..100).map(|n| key(&hung, &format!("path{n}"))).collect();
    world.register(&many, every(60));
    world.pass(seconds(1));
    let key = key(&well, "one");
    world.register(std::slice::from_ref(&key), every(60));
    world.pass(Duration::ZERO);
    assert_eq!(world.state(&key), State::Fresh);
}

#[test]
fn the_last_volume_takes_the_entry_and_the_identity_with_it() {
    let mut world = World::healthy();
    let keys = [key(&identity("a"), "one")];
    let (first, second) = (world.register(&keys, every(60)), world.register(&keys, every(60)));
    world.pass(seconds(1));
    world.on(Event::Unregister { holder: first });
    assert!(world.forgotten.is_empty());
    world.on(Event::Unregister { holder: second });
    assert_eq!(world.forgotten.len(), 1);
    assert!(world.machine.is_empty() && world.states.is_empty());
    assert_eq!(world.machine.wake_at(), None);
}

#[test]
fn an_answer_that_nobody_waits_for_any_more_is_ignored() {
    let mut world = World::healthy();
    let keys = [key(&identity("a"), "one")];
    world.reads_hang();
    let holder = world.register(&keys, every(60));
    world.pass(Duration::ZERO);
    let stray = world.reads[0].0;
    world.on(Event::Unregister { holder });
    world.register(&keys, every(60));
    world.on(Event::Answered { flight: stray, result: Ok(Lease::default()) });
    assert_eq!(world.state(&keys[0]), State::Empty);
}

#[test]
fn too_many_entries_are_refused_with_the_limit_and_the_remedy() {
    let mut world = World::new(Limits { entries: 2, ..Limits::default() });
    let identity = identity("a");
    world.register(&[key(&identity, "one"), key(&identity, "two")], every(60));
    world.machine.admit(&[key(&identity, "one")]).unwrap();
    let refusal = world.machine.admit(&[key(&identity, "three")]).unwrap_err();
    let text = "the cache is full: 2 of 2 entries in use, 1 more wanted; mount fewer different secrets on this node or \
                raise the cache's limit of entries";
    assert_eq!(refusal.to_string(), text);
}

#[test]
fn keys_of_two_identities_are_refused_together() {
    let machine = Machine::new(Limits::default());
    let keys = [key(&identity("a"), "one"), key(&identity("b"), "one")];
    assert_eq!(
        machine.admit(&keys).unwrap_err().to_string(),
        "keys of one registration must all have the same identity"
    );
    assert!(machine.admit(&[]).is_err());
}

/// One step of an arbitrary history.
#[derive(Clone, Debug)]
enum Step {
    Register { identity: usize, paths: Vec<u8>, interval: u64, grace: Option<u64> },
    Unregister(usize),
    Want { holder: usize, patience: u64 },
    Credential { identity: usize, replaces_token: bool },
    EndLogin { which: usize, how: u8, ttl: Option<u64>, renewable: bool },
    EndRead { which: usize, how: u8, lease: Option<u64>, leased: bool },
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..3_usize, prop::collection::vec(0..6_u8, 1..4), 1..120_u64, prop::option::of(0..200_u64))
            .prop_map(|(identity, paths, interval, grace)| Step::Register { identity, paths, interval, grace }),
        1 => any::<usize>().prop_map(Step::Unregister),
        3 => (any::<usize>(), 0..6_u64).prop_map(|(holder, patience)| Step::Want { holder, patience }),
        1 => (0..3_usize, any::<bool>())
            .prop_map(|(identity, replaces_token)| Step::Credential { identity, replaces_token }),
        5 => (any::<usize>(), 0..5_u8, prop::option::of(0..200_u64), any::<bool>())
            .prop_map(|(which, how, ttl, renewable)| Step::EndLogin { which, how, ttl, renewable }),
        8 => (any::<usize>(), 0..6_u8, prop::option::of(0..200_u64), any::<bool>())
            .prop_map(|(which, how, lease, leased)| Step::EndRead { which, how, lease, leased }),
        5 => (0..20_000_u64).prop_map(Step::Pass),
    ]
}

fn outcome<T>(how: u8, good: T) -> Result<T, StoreError> {
    match how {
        0 => Err(error(ErrorKind::Denied)),
        1 => Err(error(ErrorKind::Unavailable)),
        2 => Err(StoreError { retry_after: Some(seconds(7)), ..error(ErrorKind::RateLimited) }),
        _ => Ok(good),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_the_rules(steps in prop::collection::vec(step(), 1..80)) {
        const LIMIT: usize = 3;
        let mut world = World::new(Limits { in_flight: LIMIT, entries: 12, ..Limits::default() });
        world.login = Box::new(|| None);
        world.reads_hang();
        let identities = [identity("a"), identity("b"), identity("c")];
        let mut holders = Vec::new();
        let mut wanted: BTreeMap<WantId, Instant> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Register { identity, paths, interval, grace } => {
                    let keys: Vec<_> =
                        paths.iter().map(|n| key(&identities[identity], &format!("path{n}"))).collect();
                    if world.machine.admit(&keys).is_ok() {
                        let freshness = Freshness { stale_grace: grace.map(seconds), ..every(interval) };
                        holders.push((world.register(&keys, freshness), keys));
                    }
                }
                Step::Unregister(which) if !holders.is_empty() => {
                    let (holder, _) = holders.swap_remove(which % holders.len());
                    world.on(Event::Unregister { holder });
                }
                Step::Want { holder, patience } if !holders.is_empty() => {
                    let (holder, keys) = &holders[holder % holders.len()];
                    let until = (world.now + seconds(patience)).monotonic;
                    wanted.insert(world.want(*holder, keys, seconds(patience)), until);
                }
                Step::Credential { identity, replaces_token } => {
                    if let Some(identity) = world.machine.identity(&identities[identity]) {
                        world.on(Event::Credential { identity, replaces_token });
                    }
                }
                Step::EndLogin { which, how, ttl, renewable } if !world.logins.is_empty() => {
                    let (flight, ..) = world.logins.remove(which % world.logins.len());
                    let terms = Terms { renewable, ttl: ttl.map(seconds) };
                    world.on(Event::LoggedIn { flight, result: outcome(how, terms) });
                }
                Step::EndRead { which, how, lease, leased } if !world.reads.is_empty() => {
                    let (flight, _) = world.reads.remove(which % world.reads.len());
                    let id = leased.then(|| "lease".to_owned());
                    let lease = Lease { id, duration: lease.map(seconds), renewable: false };
                    world.on(Event::Answered { flight, result: outcome(how, lease) });
                }
                Step::Pass(millis) => world.pass(Duration::from_millis(millis)),
                _ => {}
            }
            check(&world, LIMIT, &wanted);
        }
        // Stores that answer again heal everything that is still held.
        world.login = Box::new(|| Some(Ok(FOREVER)));
        world.reads_come_back();
        world.pass(seconds(300));
        check(&world, LIMIT, &wanted);
        for entry in world.machine.entries.values() {
            prop_assert_eq!(entry.state(), State::Fresh);
        }
        for (holder, _) in holders {
            world.on(Event::Unregister { holder });
        }
        world.pass(MINUTE);
        prop_assert_eq!(world.machine.wake_at(), None);
        prop_assert!(world.machine.wants.is_empty() && world.machine.sessions.is_empty());
    }
}

/// What holds after every step.
fn check(world: &World, limit: usize, wanted: &BTreeMap<WantId, Instant>) {
    let machine = &world.machine;
    assert!(machine.flights.len() <= limit, "in flight beyond the budget");
    // A request that the machine gave up may still hang at the store: only those it waits for count.
    let live = |flight: &FlightId| machine.flights.contains_key(flight);
    let mut reading = BTreeSet::new();
    for (_, entry) in world.reads.iter().filter(|(flight, _)| live(flight)) {
        assert!(reading.insert(*entry), "two reads of one key in flight");
    }
    let mut logging_in = BTreeSet::new();
    for (_, identity, _) in world.logins.iter().filter(|(flight, _, is_login)| live(flight) && *is_login) {
        assert!(logging_in.insert(*identity), "two logins of one identity in flight");
    }
    assert!(machine.is_empty() || machine.wake_at().is_some(), "held entries, and nothing to wake for");
    for (want, until) in wanted {
        assert!(
            world.woken.contains_key(want) || *until > world.now.monotonic,
            "a reader waits beyond its deadline"
        );
    }
    let sent: Vec<_> = machine.flights.values().map(|(_, job)| *job).collect();
    for (id, entry) in &machine.entries {
        let session = &machine.sessions[&entry.identity];
        match entry.flight.map(|flight| flight.stage) {
            None => assert!(entry.wake_at().is_some() && entry.waiters.is_empty()),
            Some(Stage::AwaitingLogin) => assert!(session.waiting.contains(id) && session.token().is_none()),
            Some(Stage::Queued(_)) => {}
            Some(Stage::Sent { .. }) => {
                assert!(sent.contains(&Job::Read(*id)), "a read whose end cannot come")
            }
        }
    }
}
