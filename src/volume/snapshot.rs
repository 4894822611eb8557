//! The snapshot: one generation's files as bytes in secret pages. Reads are served straight from it, and it is what a
//! successor maps, so the format is versioned and fully checked when it is opened.
//!
//! All numbers little endian; offsets count from the start of the snapshot.
//!
//! ```text
//!   0  magic     8  "fusesec\0"
//!   8  version   u32  1
//!  12  checksum  u32  CRC-32 of everything from byte 16 to the length
//!  16  length    u64  of the whole snapshot
//!  24  generation u32
//!  28  files     u32
//!  32  created   i64  nanoseconds since 1970
//!  40  records   files × 64 bytes, in content order
//!      then names, lease ids and values, each where its record says
//!
//!  record: name offset u32, length u32 │ value offset u64, length u64 │ mtime i64 │ store version u64
//!          │ lease id offset u32, length u32 │ lease end i64 │ flags u32 (bit 0: absent) │ 0 u32
//! ```
//! An absent file is one whose value was given up (its grace ended): it is listed and answers EIO.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::secret::SecretBytes;
use crate::secret::pages::{MemoryError, Pages, SecretMemory, Sharing};

const MAGIC: &[u8; 8] = b"fusesec\0";
const VERSION: u32 = 1;
const HEADER: usize = 40;
const RECORD: usize = 64;
const CHECKED_FROM: usize = 16;
const ABSENT: u32 = 1;

/// What is written of one file.
pub struct FileImage<'a> {
    /// Its path in the volume.
    pub path: &'a str,
    /// Its bytes; `None`: absent.
    pub value: Option<&'a SecretBytes>,
    /// When this version of it was written.
    pub mtime: SystemTime,
    /// The store's version of the secret.
    pub version: Option<u64>,
    /// Id of the lease it came with.
    pub lease_id: Option<&'a str>,
    /// When that lease, or the value, ends.
    pub expires: Option<SystemTime>,
}

/// One file of a snapshot, without its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRecord {
    /// Its path in the volume.
    pub path: String,
    /// When this version of it was written.
    pub mtime: SystemTime,
    /// The store's version of the secret.
    pub version: Option<u64>,
    /// Id of the lease it came with.
    pub lease_id: Option<String>,
    /// When that lease, or the value, ends.
    pub expires: Option<SystemTime>,
    value: Option<Range<usize>>,
}

impl FileRecord {
    /// Length of its bytes; `None`: absent.
    #[must_use]
    pub fn size(&self) -> Option<usize> {
        self.value.as_ref().map(ExactSizeIterator::len)
    }
}

/// A snapshot that cannot be served, and where it breaks the format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SnapshotError {
    /// Not a snapshot, or a part of it lies outside.
    #[error("broken snapshot: {0}")]
    Broken(&'static str),
    /// A later format.
    #[error("snapshot of format {found}, this program reads up to {VERSION}")]
    Version {
        /// The format found.
        found: u32,
    },
}

/// Why a snapshot could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// No room.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Names or lease ids of more than 4 GiB.
    #[error("the volume's names and leases do not fit the snapshot format")]
    TooLarge,
    /// What was written cannot be read: memory at fault.
    #[error(transparent)]
    Unreadable(#[from] SnapshotError),
}

/// One generation in secret pages, checked, with its index beside it.
pub struct Snapshot {
    pages: Pages,
    generation: u32,
    created: SystemTime,
    files: Vec<FileRecord>,
}

