//! Volumes whose mount somebody else keeps, with all that a successor needs to go on: the record, the table of opens, and each
//! generation *before* it is served. What could not be deposited is served all the same, and tried again.
//!
//! ```text
//!   an answer changed ─▶ generation written ─▶ deposited (at most `PATIENCE`) ─▶ installed
//!                                                  │ no: owed, until a sweep or the keeper's return
//! ```
//! Nothing here is wiped when it is dropped, unless the volume was given up.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fuse_secrets_csi::wire::message::Part;
use tokio::runtime::Handle;

use super::build::BuildError;
use super::opens::Opens;
use super::record::{Draft, Init};
use super::{NewFile, Pod, Surroundings, Volume};
use crate::reference::{VolumeId, VolumeSpec};
use crate::secret::Token;
use crate::secret::pages::{MemoryError, Pages};
use crate::store::Credential;
use crate::time::Moment;

/// A deposit that takes longer is owed: readers wait for what it is about.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a new volume's parts are offered to a keeper that does not take them in that time.
const OFFERS: usize = 5;

/// Who keeps the parts of lent volumes beyond this process's end.
pub trait Keeper: Send + Sync + 'static {
    /// Takes a part, in place of an earlier one of the same kind and number, and lets go of the generations that are `gone`. An
    /// error means that it is not kept; it is asked again later. May be dropped while it waits.
    fn deposit(
        &self,
        volume: &VolumeId,
        part: Part,
        file: OwnedFd,
        gone: Vec<u32>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>>;
}

/// What a lent volume has beside the rest.
#[derive(Clone)]
pub struct Lending {
    /// Who keeps its parts.
    pub keeper: Arc<dyn Keeper>,
    /// Where it is mounted, for people.
    pub target: String,
    /// The pod's group.
    pub group: Option<u32>,
    /// What was negotiated for its mount.
    pub init: Init,
}

/// The state of one.
pub(super) struct Lent {
    pub(super) lending: Lending,
    /// Where builds run: a handler's thread has no runtime.
    pub(super) runtime: Handle,
    /// One build at a time; whether the volume is a successor's by now.
    turn: tokio::sync::Mutex<bool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    record: Option<Arc<Pages>>,
    credential: Option<Arc<Credential>>,
    owed: BTreeSet<Part>,
}

