//! What is open and shown, as numbers that survive the process: how many handles each kept generation has, which generation
//! each file shows, when the store last answered for it. No secret is in it, so a lent volume's table lies in an ordinary memory
//! file, shared by whoever serves; an own volume's on the heap.
//!
//! ```text
//!   word 0  magic      word 1  number of files
//!   then 16 words, one per kept generation: its number above, its open handles below
//!   then two words per file: the generation it shows; when it was last answered, in milliseconds since 1970
//! ```
//! A process may die between the count of a handle and the answer to whoever opened it, and then the kernel asks again. So an
//! open is counted before it is answered and a close after: a count is never too low, and one that is too high keeps a
//! generation until the limit pushes it out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::sys::mapping::memory_file;
use crate::sys::page_size;
use crate::sys::words::Words;

const MAGIC: u64 = u64::from_le_bytes(*b"fsopens\x01");
const HEAD: usize = 2;
/// More than are ever kept: the newest two, the older open ones, and one that is being installed.
const SLOTS: usize = 16;
/// Open handles of a generation whose count was lost: never down to none.
const UNKNOWN: u32 = 1 << 31;

enum Memory {
    Own(Box<[AtomicU64]>),
    Lent(Words, OwnedFd),
}

/// The table of one volume.
pub struct Opens {
    memory: Memory,
    files: usize,
}

impl Opens {
    /// A table of this process's alone.
    #[must_use]
    pub fn own(files: usize) -> Self {
        Self::filled(Memory::Own((0..length(files)).map(|_| AtomicU64::new(0)).collect()), files)
    }

    /// A table that a successor can adopt.
    ///
    /// # Errors
    /// No memory or descriptor left.
    pub fn lent(files: usize) -> io::Result<Self> {
        let file = memory_file((length(files) * size_of::<u64>()).next_multiple_of(page_size()))?;
        let words = Words::of_file(&file, length(files))?;
        Ok(Self::filled(Memory::Lent(words, file), files))
    }

    fn filled(memory: Memory, files: usize) -> Self {
        let table = Self { memory, files };
        table.words()[0].store(MAGIC, Ordering::Release);
        table.words()[1].store(files as u64, Ordering::Release);
        table
    }

    /// A predecessor's table.
    ///
    /// # Errors
    /// It is none, or of another number of files.
    pub fn adopt(file: OwnedFd, files: usize) -> io::Result<Self> {
        let words = Words::of_file(&file, length(files))?;
        let found = (words[0].load(Ordering::Acquire), words[1].load(Ordering::Acquire));
        if found != (MAGIC, files as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a table of open handles"));
        }
        Ok(Self { memory: Memory::Lent(words, file), files })
    }

