//! The end of a session that loses no reply.
//!
//! ```text
//!   fuser's number ──dup3──▶ one end of a socket pair    its next read finds the end of file, and the thread ends
//!   a thread that waits in read(2) of the real descriptor is woken by a signal, again and again until it has ended
//!   replies to requests that were read before ──socket pair──▶ here ──▶ the real descriptor
//!   end of file on our end: nobody holds fuser's number any more, so no reply is outstanding
//! ```

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketFlags, SocketType, recv, shutdown, socketpair, sockopt,
};
use zeroize::Zeroize;

use super::notify::Wire;
use crate::sys::fd::Kept;
use crate::sys::wake::Thread;

/// Longest reply: the largest read that the INIT allows, and a header.
const LONGEST: usize = (1 << 20) + 4096;
/// Between two signals to a thread that has not ended.
const NUDGE: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

/// Has the session's `readers` end, and passes on the replies that are outstanding.
///
/// # Errors
/// `TimedOut` at `deadline`; no descriptor left.
pub(super) fn run<K>(
    reading: Kept<K>,
    readers: Vec<Thread>,
    real: &Wire,
    ended: impl Fn() -> bool,
    deadline: Instant,
) -> io::Result<()> {
    let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // A reply that is being written when the number changes is a packet: it must fit whole.
    sockopt::set_socket_send_buffer_size(&its, 2 * LONGEST)?;
    reading.replace(its.as_fd())?;
    drop(its);
    shutdown(&ours, Shutdown::Write)?;
    // The number is fuser's alone now: with its last reply it is closed.
    drop(reading);
    // Only what a reply touches of it is ever memory, and is wiped at once.
    let mut reply = vec![0; LONGEST];
    while Instant::now() < deadline {
        if !ended() {
            for reader in &readers {
                reader.wake()?;
            }
        }
        let mut ready = [PollFd::new(&ours, PollFlags::IN)];
        match poll(&mut ready, Some(&NUDGE)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        let (length, _) = recv(&ours, &mut reply[..], RecvFlags::DONTWAIT)?;
        if length == 0 {
            return Ok(());
        }
        let written = rustix::io::write(real.as_fd(), &reply[..length]);
        reply[..length].zeroize();
        match written {
            // Whoever asked is gone, or the mount is.
            Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NOTCONN) => {
            }
            Err(error) => tracing::warn!(%error, "a reply was not taken"),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "a request is not answered"))
}
