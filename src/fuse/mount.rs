//! Attaching a FUSE file system to a directory of this process's mount namespace, and detaching it.
//!
//! With CAP_SYS_ADMIN by `fsopen(2)` … `move_mount(2)`; without, by the set-uid helper `fusermount3`, which does the same for
//! a directory that the user owns. Either way the descriptor comes back unserved, with the kernel's INIT waiting in it.
//!
//! No function here touches the inside of a mount: a server that looks into its own mount waits for itself.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};

/// Source and subtype, as `mount(8)` and /proc/self/mountinfo show them: `fuse.fuse-secrets`.
pub const NAME: &str = "fuse-secrets";

/// How a file system is to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether other users than this process's may enter.
    pub allow_other: bool,
    /// The largest reply in bytes: the size of a bounce buffer.
    pub max_read: usize,
}

/// Why a directory could not be mounted on; each text says what to change.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel has no FUSE, or the device is out of reach.
    #[error("cannot open /dev/fuse: {0}; load the fuse module, or give this process access to the device")]
    Device(#[source] io::Error),
    /// A system call of the mount.
    #[error("cannot mount on {path}: {step}: {error}")]
    Kernel {
        /// The mount point.
        path: PathBuf,
        /// The call.
        step: &'static str,
        /// What it said.
        #[source]
        error: io::Error,
    },
    /// No helper for ordinary users.
    #[error("mounting as an ordinary user needs fusermount3: install the package fuse3 ({0})")]
    NoHelper(#[source] io::Error),
    /// The helper refused.
    #[error("fusermount3 did not mount {path}: {message}")]
    Helper {
        /// The mount point.
        path: PathBuf,
        /// What it said.
        message: String,
    },
}

/// A mount that this process made.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
    by_helper: bool,
    /// Whether it was not detached yet: the next mount on this path is not ours to take away.
    attached: Mutex<bool>,
}

impl Mount {
    /// Mounts on an existing directory. Returns the descriptor on which the kernel's requests arrive.
    ///
    /// # Errors
    /// [`MountError`]; nothing is left behind.
    pub fn attach(path: &Path, options: Options) -> Result<(Self, OwnedFd), MountError> {
        match direct(path, options) {
            Err(MountError::Kernel { error, .. }) if error.raw_os_error() == Some(libc::EPERM) => {
                let fuse = by_helper(path, options)?;
                Ok((Self { path: path.to_owned(), by_helper: true, attached: Mutex::new(true) }, fuse))
            }
            // The device is the helper's to open, if it is not ours.
            Err(MountError::Device(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
                let fuse = by_helper(path, options)?;
                Ok((Self { path: path.to_owned(), by_helper: true, attached: Mutex::new(true) }, fuse))
            }
            other => {
                Ok((Self { path: path.to_owned(), by_helper: false, attached: Mutex::new(true) }, other?))
            }
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the mount away from its directory, if that was not done before. Who still has a file open goes on reading until
    /// they close it, or this process ends.
    ///
    /// # Errors
    /// As umount2(2), or what the helper said.
    pub fn detach(&self) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if *attached {
            detach(&self.path, self.by_helper)?;
            *attached = false;
        }
        Ok(())
    }
}

/// Takes a dead mount away, whoever made it, with whichever means works.
///
/// # Errors
/// As umount2(2), or what the helper said.
pub fn detach_dead(path: &Path) -> io::Result<()> {
    match detach(path, false) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => detach(path, true),
        other => other,
    }
}

fn detach(path: &Path, by_helper: bool) -> io::Result<()> {
    if !by_helper {
        // The raw call: umount(8) would look at the mount first, and hang on a dead server.
        return match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Somebody else unmounted it before.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(error) => Err(error.into()),
        };
    }
    let output = helper()?.args(["-u", "-z", "-q", "--"]).arg(path).stdin(Stdio::null()).output()?;
    if output.status.success() { Ok(()) } else { Err(io::Error::other(said(&output.stderr))) }
}

