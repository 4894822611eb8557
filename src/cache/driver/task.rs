//! The task's half of [`super`]: everything here runs on one task, so nothing is locked.

/// Requests at the store.
mod requests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::SmallRng;
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::{Cache, Command, Done, Entrance, Registration, Reply, Subscriber, shielded};
use crate::cache::id::{EntryId, FlightId, HolderId, IdentityId, WantId};
use crate::cache::identity::Terms;
use crate::cache::machine::{Action, Event, Machine};
use crate::cache::{CacheError, Limits, Slot, State, Value};
use crate::metrics::Metrics;
use crate::reference::{Identity, Key};
use crate::secret::Token;
use crate::secret::arena::Arena;
use crate::secret::pages::MemoryError;
use crate::store::{Answer, Credential, ErrorKind, Lease, Login, Store, StoreError};
use crate::time::Moment;

/// No reader waits longer, whatever it says: it holds a request of the kernel.
const LONGEST_PATIENCE: Duration = Duration::from_secs(5);

/// How a request ended.
enum Ended {
    LoggedIn { flight: FlightId, identity: Arc<Identity>, ours: bool, result: Result<Login, StoreError> },
    Renewed(FlightId, Result<Login, StoreError>),
    Answered(FlightId, EntryId, Result<Answer, StoreError>),
    Proved { cache: Cache, entrance: Entrance, reply: Reply, result: Result<Login, StoreError> },
    Revoked,
}

/// What an event brought beside itself; the machine's actions say where it goes. What they do not want is wiped.
enum Cargo {
    None,
    /// A login's token, whose it is, and whether the login made it.
    Token {
        token: Token,
        identity: Arc<Identity>,
        ours: bool,
    },
    /// The token in use, prolonged.
    Prolonged(Token),
    /// `None`: the held value is still the store's.
    Value(Option<Value>, Lease),
}

/// An identity in use.
struct Account {
    identity: Arc<Identity>,
    /// One per registration, the newest last: a login uses that one, as it is the one that ends last.
    credentials: Vec<(HolderId, Arc<Credential>)>,
    token: Option<Arc<Token>>,
    /// Whether a login of ours made the token.
    ours: bool,
}

struct Holder {
    identity: IdentityId,
    subscriber: Arc<dyn Subscriber>,
    progress: watch::Sender<()>,
}

/// What a holder is told after an event.
#[derive(Default)]
struct News {
    changed: Vec<Key>,
    states: Vec<Key>,
}

pub(super) struct Task<S> {
    store: Arc<S>,
    arena: Arc<Arena>,
    limits: Limits,
    metrics: Arc<Metrics>,
    machine: Machine,
    rng: SmallRng,
    slots: HashMap<EntryId, Arc<Slot>>,
    accounts: HashMap<IdentityId, Account>,
    holders: HashMap<HolderId, Holder>,
    wants: HashMap<WantId, Done>,
    requests: JoinSet<Ended>,
    revocations: Arc<Semaphore>,
    proofs: Arc<Semaphore>,
    bytes: usize,
    last_id: u64,
    told: Told,
}

/// Bounds what the log hears of failing and recovering secrets: a store that goes away takes all of them along.
#[derive(Default)]
struct Told {
    since: Option<Instant>,
    lines: usize,
}

impl Told {
    /// Lines per [`Self::WINDOW`].
    const LINES: usize = 20;
    const WINDOW: Duration = Duration::from_secs(10);

    fn line(&mut self, tell: impl FnOnce()) {
        let now = now().monotonic;
        if self.since.is_none_or(|since| now.duration_since(since) >= Self::WINDOW) {
            *self = Self { since: Some(now), lines: 0 };
        }
        self.lines += 1;
        match self.lines.cmp(&(Self::LINES + 1)) {
            std::cmp::Ordering::Less => tell(),
            std::cmp::Ordering::Equal => {
                tracing::warn!("more secrets fail or recover than are told one by one")
            }
            std::cmp::Ordering::Greater => {}
        }
    }
}

