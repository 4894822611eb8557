//! Pages for secrets at rest, of `memfd_secret(2)`: no other process maps them, the kernel does not either, they are never
//! swapped, dumped or inherited by a fork. Where the kernel has none, of a memory file that this process locks.
//!
//! Both count against `RLIMIT_MEMLOCK`, which may be as low as 64 KiB. What is handed out is counted here *before* the kernel
//! is asked, as some kernels say no only when a page is touched. Reply buffers (`super::bounce`) take from the same budget.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};

use super::locked::Locked;
use crate::sys::mapping::{Mapping, OnDrop, memory_file, secret_file};
use crate::sys::page_size;

/// Limit in bytes where the kernel sets none (`CAP_IPC_LOCK`, or `RLIMIT_MEMLOCK` unlimited): 256 MiB, so that a runaway
/// volume is refused here before the node's memory is gone.
pub const DEFAULT_LIMIT: usize = 256 << 20;

const RAISE_RLIMIT: &str = "raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=) or serve fewer volumes";
const RAISE_OWN_LIMIT: &str = "raise the agent's own memory limit or serve fewer volumes";

/// Why no page could be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The limit is reached.
    #[error("secret memory is full: {used} of {limit} bytes in use, {wanted} more wanted; {remedy}")]
    Full {
        /// Bytes in use.
        used: usize,
        /// Bytes that may be used.
        limit: usize,
        /// Bytes asked for, in whole pages.
        wanted: usize,
        /// What to change.
        remedy: &'static str,
    },
    /// The kernel refused.
    #[error("the kernel gave no secret memory; `fuse-secrets doctor` tells what this node has")]
    Kernel(#[source] io::Error),
}

/// What secret pages are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// `memfd_secret(2)`.
    Secret,
    /// A memory file, locked while this process maps it. Whoever is handed the file must not keep it on a node with swap.
    Locked,
}

/// Whose pages are, in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// This process's alone: wiped when they are dropped.
    Own,
    /// Also of whoever is handed their file: left as they are, unless [`Pages::wipe_on_drop`] was said.
    Lent,
}

/// Where secret pages come from and how many there may be. One per process.
pub struct SecretMemory {
    used: AtomicUsize,
    limit: usize,
    remedy: &'static str,
    backing: Backing,
}

impl SecretMemory {
    /// Asks the kernel what it has; raises the soft `RLIMIT_MEMLOCK` to the hard one.
    ///
    /// # Errors
    /// [`MemoryError::Full`]: not one page may be locked. [`MemoryError::Kernel`]: the kernel gives none for another reason.
    pub fn new() -> Result<Arc<Self>, MemoryError> {
        Self::with_limit(DEFAULT_LIMIT)
    }

