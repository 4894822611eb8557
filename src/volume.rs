//! Read 3: one volume: what it asked for, and the generations of it that are served.
//!
//! ```text
//!   Volume::publish ─▶ registered ──all keys answered──▶ generation 1 ──an answer changed──▶ generation n+1 ─▶ …
//!                          │ a key refused, or the deadline          │ nothing changed: no generation
//!                          ▼                                         │ a file can no longer be cut out of its answer:
//!                       refused (nothing stays)                      ▼ the old generation stays, and says why
//! ```
//! The cache moves a volume to the right: it calls `Volume::changed`, and the volume builds a generation from the answers
//! it holds. A volume that is dropped gives up its keys and wipes its generations: an own one. A *lent* one, whose mount is
//! somebody else's, is deposited with that one, part by part, and left as it is for a successor (`lent`, `restore`).

/// From answers to the next generation.
pub mod build;
/// The generations that are kept.
pub mod generation;
/// Volumes whose mount, and whose state, somebody else keeps.
pub mod lent;
/// What is open and shown, in memory that survives.
pub mod opens;
/// What a volume asked for, in memory that survives.
pub mod record;
/// A volume that a predecessor left.
pub mod restore;
/// A generation as bytes: the format that is served and handed over.
pub mod snapshot;

pub use build::{BuildError, NewFile};
pub use generation::{Generation, Generations};
pub use lent::{Keeper, Lending};

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::cache::{Cache, CacheError, Registration, Slot, State, Subscriber};
use crate::metrics::Metrics;
use crate::reference::{FileSpec, Freshness, Key, Method, VolumeId, VolumeSpec};
use crate::secret::pages::SecretMemory;
use crate::store::{Credential, StoreError};
use crate::time::Moment;
use build::Basis;
use lent::Lent;
use opens::Opens;

/// Who uses a volume, where that is known. Local mounts have none of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Pod {
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its uid; empty where an earlier version of this program did not note it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

/// Whether it is known that a volume's credential is its identity's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It is: somebody has verified it, or nobody else could have given it.
    Proven,
    /// Nobody knows. It logs in before anything is shared with it.
    Login,
}

/// What [`Volume::new`] takes beside the spec.
pub struct Surroundings {
    /// Where generations live.
    pub memory: Arc<SecretMemory>,
    /// Where is counted.
    pub metrics: Arc<Metrics>,
    /// Owner and group of files that neither class nor file gives any.
    pub default_owner: (u32, u32),
}

/// Why a volume cannot be served. Each text names what to change.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The store refused, or did not answer in time: every secret that is missing, one per line.
    #[error("{}", list(.0))]
    Store(Vec<(String, StoreError)>),
    /// A bound of the cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No generation can be built from the answers.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// One line per error, with all that it is about: a login that fails fails for every secret.
fn list<E: std::fmt::Display>(parts: &[(String, E)]) -> String {
    /// What the others are about is told by their number.
    const MOST: usize = 5;
    let mut lines: Vec<(Vec<&str>, String)> = Vec::new();
    for (what, error) in parts {
        let error = error.to_string();
        match lines.iter_mut().find(|(_, known)| *known == error) {
            Some((whats, _)) => whats.push(what),
            None => lines.push((vec![what], error)),
        }
    }
    let line = |(whats, error): (Vec<&str>, String)| {
        let more = whats.len().saturating_sub(MOST);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{more}: {error}", whats[..whats.len().min(MOST)].join(", "))
    };
    lines.into_iter().map(line).collect::<Vec<_>>().join("\n")
}

/// How a file's value stands against its class's max age, asked at each open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Young enough.
    Fresh,
    /// Older than the max age, and the store is believed to answer.
    Old,
    /// Older, and the last refresh failed: the last known value is served.
    LastKnown,
    /// Its grace ended: nothing is served.
    Gone,
}

/// What happened to a volume's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The new current generation.
    pub generation: u32,
    /// Indices of the files whose bytes differ from the generation before.
    pub files: Vec<usize>,
    /// Generations that are no longer kept.
    pub gone: Vec<u32>,
}