impl Snapshot {
    /// Writes a generation into pages of its own and seals them.
    ///
    /// # Errors
    /// [`WriteError`]; nothing is left behind.
    pub fn write(
        memory: &Arc<SecretMemory>,
        sharing: Sharing,
        generation: u32,
        created: SystemTime,
        files: &[FileImage<'_>],
    ) -> Result<Self, WriteError> {
        let tail: usize = files
            .iter()
            .map(|file| {
                file.path.len() + file.lease_id.map_or(0, str::len) + file.value.map_or(0, SecretBytes::len)
            })
            .sum();
        let length = HEADER + files.len() * RECORD + tail;
        let mut pages = memory.allocate(length, sharing)?;
        let bytes = &mut pages.expose_mut()[..length];
        let count = u32::try_from(files.len()).map_err(|_| WriteError::TooLarge)?;
        bytes[0..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&(length as u64).to_le_bytes());
        bytes[24..28].copy_from_slice(&generation.to_le_bytes());
        bytes[28..32].copy_from_slice(&count.to_le_bytes());
        bytes[32..40].copy_from_slice(&nanoseconds(created).to_le_bytes());
        let mut at = HEADER + files.len() * RECORD;
        let mut append = |bytes: &mut [u8], part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
            at - part.len()
        };
        // Names and leases first: their offsets are 32 bits wide, however large the values are.
        let mut texts = Vec::with_capacity(files.len());
        for file in files {
            let name = append(bytes, file.path.as_bytes());
            texts.push((name, append(bytes, file.lease_id.unwrap_or_default().as_bytes())));
        }
        for (i, (file, (name, lease))) in files.iter().zip(texts).enumerate() {
            let value = file.value.map(|value| (append(bytes, value.expose()), value.len()));
            let narrow = |n: usize| u32::try_from(n).map_err(|_| WriteError::TooLarge);
            let mut record = [0; RECORD];
            record[0..4].copy_from_slice(&narrow(name)?.to_le_bytes());
            record[4..8].copy_from_slice(&narrow(file.path.len())?.to_le_bytes());
            let (offset, size) = value.unwrap_or_default();
            record[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
            record[16..24].copy_from_slice(&(size as u64).to_le_bytes());
            record[24..32].copy_from_slice(&nanoseconds(file.mtime).to_le_bytes());
            record[32..40].copy_from_slice(&file.version.unwrap_or(0).to_le_bytes());
            record[40..44].copy_from_slice(&narrow(lease)?.to_le_bytes());
            record[44..48].copy_from_slice(&narrow(file.lease_id.map_or(0, str::len))?.to_le_bytes());
            record[48..56].copy_from_slice(&file.expires.map_or(0, nanoseconds).to_le_bytes());
            record[56..60].copy_from_slice(&(if value.is_none() { ABSENT } else { 0 }).to_le_bytes());
            let start = HEADER + i * RECORD;
            bytes[start..start + RECORD].copy_from_slice(&record);
        }
        let checksum = crc32fast::hash(&bytes[CHECKED_FROM..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        pages.seal();
        Ok(Self::open(pages)?)
    }

    /// Checks pages that hold a snapshot, whoever wrote it: magic, format, checksum, and that every part lies inside.
    ///
    /// # Errors
    /// [`SnapshotError`]
    pub fn open(pages: Pages) -> Result<Self, SnapshotError> {
        let (generation, created, files) = parse(pages.expose())?;
        Ok(Self { pages, generation, created, files })
    }

    /// The pages that hold it.
    #[must_use]
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// The generation's number, counted from 1 for each volume.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// When it was built.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        self.created
    }

    /// Its files in content order.
    #[must_use]
    pub fn files(&self) -> &[FileRecord] {
        &self.files
    }

    /// The bytes of the file with this index; `None`: no such file, or absent.
    #[must_use]
    pub fn value(&self, index: usize) -> Option<&[u8]> {
        let range = self.files.get(index)?.value.clone()?;
        self.pages.expose().get(range)
    }
}

fn parse(bytes: &[u8]) -> Result<(u32, SystemTime, Vec<FileRecord>), SnapshotError> {
    use SnapshotError::Broken;
    let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Broken("shorter than its header"))?;
    if &header[0..8] != MAGIC {
        return Err(Broken("wrong magic"));
    }
    let version = u32_at(header, 8);
    if version != VERSION {
        return Err(SnapshotError::Version { found: version });
    }
    let length = usize::try_from(u64_at(header, 16)).map_err(|_| Broken("length"))?;
    let bytes = bytes.get(..length).filter(|b| b.len() >= HEADER).ok_or(Broken("length"))?;
    if crc32fast::hash(&bytes[CHECKED_FROM..]) != u32_at(header, 12) {
        return Err(Broken("checksum"));
    }
    let count = u32_at(header, 28) as usize;
    let records =
        count.checked_mul(RECORD).and_then(|n| bytes.get(HEADER..HEADER + n)).ok_or(Broken("file count"))?;
    let part = |offset: u64, size: u64| -> Option<Range<usize>> {
        let (start, size) = (usize::try_from(offset).ok()?, usize::try_from(size).ok()?);
        let end = start.checked_add(size)?;
        (end <= length).then_some(start..end)
    };
    let text = |offset: u32, size: u32| -> Option<String> {
        let range = part(offset.into(), size.into())?;
        String::from_utf8(bytes[range].to_vec()).ok()
    };
    let mut files = Vec::with_capacity(records.len() / RECORD);
    for record in records.chunks_exact(RECORD) {
        let path = text(u32_at(record, 0), u32_at(record, 4)).ok_or(Broken("a name"))?;
        let lease = text(u32_at(record, 40), u32_at(record, 44)).ok_or(Broken("a lease"))?;
        let value = part(u64_at(record, 8), u64_at(record, 16)).ok_or(Broken("a value"))?;
        files.push(FileRecord {
            path,
            mtime: moment(u64_at(record, 24).cast_signed()),
            version: Some(u64_at(record, 32)).filter(|version| *version != 0),
            lease_id: Some(lease).filter(|id| !id.is_empty()),
            expires: Some(u64_at(record, 48).cast_signed()).filter(|end| *end != 0).map(moment),
            value: (u32_at(record, 56) & ABSENT == 0).then_some(value),
        });
    }
    Ok((u32_at(header, 24), moment(u64_at(header, 32).cast_signed()), files))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

/// Nanoseconds since 1970; a time outside ±292 years becomes the nearest one inside.
fn nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, i64::wrapping_neg),
    }
}