    /// As [`SecretMemory::new`], with a limit of its own in bytes; what the kernel allows may be less.
    ///
    /// # Errors
    /// As [`SecretMemory::new`].
    pub fn with_limit(bytes: usize) -> Result<Arc<Self>, MemoryError> {
        let room = Locked::raise().map_err(MemoryError::Kernel)?.room();
        let room = room.map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX));
        let (limit, remedy) = if room < bytes { (room, RAISE_RLIMIT) } else { (bytes, RAISE_OWN_LIMIT) };
        let backing = if secret_file(0).is_ok() { Backing::Secret } else { Backing::Locked };
        let memory = Arc::new(Self { used: AtomicUsize::new(0), limit, remedy, backing });
        memory.allocate(1, Sharing::Own)?;
        Ok(memory)
    }

    /// Bytes in use, in whole pages, reply buffers included.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that may be used.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// What the pages are made of on this node.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// `length` bytes, zeroed, in whole pages of their own. Lent ones keep their file.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn allocate(self: &Arc<Self>, length: usize, sharing: Sharing) -> Result<Pages, MemoryError> {
        let (on_drop, lent) = match sharing {
            Sharing::Own => (OnDrop::Wipe, false),
            Sharing::Lent => (OnDrop::Leave, true),
        };
        let (mapping, reservation, file) = self.map(length, on_drop)?;
        Ok(Pages { mapping, length, file: lent.then_some(file), _reservation: reservation })
    }

    /// Lent pages that another process wrote, by their file: all of it, read-only. What they hold is for the caller to check.
    ///
    /// # Errors
    /// [`MemoryError`]: no room; or the file may shrink, which would end a reader with SIGBUS, or is no secret one.
    pub fn adopt(self: &Arc<Self>, file: OwnedFd) -> Result<Pages, MemoryError> {
        let (length, backing) = inspect(&file).map_err(MemoryError::Kernel)?;
        let reservation = self.reserve(length)?;
        let map = || {
            let mut mapping = Mapping::of_file(&file, length, OnDrop::Leave)?;
            match backing {
                Backing::Secret => mapping.confirm(),
                Backing::Locked => mapping.lock(),
            }?;
            Ok(mapping)
        };
        let mapping = map().map_err(|error| self.refused(error, length))?;
        let mut pages = Pages { mapping, length, file: Some(file), _reservation: reservation };
        pages.seal();
        Ok(pages)
    }

    /// At least `length` bytes of writable pages, counted.
    pub(super) fn map(
        self: &Arc<Self>,
        length: usize,
        on_drop: OnDrop,
    ) -> Result<(Mapping, Reservation, OwnedFd), MemoryError> {
        let reservation = self.reserve(length)?;
        let map = || {
            let bytes = reservation.bytes;
            let file = match self.backing {
                Backing::Secret => secret_file(bytes),
                Backing::Locked => memory_file(bytes),
            }?;
            let mut mapping = Mapping::of_file(&file, bytes, on_drop)?;
            match self.backing {
                Backing::Secret => mapping.populate(),
                Backing::Locked => mapping.lock(),
            }?;
            Ok((mapping, file))
        };
        let (mapping, file) = map().map_err(|error| self.refused(error, reservation.bytes))?;
        Ok((mapping, reservation, file))
    }

    /// Counts `length` bytes, in whole pages and at least one, or refuses them.
    pub(super) fn reserve(self: &Arc<Self>, length: usize) -> Result<Reservation, MemoryError> {
        let page = page_size();
        let wanted = length.max(1).checked_next_multiple_of(page).unwrap_or(usize::MAX);
        let fits = |used: usize| used.checked_add(wanted).filter(|sum| *sum <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Reservation { memory: Arc::clone(self), bytes: wanted }),
            Err(used) => Err(MemoryError::Full { used, limit: self.limit, wanted, remedy: self.remedy }),
        }
    }

    /// The kernel's word for "too much" as [`MemoryError::Full`]: something else in the process locks memory too.
    pub(super) fn refused(&self, error: io::Error, wanted: usize) -> MemoryError {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOMEM | libc::EPERM | libc::EFAULT) => MemoryError::Full {
                used: self.used().saturating_sub(wanted),
                limit: self.limit,
                wanted,
                remedy: RAISE_RLIMIT,
            },
            _ => MemoryError::Kernel(error),
        }
    }
}

