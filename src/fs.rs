//! Read 4: a file system on a `Volume`: names, inodes, handles, attributes. No FUSE in it and no runtime, so that it is
//! tested without a kernel; [`crate::fuse`] translates.
//!
//! ```text
//!   /                         live: an inode per path, for as long as the volume lives
//!   ├── db-password           its bytes are those of the generation that it shows
//!   ├── nested/tls.crt
//!   ├── ..data ─▶ ..7         a symbolic link that always names the newest generation
//!   └── ..7/                  frozen: an inode per path and generation, exact for every call
//!       ├── db-password
//!       └── nested/tls.crt
//! ```
//! A handle pins a generation: reads through it never mix two. `fstat` has no handle and follows the inode, so a live inode
//! takes a new generation over only when that confuses nobody (the switch rule, `shown`).
//!
//! Nothing can be written: `Error::ReadOnly` is the answer to every attempt.

/// Who is told of changes, and which of them the kernel has taken note of.
pub mod announce;
/// Attributes: sizes, times, owner, group, mode.
pub mod attr;
/// What goes wrong, and its errno.
pub mod error;
/// Inode numbers and handles: pure functions of generation and position, never pointers.
pub mod id;
/// Which generation a live inode shows.
pub mod shown;
/// The names of a volume.
pub mod tree;

pub use announce::{Notice, Notify};
pub use attr::{Attr, Kind, Ttl};
pub use error::Error;
pub use id::{Handle, Inode};

use std::sync::Arc;

use crate::time::Moment;
use crate::volume::{Change, Generation, Listener, Standing, Volume};
use announce::Announcements;
use id::LIVE;
use shown::{Look, Shown};
use tree::{Node, NodeKind, Tree};

/// Longest name in bytes, as `statfs(2)` tells it.
pub const NAME_MAX: usize = 255;

/// What an open wants to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Anything else.
    Write,
}

/// What an open comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Opening {
    /// A handle.
    Opened(Handle),
    /// The value is older than its class allows: call [`Volume::refresh`] for this file, then do as for
    /// [`Opening::Settle`].
    Refresh {
        /// Index of the file in the spec.
        file: usize,
    },
    /// The kernel still believes what was before the newest generation, and would answer `fstat` with an old size: call
    /// [`Fs::open_last_known`] from [`Fs::when_settled`].
    Settle,
}

/// Where the bytes of a read go, which decides whose they must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Into the caller's buffer: those of the handle's generation.
    Caller,
    /// Into a page of the page cache (`mmap`, `sendfile`): those that the inode shows, as pages belong to the inode.
    Page,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its inode.
    pub inode: Inode,
    /// File, directory or link.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Where the next call goes on.
    pub next: u64,
}

/// What `statfs(2)` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Blocks of [`attr::BLOCK`] bytes in use; none is free.
    pub blocks: u64,
    /// Inodes; none is free.
    pub inodes: u64,
}

/// The file system of one volume.
pub struct Fs {
    volume: Arc<Volume>,
    tree: Tree,
    shown: Vec<Shown>,
    announcements: Announcements,
}

impl Fs {
    /// A file system on a volume that no kernel knows yet; it hears of the volume's changes from now on.
    #[must_use]
    pub fn new(volume: Arc<Volume>) -> Arc<Self> {
        let fs = Self::restored(volume);
        // Nothing has to be given up for what is there.
        fs.acknowledge(fs.newest());
        fs
    }

    /// A file system on a volume that a predecessor served: see [`Fs::invalidate_all`].
    #[must_use]
    pub fn restored(volume: Arc<Volume>) -> Arc<Self> {
        let tree = Tree::new(volume.spec().files.iter().map(|file| &file.path));
        let (opens, now) = (volume.generations().opens(), Moment::now());
        let shown = (0..volume.spec().files.len()).map(|file| Shown::new(opens.shown(file), now)).collect();
        let fs = Arc::new(Self { volume, tree, shown, announcements: Announcements::default() });
        let listener: std::sync::Weak<dyn Listener> = Arc::downgrade(&(Arc::clone(&fs) as Arc<dyn Listener>));
        fs.volume.listen(listener);
        fs
    }