impl Lent {
    pub(super) fn new(lending: Lending, record: Option<Pages>, credential: Option<Arc<Credential>>) -> Self {
        let state = State { record: record.map(Arc::new), credential, owed: BTreeSet::new() };
        let turn = tokio::sync::Mutex::new(false);
        Self { lending, runtime: Handle::current(), turn, state: Mutex::new(state) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume {
    /// A lent volume without content; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// No memory or descriptor left for its table of opens.
    pub fn lent(
        id: VolumeId,
        spec: VolumeSpec,
        pod: Pod,
        surroundings: Surroundings,
        lending: Lending,
    ) -> io::Result<Arc<Self>> {
        let opens = Opens::lent(spec.files.len())?;
        Ok(Self::assemble(id, spec, Some(pod), surroundings, opens, Some(Lent::new(lending, None, None))))
    }

    /// What it has beside the rest, if it is lent.
    #[must_use]
    pub fn lending(&self) -> Option<&Lending> {
        self.lent.as_ref().map(|lent| &lent.lending)
    }

    /// Gives a lent volume a newer token, and its successors too. The one that it has changes nothing.
    ///
    /// # Errors
    /// No room for the record: the token is used all the same.
    pub async fn renew(&self, token: Token) -> Result<(), MemoryError> {
        let Some(lent) = &self.lent else { return Ok(()) };
        let held = lent.state().credential.clone();
        if matches!(held.as_deref(), Some(Credential::Jwt(held)) if held.expose() == token.expose()) {
            return Ok(());
        }
        let record = self.draft(lent, &token);
        let credential = Arc::new(Credential::Jwt(token));
        lent.state().credential = Some(Arc::clone(&credential));
        self.set_credential(credential).await;
        let former = lent.state().record.replace(Arc::new(record?));
        self.deposit(lent, Part::Record).await;
        // Only now does nobody need the one before.
        former.iter().for_each(|former| former.wipe_on_drop());
        Ok(())
    }

    /// Deposits all that there is beside generations, for the first time.
    ///
    /// # Errors
    /// No room for the record, or the keeper did not take it.
    pub async fn deposit_all(&self, credential: &Arc<Credential>) -> io::Result<()> {
        let Some(lent) = &self.lent else { return Ok(()) };
        if let Credential::Jwt(token) = &**credential {
            let full = |error| io::Error::new(io::ErrorKind::QuotaExceeded, error);
            let record = self.draft(lent, token).map_err(full)?;
            let mut state = lent.state();
            state.record = Some(Arc::new(record));
            state.credential = Some(Arc::clone(credential));
        }
        lent.state().owed.extend([Part::Record, Part::Opens]);
        // Beside what the first build owes. A busy node takes longer than a reader of a served volume may wait.
        for _ in 0..OFFERS {
            let owed = std::mem::take(&mut lent.state().owed);
            for part in owed {
                self.deposit(lent, part).await;
            }
            if lent.state().owed.is_empty() {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::NotConnected, "the shim did not take what a successor needs"))
    }

    fn draft(&self, lent: &Lent, token: &Token) -> Result<Pages, MemoryError> {
        let Lending { target, group, init, .. } = &lent.lending;
        let (spec, pod) = (&self.spec, self.pod.as_ref());
        Draft { spec, pod, group: *group, target, init: *init, token }.write(&self.surroundings.memory)
    }

    /// The newest credential, if it is not this one.
    pub(super) fn newer_than(&self, used: &Arc<Credential>) -> Option<Arc<Credential>> {
        let newest = self.lent.as_ref()?.state().credential.clone()?;
        (!Arc::ptr_eq(&newest, used)).then_some(newest)
    }

    pub(super) async fn rebuild_lent(&self, lent: &Lent, now: Moment) -> Result<(), BuildError> {
        let retired = lent.turn.lock().await;
        if *retired {
            return Ok(());
        }
        let (sources, next) = {
            let built_from = self.built_from();
            let Some(sources) = self.sources(&built_from, now) else { return Ok(()) };
            let next = self.next(&sources, now);
            (sources, next)
        };
        let result = match next {
            Ok(next) => {
                self.install_lent(lent, next, now).await;
                Ok(())
            }
            Err(error) => Err(error),
        };
        self.conclude(&mut self.built_from(), &sources, result)
    }

    /// Installs files as a generation of any volume; a lent one's is deposited first. The order is the spec's.
    ///
    /// # Errors
    /// [`BuildError::Write`]
    pub async fn put(&self, files: &[NewFile], now: Moment) -> Result<(), BuildError> {
        let Some(lent) = &self.lent else { return self.install(files, now) };
        let retired = lent.turn.lock().await;
        if *retired {
            return Ok(());
        }
        let next = self.write(files, now)?;
        self.install_lent(lent, next, now).await;
        Ok(())
    }

    async fn install_lent(&self, lent: &Lent, next: Option<super::build::Next>, now: Moment) {
        let Some(next) = next else { return };
        let part = Part::Generation(next.snapshot.generation());
        self.hand_over(lent, part, next.snapshot.pages().file()).await;
        self.install_next(Some(next), now);
    }

    /// All parts that a successor needs, for a keeper that has none of them: one that was started anew.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn parts(&self) -> io::Result<Vec<(Part, OwnedFd)>> {
        let Some(lent) = &self.lent else { return Ok(Vec::new()) };
        let generations = self.generations.kept();
        let mut parts: BTreeSet<Part> =
            generations.iter().map(|generation| Part::Generation(generation.number())).collect();
        parts.extend([Part::Record, Part::Opens]);
        let mut files = Vec::with_capacity(parts.len());
        for part in parts {
            if let Some(file) = self.file(lent, part).transpose()? {
                files.push((part, file));
            }
        }
        // It has all of them now.
        lent.state().owed.clear();
        let _ = self.generations.take_gone();
        Ok(files)
    }

    /// What is to be done from time to time: notes the refreshes, ends what has lasted long enough, deposits what is owed.
    pub async fn sweep(&self, now: Moment) {
        let Some(lent) = &self.lent else { return };
        self.note_refreshes();
        let over = |file| self.inherited_standing(file, now) == super::Standing::Gone;
        if self.inherited.get().is_some() && (0..self.spec.files.len()).any(over) {
            // A failure is told by the build.
            let _ = self.rebuild(now).await;
        }
        let owed = std::mem::take(&mut lent.state().owed);
        for part in owed {
            self.deposit(lent, part).await;
        }
        let gone = self.generations.take_gone();
        if !gone.is_empty() {
            self.generations.untell(gone);
            self.deposit(lent, Part::Opens).await;
        }
    }

    /// It is a successor's from now on: nothing is built or deposited any more.
    pub async fn retire(&self) {
        if let Some(lent) = &self.lent {
            *lent.turn.lock().await = true;
        }
    }

    /// It is nobody's any more: all of it is wiped as soon as nobody reads it.
    pub async fn give_up(&self) {
        self.retire().await;
        self.generations.give_up();
        let record = self.lent.as_ref().and_then(|lent| lent.state().record.take());
        record.iter().for_each(|record| record.wipe_on_drop());
    }

    async fn deposit(&self, lent: &Lent, part: Part) {
        let record = lent.state().record.clone();
        let generation = match part {
            Part::Generation(number) => self.generations.find(number),
            _ => None,
        };
        let file = match part {
            Part::Record => record.as_deref().and_then(Pages::file),
            Part::Opens => self.generations.opens().file(),
            Part::Generation(_) => generation.as_ref().and_then(|found| found.snapshot.pages().file()),
            Part::Other => None,
        };
        // What is gone by now is owed to nobody.
        if file.is_some() {
            self.hand_over(lent, part, file).await;
        }
    }

    async fn hand_over(&self, lent: &Lent, part: Part, file: Option<BorrowedFd<'_>>) {
        let gone = self.generations.take_gone();
        let file =
            file.ok_or_else(|| io::ErrorKind::NotFound.into()).and_then(|file| file.try_clone_to_owned());
        let outcome = match file {
            Ok(file) => {
                let deposit = lent.lending.keeper.deposit(&self.id, part, file, gone.clone());
                let late = |_| Err(io::ErrorKind::TimedOut.into());
                tokio::time::timeout(PATIENCE, deposit).await.unwrap_or_else(late)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::warn!(volume = %self.id.0, ?part, %error, "not deposited; tried again");
            self.generations.untell(gone);
            lent.state().owed.insert(part);
        }
    }

    fn file(&self, lent: &Lent, part: Part) -> Option<io::Result<OwnedFd>> {
        let clone = |file: BorrowedFd<'_>| file.try_clone_to_owned();
        match part {
            Part::Record => lent.state().record.as_deref().and_then(Pages::file).map(clone),
            Part::Opens => self.generations.opens().file().map(clone),
            Part::Generation(number) => self.generations.find(number)?.snapshot.pages().file().map(clone),
            Part::Other => None,
        }
    }
}

/// A keeper for tests.
#[cfg(test)]
pub(crate) mod testing;
