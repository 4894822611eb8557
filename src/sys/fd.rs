//! Descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// Makes the number of `over` name what `source` names, atomically (dup3(2)); what it named before is closed. The new
/// descriptor is closed on exec.
///
/// # Errors
/// dup3(2): EINVAL if both are the same number, EMFILE, EINTR or EBUSY in a race with open(2).
pub fn replace(over: BorrowedFd<'_>, source: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open, as the borrows prove, and stay open during the call. Whoever owns `over` goes on owning
    // an open descriptor of the same number, so no owner is left with a closed one; dup3 touches no memory.
    let result = unsafe { libc::dup3(source.as_raw_fd(), over.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The number of a descriptor that `keeper` keeps open: fuser's, which is out of reach while its session runs.
pub struct Kept<K> {
    number: RawFd,
    _keeper: K,
}

impl<K> Kept<K> {
    /// `fd` is open for as long as `keeper` lives.
    pub fn new(fd: BorrowedFd<'_>, keeper: K) -> Self {
        Self { number: fd.as_raw_fd(), _keeper: keeper }
    }

    /// As [`replace`], over this number.
    ///
    /// # Errors
    /// As [`replace`].
    pub fn replace(&self, source: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            // SAFETY: the keeper holds the number open, so that no other owner's descriptor can have it and be closed by this
            // call, and its owner goes on owning an open descriptor; `source` is borrowed; dup3 touches no memory.
            let result = unsafe { libc::dup3(source.as_raw_fd(), self.number, libc::O_CLOEXEC) };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                _ if result >= 0 => return Ok(()),
                Some(libc::EINTR | libc::EBUSY) => {}
                _ => return Err(error),
            }
        }
    }
}