fn moment(nanoseconds: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
    if nanoseconds < 0 { SystemTime::UNIX_EPOCH - distance } else { SystemTime::UNIX_EPOCH + distance }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image<'a>(path: &'a str, value: Option<&'a SecretBytes>) -> FileImage<'a> {
        let mtime = moment(1_700_000_000_123_456_789);
        FileImage { path, value, mtime, version: Some(7), lease_id: Some("db/creds/1"), expires: Some(mtime) }
    }

    fn sample(memory: &Arc<SecretMemory>) -> Snapshot {
        let (a, b) = (SecretBytes::new(b"alpha".to_vec()), SecretBytes::new(vec![]));
        let files = [image("a", Some(&a)), image("dir/b", Some(&b)), image("gone", None)];
        Snapshot::write(memory, Sharing::Own, 3, moment(5), &files).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let snapshot = sample(&SecretMemory::new().unwrap());
        assert_eq!((snapshot.generation(), snapshot.created()), (3, moment(5)));
        assert_eq!(snapshot.value(0), Some(b"alpha".as_slice()));
        assert_eq!(snapshot.value(1), Some(b"".as_slice()));
        assert_eq!((snapshot.value(2), snapshot.value(3)), (None, None));
        let record = &snapshot.files()[1];
        assert_eq!((record.path.as_str(), record.size(), record.version), ("dir/b", Some(0), Some(7)));
        assert_eq!(record.lease_id.as_deref(), Some("db/creds/1"));
        assert_eq!(record.mtime, moment(1_700_000_000_123_456_789));
        assert_eq!(record.expires, Some(record.mtime));
    }

    /// What version 1 of the program writes. Later versions must read it: this file is never changed.
    const RECORDED: &str = include_str!("../../tests/snapshot-v1.hex");

    #[test]
    fn a_snapshot_of_version_1_is_read_by_this_and_every_later_version() {
        let memory = SecretMemory::new().unwrap();
        let bytes = hex::decode(RECORDED.split_whitespace().collect::<String>()).unwrap();
        let mut pages = memory.allocate(bytes.len(), Sharing::Own).unwrap();
        pages.expose_mut().copy_from_slice(&bytes);
        let (recorded, sample) = (Snapshot::open(pages).unwrap(), sample(&memory));
        assert_eq!(recorded.files(), sample.files());
        assert_eq!((recorded.generation(), recorded.created()), (sample.generation(), sample.created()));
        assert_eq!((recorded.value(0), recorded.value(1)), (Some(b"alpha".as_slice()), Some(b"".as_slice())));
        assert_eq!(recorded.value(2), None);
        assert_eq!(sample.pages.expose(), bytes, "what is written has not changed either");
    }

    #[test]
    fn a_lent_snapshot_is_read_from_its_file() {
        let memory = SecretMemory::new().unwrap();
        let value = SecretBytes::new(b"alpha".to_vec());
        let lent =
            Snapshot::write(&memory, Sharing::Lent, 9, moment(5), &[image("a", Some(&value))]).unwrap();
        let file = lent.pages().file().unwrap().try_clone_to_owned().unwrap();
        drop(lent);
        let successor = Snapshot::open(memory.adopt(file).unwrap()).unwrap();
        assert_eq!((successor.generation(), successor.value(0)), (9, Some(b"alpha".as_slice())));
    }

    proptest! {
        #[test]
        fn no_damaged_byte_is_served(at in 0usize..400, flip in 1u8..) {
            let memory = SecretMemory::new().unwrap();
            let whole = sample(&memory).pages.expose().to_vec();
            let length = usize::try_from(u64_at(&whole, 16)).unwrap();
            let at = at % length;
            let mut damaged = memory.allocate(whole.len(), Sharing::Own).unwrap();
            damaged.expose_mut().copy_from_slice(&whole);
            damaged.expose_mut()[at] ^= flip;
            prop_assert!(Snapshot::open(damaged).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 1..300)) {
            let mut forged = bytes;
            let length = forged.len();
            if length > HEADER {
                forged[0..8].copy_from_slice(MAGIC);
                forged[8..12].copy_from_slice(&VERSION.to_le_bytes());
                forged[16..24].copy_from_slice(&(length as u64).to_le_bytes());
                let checksum = crc32fast::hash(&forged[CHECKED_FROM..]);
                forged[12..16].copy_from_slice(&checksum.to_le_bytes());
            }
            let memory = SecretMemory::new().unwrap();
            let mut pages = memory.allocate(length, Sharing::Own).unwrap();
            pages.expose_mut()[..length].copy_from_slice(&forged);
            if let Ok(snapshot) = Snapshot::open(pages) {
                for i in 0..snapshot.files().len() {
                    let _ = snapshot.value(i);
                }
            }
        }
    }
}
