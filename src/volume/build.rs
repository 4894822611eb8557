//! From answers to the next generation: each file is cut out of its answer, compared with the generation before, and
//! written with the others if any of them differs.

use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use super::generation::Generation;
use super::snapshot::{FileImage, FileRecord, Snapshot, WriteError};
use super::{Change, Standing, Surroundings, Volume};
use crate::cache::{State, Value};
use crate::reference::FileSpec;
use crate::secret::SecretBytes;
use crate::secret::pages::{MemoryError, SecretMemory, Sharing};
use crate::store::answer::{ExtractError, extract};
use crate::time::Moment;

/// Why no generation could be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Files that cannot be cut out of their answers.
    #[error("{}", super::list(.0))]
    Extract(Vec<(String, ExtractError)>),
    /// No room, or broken memory.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Where a file's bytes come from.
pub(super) enum Source {
    /// From the store's answer.
    Answer(Arc<Value>),
    /// From the generation that a predecessor left: the store has not answered since.
    Carried,
    /// From nowhere: its grace ended.
    Over,
}

/// What a generation was built from, to know when that is something else.
pub(super) enum Basis {
    Answer(Weak<Value>),
    Carried,
    Over,
}

impl Source {
    pub(super) fn basis(&self) -> Basis {
        match self {
            Self::Answer(value) => Basis::Answer(Arc::downgrade(value)),
            Self::Carried => Basis::Carried,
            Self::Over => Basis::Over,
        }
    }

    pub(super) fn is(&self, basis: &Basis) -> bool {
        match (self, basis) {
            (Self::Answer(value), Basis::Answer(built)) => std::ptr::eq(Arc::as_ptr(value), built.as_ptr()),
            (Self::Carried, Basis::Carried) | (Self::Over, Basis::Over) => true,
            _ => false,
        }
    }
}

/// One file of a generation to be.
pub struct NewFile {
    /// Its bytes; `None`: given up.
    pub value: Option<SecretBytes>,
    /// When the store says it was written, else when it was read.
    pub written: SystemTime,
    /// The store's version.
    pub version: Option<u64>,
    /// The lease it came with.
    pub lease_id: Option<String>,
    /// When that ends.
    pub expires: Option<SystemTime>,
}

impl Default for NewFile {
    fn default() -> Self {
        Self { value: None, written: SystemTime::UNIX_EPOCH, version: None, lease_id: None, expires: None }
    }
}

impl NewFile {
    fn same_as(&self, snapshot: &Snapshot, index: usize) -> bool {
        self.value.as_ref().map(SecretBytes::expose) == snapshot.value(index)
    }
}

impl Volume {
    /// Builds and installs a generation if any file's bytes differ from the current one; a lent volume's is deposited first.
    /// Called whenever an answer changed.
    ///
    /// # Errors
    /// [`BuildError`]: the current generation stays; [`Volume::report`] tells.
    pub async fn rebuild(&self, now: Moment) -> Result<(), BuildError> {
        match &self.lent {
            Some(lent) => self.rebuild_lent(lent, now).await,
            None => self.build(now),
        }
    }

    fn build(&self, now: Moment) -> Result<(), BuildError> {
        let mut built_from = self.built_from();
        let Some(sources) = self.sources(&built_from, now) else { return Ok(()) };
        let result = self.next(&sources, now).map(|next| self.install_next(next, now));
        self.conclude(&mut built_from, &sources, result)
    }

    /// Where the files' bytes are to come from; `None`: from where they came last time, or from nowhere yet.
    pub(super) fn sources(&self, built_from: &[Basis], now: Moment) -> Option<Vec<Source>> {
        if self.slots().is_empty() && self.inherited.get().is_none() {
            return None;
        }
        let restored = self.generations.current().is_some();
        let source = |file| match self.slot(file) {
            Some(slot) if slot.state() != State::Empty => {
                Some(slot.value().filter(|_| !self.is_over(slot, now)).map_or(Source::Over, Source::Answer))
            }
            // Nothing to go on with, nothing to serve meanwhile.
            _ if !restored => None,
            _ if matches!(self.inherited_standing(file, now), Standing::Gone) => Some(Source::Over),
            _ => Some(Source::Carried),
        };
        let sources: Vec<Source> = (0..self.spec.files.len()).map(source).collect::<Option<_>>()?;
        let same = sources.len() == built_from.len() && sources.iter().zip(built_from).all(|(s, b)| s.is(b));
        (!same).then_some(sources)
    }

