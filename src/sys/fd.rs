//! Descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

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