/// Who wants to hear of changes: the file system on this volume.
pub trait Listener: Send + Sync {
    /// Called after a generation was installed, from whatever thread did it; must not block.
    fn changed(&self, change: &Change);
}

/// One volume.
pub struct Volume {
    id: VolumeId,
    spec: VolumeSpec,
    pod: Option<Pod>,
    surroundings: Surroundings,
    generations: Generations,
    /// From what was built last, per file. Held while a generation is built: one at a time.
    built_from: Mutex<Vec<Basis>>,
    registration: OnceLock<Registration>,
    /// One slot per file, in content order; empty until published.
    slots: OnceLock<Vec<Arc<Slot>>>,
    /// Of a restored volume, per file that has a value: when the store answered for it last, as far as the predecessor knew.
    inherited: OnceLock<Vec<Option<SystemTime>>>,
    lent: Option<Lent>,
    listener: OnceLock<Weak<dyn Listener>>,
    last_build_error: Mutex<Option<String>>,
    since: Moment,
    opens: AtomicU64,
    reads: AtomicU64,
}

impl Volume {
    /// A volume without content.
    #[must_use]
    pub fn new(id: VolumeId, spec: VolumeSpec, pod: Option<Pod>, surroundings: Surroundings) -> Arc<Self> {
        let opens = Opens::own(spec.files.len());
        Self::assemble(id, spec, pod, surroundings, opens, None)
    }

    fn assemble(
        id: VolumeId,
        spec: VolumeSpec,
        pod: Option<Pod>,
        surroundings: Surroundings,
        opens: Opens,
        lent: Option<Lent>,
    ) -> Arc<Self> {
        surroundings.metrics.volumes.add(1);
        Arc::new(Self {
            id,
            spec,
            pod,
            surroundings,
            generations: Generations::new(Arc::new(opens)),
            built_from: Mutex::new(Vec::new()),
            registration: OnceLock::new(),
            slots: OnceLock::new(),
            inherited: OnceLock::new(),
            lent,
            listener: OnceLock::new(),
            last_build_error: Mutex::new(None),
            since: Moment::now(),
            opens: AtomicU64::new(0),
            reads: AtomicU64::new(0),
        })
    }

    /// Asks the cache for every secret of the spec and builds the first generation: all files, or an error.
    ///
    /// # Errors
    /// [`PublishError`]. Drop the volume then: nothing of it stays.
    pub async fn publish(
        self: &Arc<Self>,
        cache: &Cache,
        credential: Arc<Credential>,
        trust: Trust,
        deadline: Instant,
    ) -> Result<(), PublishError> {
        let registration = match trust {
            Trust::Proven => self.register(cache, credential).await?,
            Trust::Login => self.prove(cache, credential, deadline).await?,
        };
        registration.ready(deadline).await.map_err(|errors| {
            PublishError::Store(errors.into_iter().map(|(key, error)| (self.files_of(&key), error)).collect())
        })?;
        self.hold(registration);
        self.rebuild(Moment::now()).await?;
        Ok(())
    }

    async fn register(
        self: &Arc<Self>,
        cache: &Cache,
        credential: Arc<Credential>,
    ) -> Result<Registration, CacheError> {
        let subscriber = Arc::new(Rebuild(Arc::downgrade(self)));
        cache.register(self.keys(), credential, self.spec.freshness, subscriber).await
    }

    async fn prove(
        self: &Arc<Self>,
        cache: &Cache,
        credential: Arc<Credential>,
        deadline: Instant,
    ) -> Result<Registration, PublishError> {
        let subscriber = Arc::new(Rebuild(Arc::downgrade(self)));
        let proved =
            cache.prove_and_register(self.keys(), credential, self.spec.freshness, subscriber, deadline);
        proved.await.map_err(|error| match error {
            // No file can be had without it.
            CacheError::Unproven(error) => {
                let paths: Vec<_> = self.spec.files.iter().map(|file| file.path.as_str()).collect();
                PublishError::Store(vec![(paths.join(", "), error)])
            }
            error => error.into(),
        })
    }

