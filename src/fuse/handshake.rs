//! The INIT exchange, once per mount. What is negotiated here stays latched in the connection for as long as it lives, whoever
//! serves it later, so it is done here by hand and not by the session, which only ever *adopts* (see `super::session`).
//!
//! Layouts: `struct fuse_init_in` and `fuse_init_out` of the kernel's include/uapi/linux/fuse.h, version 7.40.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

/// Protocol version that is spoken.
const MAJOR: u32 = 7;
const MINOR: u32 = 40;
/// Oldest minor version with all that is relied on (FUSE_MAX_PAGES: 7.28, Linux 4.20).
const OLDEST_MINOR: u32 = 28;
const OPCODE_INIT: u32 = 26;
const OPCODE_FORGET: u32 = 2;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const INIT_OUT: usize = 64;

/// The kernel queues INIT while it mounts; it is there at once, or something else reads this descriptor.
const INIT_DEADLINE: Duration = Duration::from_secs(5);
/// A read-only file system takes no writes; the smallest legal size keeps every later reader's buffer small.
const MAX_WRITE: u32 = 4096;
/// Reads of up to 1 MiB, if the mount's `max_read` allows.
const MAX_PAGES: u16 = 256;

const FUSE_ASYNC_READ: u64 = 1 << 0;
/// `O_TRUNC` arrives in the flags of OPEN, which is refused there, and not as a SETATTR after an open that succeeded.
const FUSE_ATOMIC_O_TRUNC: u64 = 1 << 3;
const FUSE_BIG_WRITES: u64 = 1 << 5;
const FUSE_PARALLEL_DIROPS: u64 = 1 << 18;
const FUSE_MAX_PAGES: u64 = 1 << 22;
const FUSE_INIT_EXT: u64 = 1 << 30;
/// Pods with `hostUsers: false` mount their volumes id-mapped; needs `default_permissions`.
const FUSE_ALLOW_IDMAP: u64 = 1 << 40;

const WANTED: u64 = FUSE_ASYNC_READ
    | FUSE_ATOMIC_O_TRUNC
    | FUSE_BIG_WRITES
    | FUSE_PARALLEL_DIROPS
    | FUSE_MAX_PAGES
    | FUSE_INIT_EXT
    | FUSE_ALLOW_IDMAP;

/// What kernel and file system agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's minor version.
    pub minor: u32,
    /// The flags in force.
    pub flags: u64,
}

/// Answers INIT on a descriptor that was just mounted.
///
/// # Errors
/// No INIT within 5 s, another request first, or a kernel older than protocol 7.28.
pub fn negotiate(fuse: BorrowedFd<'_>) -> io::Result<Negotiated> {
    let deadline =
        rustix::event::Timespec { tv_sec: i64::try_from(INIT_DEADLINE.as_secs()).unwrap_or(5), tv_nsec: 0 };
    let mut ready = [PollFd::new(&fuse, PollFlags::IN)];
    if poll(&mut ready, Some(&deadline))? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the kernel sent no INIT: is the descriptor mounted",
        ));
    }
    let mut request = vec![0; 8192];
    let length = rustix::io::read(fuse, &mut request)?;
    let (reply, negotiated) = answer(&request[..length])?;
    rustix::io::write(fuse, &reply)?;
    negotiated.ok_or_else(|| {
        io::Error::new(io::ErrorKind::Unsupported, "FUSE protocol 7.28 (Linux 4.20) is needed")
    })
}

/// The INIT request that a session is fed in place of the kernel's, and which it may answer as it likes.
#[must_use]
pub fn synthetic_request() -> Vec<u8> {
    let mut request = Vec::with_capacity(IN_HEADER + 64);
    for word in [low((IN_HEADER + 64) as u64), OPCODE_INIT, 1, 0] {
        request.extend(word.to_le_bytes());
    }
    request.resize(IN_HEADER, 0);
    for word in [MAJOR, MINOR, 1 << 17, low(FUSE_INIT_EXT | FUSE_MAX_PAGES), 0] {
        request.extend(word.to_le_bytes());
    }
    request.resize(IN_HEADER + 64, 0);
    request
}

