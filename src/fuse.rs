//! Read 5: the adapter between the kernel's FUSE protocol and `Fs`. The only place with fuser's types.
//!
//! ```text
//!   mount ──/dev/fuse──▶ handshake ──negotiated──▶ session ──requests──▶ Adapter ──▶ Fs
//!                                                     ▲                     │ notices, page fills
//!                                                     └── invalidations ── notify (a thread of its own)
//! ```
//! A handler never waits for the store: an open that needs a refresh takes its reply along and answers when the refresh
//! ends. A handler that panics answers EIO (the reply does, when it is dropped) and the session lives on.

/// For how long a thread has been at one thing.
mod busy;
/// The end of a session that loses no reply.
mod drain;
/// The INIT exchange: what is negotiated once per mount.
pub mod handshake;
/// Attaching a FUSE file system to a directory, and detaching it.
pub mod mount;
/// Tells the kernel what it must not believe any more.
pub mod notify;
/// A running file system on a descriptor.
pub mod session;

use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use busy::Busy;
use session::Start;

use crate::fs::{Access, Attr, Destination, Error, Fs, Handle, Inode, Kind, NAME_MAX, Opening, Ttl, attr};
use crate::secret::bounce::Pool;
use crate::time::Moment;

/// How long the kernel may believe a name or an attribute that it is told about when it changes. Long, but not for ever: what
/// an invalidation misses heals within a day.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a reply waits for a bounce buffer. They are held for microseconds; this only bounds a fault.
const PATIENCE: Duration = Duration::from_secs(5);

/// Direct: no page of the page cache is filled by `read(2)`. No flush: nothing is ever dirty, and closing a file never asks.
fn open_flags() -> FopenFlags {
    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH
}

/// Translates requests. Its parts are shared with the opens that wait.
struct Adapter {
    fs: Arc<Fs>,
    pool: Arc<Pool>,
    invalidate: notify::Invalidations,
    start: Arc<Start>,
}

thread_local! {
    static IN_HANDLER: Cell<bool> = const { Cell::new(false) };
    /// Of a session's thread: since when it is in a handler.
    static BUSY: RefCell<Arc<Busy>> = RefCell::default();
}

/// Whether this thread runs a handler, whose panic is contained.
#[must_use]
pub fn in_handler() -> bool {
    IN_HANDLER.get()
}

/// Runs a handler. A panic ends in EIO for this one caller: the reply it held answers so when it is dropped.
fn guard(fs: &Fs, call: &'static str, handler: impl FnOnce()) {
    let outer = IN_HANDLER.replace(true);
    let busy = BUSY.with_borrow(Arc::clone);
    let outcome = busy.while_in(|| catch_unwind(AssertUnwindSafe(handler)));
    IN_HANDLER.set(outer);
    if outcome.is_err() {
        fs.volume().metrics().fs_panics.increment();
        tracing::error!(call, volume = %fs.volume().id().0, "a handler panicked; its caller got EIO");
    }
}

impl Adapter {
    fn guard(&self, call: &'static str, handler: impl FnOnce()) {
        guard(&self.fs, call, handler);
    }

    /// The rest of an open, for whoever ends its wait: the cache or the invalidator. A panic in it would end either.
    fn open_later(&self, inode: INodeNo, reply: ReplyOpen) -> Box<dyn FnOnce() + Send> {
        let fs = Arc::clone(&self.fs);
        Box::new(move || {
            guard(&fs, "open", || match fs.open_last_known(Inode(inode.0), Moment::now()) {
                Ok(handle) => reply.opened(FileHandle(handle.0), open_flags()),
                Err(error) => reply.error(errno(error)),
            });
        })
    }

    fn refuse(&self, reply: ReplyEmpty) {
        reply.error(errno(self.fs.refuse_write()));
    }
}

