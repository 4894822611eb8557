//! What is kept of one volume: its connection, and memory files that only agents read.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_secrets_csi::wire::MOST_DESCRIPTORS;
use fuse_secrets_csi::wire::message::{Adopt, Handover, Message, Part};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys;

/// Major and minor number of /dev/fuse.
const FUSE: (u32, u32) = (10, 229);

pub(super) struct Held {
    pub(super) fuse: Arc<OwnedFd>,
    pub(super) parts: BTreeMap<Part, OwnedFd>,
    /// Where this shim mounted it; none if an earlier one did.
    pub(super) at: Option<PathBuf>,
    /// For people, as an agent may have said it.
    pub(super) target: String,
    /// For people: `namespace/name`.
    pub(super) pod: String,
}

impl Held {
    /// Puts a part in the place of an earlier one; `false`: there are too many.
    pub(super) fn deposit(&mut self, part: Part, file: OwnedFd, gone: &[u32]) -> bool {
        self.parts.retain(|part, _| !matches!(part, Part::Generation(number) if gone.contains(number)));
        // They travel in one message, with the connection.
        let room = self.parts.len() + 1 < usize::from(MOST_DESCRIPTORS) || self.parts.contains_key(&part);
        if room {
            self.parts.insert(part, file);
        }
        room
    }

    /// All that an agent needs to serve it.
    pub(super) fn estate(
        &self,
        volume: &str,
        attempts: u32,
        handover: Handover,
    ) -> io::Result<(Message, Vec<OwnedFd>)> {
        let mut descriptors = vec![lend(self.fuse.as_fd(), handover)?];
        for file in self.parts.values() {
            descriptors.push(file.try_clone()?);
        }
        let adopt = Adopt {
            volume: volume.to_owned(),
            target: self.target.clone(),
            pod: self.pod.clone(),
            parts: self.parts.keys().copied().collect(),
            attempts,
        };
        Ok((Message::Adopt(adopt), descriptors))
    }

    /// Whether it is known to be mounted at another target. What an agent says of that decides nothing.
    pub(super) fn is_elsewhere(&self, target: &Path) -> bool {
        self.at.as_ref().is_some_and(|at| at != target)
    }

    /// Whether a request waits to be read.
    pub(super) fn waits(&self) -> bool {
        polled(self.fuse.as_fd()).contains(PollFlags::IN)
    }

    /// Whether the connection has ended, which is for ever.
    pub(super) fn is_dead(&self) -> bool {
        polled(self.fuse.as_fd()).contains(PollFlags::ERR)
    }

    /// The newest generation; 0: none.
    pub(super) fn generation(&self) -> u32 {
        let number = |part: &Part| if let Part::Generation(number) = part { Some(*number) } else { None };
        self.parts.keys().filter_map(number).max().unwrap_or(0)
    }
}

/// What an agent reads a connection by: a duplicate, whose requests in flight outlive it, or a clone, whose requests end with it.
pub(super) fn lend(fuse: BorrowedFd<'_>, handover: Handover) -> io::Result<OwnedFd> {
    match handover {
        Handover::Resend => fuse.try_clone_to_owned(),
        Handover::Clone => sys::clone_device(fuse),
    }
}

/// What the shim keeps of what an agent read a connection by. It must not be that agent's own clone: kept, it would turn
/// the end of its requests in flight into a hang.
pub(super) fn keep(lent: OwnedFd, handover: Handover) -> io::Result<OwnedFd> {
    let is = rustix::fs::fstat(&lent)?.st_rdev;
    if (rustix::fs::major(is), rustix::fs::minor(is)) != FUSE {
        return Err(io::Error::other("not a descriptor of /dev/fuse"));
    }
    match handover {
        Handover::Resend => Ok(lent),
        Handover::Clone => sys::clone_device(lent.as_fd()),
    }
}

fn polled(file: BorrowedFd<'_>) -> PollFlags {
    let mut polled = [PollFd::new(&file, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // It fails for want of memory only.
    poll(&mut polled, Some(&now)).map_or(PollFlags::empty(), |_| polled[0].revents())
}