    /// The file of a lent table, to hand over.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.memory {
            Memory::Own(_) => None,
            Memory::Lent(_, file) => Some(file.as_fd()),
        }
    }

    /// The place where a generation's handles are counted: the one that it has, or a free one, with no handle yet. Called by one
    /// thread at a time, as is [`Opens::keep_only`].
    #[must_use]
    pub fn place(&self, number: u32) -> usize {
        let slots = self.slots();
        let find = |wanted| slots.iter().position(|slot| split(slot.load(Ordering::Acquire)).0 == wanted);
        let place = find(number)
            .or_else(|| find(0).inspect(|&free| slots[free].store(join(number, 0), Ordering::Release)));
        // Never none: fewer are kept than there are places.
        place.unwrap_or(usize::MAX)
    }

    /// A generation of whose handles nothing is known counts as open for ever.
    pub fn assume_open(&self, place: usize, number: u32) {
        if let Some(slot) = self.slots().get(place) {
            slot.store(join(number, UNKNOWN), Ordering::Release);
        }
    }

    /// Frees the places of all other generations.
    pub fn keep_only(&self, numbers: &[u32]) {
        for slot in self.slots() {
            if !numbers.contains(&split(slot.load(Ordering::Acquire)).0) {
                slot.store(0, Ordering::Release);
            }
        }
    }

    /// Handles open on a generation.
    #[must_use]
    pub fn count(&self, place: usize, number: u32) -> u32 {
        let found = self.slots().get(place).map_or((0, 0), |slot| split(slot.load(Ordering::Acquire)));
        if found.0 == number { found.1 } else { 0 }
    }

    /// Counts a handle.
    pub fn add(&self, place: usize, number: u32) {
        self.change(place, number, |count| Some(count.saturating_add(1)));
    }

    /// Takes a handle off; whether it was the last one.
    pub fn take(&self, place: usize, number: u32) -> bool {
        self.change(place, number, |count| count.checked_sub(1)) == Some(1)
    }

    /// The count before, if the place is still this generation's and there is another count.
    fn change(&self, place: usize, number: u32, to: impl Fn(u32) -> Option<u32>) -> Option<u32> {
        let next = |word| match split(word) {
            (found, count) if found == number => to(count).map(|count| join(number, count)),
            _ => None,
        };
        let slot = self.slots().get(place)?;
        slot.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).ok().map(|word| split(word).1)
    }

    /// The generation that a file shows; 0 before the first look.
    #[must_use]
    pub fn shown(&self, file: usize) -> u32 {
        self.file_words(file).map_or(0, |words| split(words[0].load(Ordering::Acquire)).1)
    }

    /// Notes which generation a file shows.
    pub fn show(&self, file: usize, number: u32) {
        if let Some(words) = self.file_words(file) {
            words[0].store(number.into(), Ordering::Release);
        }
    }

    /// When the store last answered for a file, as far as it was noted.
    #[must_use]
    pub fn refreshed(&self, file: usize) -> Option<SystemTime> {
        let noted = self.file_words(file)?[1].load(Ordering::Acquire);
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(noted)).filter(|_| noted != 0)
    }

    /// Notes when the store last answered for a file.
    pub fn note_refreshed(&self, file: usize, at: SystemTime) {
        let noted = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        if let Some(words) = self.file_words(file) {
            words[1].store(u64::try_from(noted).unwrap_or(u64::MAX), Ordering::Release);
        }
    }

    fn words(&self) -> &[AtomicU64] {
        match &self.memory {
            Memory::Own(words) => words,
            Memory::Lent(words, _) => words,
        }
    }

    fn slots(&self) -> &[AtomicU64] {
        &self.words()[HEAD..HEAD + SLOTS]
    }

    fn file_words(&self, file: usize) -> Option<&[AtomicU64]> {
        let at = HEAD + SLOTS + 2 * file;
        (file < self.files).then(|| &self.words()[at..at + 2])
    }
}

fn length(files: usize) -> usize {
    HEAD + SLOTS + 2 * files
}

fn join(number: u32, count: u32) -> u64 {
    u64::from(number) << 32 | u64::from(count)
}

fn split(word: u64) -> (u32, u32) {
    let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
    (half(word >> 32), half(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_reads_what_was_counted_and_both_count_on() {
        let table = Opens::lent(3).unwrap();
        let place = table.place(7);
        table.add(place, 7);
        table.add(place, 7);
        table.show(2, 7);
        let when = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        table.note_refreshed(1, when);
        let next = Opens::adopt(table.file().unwrap().try_clone_to_owned().unwrap(), 3).unwrap();
        assert_eq!((next.place(7), next.count(place, 7)), (place, 2));
        assert_eq!((next.shown(2), next.shown(0)), (7, 0));
        assert_eq!((next.refreshed(1), next.refreshed(0)), (Some(when), None));
        assert!(!next.take(place, 7));
        assert!(table.take(place, 7));
        assert!(!table.take(place, 7), "never below none");
    }

    #[test]
    fn what_is_no_table_of_so_many_files_is_refused() {
        let table = Opens::lent(3).unwrap();
        let file = || table.file().unwrap().try_clone_to_owned().unwrap();
        assert!(Opens::adopt(file(), 4).is_err());
        table.words()[0].store(0, Ordering::Release);
        assert!(Opens::adopt(file(), 3).is_err());
        assert!(Opens::adopt(memory_file(16).unwrap(), 3).is_err());
    }

    #[test]
    fn a_late_close_does_not_touch_the_generation_that_has_the_place_now() {
        let table = Opens::own(1);
        let place = table.place(1);
        table.keep_only(&[]);
        assert_eq!(table.place(2), place);
        table.add(place, 2);
        assert!(!table.take(place, 1));
        assert_eq!((table.count(place, 2), table.count(place, 1)), (1, 0));
    }

    #[test]
    fn a_generation_of_unknown_handles_is_never_counted_down_to_none() {
        let table = Opens::own(1);
        let place = table.place(1);
        table.assume_open(place, 1);
        assert!((0..100).all(|_| !table.take(place, 1)));
    }
}
