//! The tokio user of the machine: one task that owns the machine, the tokens and the values, and a task per request.
//!
//! ```text
//!   Cache, Registration ──commands──▶ ┌────────┐ ──Event──▶ machine ──Action──┐
//!   requests at the store ──results──▶│ driver │                              │
//!   the clock ─────────────wake-ups──▶└────────┘ ◀── slots, subscribers, tokens, requests
//! ```
//! The task never waits for anything but these three. Readers never wait for the task: they look at [`Slot`]s.

/// What the task owns, and how it does what the machine says.
mod task;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::entry::RECENT;
use super::id::{EntryId, HolderId};
use super::{CacheError, Limits, Slot};
use crate::metrics::Metrics;
use crate::reference::{Freshness, Key};
use crate::secret::arena::Arena;
use crate::store::{Credential, ErrorKind, Store, StoreError};
use task::Task;

/// Commands that wait for the task; a reader that finds the queue full is answered at once.
const COMMANDS: usize = 1_024;

/// Who is told that held values changed. Called from the cache's only task: it must not block, and must not call back.
///
/// The cache keeps it as long as the registration lives, so it must not own that registration.
pub trait Subscriber: Send + Sync + 'static {
    /// The store gave another value than before, or the first one, for these keys.
    fn changed(&self, keys: &[Key]);

    /// These keys are in another [`super::State`] than before.
    fn state_changed(&self, keys: &[Key]);
}

/// The cache. A clone is another handle to the same one.
#[derive(Clone)]
pub struct Cache {
    commands: mpsc::Sender<Command>,
    /// Ends of registrations. Unbounded, since a drop cannot wait, but no longer than there are registrations.
    leaving: mpsc::UnboundedSender<HolderId>,
}

impl Cache {
    /// Starts the task; must be called inside a tokio runtime.
    #[must_use]
    pub fn new<S: Store>(store: Arc<S>, arena: Arc<Arena>, limits: Limits, metrics: Arc<Metrics>) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (leaving, left) = mpsc::unbounded_channel();
        tokio::spawn(Task::new(store, arena, limits, metrics).run(inbox, left));
        Self { commands, leaving }
    }

    /// Holds these keys, and keeps them fresh, until the registration is dropped. What the cache already has is there at
    /// once; what it does not have is being read: see [`Registration::ready`].
    ///
    /// # Errors
    /// [`CacheError`]: a limit, keys that do not belong together, or a stopped cache.
    pub async fn register(
        &self,
        keys: Vec<Key>,
        credential: Arc<Credential>,
        freshness: Freshness,
        subscriber: Arc<dyn Subscriber>,
    ) -> Result<Registration, CacheError> {
        self.enter(Entrance { keys, credential, freshness, subscriber }, None).await
    }

    /// The same for a credential of which nobody knows yet that it is the identity's: it logs in before anything is shared with
    /// it. The token that it gets becomes the identity's if that has none, else it is given back.
    ///
    /// # Errors
    /// [`CacheError`]; [`CacheError::Unproven`]: the store refused, or did not answer by `deadline`.
    pub async fn prove_and_register(
        &self,
        keys: Vec<Key>,
        credential: Arc<Credential>,
        freshness: Freshness,
        subscriber: Arc<dyn Subscriber>,
        deadline: Instant,
    ) -> Result<Registration, CacheError> {
        self.enter(Entrance { keys, credential, freshness, subscriber }, Some(deadline)).await
    }

    async fn enter(&self, entrance: Entrance, proof: Option<Instant>) -> Result<Registration, CacheError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Register { cache: self.clone(), entrance, proof, reply };
        self.commands.send(command).await.map_err(|_| CacheError::Stopped)?;
        answer.await.map_err(|_| CacheError::Stopped)?
    }

    /// Whether the task answers. Waits for it as long as it takes.
    pub async fn answers(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Ping { reply }).await.is_ok() && answer.await.is_ok()
    }

    /// Drops and wipes everything, gives tokens back, and ends the task. Returns when it is done, at `deadline` at the latest.
    pub async fn stop(&self, deadline: Instant) {
        let (stopped, done) = oneshot::channel();
        let stopped = async {
            if self.commands.send(Command::Stop { stopped }).await.is_ok() {
                // An error means that it has stopped already.
                let _ = done.await;
            }
        };
        if tokio::time::timeout_at(deadline.into(), stopped).await.is_err() {
            tracing::warn!("the cache did not stop in time: tokens may not have been given back");
        }
    }
}

/// The keys that one volume holds. Dropping it lets go of them.
pub struct Registration {
    cache: Cache,
    holder: HolderId,
    since: Instant,
    held: HashMap<Key, (EntryId, Arc<Slot>)>,
    progress: watch::Receiver<()>,
}

