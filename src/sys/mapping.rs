//! Mapped memory as owned values. `Mapping` is a whole one; `Extent` is a piece of one that nobody else has: pieces are
//! only made by splitting and only put together again by joining, so that ownership is the proof that no two overlap.

use std::ffi::c_void;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use rustix::mm::{Advice, MapFlags, MlockFlags, MprotectFlags, ProtFlags};

use super::page_size;

/// What happens to the bytes when a mapping is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDrop {
    /// They are overwritten with zeros, then unmapped.
    Wipe,
    /// They are only unmapped: somebody else holds the file and reads them.
    Leave,
}

/// Whole pages of this process: not inherited by a fork, not in a core dump.
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
    writable: bool,
    /// Whether the bytes are overwritten on drop.
    wipe: AtomicBool,
}

// SAFETY: a Mapping owns its pages as a Box<[u8]> does: no other value points into them, they are shared only through
// `&self` (reads) and changed only through `&mut self`.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives reads only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a file of [`secret_file`] or [`memory_file`], readable and writable, for all who hold the file.
    /// `length` is a multiple of the page size.
    ///
    /// # Errors
    /// `EAGAIN`: more than `RLIMIT_MEMLOCK` (secret files); what mmap(2) and madvise(2) say.
    pub fn of_file(file: impl AsFd, length: usize, on_drop: OnDrop) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: no address is asked for, so no mapping of ours is replaced.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), length, access, flags, file, 0) }?;
        Self::take(start, length, on_drop)
    }

    /// Ordinary private memory, zeroed: pages come with their first use and stay locked from then on.
    /// `length` is a multiple of the page size.
    ///
    /// # Errors
    /// `ENOMEM`, `EAGAIN`, `EPERM`: more than `RLIMIT_MEMLOCK`.
    pub fn locked(length: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: no address is asked for, so no mapping of ours is replaced.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), length, access, flags) }?;
        let mapping = Self::take(start, length, OnDrop::Wipe)?;
        // SAFETY: `take` made these pages ours; locking changes no byte.
        unsafe { rustix::mm::mlock_with(mapping.address(), length, MlockFlags::ONFAULT) }?;
        Ok(mapping)
    }

    fn take(start: *mut c_void, length: usize, on_drop: OnDrop) -> io::Result<Self> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let wipe = AtomicBool::new(on_drop == OnDrop::Wipe);
        let mapping = Self { start, length, writable: true, wipe };
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: whole pages that mmap just gave us; neither advice changes a byte.
            unsafe { rustix::mm::madvise(mapping.address(), length, advice) }?;
        }
        Ok(mapping)
    }

    /// Brings every page in now. Done by the kernel's hand, one byte per page: where a page cannot be had the call fails,
    /// while a touch of our own would be answered with SIGBUS.
    ///
    /// # Errors
    /// `EFAULT`: a page cannot be had (some kernels count secret pages only here).
    pub fn populate(&mut self) -> io::Result<()> {
        for offset in (0..self.length).step_by(page_size()) {
            // SAFETY: the byte lies inside our pages, which `&mut self` keeps anybody else from looking at. The system
            // call itself, not libc's function, which may write from user space.
            let written =
                unsafe { libc::syscall(libc::SYS_getrandom, self.start.as_ptr().add(offset), 1, 0) };
            if written != 1 {
                let error = io::Error::last_os_error();
                // No secret is in it yet, and a wipe would touch the page that cannot be had.
                *self.wipe.get_mut() = false;
                return Err(error);
            }
            self[offset] = 0;
        }
        Ok(())
    }

    /// Brings every page in that somebody else wrote, and leaves it as it is. By the kernel's hand, as [`Mapping::populate`]:
    /// it compares a word of each, which is copied nowhere.
    ///
    /// # Errors
    /// `EFAULT`: a page cannot be had.
    pub fn confirm(&mut self) -> io::Result<()> {
        let (compare, at_once) = (libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, [0i64; 2]);
        for offset in (0..self.length).step_by(page_size()) {
            // SAFETY: an aligned word inside our pages, which the kernel only reads; the time is on the stack, zero, and wide
            // enough for any timespec; so the call never waits.
            let result = unsafe {
                let word = self.start.as_ptr().add(offset);
                libc::syscall(libc::SYS_futex, word, compare, 0, at_once.as_ptr(), ptr::null::<u32>(), 0)
            };
            let error = io::Error::last_os_error();
            // Another word than zero is EAGAIN, and zero a wait that is over at once.
            if result < 0
                && !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ETIMEDOUT | libc::EINTR))
            {
                *self.wipe.get_mut() = false;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Changes what happens when it is dropped: the bytes are overwritten, for whoever holds the file too.
    pub fn wipe_on_drop(&self) {
        self.wipe.store(true, Ordering::Release);
    }

    /// Locks every page, bringing it in.
    ///
    /// # Errors
    /// `ENOMEM`, `EAGAIN`, `EPERM`: more than `RLIMIT_MEMLOCK`.
    pub fn lock(&mut self) -> io::Result<()> {
        // SAFETY: our own pages; locking changes no byte.
        Ok(unsafe { rustix::mm::mlock(self.address(), self.length) }?)
    }

    /// Makes the pages read-only.
    ///
    /// # Errors
    /// What mprotect(2) says.
    pub fn seal(&mut self) -> io::Result<()> {
        self.protect(MprotectFlags::READ)?;
        self.writable = false;
        Ok(())
    }

    fn protect(&mut self, access: MprotectFlags) -> io::Result<()> {
        // SAFETY: our own pages, and `&mut self`: no reference into them lives that the change could invalidate.
        Ok(unsafe { rustix::mm::mprotect(self.address(), self.length, access) }?)
    }

    fn address(&self) -> *mut c_void {
        self.start.as_ptr().cast()
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` readable, initialised bytes (the kernel zeroes new pages) that live as long as self; whoever
        // writes has `&mut self`. Another holder of the file writes only before it hands the file over.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        assert!(self.writable, "sealed pages are not written any more");
        // SAFETY: as in `deref`; writable is checked above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if *self.wipe.get_mut() {
            self.writable |= self.protect(MprotectFlags::READ | MprotectFlags::WRITE).is_ok();
            if self.writable {
                crate::secret::wipe(self);
            } else {
                // A secret page is cleared by the kernel when it is freed; the fallback's pages are not.
                tracing::error!("sealed pages could not be made writable again and go unwiped");
            }
        }
        // SAFETY: our own pages, and nothing points into them any more: references borrow from self, extents keep it alive.
        if let Err(error) = unsafe { rustix::mm::munmap(self.address(), self.length) } {
            tracing::error!(%error, "pages could not be unmapped");
        }
    }
}

/// A new file of memfd_secret(2), `length` bytes: pages that are in no other address space, not even the kernel's.
///
/// # Errors
/// `ENOSYS`: the kernel has none (before 5.14) or has it switched off (`secretmem.enable=0`).
pub fn secret_file(length: usize) -> io::Result<OwnedFd> {
    // SAFETY: the call takes one flag word and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::fs::ftruncate(&file, length as u64)?;
    Ok(file)
}

/// A new memory file, `length` bytes for ever, that cannot be executed.
///
/// # Errors
/// What memfd_create(2) says.
pub fn memory_file(length: usize) -> io::Result<OwnedFd> {
    let create = |flags| rustix::fs::memfd_create(c"fuse-secrets", flags);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match create(flags | MemfdFlags::NOEXEC_SEAL) {
        // Before 6.3 the kernel does not know this flag.
        Err(rustix::io::Errno::INVAL) => create(flags)?,
        made => made?,
    };
    rustix::fs::ftruncate(&file, length as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// A piece of a mapping that nobody else has. The mapping lives until its last piece is gone.
pub struct Extent {
    mapping: Arc<Mapping>,
    offset: usize,
    length: usize,
}

impl Extent {
    /// The one piece that is all of it. The mapping must not be sealed.
    #[must_use]
    pub fn whole(mapping: Mapping) -> Self {
        assert!(mapping.writable, "sealed pages are not handed out in pieces");
        Self { offset: 0, length: mapping.length, mapping: Arc::new(mapping) }
    }

    /// Keeps the first `at` bytes and gives away the rest.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.length, "a piece cannot be split behind its end");
        let rest =
            Self { mapping: Arc::clone(&self.mapping), offset: self.offset + at, length: self.length - at };
        self.length = at;
        rest
    }

    /// Takes `next` in if it begins where this piece ends.
    ///
    /// # Errors
    /// `next`, unchanged: it lies elsewhere.
    pub fn join(&mut self, next: Self) -> Result<(), Self> {
        if self.mapping_id() != next.mapping_id() || self.offset + self.length != next.offset {
            return Err(next);
        }
        self.length += next.length;
        Ok(())
    }

    /// Which mapping this is a piece of: its address, unique while any piece of it lives.
    #[must_use]
    pub fn mapping_id(&self) -> usize {
        self.mapping.start.as_ptr().addr()
    }

    /// Where in its mapping this piece begins, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl Deref for Extent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: offset + length lie within the mapping (`whole`, `split_off` and `join` keep that), which the Arc keeps
        // mapped. The range belongs to this value alone, as pieces are only ever split from a whole and joined; so no
        // `&mut` to any byte of it exists beside this `&self`. The Arc's Mapping itself is never dereferenced.
        unsafe {
            std::slice::from_raw_parts(self.mapping.start.as_ptr().add(self.offset).cast_const(), self.length)
        }
    }
}

impl DerefMut for Extent {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only reference to the range; the mapping is writable, as
        // `whole` checked and nobody can seal it behind its Arc.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.as_ptr().add(self.offset), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_cannot_be_had_is_an_error_and_not_a_signal() {
        let page = page_size();
        let file = memory_file(page).unwrap();
        let mut mapping = Mapping::of_file(&file, 2 * page, OnDrop::Wipe).unwrap();
        let error = mapping.populate().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn populated_pages_are_zero() {
        let file = memory_file(3 * page_size()).unwrap();
        let mut mapping = Mapping::of_file(&file, 3 * page_size(), OnDrop::Wipe).unwrap();
        mapping.populate().unwrap();
        assert!(mapping.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_wiped_mapping_leaves_zeros_in_its_file_and_a_left_one_its_bytes() {
        for (on_drop, left) in [(OnDrop::Wipe, 0), (OnDrop::Leave, 7)] {
            let file = memory_file(page_size()).unwrap();
            let mut mapping = Mapping::of_file(&file, page_size(), on_drop).unwrap();
            mapping.fill(7);
            mapping.seal().unwrap();
            drop(mapping);
            let mut bytes = vec![1; page_size()];
            rustix::io::pread(&file, &mut bytes, 0).unwrap();
            assert!(bytes.iter().all(|byte| *byte == left));
        }
    }

    #[test]
    fn extents_of_two_mappings_or_with_a_gap_do_not_join() {
        let mut first = Extent::whole(Mapping::locked(page_size()).unwrap());
        let other = Extent::whole(Mapping::locked(page_size()).unwrap());
        assert!(first.join(other).is_err());
        let mut middle = first.split_off(16);
        let last = middle.split_off(16);
        let last = first.join(last).err().unwrap();
        assert!(first.join(middle).is_ok());
        assert!(first.join(last).is_ok());
        assert_eq!(first.len(), page_size());
    }
}
