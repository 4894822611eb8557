//! Connects to sockets as its test says, and hands the connections over: whatever the test then says on them, the kernel tells
//! that this process, with its user, parent, cgroup and pid namespace, said it. Its standard input is a socket of packets.
//!
//! | packet | answer, with descriptors |
//! |---|---|
//! | `connect PATH` | `done`, the connection |
//! | `spawn` | `done`, the standard input of a child like this one, its pidfd |
//! | anything else, the end | it ends |

#![allow(clippy::unwrap_used, reason = "what fails in here is a test that fails")]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, sendmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

fn main() {
    let control = std::io::stdin();
    let mut packet = [0; 4096];
    loop {
        let (length, _) = recv(&control, &mut packet, RecvFlags::empty()).unwrap();
        let said = std::str::from_utf8(&packet[..length]).unwrap();
        let answer: Vec<OwnedFd> = match said.split_once(' ') {
            Some(("connect", path)) => vec![UnixStream::connect(path).unwrap().into()],
            None if said == "spawn" => spawn(),
            _ => return,
        };
        let carried: Vec<_> = answer.iter().map(|file| file.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&carried)));
        sendmsg(&control, &[IoSlice::new(b"done")], &mut rights, SendFlags::empty()).unwrap();
    }
}

#[allow(clippy::zombie_processes, reason = "a child that nobody has waited for is what a test wants")]
fn spawn() -> Vec<OwnedFd> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let child = Command::new("/proc/self/exe").stdin(Stdio::from(theirs)).spawn().unwrap();
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    vec![ours, pidfd_open(pid, PidfdFlags::empty()).unwrap()]
}