    /// Writes the next generation; `None`: it would be the current one.
    pub(super) fn next(&self, sources: &[Source], now: Moment) -> Result<Option<Next>, BuildError> {
        let current = self.generations.current();
        let files = cut(&self.spec.files, sources, current.as_deref())?;
        self.write(&files, now)
    }

    pub(super) fn write(&self, files: &[NewFile], now: Moment) -> Result<Option<Next>, BuildError> {
        let sharing = if self.lent.is_some() { Sharing::Lent } else { Sharing::Own };
        let memory = (&self.surroundings.memory, sharing);
        let current = self.generations.current();
        let number = self.generations.next_number();
        Next::build(&self.spec.files, files, current.as_deref(), number, memory, now)
    }

    /// Notes how a build went.
    pub(super) fn conclude(
        &self,
        built_from: &mut Vec<Basis>,
        sources: &[Source],
        result: Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        // What failed for want of room is tried again; what cannot be cut out of these answers never will be.
        let basis = || sources.iter().map(Source::basis).collect();
        *built_from = if matches!(result, Err(BuildError::Write(_))) { Vec::new() } else { basis() };
        let text = result.as_ref().err().map(ToString::to_string);
        if let Some(text) = &text {
            self.surroundings.metrics.generations_failed.increment();
            if let Err(BuildError::Write(WriteError::Memory(MemoryError::Full { .. }))) = &result {
                self.surroundings.metrics.memory_refused.increment();
            }
            // The first generation's faults are its publisher's to tell.
            if self.generations.current().is_some() {
                tracing::warn!(volume = %self.id.0, "no new generation: {text}");
            }
        }
        *self.last_build_error.lock().unwrap_or_else(PoisonError::into_inner) = text;
        result
    }

    /// Installs files as a generation of an own volume, unless they are the current one's to the byte. The order is the spec's.
    ///
    /// # Errors
    /// [`BuildError::Write`]
    pub fn install(&self, files: &[NewFile], now: Moment) -> Result<(), BuildError> {
        let next = self.write(files, now)?;
        self.install_next(next, now);
        Ok(())
    }

    pub(super) fn install_next(&self, next: Option<Next>, now: Moment) {
        let Some(next) = next else { return };
        let Surroundings { memory, metrics, .. } = &self.surroundings;
        let is_first = self.generations.current().is_none();
        let (number, changed) = (next.snapshot.generation(), next.changed);
        let gone = self.generations.install(next.snapshot, next.since, now, next.forget_older);
        self.note_refreshes();
        metrics.generations_built.increment();
        metrics.generations_evicted.add(gone.iter().filter(|(_, open)| *open).count() as u64);
        metrics.memory_used.set(memory.used() as u64);
        if !is_first {
            let names: Vec<&str> = changed.iter().map(|&i| self.spec.files[i].path.as_str()).collect();
            tracing::info!(volume = %self.id.0, generation = number, files = names.join(", "), "changed");
        }
        if let Some(listener) = self.listener.get().and_then(Weak::upgrade) {
            let gone = gone.into_iter().map(|(number, _)| number).collect();
            listener.changed(&Change { generation: number, files: changed, gone });
        }
    }

    /// Builds, at once or as soon as it can be deposited, then calls `done`. A failure is told by the build, and leaves the last
    /// known value to be served.
    pub(super) fn rebuild_soon(self: &Arc<Self>, now: Moment, done: Box<dyn FnOnce() + Send>) {
        match &self.lent {
            None => {
                let _ = self.build(now);
                done();
            }
            Some(lent) => {
                let volume = Arc::clone(self);
                lent.runtime.spawn(async move {
                    let _ = volume.rebuild(now).await;
                    done();
                });
            }
        }
    }

    /// Writes down, for a successor, when the store last answered for each file.
    pub(super) fn note_refreshes(&self) {
        for file in 0..self.spec.files.len() {
            if let Some(at) = self.refreshed(file) {
                self.generations.opens().note_refreshed(file, at);
            }
        }
    }