fn direct(path: &Path, options: Options) -> Result<OwnedFd, MountError> {
    let failed =
        |step| move |error: Errno| MountError::Kernel { path: path.to_owned(), step, error: error.into() };
    let fuse = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| MountError::Device(error.into()))?;
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    let context = context.as_fd();
    for (key, value) in settings(options, fuse.as_raw_fd()) {
        fsconfig_set_string(context, key, value).map_err(failed("fsconfig"))?;
    }
    fsconfig_set_flag(context, "default_permissions").map_err(failed("fsconfig"))?;
    if options.allow_other {
        fsconfig_set_flag(context, "allow_other").map_err(failed("fsconfig"))?;
    }
    fsconfig_set_flag(context, "ro").map_err(failed("fsconfig"))?;
    fsconfig_create(context).map_err(failed("fsconfig create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), "", CWD, path, flags).map_err(failed("move_mount"))?;
    Ok(fuse)
}

fn settings(options: Options, fuse: i32) -> [(&'static str, String); 7] {
    [
        ("source", NAME.to_owned()),
        ("subtype", NAME.to_owned()),
        ("fd", fuse.to_string()),
        ("rootmode", "40000".to_owned()),
        ("user_id", rustix::process::geteuid().as_raw().to_string()),
        ("group_id", rustix::process::getegid().as_raw().to_string()),
        ("max_read", options.max_read.to_string()),
    ]
}

fn by_helper(path: &Path, options: Options) -> Result<OwnedFd, MountError> {
    let io = |error: Errno| MountError::NoHelper(error.into());
    let (ours, its) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(io)?;
    let other = if options.allow_other { ",allow_other" } else { "" };
    let settings = format!(
        "ro,nosuid,nodev,noexec,default_permissions,fsname={NAME},subtype={NAME},max_read={}{other}",
        options.max_read
    );
    // The helper's end must survive its exec: it becomes its standard input, which no other child inherits.
    let child = helper()
        .map_err(MountError::NoHelper)?
        .env("_FUSE_COMMFD", "0")
        .args(["-o", &settings, "--"])
        .arg(path)
        .stdin(Stdio::from(its))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(MountError::NoHelper)?;
    // All its work is a few system calls; it ends by itself, with or without having sent the descriptor.
    let output = child.wait_with_output().map_err(MountError::NoHelper)?;
    if !output.status.success() {
        return Err(MountError::Helper { path: path.to_owned(), message: said(&output.stderr) });
    }
    receive(&ours).map_err(|error| MountError::Helper { path: path.to_owned(), message: error.to_string() })
}

fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(socket, &mut [io::IoSliceMut::new(&mut byte)], &mut control, flags)?;
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "it passed no descriptor"))
}

/// `fusermount3` from the system's directories only: it is set-uid, and the search path is the caller's.
fn helper() -> io::Result<Command> {
    [
        "/usr/bin/fusermount3",
        "/bin/fusermount3",
        "/usr/local/bin/fusermount3",
        "/run/wrappers/bin/fusermount3",
    ]
    .into_iter()
    .find(|path| Path::new(path).exists())
    .map(Command::new)
    .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not found"))
}

fn said(stderr: &[u8]) -> String {
    String::from_utf8_lossy(stderr).trim().replace('\n', "; ")
}

/// What is mounted on a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// Nothing.
    Nobody,
    /// A file system of this kind whose server is gone.
    Dead,
    /// A file system of this kind that is served, or that does not answer.
    Alive,
    /// Some other file system.
    Foreign,
}

/// How long a live file system may take to open its root.
const PROBE: Duration = Duration::from_secs(2);

/// Looks at what is mounted on `path`, without entering it but for one `open`, which alone tells a dead mount from a live
/// one. A thread of its own does that: on a server that hangs it would wait for ever.
///
/// # Errors
/// /proc/self/mountinfo cannot be read, or no thread is left.
pub fn occupant(path: &Path) -> io::Result<Occupant> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let topmost = table.split(|byte| *byte == b'\n').filter_map(mount_of).rfind(|(at, _)| at == path);
    match topmost {
        None => Ok(Occupant::Nobody),
        Some((_, kind)) if kind != format!("fuse.{NAME}") => Ok(Occupant::Foreign),
        Some(_) => {
            let (tell, hear) = mpsc::channel();
            let path = path.to_owned();
            std::thread::Builder::new()
                .name("probe".to_owned())
                .spawn(move || tell.send(File::open(path).map(drop)))?;
            match hear.recv_timeout(PROBE) {
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(Occupant::Dead),
                _ => Ok(Occupant::Alive),
            }
        }
    }
}

/// All mount points of file systems of this kind that this process sees, dead ones too; none is touched.
///
/// # Errors
/// /proc/self/mountinfo cannot be read.
pub fn points() -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let mounts = table.split(|byte| *byte == b'\n').filter_map(mount_of);
    Ok(mounts.filter(|(_, kind)| *kind == format!("fuse.{NAME}")).map(|(point, _)| point).collect())
}

/// Mount point and file system of a line of mountinfo, see proc_pid_mountinfo(5).
fn mount_of(line: &[u8]) -> Option<(PathBuf, String)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = unescape(fields.nth(4)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some((PathBuf::from(OsStr::from_bytes(&point)), String::from_utf8_lossy(kind).into_owned()))
}

/// Undoes `\040` and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| first == b'\\').and_then(|digits| {
            std::str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 8).ok())
        });
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_point_and_file_system() {
        let line =
            b"36 35 98:0 / /mnt/a\\040b rw,noatime master:1 shared:3 - fuse.fuse-secrets fuse-secrets ro";
        assert_eq!(mount_of(line), Some((PathBuf::from("/mnt/a b"), "fuse.fuse-secrets".to_owned())));
        assert_eq!(mount_of(b"36 35 98:0 /"), None);
    }

    #[test]
    fn escapes_that_are_none_stay_as_they_are() {
        assert_eq!(unescape(b"a\\134b\\9\\04"), b"a\\b\\9\\04");
    }
}