impl Filesystem for Adapter {
    // `init` stays the default one: what counts was negotiated by `handshake`.

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.guard("lookup", || match self.fs.lookup(Inode(parent.0), name.as_bytes(), Moment::now()) {
            Ok(found) => reply.entry_with_ttls(&ttl(found.ttl), &LONG, &attributes(&found), Generation(0)),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn forget(&self, _: &Request, inode: INodeNo, _: u64) {
        if inode.0 == handshake::NOBODY {
            BUSY.set(self.start.arrive());
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.guard("getattr", || match self.fs.attr(Inode(inode.0), Moment::now()) {
            Ok(found) => reply.attr(&ttl(found.ttl), &attributes(&found)),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        self.guard("readlink", || match self.fs.readlink(Inode(inode.0)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.guard("open", || {
            let reads = flags.acc_mode() == OpenAccMode::O_RDONLY && flags.0 & libc::O_TRUNC == 0;
            let access = if reads { Access::Read } else { Access::Write };
            match self.fs.open(Inode(inode.0), access, Moment::now()) {
                Ok(Opening::Opened(handle)) => reply.opened(FileHandle(handle.0), open_flags()),
                Ok(Opening::Refresh { file }) => {
                    let (fs, later) = (Arc::clone(&self.fs), self.open_later(inode, reply));
                    self.fs.volume().refresh(file, Box::new(move || fs.when_settled(later)));
                }
                Ok(Opening::Settle) => self.fs.when_settled(self.open_later(inode, reply)),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.guard("read", || {
            // A read for a caller names a lock owner (FUSE_READ_LOCKOWNER); one that fills a page of the page cache has none.
            let destination = if owner.is_some() { Destination::Caller } else { Destination::Page };
            let mut reply = Some(reply);
            let outcome =
                self.fs.read(Inode(inode.0), Handle(handle.0), offset, size, destination, |bytes| {
                    if bytes.is_empty() {
                        reply.take().map(|reply| reply.data(bytes))
                    } else {
                        // No buffer in time: the reply is dropped, and answers EIO.
                        self.pool
                            .lend(bytes, PATIENCE, |lent| reply.take().map(|reply| reply.data(lent)))
                            .flatten()
                    }
                });
            if let (Err(error), Some(reply)) = (outcome, reply.take()) {
                reply.error(errno(error));
            }
            if destination == Destination::Page {
                self.invalidate.page_filled(Inode(inode.0));
            }
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.guard("release", || {
            // Answered first: should this process end in between, the kernel asks nobody a second time (see `volume::opens`).
            reply.ok();
            self.fs.release(Handle(handle.0));
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.guard("opendir", || match self.fs.open_directory(Inode(inode.0)) {
            Ok(handle) => reply.opened(FileHandle(handle.0), FopenFlags::empty()),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.guard("readdir", || {
            let outcome = self.fs.read_directory(Inode(inode.0), offset, |entry| {
                !reply.add(INodeNo(entry.inode.0), entry.next, file_type(entry.kind), &entry.name)
            });
            match outcome {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.guard("releasedir", || {
            // Answered first: should this process end in between, the kernel asks nobody a second time (see `volume::opens`).
            reply.ok();
            self.fs.release(Handle(handle.0));
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.guard("statfs", || {
            let all = self.fs.statistics();
            let block = u32::try_from(attr::BLOCK).unwrap_or(u32::MAX);
            let name = u32::try_from(NAME_MAX).unwrap_or(u32::MAX);
            reply.statfs(all.blocks, 0, 0, all.inodes, 0, block, name, block);
        });
    }

    // There are no extended attributes. ENOSYS, at once: the kernel remembers it for the whole mount and stops asking.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    // `SEEK_DATA` and `SEEK_HOLE`: the kernel's own answer (all is data) is right.
    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    // Whatever would change something. The kernel refuses most of it before, as the mount is read-only; but runtimes are known
    // to clear that flag, so the refusal that counts is this one.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        self.refuse(reply);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        self.refuse(reply);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.refuse(reply);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(errno(self.fs.refuse_write()));
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        self.refuse(reply);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        self.refuse(reply);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        self.refuse(reply);
    }
}

fn errno(error: Error) -> Errno {
    Errno::from_i32(error.errno())
}

fn ttl(ttl: Ttl) -> Duration {
    match ttl {
        Ttl::Long => LONG,
        Ttl::None => Duration::ZERO,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Link => FileType::Symlink,
    }
}

fn attributes(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.inode.0),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: attr.mtime,
        mtime: attr.mtime,
        ctime: attr.mtime,
        crtime: attr.mtime,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.links,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: u32::try_from(attr::BLOCK).unwrap_or(u32::MAX),
        flags: 0,
    }
}
