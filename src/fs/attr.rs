//! Attributes. Files are owned by root, with the class's or the file's `uid`, `gid`, `mode` before that; mode 0444, or 0440
//! where a group is known. No execute or set-id bit is ever shown.

use std::time::SystemTime;

use super::id::Inode;
use crate::reference::Ownership;
use crate::volume::{Generation, Volume};

/// Size of a block in bytes, as `statfs(2)` and `stat(2)` tell it.
pub const BLOCK: u64 = 4096;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
}

/// How long the kernel may believe attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ttl {
    /// Until it is told otherwise.
    Long,
    /// Not at all.
    None,
}

/// What `stat(2)` tells. Access and change time are the modification time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The inode.
    pub inode: Inode,
    /// What it is.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// When this version was written.
    pub mtime: SystemTime,
    /// Permission bits.
    pub mode: u16,
    /// Links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// How long all this may be believed.
    pub ttl: Ttl,
}

/// Permission bits of a file.
#[must_use]
pub fn mode(ownership: Ownership) -> u16 {
    ownership.mode.unwrap_or(if ownership.gid.is_some() { 0o440 } else { 0o444 }) & 0o666
}

pub(super) fn file(volume: &Volume, inode: Inode, generation: &Generation, index: usize, ttl: Ttl) -> Attr {
    let spec = &volume.spec().files[index];
    let ownership = spec.ownership.or(volume.spec().ownership);
    let record = &generation.snapshot.files()[index];
    let (uid, gid) = owner(volume, ownership);
    Attr {
        inode,
        kind: Kind::File,
        size: record.size().unwrap_or(0) as u64,
        mtime: record.mtime,
        mode: mode(ownership),
        links: 1,
        uid,
        gid,
        ttl,
    }
}

pub(super) fn directory(volume: &Volume, inode: Inode, generation: &Generation, subdirectories: u32) -> Attr {
    let (uid, gid) = owner(volume, volume.spec().ownership);
    Attr {
        inode,
        kind: Kind::Directory,
        size: 0,
        mtime: generation.snapshot.created(),
        mode: 0o555,
        links: 2 + subdirectories,
        uid,
        gid,
        ttl: Ttl::Long,
    }
}

pub(super) fn link(volume: &Volume, inode: Inode, generation: &Generation, length: usize) -> Attr {
    let (uid, gid) = owner(volume, volume.spec().ownership);
    Attr {
        inode,
        kind: Kind::Link,
        size: length as u64,
        mtime: generation.snapshot.created(),
        mode: 0o777,
        links: 1,
        uid,
        gid,
        ttl: Ttl::Long,
    }
}

fn owner(volume: &Volume, ownership: Ownership) -> (u32, u32) {
    let (uid, gid) = volume.default_owner();
    (ownership.uid.unwrap_or(uid), ownership.gid.unwrap_or(gid))
}