    fn hold(&self, registration: Registration) {
        let slots = self.spec.files.iter().filter_map(|file| registration.slot(&self.key(file))).collect();
        let _ = self.slots.set(slots);
        let _ = self.registration.set(registration);
    }

    /// How the value of a file stands now.
    #[must_use]
    pub fn standing(self: &Arc<Self>, file: usize, now: Moment) -> Standing {
        let slot = match self.slot(file) {
            Some(slot) if slot.state() != State::Empty || self.inherited.get().is_none() => slot,
            None if self.inherited.get().is_none() => return Standing::Fresh,
            // The store has not answered since the predecessor: what that one left is served, and nobody waits.
            _ => {
                let standing = self.inherited_standing(file, now);
                if standing == Standing::Gone {
                    self.rebuild_soon(now, Box::new(|| ()));
                }
                return standing;
            }
        };
        match slot.state() {
            State::Gone | State::Empty => Standing::Gone,
            State::Stale if self.is_over(slot, now) => {
                // The cache holds it on for volumes with a longer grace. A failure to build leaves it unserved as well.
                self.rebuild_soon(now, Box::new(|| ()));
                Standing::Gone
            }
            _ if slot.is_young(self.spec.freshness.max_age, now) => Standing::Fresh,
            // The cache calls stale what is merely older than the max age, too: a store that did not fail is asked first.
            _ if slot.is_failing() => Standing::LastKnown,
            _ => Standing::Old,
        }
    }

    /// Asks for a refresh of one file's secret; `done` is called when it ended or the class's `open_deadline` passed, and
    /// what it brought is installed.
    pub fn refresh(self: &Arc<Self>, file: usize, done: Box<dyn FnOnce() + Send>) {
        match (self.registration.get(), self.spec.files.get(file)) {
            (Some(registration), Some(spec)) => {
                let volume = Arc::clone(self);
                let built = move || volume.rebuild_soon(Moment::now(), done);
                registration.refresh(&[self.key(spec)], self.spec.freshness.open_deadline, Box::new(built));
            }
            _ => done(),
        }
    }

    /// Gives the volume a newer credential, such as a fresh token from kubelet. No request is made for it.
    pub async fn set_credential(&self, credential: Arc<Credential>) {
        if let Some(registration) = self.registration.get() {
            registration.set_credential(credential).await;
        }
    }

    /// Names the one who hears of changes. The first call counts: a volume has one file system.
    pub fn listen(&self, listener: Weak<dyn Listener>) {
        let _ = self.listener.set(listener);
    }

    /// Its name on this node.
    #[must_use]
    pub fn id(&self) -> &VolumeId {
        &self.id
    }

    /// What it asked for.
    #[must_use]
    pub fn spec(&self) -> &VolumeSpec {
        &self.spec
    }

    /// Who uses it.
    #[must_use]
    pub fn pod(&self) -> Option<&Pod> {
        self.pod.as_ref()
    }

    /// Its generations.
    #[must_use]
    pub fn generations(&self) -> &Generations {
        &self.generations
    }

