//! The floor of the read bench: the least that a fuser file system can do under the same conditions as the product. It is
//! mounted, negotiated and adopted by the same code, with as many threads, the same lifetimes and flags and the same
//! allocator, and it answers constants.
//!
//! `bench-floor DIR THREADS MAX_READ LARGE`: mounts on `DIR`; replies are of at most `MAX_READ` bytes, the large file has
//! `LARGE`. Prints a line when it serves, and serves until it is killed.

// It tells its parent through a pipe.
#![allow(clippy::print_stdout)]

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuse_secrets::fuse::mount::{Mount, Options};
use fuse_secrets::fuse::{handshake, session};
use fuse_secrets::sys::alloc::{self, Wiping};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};

#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

const ONE_DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    alloc::pin();
    let arguments: Vec<String> = std::env::args().collect();
    let [_, directory, threads, max_read, large] = arguments.as_slice() else {
        return Err("usage: bench-floor DIR THREADS MAX_READ LARGE".into());
    };
    let options = Options { allow_other: rustix::process::geteuid().is_root(), max_read: max_read.parse()? };
    let (_mount, fuse) = Mount::attach(Path::new(directory), options)?;
    handshake::negotiate(fuse.as_fd())?;
    let floor = Floor { small: vec![b'x'; 64], large: vec![b'x'; large.parse()?] };
    let session = session::adopt(fuse, floor, threads.parse()?)?;
    println!("serving");
    Ok(session.run()?)
}

/// Two files of constant content: `small` is inode 2, `large` 3.
struct Floor {
    small: Vec<u8>,
    large: Vec<u8>,
}

impl Floor {
    fn content(&self, inode: INodeNo) -> Option<&[u8]> {
        match inode.0 {
            2 => Some(&self.small),
            3 => Some(&self.large),
            _ => None,
        }
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let content = self.content(inode);
        let (kind, perm) =
            if content.is_some() { (FileType::RegularFile, 0o444) } else { (FileType::Directory, 0o555) };
        let size = content.map_or(0, <[u8]>::len) as u64;
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Floor {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let inode = match name.to_str() {
            Some("small") => 2,
            Some("large") => 3,
            _ => return reply.error(Errno::ENOENT),
        };
        reply.entry_with_ttls(&ONE_DAY, &ONE_DAY, &self.attributes(INodeNo(inode)), Generation(0));
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {}

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ONE_DAY, &self.attributes(inode));
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(inode.0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let content = self.content(inode).unwrap_or_default();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let end = start.saturating_add(size as usize).min(content.len());
        reply.data(&content[start..end]);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}