    pub(super) fn built_from(&self) -> MutexGuard<'_, Vec<Basis>> {
        self.built_from.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next generation, written but not installed.
pub(super) struct Next {
    /// Its bytes.
    pub(super) snapshot: Snapshot,
    /// Per file, the generation in which its bytes last changed.
    pub(super) since: Vec<u32>,
    /// The files whose bytes changed now.
    pub(super) changed: Vec<usize>,
    /// A value was given up, and must not live on in older generations.
    pub(super) forget_older: bool,
}

impl Next {
    /// Writes it with this number; `None`: every byte is as in the current one.
    pub(super) fn build(
        specs: &[FileSpec],
        files: &[NewFile],
        current: Option<&Generation>,
        number: u32,
        (memory, sharing): (&Arc<SecretMemory>, Sharing),
        now: Moment,
    ) -> Result<Option<Self>, BuildError> {
        let before = current.map(|current| &current.snapshot);
        let differs: Vec<bool> =
            files.iter().enumerate().map(|(i, file)| before.is_none_or(|b| !file.same_as(b, i))).collect();
        if before.is_some() && !differs.contains(&true) {
            return Ok(None);
        }
        let images: Vec<FileImage<'_>> = (specs.iter().zip(files).enumerate())
            .map(|(i, (spec, file))| FileImage {
                path: spec.path.as_str(),
                value: file.value.as_ref(),
                mtime: mtime(file, before.and_then(|b| b.files().get(i)), differs[i], now),
                version: file.version,
                lease_id: file.lease_id.as_deref(),
                expires: file.expires,
            })
            .collect();
        Ok(Some(Self {
            snapshot: Snapshot::write(memory, sharing, number, now.wall, &images)?,
            since: (0..files.len())
                .map(|i| current.filter(|_| !differs[i]).map_or(number, |current| current.since(i)))
                .collect(),
            forget_older: files.iter().zip(&differs).any(|(file, differs)| *differs && file.value.is_none()),
            changed: (0..files.len()).filter(|&i| differs[i]).collect(),
        }))
    }
}

/// Cuts each file out of its source; every fault at once.
pub(super) fn cut(
    specs: &[FileSpec],
    sources: &[Source],
    current: Option<&Generation>,
) -> Result<Vec<NewFile>, BuildError> {
    let mut faults = Vec::new();
    let mut files = Vec::with_capacity(sources.len());
    for (index, (spec, source)) in specs.iter().zip(sources).enumerate() {
        let value = match source {
            Source::Answer(value) => value,
            Source::Carried => {
                files
                    .push(current.map_or_else(NewFile::default, |current| carried(&current.snapshot, index)));
                continue;
            }
            Source::Over => {
                files.push(NewFile::default());
                continue;
            }
        };
        match extract(value.body.expose(), spec.key.as_deref(), spec.encoding) {
            Ok(bytes) => files.push(NewFile {
                value: Some(bytes),
                written: value.created.unwrap_or(value.read_at.wall),
                version: value.version,
                lease_id: value.lease.id.clone(),
                expires: value.lease.duration.map(|duration| value.read_at.wall + duration),
            }),
            Err(error) => faults.push((spec.path.to_string(), error)),
        }
    }
    if faults.is_empty() { Ok(files) } else { Err(BuildError::Extract(faults)) }
}

/// A file as a generation has it.
fn carried(snapshot: &Snapshot, index: usize) -> NewFile {
    let value = snapshot.value(index).map(|bytes| SecretBytes::new(bytes.to_vec()));
    let Some(record) = snapshot.files().get(index) else { return NewFile::default() };
    let FileRecord { mtime, version, lease_id, expires, .. } = record;
    NewFile { value, written: *mtime, version: *version, lease_id: lease_id.clone(), expires: *expires }
}

/// The `mtime` of a file in the generation that is being built: that of its version, never going backwards, and never the
/// same for other bytes.
fn mtime(file: &NewFile, before: Option<&FileRecord>, differs: bool, now: Moment) -> SystemTime {
    let Some(before) = before else { return file.written };
    if !differs {
        return before.mtime;
    }
    let floor = before.mtime + Duration::from_nanos(1);
    if file.written >= floor { file.written } else { now.wall.max(floor) }
}