/// Size and kind of a file of secret pages, if it will keep that size.
fn inspect(file: &OwnedFd) -> io::Result<(usize, Backing)> {
    /// include/uapi/linux/magic.h. The kernel fixes the size of such a file when it is first set.
    const SECRETMEM_MAGIC: i64 = 0x5345_434d;
    let backing = if fstatfs(file)?.f_type == SECRETMEM_MAGIC {
        Backing::Secret
    } else if fcntl_get_seals(file)?.contains(SealFlags::SHRINK) {
        Backing::Locked
    } else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a file that may shrink"));
    };
    let length = usize::try_from(fstat(file)?.st_size).ok();
    let length = length.filter(|length| *length > 0 && length.is_multiple_of(page_size()));
    length.map(|length| (length, backing)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A part of the budget; given back on drop.
pub(super) struct Reservation {
    memory: Arc<SecretMemory>,
    bytes: usize,
}

impl Reservation {
    /// Its size in bytes: whole pages.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A mapping of whole secret pages; unmapped on drop, and wiped unless it is lent.
pub struct Pages {
    // Unmapped before the budget is given back: fields are dropped in this order.
    mapping: Mapping,
    length: usize,
    file: Option<OwnedFd>,
    _reservation: Reservation,
}

impl Pages {
    /// The file of lent pages, to hand over.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// They are given up for good: when they are dropped they are wiped, lent or not.
    pub fn wipe_on_drop(&self) {
        self.mapping.wipe_on_drop();
    }

    /// The bytes.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.mapping[..self.length]
    }

    /// The bytes, to be written once: before [`Pages::seal`], else it panics.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        &mut self.mapping[..self.length]
    }

    /// Makes the mapping read-only: a generation is written once.
    pub fn seal(&mut self) {
        if let Err(error) = self.mapping.seal() {
            // Read-only pages guard against our own mistakes only, so a reader is not refused for the lack of it.
            tracing::warn!(%error, "secret pages stay writable");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::arena::Arena;
    use crate::secret::bounce::Pool;
    use crate::secret::{SecretBytes, child};

    const LITTLE: u64 = 64 << 10;
    const USUAL: u64 = 8 << 20;

    #[test]
    fn pages_are_zero_count_whole_and_give_their_budget_back() {
        let memory = SecretMemory::with_limit(16 * page_size()).unwrap();
        let mut pages = memory.allocate(page_size() + 1, Sharing::Own).unwrap();
        assert_eq!(pages.expose().len(), page_size() + 1);
        assert!(pages.expose().iter().all(|byte| *byte == 0));
        assert_eq!(memory.used(), 2 * page_size());
        pages.expose_mut().fill(7);
        pages.seal();
        assert!(pages.expose().iter().all(|byte| *byte == 7));
        drop(pages);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_used_limit_wanted_and_a_remedy() {
        let page = page_size();
        let memory = SecretMemory::with_limit(4 * page).unwrap();
        let _held = memory.allocate(3 * page, Sharing::Own).unwrap();
        let text = memory.allocate(page + 1, Sharing::Own).err().unwrap().to_string();
        let expected = format!("{} of {} bytes in use, {} more wanted; raise", 3 * page, 4 * page, 2 * page);
        assert!(text.contains(&expected), "{text}");
        assert!(matches!(memory.allocate(usize::MAX, Sharing::Own), Err(MemoryError::Full { .. })));
        assert!(memory.allocate(page, Sharing::Own).is_ok(), "a refusal takes nothing");
    }

    #[test]
    fn sealed_pages_refuse_to_be_written() {
        let memory = SecretMemory::with_limit(4 * page_size()).unwrap();
        let mut pages = memory.allocate(10, Sharing::Own).unwrap();
        pages.seal();
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pages.expose_mut()[0] = 1));
        assert!(written.is_err());
    }

    #[test]
    fn lent_pages_outlive_their_maker_unless_they_were_given_up() {
        let here = SecretMemory::with_limit(8 * page_size()).unwrap();
        let fallback = fallback(&here);
        for memory in [here, fallback] {
            for given_up in [false, true] {
                let mut pages = memory.allocate(page_size() + 1, Sharing::Lent).unwrap();
                pages.expose_mut().fill(7);
                pages.seal();
                let file = pages.file().unwrap().try_clone_to_owned().unwrap();
                if given_up {
                    pages.wipe_on_drop();
                }
                drop(pages);
                let successor = memory.adopt(file).unwrap();
                assert_eq!(successor.expose().len(), 2 * page_size());
                let left = if given_up { 0 } else { 7 };
                assert!(successor.expose()[..=page_size()].iter().all(|byte| *byte == left));
                assert_eq!(memory.used(), 2 * page_size());
            }
        }
    }

    #[test]
    fn a_file_that_may_shrink_or_is_too_large_is_not_adopted() {
        let memory = SecretMemory::with_limit(4 * page_size()).unwrap();
        let open = tempfile::tempfile().unwrap();
        open.set_len(page_size() as u64).unwrap();
        assert!(memory.adopt(open.into()).is_err());
        let empty = crate::sys::mapping::memory_file(0).unwrap();
        assert!(memory.adopt(empty).is_err());
        let large = crate::sys::mapping::memory_file(5 * page_size()).unwrap();
        assert!(matches!(memory.adopt(large), Err(MemoryError::Full { .. })));
        let odd = crate::sys::mapping::memory_file(page_size() + 1).unwrap();
        assert!(memory.adopt(odd).is_err());
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn threads_that_race_never_get_more_than_the_limit() {
        let page = page_size();
        let memory = SecretMemory::with_limit(8 * page).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let held: Vec<_> =
                            (0..3).filter_map(|_| memory.allocate(page, Sharing::Own).ok()).collect();
                        assert!(memory.used() <= 8 * page);
                        assert!(memory.used() >= held.len() * page);
                    }
                });
            }
        });
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn pages_of_both_kinds_are_locked_not_inherited_and_not_dumped() {
        let here = SecretMemory::with_limit(4 * page_size()).unwrap();
        let fallback = fallback(&here);
        for memory in [here, fallback] {
            let mut pages = memory.allocate(10, Sharing::Own).unwrap();
            pages.expose_mut().fill(7);
            pages.seal();
            assert_eq!(pages.expose(), [7; 10]);
            let start = format!("{:x}-", pages.expose().as_ptr().addr());
            let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
            assert!(lines.next().is_some(), "the mapping is listed");
            let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
            for flag in ["lo", "dc", "dd"] {
                let listed = flags.split_whitespace().any(|found| found == flag);
                assert!(listed, "{:?}: {flag} is missing: {flags}", memory.backing());
            }
        }
    }

    /// As on a kernel without `memfd_secret(2)`.
    fn fallback(memory: &SecretMemory) -> Arc<SecretMemory> {
        let used = AtomicUsize::new(0);
        let (limit, remedy, backing) = (memory.limit, memory.remedy, Backing::Locked);
        Arc::new(SecretMemory { used, limit, remedy, backing })
    }

    /// Fills all there is, and shows that refusals leave what is held intact.
    fn works_under_a_limit(limit: u64) {
        let limit = usize::try_from(limit).unwrap();
        assert!(Locked::read().unwrap().room().is_some(), "the limit counts for this process");
        let memory = SecretMemory::new().unwrap();
        serves_until_full(&memory, limit);
        serves_until_full(&fallback(&memory), limit);
    }

    fn serves_until_full(memory: &Arc<SecretMemory>, limit: usize) {
        assert_eq!(memory.limit(), limit);
        let pool = Pool::new(memory, 128 << 10, 16).unwrap();
        assert!(memory.used() <= limit / 4, "most is left for values");
        let arena = Arena::new(Arc::clone(memory));
        let mut blobs = Vec::new();
        let refused = loop {
            let byte = u8::try_from(blobs.len() % 251).unwrap();
            match arena.store(SecretBytes::new(vec![byte; 1000])) {
                Ok(blob) => blobs.push(blob),
                Err(error) => break error,
            }
        };
        assert!(
            refused
                .to_string()
                .ends_with("raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=) or serve fewer volumes")
        );
        assert!(limit - memory.used() < page_size(), "everything was used before anything was refused");
        println!(
            "{limit} bytes: {:?}, replies of {}, {} values",
            memory.backing(),
            pool.buffer_size(),
            blobs.len()
        );
        for (index, blob) in blobs.iter().enumerate() {
            assert!(blob.expose().iter().all(|byte| usize::from(*byte) == index % 251));
            let lent = pool.lend(blob.expose(), std::time::Duration::ZERO, <[u8]>::len);
            assert_eq!(lent, Some(1000));
        }
        drop((blobs, pool, arena));
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn sixty_four_kibibytes_without_privilege_are_enough_to_serve() {
        if child::is_one() {
            return works_under_a_limit(LITTLE);
        }
        child::run_with_little_memory(
            "secret::pages::tests::sixty_four_kibibytes_without_privilege_are_enough_to_serve",
            LITTLE,
        );
    }

    #[test]
    fn eight_mebibytes_without_privilege_are_enough_to_serve() {
        if child::is_one() {
            return works_under_a_limit(USUAL);
        }
        if Locked::read().unwrap().hard.is_some_and(|hard| hard < USUAL)
            && !rustix::process::geteuid().is_root()
        {
            println!("skipped: this user's hard RLIMIT_MEMLOCK is below 8 MiB");
            return;
        }
        child::run_with_little_memory(
            "secret::pages::tests::eight_mebibytes_without_privilege_are_enough_to_serve",
            USUAL,
        );
    }

    #[test]
    fn where_nothing_may_be_locked_the_start_says_what_to_raise() {
        if child::is_one() {
            let text = SecretMemory::new().err().unwrap().to_string();
            assert!(text.contains("RLIMIT_MEMLOCK"), "{text}");
            return;
        }
        child::run_with_little_memory(
            "secret::pages::tests::where_nothing_may_be_locked_the_start_says_what_to_raise",
            0,
        );
    }
}