    /// A kernel knows it from a predecessor: all that it believes is void, and live files are opened when it has given that up.
    /// Called when there is somebody to tell it.
    pub fn invalidate_all(&self) {
        let nodes = 0..u32::try_from(self.tree.len()).unwrap_or(u32::MAX);
        let inodes = nodes.map(|node| Inode::new(LIVE, node)).chain([Inode::DATA]).collect();
        self.announce(&Notice::Changed { generation: self.newest(), inodes });
    }

    /// Adds somebody who passes notices on.
    pub fn notify_through(&self, notify: Arc<dyn Notify>) {
        self.announcements.add(notify);
    }

    /// The kernel has given up what it believed before this generation: live inodes may show it now.
    pub fn acknowledge(&self, generation: u32) {
        self.announcements.acknowledge(generation, self.newest());
    }

    /// Calls `then` when the newest generation is acknowledged: at once, or by whoever acknowledges it.
    pub fn when_settled(&self, then: Box<dyn FnOnce() + Send>) {
        self.announcements.when_settled(self.newest(), then);
    }

    /// The volume it serves.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Finds a name in a directory.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::NameTooLong`]; [`Error::NotDirectory`]; [`Error::Stale`]: the generation is no longer
    /// kept.
    pub fn lookup(&self, parent: Inode, name: &[u8], now: Moment) -> Result<Attr, Error> {
        if name.len() > NAME_MAX {
            return Err(Error::NameTooLong);
        }
        let name = std::str::from_utf8(name).map_err(|_| Error::NotFound)?;
        if parent == Inode::ROOT && name == Tree::DATA {
            return self.attr(Inode::DATA, now);
        }
        if let Some(number) = name.strip_prefix("..").filter(|_| parent == Inode::ROOT) {
            let number = parse_generation(number).ok_or(Error::NotFound)?;
            // A name that the kernel still holds may have gone: ESTALE makes it walk the path again from the top.
            self.volume.generations().find(number).ok_or(Error::Stale)?;
            return self.attr(Inode::new(number, Tree::ROOT), now);
        }
        let (generation, node) = self.node(parent)?;
        let NodeKind::Directory { .. } = node.kind else { return Err(Error::NotDirectory) };
        let child = self.tree.child(node, name).ok_or(Error::NotFound)?;
        self.attr(Inode::new(generation, child), now)
    }

    /// Attributes of an inode, and how long they may be believed.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Stale`]: the generation is no longer kept.
    pub fn attr(&self, inode: Inode, now: Moment) -> Result<Attr, Error> {
        let current = self.volume.generations().current().ok_or(Error::Gone)?;
        if inode == Inode::DATA {
            return Ok(attr::link(&self.volume, inode, &current, generation_name(current.number()).len()));
        }
        let (number, node) = self.node(inode)?;
        match node.kind {
            NodeKind::Directory { .. } => {
                let generation = if number == LIVE { current } else { self.generation(number)? };
                Ok(attr::directory(&self.volume, inode, &generation, self.tree.subdirectories(node)))
            }
            NodeKind::File { index } if number == LIVE => {
                let generation = self.show(index, &current, now, false);
                let ttl = if generation.since(index) == current.since(index) { Ttl::Long } else { Ttl::None };
                Ok(attr::file(&self.volume, inode, &generation, index, ttl))
            }
            NodeKind::File { index } => {
                let generation = self.generation(number)?;
                Ok(attr::file(&self.volume, inode, &generation, index, Ttl::Long))
            }
        }
    }

    /// Where a symbolic link leads: there is one, `..data`.
    ///
    /// # Errors
    /// [`Error::Invalid`]: not a link.
    pub fn readlink(&self, inode: Inode) -> Result<String, Error> {
        if inode != Inode::DATA {
            return Err(Error::Invalid);
        }
        let current = self.volume.generations().current().ok_or(Error::Gone)?;
        Ok(generation_name(current.number()))
    }

