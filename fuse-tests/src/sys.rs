//! System calls that rustix lacks, safe to call.

#![allow(unsafe_code, reason = "system calls that rustix lacks; every block states its invariants")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `cachestat(2)`, Linux 6.5; the number is the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// Pages of a file that are in the page cache.
///
/// # Errors
/// As `cachestat(2)`.
pub fn cached_pages(file: &File) -> io::Result<u64> {
    let range = [0u64; 2];
    let mut counts = [0u64; 5];
    // SAFETY: the layouts of `struct cachestat_range` (two u64) and `struct cachestat` (five u64, written by the kernel), both
    // alive during the call.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    if result == 0 { Ok(counts[0]) } else { Err(io::Error::last_os_error()) }
}

/// A descriptor of its own on a FUSE connection (`FUSE_DEV_IOC_CLONE`): what is read there and not answered ends with it.
///
/// # Errors
/// /dev/fuse cannot be opened, or `fuse` is none.
pub fn clone_fuse(fuse: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `_IOR(229, 0, uint32_t)` of include/uapi/linux/fuse.h.
    const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let number = fuse.as_raw_fd();
    // SAFETY: the call reads one 32-bit number, which is alive during the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const number) };
    if result == 0 { Ok(device.into()) } else { Err(io::Error::last_os_error()) }
}

/// Fills a memory file with garbage, also one that write(2) does not reach (`memfd_secret`).
///
/// # Errors
/// As `mmap(2)`.
pub fn spoil(file: BorrowedFd<'_>) -> io::Result<()> {
    let length = usize::try_from(rustix::fs::fstat(file)?.st_size).map_err(io::Error::other)?;
    // SAFETY: no address is asked for, so no mapping of this program is replaced.
    let start = unsafe {
        mmap(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
    }?;
    // SAFETY: the mapping is `length` writable bytes and used by nobody else in this program; who shares its pages must bear it.
    (0..length).for_each(|at| unsafe { start.cast::<u8>().add(at).write_volatile(0xa5) });
    // SAFETY: the mapping that was made above, not used any more.
    Ok(unsafe { munmap(start, length) }?)
}

/// Maps the owners of a detached mount into a user namespace, as a container runtime does for `hostUsers: false`.
///
/// # Errors
/// As `mount_setattr(2)`.
pub fn map_owners(mount: BorrowedFd<'_>, users: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::from(users.as_raw_fd().cast_unsigned()),
    };
    let (path, size) = (c"".as_ptr(), size_of::<libc::mount_attr>());
    // SAFETY: the kernel reads an empty, terminated path and `size` bytes of a structure that outlives the call; both
    // descriptors are open, as the borrows prove. It writes nothing.
    let result = unsafe {
        let mount = mount.as_raw_fd();
        libc::syscall(libc::SYS_mount_setattr, mount, path, libc::AT_EMPTY_PATH, &raw const attributes, size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file in memory, readable.
pub struct Map {
    start: *mut libc::c_void,
    length: usize,
}

impl Map {
    /// Maps the first `length` bytes, shared or private.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn new(file: &File, length: usize, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: no address is asked for, so no mapping of this program is replaced.
        let start = unsafe { mmap(ptr::null_mut(), length, ProtFlags::READ, flags, file, 0) }?;
        Ok(Self { start, length })
    }

    /// A copy of the bytes. The mapped file must be as long as the map.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        // SAFETY: the mapping is `length` readable bytes until the drop. They are copied byte by byte, volatile, as the
        // kernel may exchange the page below at any time.
        (0..self.length).map(|at| unsafe { self.start.cast::<u8>().add(at).read_volatile() }).collect()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, used by nobody else.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}