/// The inode that the made-up FORGET names: none of a kernel's has this number.
pub const NOBODY: u64 = 0;

/// A FORGET that a session's thread is fed before the first real request: it has no answer, so nobody misses one.
#[must_use]
pub fn synthetic_forget() -> Vec<u8> {
    let mut request = Vec::with_capacity(IN_HEADER + 8);
    for word in [low((IN_HEADER + 8) as u64), OPCODE_FORGET, 2, 0] {
        request.extend(word.to_le_bytes());
    }
    request.extend(NOBODY.to_le_bytes());
    request.resize(IN_HEADER + 8, 0);
    request
}

/// The reply to an INIT request; without what was negotiated if the kernel is too old, whom the reply refuses.
fn answer(request: &[u8]) -> io::Result<(Vec<u8>, Option<Negotiated>)> {
    let word = |at: usize| -> io::Result<u32> {
        let bytes = request.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map(|bytes| u32::from_le_bytes(*bytes)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    };
    if word(4)? != OPCODE_INIT {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first request is not INIT: this mount is served already",
        ));
    }
    let unique = request.get(8..16).unwrap_or_default();
    let (major, minor, readahead) = (word(IN_HEADER)?, word(IN_HEADER + 4)?, word(IN_HEADER + 8)?);
    if major != MAJOR || minor < OLDEST_MINOR {
        return Ok((header(OUT_HEADER, -libc::EPROTO, unique), None));
    }
    let offered = u64::from(word(IN_HEADER + 12)?);
    let offered =
        if offered & FUSE_INIT_EXT == 0 { offered } else { offered | u64::from(word(IN_HEADER + 16)?) << 32 };
    let flags = offered & WANTED;
    let mut reply = header(OUT_HEADER + INIT_OUT, 0, unique);
    for word in [MAJOR, MINOR, readahead, low(flags)] {
        reply.extend(word.to_le_bytes());
    }
    // At most this many background requests (readahead, release) at a time; congestion from three quarters on.
    for half in [16u16, 12] {
        reply.extend(half.to_le_bytes());
    }
    for word in [MAX_WRITE, 1 /* nanosecond times */] {
        reply.extend(word.to_le_bytes());
    }
    for half in [MAX_PAGES, 0] {
        reply.extend(half.to_le_bytes());
    }
    reply.extend(low(flags >> 32).to_le_bytes());
    reply.resize(OUT_HEADER + INIT_OUT, 0);
    Ok((reply, Some(Negotiated { minor, flags })))
}

fn header(length: usize, error: i32, unique: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(low(length as u64).to_le_bytes());
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique);
    bytes
}

fn low(flags: u64) -> u32 {
    u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_that_the_kernel_offers_are_taken() {
        let mut request = synthetic_request();
        let (reply, negotiated) = answer(&request).unwrap();
        let negotiated = negotiated.unwrap();
        assert_eq!(negotiated.flags, FUSE_INIT_EXT | FUSE_MAX_PAGES);
        assert_eq!((reply.len(), &reply[8..16]), (80, &request[8..16]));
        request[IN_HEADER + 16..IN_HEADER + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            answer(&request).unwrap().1.unwrap().flags,
            FUSE_INIT_EXT | FUSE_MAX_PAGES | FUSE_ALLOW_IDMAP
        );
    }

    #[test]
    fn an_old_kernel_is_refused_in_words_it_understands() {
        let mut request = synthetic_request();
        request[IN_HEADER + 4..IN_HEADER + 8].copy_from_slice(&27u32.to_le_bytes());
        let (reply, negotiated) = answer(&request).unwrap();
        assert_eq!((negotiated, reply.len()), (None, OUT_HEADER));
        assert_eq!(&reply[4..8], (-libc::EPROTO).to_le_bytes());
    }

    #[test]
    fn a_mount_that_is_served_already_is_not_taken() {
        let mut request = synthetic_request();
        request[4] = 3;
        assert!(answer(&request).is_err());
        assert!(answer(&request[..20]).is_err());
    }
}