    /// Opens a file, unless its value is too old to be served without asking the store first.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::IsDirectory`]; [`Error::Stale`]; [`Error::Gone`]: its grace ended.
    pub fn open(&self, inode: Inode, access: Access, now: Moment) -> Result<Opening, Error> {
        if access == Access::Write {
            return Err(self.refuse_write());
        }
        let metrics = self.volume.metrics();
        if let (LIVE, Node { kind: NodeKind::File { index }, .. }) = self.node(inode)? {
            match self.volume.standing(*index, now) {
                Standing::Fresh => metrics.cache_hits.increment(),
                Standing::LastKnown => metrics.cache_stale_serves.increment(),
                Standing::Gone => return Err(Error::Gone),
                Standing::Old => {
                    metrics.cache_misses.increment();
                    return Ok(Opening::Refresh { file: *index });
                }
            }
            if !self.announcements.is_settled(self.newest()) {
                return Ok(Opening::Settle);
            }
        }
        self.pin(inode, now).map(Opening::Opened)
    }

    /// Opens a file after a refresh was asked for: with the new value if it came, else with the last known one.
    ///
    /// # Errors
    /// As [`Fs::open`].
    pub fn open_last_known(&self, inode: Inode, now: Moment) -> Result<Handle, Error> {
        if let (LIVE, Node { kind: NodeKind::File { index }, .. }) = self.node(inode)? {
            match self.volume.standing(*index, now) {
                Standing::Fresh => {}
                Standing::Gone => return Err(Error::Gone),
                Standing::Old | Standing::LastKnown => self.volume.metrics().cache_stale_serves.increment(),
            }
        }
        self.pin(inode, now)
    }

    /// Reads through a handle: calls `reply` once with the bytes from `offset`, at most `size`, fewer only at the end.
    ///
    /// # Errors
    /// [`Error::Stale`]: the handle's generation is no longer kept; [`Error::Gone`]: the value was given up. `reply` was
    /// not called then.
    pub fn read<R>(
        &self,
        inode: Inode,
        handle: Handle,
        offset: u64,
        size: u32,
        destination: Destination,
        reply: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, Error> {
        self.volume.count_read();
        let (number, node) = self.node(inode)?;
        let NodeKind::File { index } = node.kind else { return Err(Error::IsDirectory) };
        let generation = match destination {
            Destination::Page if number == LIVE => self.shown[index].generation(self.volume.generations()),
            _ => self.volume.generations().find(handle.generation()),
        };
        let Some(generation) = generation else {
            self.volume.metrics().fs_stale_handles.increment();
            return Err(Error::Stale);
        };
        let value = generation.snapshot.value(index).ok_or(Error::Gone)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(value.len());
        let end = start.saturating_add(size as usize).min(value.len());
        Ok(reply(&value[start..end]))
    }

    /// Gives a handle of a file or directory back.
    pub fn release(&self, handle: Handle) {
        for number in self.volume.generations().release(handle.generation()) {
            self.announce(&Notice::Removed(generation_name(number)));
        }
    }

    /// Opens a directory. A frozen one keeps its generation while it is open.
    ///
    /// # Errors
    /// [`Error::NotDirectory`]; [`Error::Stale`]
    pub fn open_directory(&self, inode: Inode) -> Result<Handle, Error> {
        let (number, node) = self.node(inode)?;
        let NodeKind::Directory { .. } = node.kind else { return Err(Error::NotDirectory) };
        if number != LIVE {
            self.volume.generations().open(number).ok_or(Error::Stale)?;
        }
        Ok(Handle::new(number, node.index()))
    }

    /// The entries of a directory from `offset` on, in an order that never changes; ends when `take` answers `false`.
    ///
    /// # Errors
    /// [`Error::NotDirectory`]; [`Error::Stale`]
    pub fn read_directory(
        &self,
        inode: Inode,
        offset: u64,
        mut take: impl FnMut(&Entry) -> bool,
    ) -> Result<(), Error> {
        let (number, node) = self.node(inode)?;
        let NodeKind::Directory { children, parent } = &node.kind else { return Err(Error::NotDirectory) };
        let mut entries = vec![
            (inode, Kind::Directory, ".".to_owned()),
            (Inode::new(number, *parent), Kind::Directory, "..".to_owned()),
        ];
        if inode == Inode::ROOT {
            let current = self.volume.generations().current().ok_or(Error::Gone)?.number();
            entries.push((Inode::DATA, Kind::Link, Tree::DATA.to_owned()));
            entries.push((Inode::new(current, Tree::ROOT), Kind::Directory, generation_name(current)));
        } else if number != LIVE {
            self.generation(number)?;
        }
        let special = entries.len();
        let children = children.iter().map(|&child| {
            let node = self.tree.node(child);
            let kind = if matches!(node.kind, NodeKind::File { .. }) { Kind::File } else { Kind::Directory };
            (Inode::new(number, child), kind, node.name.clone())
        });
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let entries = entries.into_iter().skip(skip).chain(children.skip(skip.saturating_sub(special)));
        for (next, (inode, kind, name)) in (offset + 1..).zip(entries) {
            if !take(&Entry { inode, kind, name, next }) {
                break;
            }
        }
        Ok(())
    }

    /// What `statfs(2)` tells: all that is here is in use.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let bytes: usize =
            self.volume.generations().current().map_or(0, |current| {
                current.snapshot.files().iter().map(|file| file.size().unwrap_or(0)).sum()
            });
        Statistics { blocks: (bytes as u64).div_ceil(attr::BLOCK), inodes: self.tree.len() as u64 + 1 }
    }

