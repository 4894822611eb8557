//! Words that several processes share: atomics in a memory file that cannot shrink.

use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping of 64-bit words.
pub struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the words are atomics, which any thread may use through a shared reference; the mapping itself is owned and only
// unmapped on drop.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps `count` words of a file of [`super::mapping::memory_file`]. Zero-filled, if it is new.
    ///
    /// # Errors
    /// `InvalidData`: the file is shorter, or is not sealed against shrinking (a word behind its end would raise SIGBUS); what
    /// mmap(2) says.
    pub fn of_file(file: impl AsFd, count: usize) -> io::Result<Self> {
        let length = count.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::InvalidData)?;
        let fits = usize::try_from(fstat(&file)?.st_size).is_ok_and(|size| size >= length);
        if length == 0 || !fits || !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: no address is asked for, so no mapping of ours is replaced.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), length, access, flags, file, 0) }?;
        Ok(Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?, count })
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `count` words of a mapping that is page-aligned, lives as long as self and whose file cannot shrink; every bit
        // pattern is an AtomicU64, and whoever else maps the file changes it in whole words, as this type does.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: our own pages, and nothing points into them any more: references borrow from self.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.count * 8) } {
            tracing::error!(%error, "shared words could not be unmapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::sys::mapping::memory_file;

    #[test]
    fn what_one_holder_writes_the_other_reads_and_no_file_can_shrink_below_it() {
        let file = memory_file(4096).unwrap();
        let (a, b) = (Words::of_file(&file, 512).unwrap(), Words::of_file(&file, 512).unwrap());
        a[511].store(7, Ordering::Release);
        assert_eq!(b[511].load(Ordering::Acquire), 7);
        assert!(Words::of_file(&file, 513).is_err());
        assert!(rustix::fs::ftruncate(&file, 8).is_err());
        let open = tempfile::tempfile().unwrap();
        open.set_len(4096).unwrap();
        assert!(Words::of_file(&open, 8).is_err(), "a file that can shrink");
    }
}