    /// Where is counted.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.surroundings.metrics
    }

    /// Owner and group of files that neither class nor file gives any.
    #[must_use]
    pub fn default_owner(&self) -> (u32, u32) {
        self.surroundings.default_owner
    }

    /// Counts an open.
    pub fn count_open(&self) {
        self.opens.fetch_add(1, Ordering::Relaxed);
        self.surroundings.metrics.fs_opens.increment();
    }

    /// Counts a read request.
    pub fn count_read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.surroundings.metrics.fs_reads.increment();
    }

    /// What people ask about it.
    #[must_use]
    pub fn report(&self) -> Report {
        let slots = self.slots();
        let reports: Vec<_> = slots.iter().map(|slot| slot.report()).collect();
        let build_error = self.last_build_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Report {
            since: self.since.wall,
            opens: self.opens.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            refreshed: (0..self.spec.files.len()).filter_map(|file| self.refreshed(file)).min(),
            stale_since: reports.iter().filter_map(|report| report.failing_since).min(),
            gone: slots.iter().filter(|slot| slot.state() == State::Gone).count(),
            last_error: build_error.or_else(|| reports.into_iter().find_map(|report| report.last_error)),
        }
    }

    fn slots(&self) -> &[Arc<Slot>] {
        self.slots.get().map(Vec::as_slice).unwrap_or_default()
    }

    fn slot(&self, file: usize) -> Option<&Arc<Slot>> {
        self.slots().get(file)
    }

    /// When the store last answered for a file: to this process, else to the one before.
    fn refreshed(&self, file: usize) -> Option<SystemTime> {
        let own = self.slot(file).and_then(|slot| slot.refreshed());
        own.or_else(|| self.inherited.get()?.get(file).copied().flatten())
    }

    /// Whether this volume's own grace for a value has ended.
    fn is_over(&self, slot: &Slot, now: Moment) -> bool {
        let Freshness { max_age, stale_grace, .. } = self.spec.freshness;
        slot.state() == State::Stale
            && stale_grace.zip(slot.age(now)).is_some_and(|(grace, age)| age > max_age.saturating_add(grace))
    }

    /// All that it asks the store for.
    fn keys(&self) -> Vec<Key> {
        let distinct: HashSet<Key> = self.spec.files.iter().map(|file| self.key(file)).collect();
        distinct.into_iter().collect()
    }

    fn key(&self, file: &FileSpec) -> Key {
        Key {
            identity: Arc::clone(&self.spec.identity),
            request: file.request.clone(),
            volume: (file.request.method != Method::Get).then(|| self.id.clone()),
        }
    }

    fn files_of(&self, key: &Key) -> String {
        let names: Vec<&str> = (self.spec.files.iter())
            .filter(|file| file.request == key.request)
            .map(|file| file.path.as_str())
            .collect();
        names.join(", ")
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.surroundings.metrics.volumes.subtract(1);
    }
}

/// What people ask about a volume, beside its spec and generations.
#[derive(Clone, Debug)]
pub struct Report {
    /// When it was published.
    pub since: SystemTime,
    /// Opens of its files.
    pub opens: u64,
    /// Read requests.
    pub reads: u64,
    /// When the store last answered for the secret that waits longest.
    pub refreshed: Option<SystemTime>,
    /// Since when a refresh fails.
    pub stale_since: Option<SystemTime>,
    /// Files whose grace ended.
    pub gone: usize,
    /// The last failure.
    pub last_error: Option<String>,
}

/// After this time a generation is tried again for which there was no room.
const RETRY: Duration = Duration::from_secs(5);

/// Wakes the volume when the cache has something new for it.
struct Rebuild(Weak<Volume>);

impl Subscriber for Rebuild {
    fn changed(&self, _keys: &[Key]) {
        // The first generation is `publish`'s, which also reports its faults; but a restored volume has no publisher.
        if self
            .0
            .upgrade()
            .is_none_or(|volume| volume.generations.current().is_none() && volume.inherited.get().is_none())
        {
            return;
        }
        let volume = Weak::clone(&self.0);
        tokio::spawn(async move {
            while let Some(Err(BuildError::Write(_))) = rebuild(&volume).await {
                tokio::time::sleep(RETRY).await;
            }
        });
    }

    fn state_changed(&self, keys: &[Key]) {
        // The end of a grace takes a file away, an answer after it brings it back; `build` sees whether it is one of these.
        self.changed(keys);
    }
}

/// `None`: the volume is gone.
async fn rebuild(volume: &Weak<Volume>) -> Option<Result<(), BuildError>> {
    Some(volume.upgrade()?.rebuild(Moment::now()).await)
}

#[cfg(test)]
mod tests;