    /// The answer to every attempt to change something; the one place where it is given.
    #[must_use]
    pub fn refuse_write(&self) -> Error {
        self.volume.metrics().fs_writes_refused.increment();
        Error::ReadOnly
    }

    /// Pins the generation that a file shows now (live) or belongs to (frozen).
    fn pin(&self, inode: Inode, now: Moment) -> Result<Handle, Error> {
        let (number, node) = self.node(inode)?;
        let NodeKind::File { index } = node.kind else { return Err(Error::IsDirectory) };
        loop {
            let generation = if number == LIVE {
                let current = self.volume.generations().current().ok_or(Error::Gone)?;
                self.show(index, &current, now, true).number()
            } else {
                number
            };
            match self.volume.generations().open(generation) {
                Some(generation) if generation.snapshot.value(index).is_none() => {
                    self.release(Handle::new(generation.number(), node.index()));
                    return Err(Error::Gone);
                }
                Some(generation) => {
                    self.volume.count_open();
                    return Ok(Handle::new(generation.number(), node.index()));
                }
                None if number != LIVE => return Err(Error::Stale),
                // It went between the two calls: a newer one is shown by now.
                None => {}
            }
        }
    }

    /// Which generation a live file shows; announces it if that is another one from now on.
    fn show(&self, index: usize, current: &Arc<Generation>, now: Moment, opening: bool) -> Arc<Generation> {
        let acknowledged = self.announcements.is_settled(current.number());
        let look = Look { index, now, opening, acknowledged };
        let (generation, switched) = self.shown[index].decide(look, current, self.volume.generations());
        if switched {
            let inodes = vec![Inode::new(LIVE, self.tree.file(index))];
            self.announce(&Notice::Changed { generation: generation.number(), inodes });
        }
        generation
    }

    fn node(&self, inode: Inode) -> Result<(u32, &Node), Error> {
        if inode == Inode::DATA {
            return Err(Error::Invalid);
        }
        let node = self.tree.try_node(inode.node()).ok_or(Error::NotFound)?;
        Ok((inode.generation(), node))
    }

    fn generation(&self, number: u32) -> Result<Arc<Generation>, Error> {
        self.volume.generations().find(number).ok_or(Error::Stale)
    }

    fn newest(&self) -> u32 {
        self.volume.generations().current().map_or(0, |current| current.number())
    }

    fn announce(&self, notice: &Notice) {
        self.announcements.announce(notice, self.newest());
    }
}

impl Listener for Fs {
    fn changed(&self, change: &Change) {
        let live = change.files.iter().map(|&index| Inode::new(LIVE, self.tree.file(index)));
        let inodes = live.chain([Inode::DATA, Inode::ROOT]).collect();
        self.announce(&Notice::Changed { generation: change.generation, inodes });
        for &number in &change.gone {
            self.announce(&Notice::Removed(generation_name(number)));
        }
    }
}

/// Name of a generation's directory. The two dots hide it from `ls` and from every glob, as with Kubernetes' own volumes.
fn generation_name(number: u32) -> String {
    format!("..{number}")
}

/// The other way: only the name that [`generation_name`] gives, so that a generation has one name.
fn parse_generation(text: &str) -> Option<u32> {
    let number = text.parse().ok()?;
    (number != LIVE && generation_name(number).strip_prefix("..") == Some(text)).then_some(number)
}

#[cfg(test)]
mod tests;