impl<S: Store> Task<S> {
    pub(super) fn new(store: Arc<S>, arena: Arc<Arena>, limits: Limits, metrics: Arc<Metrics>) -> Self {
        Self {
            store,
            arena,
            limits,
            metrics,
            machine: Machine::new(limits),
            rng: rand::make_rng(),
            slots: HashMap::new(),
            accounts: HashMap::new(),
            holders: HashMap::new(),
            wants: HashMap::new(),
            requests: JoinSet::new(),
            revocations: Arc::new(Semaphore::new(requests::REVOCATIONS)),
            proofs: Arc::new(Semaphore::new(requests::PROOFS)),
            bytes: 0,
            last_id: 0,
            told: Told::default(),
        }
    }

    /// Runs until [`Command::Stop`], or until nobody can send a command any more.
    pub(super) async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Command>,
        mut left: mpsc::UnboundedReceiver<HolderId>,
    ) {
        let stopped = loop {
            let wake_at = self.machine.wake_at();
            let wake = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                command = inbox.recv() => match command {
                    None => break None,
                    Some(Command::Stop { stopped }) => break Some(stopped),
                    Some(command) => self.command(command),
                },
                Some(holder) = left.recv() => self.leave(holder),
                Some(ended) = self.requests.join_next() => match ended {
                    Ok(ended) => self.ended(ended),
                    // The machine takes the request for failed when its time is over.
                    // Its text would carry the panic's message.
                    Err(_) => tracing::error!("a request at a store ended by a fault of this program"),
                },
                () = wake => self.feed(Event::Tick, Cargo::None),
            }
        };
        inbox.close();
        while inbox.try_recv().is_ok() {}
        loop {
            for holder in self.holders.keys().copied().collect::<Vec<_>>() {
                self.leave(holder);
            }
            // Each has its deadline. A login that ends only now is given back too, also one that proved somebody.
            match self.requests.join_next().await {
                Some(Ok(ended)) => self.ended(ended),
                Some(Err(_)) => {}
                None => break,
            }
        }
        if let Some(stopped) = stopped {
            // Whoever asked may have stopped waiting.
            let _ = stopped.send(());
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Register { cache, entrance, proof: None, reply } => {
                let registration = self.register(cache, entrance, None);
                // If nobody waits for it any more, its drop takes it back.
                let _ = reply.send(registration);
            }
            Command::Register { cache, entrance, proof: Some(deadline), reply } => {
                self.prove(cache, entrance, deadline, reply);
            }
            Command::Credential { holder, credential } => {
                if let Some(event) = self.remember(holder, credential) {
                    self.feed(event, Cargo::None);
                }
            }
            Command::Want { holder, entries, patience, done } => {
                let want = WantId(self.number());
                self.wants.insert(want, done);
                let until = now().monotonic + patience.min(LONGEST_PATIENCE);
                self.feed(Event::Want { want, holder, entries, until }, Cargo::None);
            }
            // Whoever asked may have stopped waiting.
            Command::Ping { reply } => drop(reply.send(())),
            Command::Stop { .. } => {}
        }
    }

    fn register(
        &mut self,
        cache: Cache,
        entrance: Entrance,
        login: Option<Login>,
    ) -> Result<Registration, CacheError> {
        let Entrance { keys, credential, freshness, subscriber } = entrance;
        let (terms, cargo) = match login {
            Some(Login { token, renewable, ttl }) => {
                let (identity, ours) = (Arc::clone(&keys[0].identity), makes_tokens(&credential));
                (Some(Terms { renewable, ttl }), Cargo::Token { token, identity, ours })
            }
            None => (None, Cargo::None),
        };
        if let Err(full) = self.admit(&keys) {
            // What was brought along is given back.
            self.perform(Vec::new(), cargo);
            return Err(full);
        }
        let holder = HolderId(self.number());
        let identity = Arc::clone(&keys[0].identity);
        let (progress, follow) = watch::channel(());
        let since = now().monotonic;
        let event = Event::Register { holder, keys: keys.clone(), freshness, login: terms };
        let actions = self.machine.on(event, now(), &mut self.rng);
        let Some(id) = self.machine.identity(&identity) else { return Err(CacheError::Stopped) };
        self.holders.insert(holder, Holder { identity: id, subscriber, progress });
        self.accounts.entry(id).or_insert_with(|| Account {
            identity,
            credentials: Vec::new(),
            token: None,
            ours: false,
        });
        let mut held = HashMap::with_capacity(keys.len());
        for key in keys {
            let Some(entry) = self.machine.entry(&key) else { continue };
            let slot = Arc::clone(self.slots.entry(entry).or_default());
            if slot.value().is_none() {
                self.metrics.cache_misses.increment();
            }
            held.insert(key, (entry, slot));
        }
        let changed = self.remember(holder, credential);
        self.perform(actions, cargo);
        if let Some(event) = changed {
            self.feed(event, Cargo::None);
        }
        Ok(Registration { cache, holder, since, held, progress: follow })
    }

    fn admit(&self, keys: &[Key]) -> Result<(), CacheError> {
        self.machine.admit(keys)?;
        if self.bytes >= self.limits.bytes && keys.iter().any(|key| self.machine.entry(key).is_none()) {
            return Err(CacheError::Limit {
                what: "bytes",
                used: self.bytes,
                wanted: 1,
                limit: self.limits.bytes,
                remedy: "mount fewer or smaller secrets on this node or raise the cache's limit of bytes",
            });
        }
        Ok(())
    }

    fn leave(&mut self, holder: HolderId) {
        if let Some(Holder { identity, .. }) = self.holders.remove(&holder)
            && let Some(account) = self.accounts.get_mut(&identity)
        {
            account.credentials.retain(|(other, _)| *other != holder);
        }
        self.feed(Event::Unregister { holder }, Cargo::None);
    }

    /// Makes a credential its identity's newest. Returns what the machine must hear of it: nothing of the first, nor of one
    /// that was there already.
    fn remember(&mut self, holder: HolderId, credential: Arc<Credential>) -> Option<Event> {
        let identity = self.holders.get(&holder)?.identity;
        let account = self.accounts.get_mut(&identity)?;
        let known = account.credentials.iter().any(|(_, known)| is_same(known, &credential));
        let changed = !account.credentials.is_empty() && !known;
        let replaces_token = matches!(*credential, Credential::Token(_) | Credential::TokenFile(_));
        account.credentials.retain(|(other, _)| *other != holder);
        account.credentials.push((holder, credential));
        changed.then_some(Event::Credential { identity, replaces_token })
    }

    fn ended(&mut self, ended: Ended) {
        match ended {
            Ended::LoggedIn { flight, identity, ours, result } => {
                let (result, cargo) = parted(result, |token| Cargo::Token { token, identity, ours });
                self.feed(Event::LoggedIn { flight, result }, cargo);
            }
            Ended::Renewed(flight, result) => {
                let (result, cargo) = parted(result, Cargo::Prolonged);
                self.feed(Event::LoggedIn { flight, result }, cargo);
            }
            Ended::Answered(flight, entry, result) => {
                let kept = result.and_then(|answer| self.keep(entry, answer));
                let (result, cargo) = match kept {
                    Ok((value, lease)) => (Ok(lease.clone()), Cargo::Value(value, lease)),
                    Err(error) => (Err(error), Cargo::None),
                };
                self.feed(Event::Answered { flight, result }, cargo);
            }
            Ended::Proved { cache, entrance, reply, result } => {
                let registration = match result {
                    Ok(login) => self.register(cache, entrance, Some(login)),
                    Err(error) => Err(CacheError::Unproven(error)),
                };
                // As above.
                let _ = reply.send(registration);
            }
            Ended::Revoked => {}
        }
    }

    /// Moves an answer into secret pages, unless it says what is already held.
    fn keep(&self, entry: EntryId, answer: Answer) -> Result<(Option<Value>, Lease), StoreError> {
        let Answer { body, lease, version, created } = answer;
        let held = self.slots.get(&entry).and_then(|slot| slot.value());
        if let Some(held) = &held
            && held.lease.id == lease.id
            && held.version == version
            && says_the_same(held.body.expose(), body.expose())
        {
            return Ok((None, lease));
        }
        let freed = held.map_or(0, |held| held.body.expose().len());
        let wanted = body.len();
        let full = |answered: String, remedy: Option<&str>| StoreError {
            kind: ErrorKind::Full,
            asked: format!(
                "keeping the answer of {}",
                self.machine.key(entry).map_or_else(String::new, |key| key.request.to_string())
            ),
            answered,
            remedy: remedy.map(str::to_owned),
            retry_after: None,
        };
        if self.bytes - freed + wanted > self.limits.bytes {
            return Err(full(
                format!(
                    "the cache is full: {} of {} bytes in use, {wanted} more wanted",
                    self.bytes - freed,
                    self.limits.bytes
                ),
                Some("mount fewer or smaller secrets on this node, or raise the cache's limit of bytes"),
            ));
        }
        // Its text ends with a remedy.
        let body = self.arena.store(body).map_err(|error| {
            if let MemoryError::Full { .. } = error {
                self.metrics.memory_refused.increment();
            }
            full(error.to_string(), None)
        })?;
        Ok((Some(Value { body, lease: lease.clone(), version, created, read_at: now() }), lease))
    }

    fn feed(&mut self, event: Event, cargo: Cargo) {
        let actions = self.machine.on(event, now(), &mut self.rng);
        self.perform(actions, cargo);
    }

    fn perform(&mut self, actions: Vec<Action>, mut cargo: Cargo) {
        let mut news: BTreeMap<HolderId, News> = BTreeMap::new();
        for action in actions {
            match action {
                Action::Login { flight, identity, deadline } => self.log_in(flight, identity, deadline),
                Action::Renew { flight, identity, deadline } => self.renew(flight, identity, deadline),
                Action::Read { flight, identity, entry, deadline } => {
                    self.read(flight, identity, entry, deadline);
                }
                Action::Hold { identity } => {
                    let Some(account) = self.accounts.get_mut(&identity) else { continue };
                    match std::mem::replace(&mut cargo, Cargo::None) {
                        Cargo::Token { token, ours, .. } => {
                            account.token = Some(Arc::new(token));
                            account.ours = ours;
                        }
                        Cargo::Prolonged(token) => account.token = Some(Arc::new(token)),
                        Cargo::None | Cargo::Value(..) => {}
                    }
                }
                Action::Forget { identity } => self.forget(identity),
                Action::Publish { entry } => {
                    if let Cargo::Value(value, lease) = std::mem::replace(&mut cargo, Cargo::None) {
                        self.publish(entry, value, &lease, &mut news);
                    }
                }
                Action::Fail { entry, state, error } => {
                    self.metrics.cache_refresh_failures.increment();
                    if let Some(slot) = self.slots.get(&entry) {
                        let moved = slot.state() != state;
                        let begins = slot.report().failing_since.is_none();
                        // A first read that fails for good is told by whoever waits for it.
                        let tell = begins && (state != State::Empty || error.is_retryable());
                        if let (true, Some(key)) = (tell, self.machine.key(entry)) {
                            self.told.line(|| {
                                tracing::warn!(secret = %key.request, %error, "cannot be read; goes on trying");
                            });
                        }
                        slot.fail(state, error, now());
                        self.tell(entry, &mut news, |news, key| {
                            if moved {
                                news.states.push(key.clone());
                            }
                        });
                    }
                }
                Action::Age { entry, state } => {
                    self.age_to(entry, state);
                    self.tell(entry, &mut news, |news, key| news.states.push(key.clone()));
                }
                Action::Drop { entry } => {
                    self.age_to(entry, State::Empty);
                    self.slots.remove(&entry);
                }
                // What an open came to is counted where it is answered.
                Action::Wake { want, .. } => drop(self.wants.remove(&want)),
            }
        }
        if let Cargo::Token { token, identity, ours: true } = cargo {
            // A login that ended after its last volume had gone.
            self.revoke(identity, Arc::new(token));
        }
        self.metrics.cache_entries.set(self.machine.len() as u64);
        self.metrics.cache_bytes.set(self.bytes as u64);
        for (holder, News { changed, states }) in news {
            let Some(holder) = self.holders.get(&holder) else { continue };
            holder.progress.send_replace(());
            if !changed.is_empty() {
                shielded(|| holder.subscriber.changed(&changed));
            }
            if !states.is_empty() {
                shielded(|| holder.subscriber.state_changed(&states));
            }
        }
    }
    /// Notes what to tell the holders of an entry.
    fn tell(&self, entry: EntryId, news: &mut BTreeMap<HolderId, News>, note: impl Fn(&mut News, &Key)) {
        let Some(key) = self.machine.key(entry) else { return };
        for holder in self.machine.holders(entry) {
            note(news.entry(holder).or_default(), key);
        }
    }

    fn publish(
        &mut self,
        entry: EntryId,
        value: Option<Value>,
        lease: &Lease,
        news: &mut BTreeMap<HolderId, News>,
    ) {
        let Some(slot) = self.slots.get(&entry) else { return };
        self.metrics.cache_refreshes.increment();
        let moved = slot.state() != State::Fresh;
        let held = slot.value();
        let changed = value.as_ref().is_some_and(|new| {
            held.as_ref().is_none_or(|held| !says_the_same(held.body.expose(), new.body.expose()))
        });
        if let Some(new) = &value {
            self.bytes += new.body.expose().len();
            self.bytes -= held.map_or(0, |held| held.body.expose().len());
        }
        if let (Some(since), Some(key)) = (slot.report().failing_since, self.machine.key(entry)) {
            let outage = Duration::from_secs(now().wall.duration_since(since).unwrap_or_default().as_secs());
            self.told.line(|| tracing::info!(secret = %key.request, ?outage, "can be read again"));
        }
        slot.publish(value.map(Arc::new), lease, now());
        self.tell(entry, news, |news, key| {
            if changed {
                news.changed.push(key.clone());
            }
            if moved {
                news.states.push(key.clone());
            }
        });
    }

    fn age_to(&mut self, entry: EntryId, state: State) {
        let Some(slot) = self.slots.get(&entry) else { return };
        let held = slot.value().map_or(0, |held| held.body.expose().len());
        slot.age_to(state);
        if slot.value().is_none() {
            self.bytes -= held;
        }
    }

    fn number(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// Whether a login with it makes a token that is ours to give back.
fn makes_tokens(credential: &Credential) -> bool {
    matches!(credential, Credential::Jwt(_) | Credential::JwtFile(_) | Credential::SecretIdFile(_))
}

/// The present on tokio's clock, which tests can stop.
fn now() -> Moment {
    Moment { monotonic: tokio::time::Instant::now().into_std(), wall: SystemTime::now() }
}

/// The terms for the machine, the token for the account.
fn parted(
    result: Result<Login, StoreError>,
    load: impl FnOnce(Token) -> Cargo,
) -> (Result<Terms, StoreError>, Cargo) {
    match result {
        Ok(Login { token, renewable, ttl }) => (Ok(Terms { renewable, ttl }), load(token)),
        Err(error) => (Err(error), Cargo::None),
    }
}

/// Whether two answers carry the same secret: their `data` is compared, since each answer has a request id of its own.
fn says_the_same(held: &[u8], new: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        data: Option<&'a RawValue>,
    }
    let data =
        |body| serde_json::from_slice::<Body<'_>>(body).ok().and_then(|body| body.data).map(RawValue::get);
    held == new || data(held).zip(data(new)).is_some_and(|(held, new)| held == new)
}

fn is_same(a: &Credential, b: &Credential) -> bool {
    match (a, b) {
        (Credential::Jwt(a), Credential::Jwt(b)) | (Credential::Token(a), Credential::Token(b)) => {
            a.expose() == b.expose()
        }
        (Credential::JwtFile(a), Credential::JwtFile(b))
        | (Credential::TokenFile(a), Credential::TokenFile(b)) => a == b,
        (Credential::SecretIdFile(a), Credential::SecretIdFile(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_hears_of_no_more_secrets_than_its_bound() {
        let (mut told, mut lines) = (Told::default(), 0);
        for _ in 0..1_000 {
            told.line(|| lines += 1);
        }
        assert_eq!(lines, Told::LINES);
    }
}
