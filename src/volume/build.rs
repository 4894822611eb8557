//! From answers to the next generation: each file is cut out of its answer, compared with the generation before, and
//! written with the others if any of them differs.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use super::generation::Generation;
use super::snapshot::{FileImage, FileRecord, Snapshot, WriteError};
use crate::cache::Value;
use crate::reference::FileSpec;
use crate::secret::SecretBytes;
use crate::secret::pages::{SecretMemory, Sharing};
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