impl Registration {
    /// Waits until every key has a value. A value that the cache already had counts, also a stale one.
    ///
    /// # Errors
    /// The keys without a value, each with its error: as soon as one of them needs somebody to change something and each
    /// has been tried, else at `deadline`.
    pub async fn ready(&self, deadline: Instant) -> Result<(), Vec<(Key, StoreError)>> {
        let mut progress = self.progress.clone();
        loop {
            progress.borrow_and_update();
            let missing: Vec<_> = self.missing().collect();
            if missing.is_empty() {
                return Ok(());
            }
            let tried = missing.iter().all(|(_, error)| error.is_some());
            let hopeless = missing.iter().any(|(_, e)| e.as_ref().is_some_and(|e| !e.is_retryable()));
            let over = (tried && hopeless)
                || !matches!(tokio::time::timeout_at(deadline.into(), progress.changed()).await, Ok(Ok(())));
            if over {
                let unanswered = |key: &Key| StoreError {
                    kind: ErrorKind::Deadline,
                    asked: key.request.to_string(),
                    answered: "no answer yet".to_owned(),
                    remedy: None,
                    retry_after: None,
                };
                let errors: Vec<_> = self
                    .missing()
                    .map(|(key, error)| (key.clone(), error.unwrap_or_else(|| unanswered(key))))
                    .collect();
                return if errors.is_empty() { Ok(()) } else { Err(errors) };
            }
        }
    }

    /// What readers see of a key; `None` if it is not one of this registration's.
    #[must_use]
    pub fn slot(&self, key: &Key) -> Option<Arc<Slot>> {
        self.held.get(key).map(|(_, slot)| Arc::clone(slot))
    }

    /// All keys with what readers see of them.
    pub fn slots(&self) -> impl Iterator<Item = (&Key, &Arc<Slot>)> {
        self.held.iter().map(|(key, (_, slot))| (key, slot))
    }

    /// Has values read again that are too old for this registration, and calls `done` as soon as that is over, `patience` is,
    /// or waiting makes no sense (the store fails already, too many wait). Never blocks; `done` must not either: it runs
    /// here or on the cache's task.
    pub fn refresh(&self, keys: &[Key], patience: Duration, done: Box<dyn FnOnce() + Send>) {
        let entries = keys.iter().filter_map(|key| self.held.get(key)).map(|(id, _)| *id).collect();
        let done = Done(Some(done));
        // A command that is not taken is dropped here, and `done` runs with it.
        let _ = self.cache.commands.try_send(Command::Want { holder: self.holder, entries, patience, done });
    }

    /// Brings a newer credential, such as kubelet's next service-account token. No request follows from it unless the last
    /// login failed or the credential is the store's token itself.
    pub async fn set_credential(&self, credential: Arc<Credential>) {
        let command = Command::Credential { holder: self.holder, credential };
        // A stopped cache logs in no more.
        let _ = self.cache.commands.send(command).await;
    }

    fn missing(&self) -> impl Iterator<Item = (&Key, Option<StoreError>)> {
        let since = self.since.checked_sub(RECENT).unwrap_or(self.since);
        self.slots()
            .filter(|(_, slot)| slot.value().is_none())
            .map(move |(key, slot)| (key, slot.failure(since)))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // A stopped cache holds nothing any more.
        let _ = self.cache.leaving.send(self.holder);
    }
}

/// What a registration asks for.
struct Entrance {
    keys: Vec<Key>,
    credential: Arc<Credential>,
    freshness: Freshness,
    subscriber: Arc<dyn Subscriber>,
}

/// Where a registration is awaited.
type Reply = oneshot::Sender<Result<Registration, CacheError>>;

enum Command {
    Register {
        cache: Cache,
        entrance: Entrance,
        /// By when the credential must have logged in by itself; `None`: it need not.
        proof: Option<Instant>,
        reply: Reply,
    },
    Credential {
        holder: HolderId,
        credential: Arc<Credential>,
    },
    Want {
        holder: HolderId,
        entries: Vec<EntryId>,
        patience: Duration,
        done: Done,
    },
    Ping {
        reply: oneshot::Sender<()>,
    },
    Stop {
        stopped: oneshot::Sender<()>,
    },
}

/// What a waiting reader wants called: runs when it is dropped, so that no way out forgets it.
struct Done(Option<Box<dyn FnOnce() + Send>>);

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            shielded(done);
        }
    }
}

/// Runs foreign code on the cache's task; its panic ends only itself.
fn shielded(foreign: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(foreign)).is_err() {
        tracing::error!("a callback of the cache panicked");
    }
}

#[cfg(test)]
mod tests;
