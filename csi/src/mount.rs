//! FUSE mounts: made detached, attached by descriptor, taken away.
//!
//! The mount is read-only; its superblock is not, so that a writable mount of the same (see [`again`]) can tell watchers of a
//! change. That nobody else writes is the agent's to enforce. No function here touches the inside of a mount but [`is_dead`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use crate::mountinfo::Device;
use crate::sys;
use crate::target::{HANDLE, Target};

/// What no mount of a volume lets happen.
pub(crate) const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// How long a mount may take to say that it is alive: one that nobody serves just now says nothing.
const ALIVE: Duration = Duration::from_millis(200);

/// How volumes are mounted on this node.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The largest reply in bytes.
    pub max_read: u32,
    /// The SELinux context of every file; none leaves it to the policy.
    pub selinux_context: Option<String>,
}

/// Why there is no mount; each text says what to change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// The kernel has no FUSE, or the device is out of reach.
    #[error("cannot open /dev/fuse: {0}; load the fuse module, and run the shim privileged")]
    Device(io::Error),
    /// The mount could not be made: the call or setting, and what the kernel said.
    #[error("cannot make a FUSE mount: {0}: {1}")]
    Make(&'static str, io::Error),
    /// The mount could not be attached: the target, and what the kernel said.
    #[error("cannot mount on {0:?}: {1}")]
    Attach(PathBuf, io::Error),
}

/// A mount that is attached nowhere. Dropped, it is gone, and so is the connection once its descriptors are closed.
#[derive(Debug)]
pub(crate) struct Detached(OwnedFd);

/// Makes a connection and a mount of it. The kernel's INIT waits in the descriptor.
///
/// # Errors
/// [`MountError`]; nothing is left behind.
pub(crate) fn create(volume: &str, options: &Options) -> Result<(OwnedFd, Detached), MountError> {
    let fuse = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| MountError::Device(error.into()))?;
    let mount = again(fuse.as_fd(), volume, options)?;
    Ok((fuse, mount))
}

/// Ends a connection: its requests fail, those that wait and all to come. Its mounts stay, dead, until they are covered or taken
/// away. One that has ended is left alone. By the control file system of FUSE (Documentation/filesystems/fuse/fuse.rst), which
/// need not be mounted anywhere.
///
/// # Errors
/// The kernel has no such file system, or this process not the right.
pub(crate) fn abort(Device(_, number): Device) -> io::Result<()> {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let control = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let file = format!("{number}/abort");
    match rustix::fs::openat(&control, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(rustix::io::write(file, b"1").map(drop)?),
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes a further mount of the file system of a connection.
///
/// # Errors
/// [`MountError`]; ENOTCONN inside if its last mount is gone: it cannot come back.
pub(crate) fn again(fuse: BorrowedFd<'_>, volume: &str, options: &Options) -> Result<Detached, MountError> {
    let failed = |step| move |error: Errno| MountError::Make(step, error.into());
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    let context = context.as_fd();
    let mut settings = vec![
        ("source", volume.to_owned()),
        ("subtype", "fuse-secrets".to_owned()),
        ("fd", fuse.as_raw_fd().to_string()),
        ("rootmode", "40000".to_owned()),
        ("user_id", "0".to_owned()),
        ("group_id", "0".to_owned()),
        ("max_read", options.max_read.to_string()),
    ];
    settings.extend(options.selinux_context.clone().map(|label| ("context", label)));
    for (key, value) in settings {
        fsconfig_set_string(context, key, value).map_err(failed(key))?;
    }
    for key in ["default_permissions", "allow_other"] {
        fsconfig_set_flag(context, key).map_err(failed(key))?;
    }
    fsconfig_create(context).map_err(failed("fsconfig create"))?;
    let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, ATTRIBUTES).map_err(failed("fsmount"))?;
    Ok(Detached(mount))
}

impl Detached {
    /// Attaches it to an existing directory, on top of whatever is mounted there.
    ///
    /// # Errors
    /// [`MountError::Attach`]; the mount is gone.
    pub(crate) fn attach(self, target: &Target) -> Result<Device, MountError> {
        let attach = || {
            let at = target.open()?;
            move_onto(self.0.as_fd(), at.as_fd())?;
            device(self.0.as_fd())
        };
        attach().map_err(|error| MountError::Attach(target.path().to_owned(), error))
    }
}

/// Attaches a detached mount by descriptors alone.
///
/// # Errors
/// As move_mount(2).
pub(crate) fn move_onto(mount: BorrowedFd<'_>, at: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", at, "", flags)?)
}

/// Takes away everything that is mounted on a target, dead or alive, busy or not; how many mounts that was.
///
/// # Errors
/// As umount2(2).
pub(crate) fn detach_all(target: &Target) -> io::Result<usize> {
    let path = target.handle();
    let mut count = 0;
    loop {
        // The raw call: umount(8) would look at the mount first, and hang on one that nobody serves.
        match unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => count += 1,
            // Not a mount point, not there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(count),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The file system of anything that is open, without asking its server.
///
/// # Errors
/// As statx(2).
pub(crate) fn device(of: BorrowedFd<'_>) -> io::Result<Device> {
    identity(of).map(|(_, device)| device)
}

/// The mount (its id in mountinfo) and file system of anything that is open, without asking its server.
///
/// # Errors
/// As statx(2).
pub(crate) fn identity(of: BorrowedFd<'_>) -> io::Result<(u64, Device)> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let is = statx(of, "", flags, StatxFlags::MNT_ID)?;
    Ok((is.stx_mnt_id, Device(is.stx_dev_major, is.stx_dev_minor)))
}

/// Whether the mount of the file system `mount` on top of a target has lost its connection, which is for ever. One that is only
/// served by nobody just now is not dead. Blocks for at most 200 ms.
///
/// # Errors
/// Something else is on the target; as openat2(2).
pub(crate) fn is_dead(target: &Path, mount: Device) -> io::Result<bool> {
    let path = target.to_owned();
    let ask = move || {
        let top = open_handle(&path)?;
        if device(top.as_fd())? != mount {
            return Err(io::Error::other(format!("another mount than {mount} is on {path:?}")));
        }
        match statx(top, "", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => Ok(true),
            _ => Ok(false),
        }
    };
    match sys::seclude(ALIVE, ask) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
        other => other,
    }
}

/// A handle on a directory, or what is mounted there, by a path without links.
///
/// # Errors
/// As openat2(2).
pub(crate) fn open_handle(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat2(CWD, path, HANDLE, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::process::{Pid, PidfdFlags};

    use super::*;
    use crate::child::{self, Node, options};
    use crate::mountinfo;
    use crate::target::{Occupant, Root};

    /// Whether the kernel has given a connection up.
    fn is_over(fuse: &OwnedFd) -> bool {
        let mut events = [PollFd::new(fuse, PollFlags::IN)];
        poll(&mut events, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        events[0].revents().contains(PollFlags::ERR)
    }

    #[test]
    fn a_mount_that_is_dropped_leaves_nothing() {
        let (fuse, mount) = create("csi-1", &options()).unwrap();
        assert!(!is_over(&fuse), "the control");
        drop(mount);
        assert!(is_over(&fuse));
        let error = again(fuse.as_fd(), "csi-1", &options()).unwrap_err();
        assert!(error.to_string().contains("fsconfig create"), "{error}");
    }

    #[test]
    fn a_setting_that_the_kernel_refuses_is_named() {
        let options = Options { max_read: 4096, selinux_context: Some("no\u{1}context".to_owned()) };
        let Err(error) = create("csi-1", &options) else { panic!("mounted with a bad context") };
        assert!(error.to_string().contains("context"), "{error}");
    }

    #[test]
    fn a_mount_is_attached_with_its_flags_and_its_superblock_can_be_written() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "mount::tests::a_mount_is_attached_with_its_flags_and_its_superblock_can_be_written",
            );
        }
        let node = Node::new();
        let target = node.target("pods/a/mount");
        let (_fuse, mount) = create("csi-1", &options()).unwrap();
        let device = mount.attach(&target).unwrap();
        assert_eq!(
            target.occupant(&mountinfo::read().unwrap()),
            Occupant::Ours { volume: "csi-1".to_owned(), device }
        );
        assert_eq!(super::device(target.open().unwrap().as_fd()).unwrap(), device);
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = text.lines().find(|line| line.contains(" fuse.fuse-secrets csi-1 ")).unwrap();
        let (before, after) = line.split_once(" - ").unwrap();
        assert!(before.contains(" ro,nosuid,nodev,noexec,"), "{line}");
        assert_eq!(
            after,
            "fuse.fuse-secrets csi-1 rw,user_id=0,group_id=0,default_permissions,allow_other,max_read=131072"
        );
    }

    #[test]
    fn another_mount_of_a_connection_is_the_same_file_system() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "mount::tests::another_mount_of_a_connection_is_the_same_file_system",
            );
        }
        let node = Node::new();
        let (fuse, mount) = create("csi-1", &options()).unwrap();
        let first = mount.attach(&node.target("a")).unwrap();
        let second = again(fuse.as_fd(), "csi-1", &options()).unwrap();
        assert_eq!(second.attach(&node.target("b")).unwrap(), first);
        detach_all(&node.target("a")).unwrap();
        assert!(!is_over(&fuse), "one mount is left");
        detach_all(&node.target("b")).unwrap();
        assert!(is_over(&fuse));
    }

    #[test]
    fn a_target_that_became_a_link_is_refused_and_a_parent_that_did_is_not_followed() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "mount::tests::a_target_that_became_a_link_is_refused_and_a_parent_that_did_is_not_followed",
            );
        }
        let node = Node::new();
        let elsewhere = node.path("elsewhere/mount");
        std::fs::create_dir(&elsewhere).unwrap();
        let target = node.target("a/mount");
        std::fs::remove_dir(target.path()).unwrap();
        std::os::unix::fs::symlink(&elsewhere, target.path()).unwrap();
        let (_fuse, mount) = create("csi-1", &options()).unwrap();
        let error = mount.attach(&target).unwrap_err();
        assert!(error.to_string().contains("symbolic links"), "{error}");
        assert!(mountinfo::read().unwrap().iter().all(|entry| entry.volume() != Some("csi-1")));

        let target = node.target("b/mount");
        std::fs::rename(node.directory().join("b"), node.directory().join("c")).unwrap();
        std::os::unix::fs::symlink("elsewhere", node.directory().join("b")).unwrap();
        let (_fuse, mount) = create("csi-2", &options()).unwrap();
        mount.attach(&target).unwrap();
        let entries = mountinfo::read().unwrap();
        let points: Vec<_> = entries.iter().filter(|entry| entry.volume() == Some("csi-2")).collect();
        assert!(points.iter().all(|entry| entry.point == node.directory().join("c/mount")), "{points:?}");
        assert_eq!((points.len(), detach_all(&target).unwrap()), (1, 1));
    }

    #[test]
    fn a_dead_mount_is_told_from_one_that_waits_and_is_covered_without_asking_it() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "mount::tests::a_dead_mount_is_told_from_one_that_waits_and_is_covered_without_asking_it",
            );
        }
        let node = Node::new();
        let target = node.target("mount");
        let (fuse, mount) = create("csi-1", &options()).unwrap();
        let first = mount.attach(&target).unwrap();
        assert!(!is_dead(target.path(), first).unwrap(), "nobody serves it, but somebody may");
        drop(fuse);
        assert!(is_dead(target.path(), first).unwrap());

        let target = node.root.resolve(target.path()).unwrap();
        assert!(!target.create().unwrap(), "there is a directory below");
        let (_fuse, mount) = create("csi-1", &options()).unwrap();
        let second = mount.attach(&target).unwrap();
        assert_ne!(first, second);
        let ours = Occupant::Ours { volume: "csi-1".to_owned(), device: second };
        assert_eq!(target.occupant(&mountinfo::read().unwrap()), ours);
        assert!(!is_dead(target.path(), second).unwrap());
        assert!(is_dead(target.path(), first).unwrap_err().to_string().contains("another mount"));
    }

    #[test]
    fn all_that_is_on_a_target_is_taken_away_dead_or_waiting_or_foreign() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "mount::tests::all_that_is_on_a_target_is_taken_away_dead_or_waiting_or_foreign",
            );
        }
        let node = Node::new();
        let target = node.target("mount");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("foreign", target.path(), "tmpfs", flags, None).unwrap();
        assert_eq!(target.occupant(&mountinfo::read().unwrap()), Occupant::Foreign);
        for volume in ["dead", "waiting"] {
            let (fuse, mount) = create(volume, &options()).unwrap();
            mount.attach(&target).unwrap();
            if volume == "waiting" {
                std::mem::forget(fuse);
            }
        }
        assert_eq!(target.remove().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(detach_all(&target).unwrap(), 3);
        assert_eq!(detach_all(&target).unwrap(), 0);
        assert_eq!(target.occupant(&mountinfo::read().unwrap()), Occupant::Nothing);
        target.remove().unwrap();
        assert_eq!(detach_all(&target).unwrap(), 0);
    }

    const A_PROCESS_THAT_DIES: &str = "mount::tests::a_process_that_dies_while_it_asks_its_own_mount";

    /// Mounts on the target that it is told, takes the question whether it is alive, and is killed instead of answering.
    #[test]
    fn a_process_that_dies_while_it_asks_its_own_mount() {
        let Some(path) = child::argument().map(PathBuf::from) else { return };
        let target = Root::open(path.parent().unwrap()).unwrap().resolve(&path).unwrap();
        let (fuse, mount) = create("csi-1", &options()).unwrap();
        let device = mount.attach(&target).unwrap();
        let mut request = [0; 1 << 16];
        rustix::io::read(&fuse, &mut request).unwrap();
        // struct fuse_out_header: length, error, unique; struct fuse_init_out: version 7.31, max_write 4096.
        let mut reply = [0; 80];
        reply[..4].copy_from_slice(&80_u32.to_ne_bytes());
        reply[8..16].copy_from_slice(&request[8..16]);
        for (at, number) in [(16, 7_u32), (20, 31), (36, 4096)] {
            reply[at..at + 4].copy_from_slice(&number.to_ne_bytes());
        }
        rustix::io::write(&fuse, &reply).unwrap();
        std::thread::spawn(move || is_dead(target.path(), device));
        rustix::io::read(&fuse, &mut request).unwrap();
        assert_eq!(request[4..8], 3_u32.to_ne_bytes(), "FUSE_GETATTR");
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
    }

    #[test]
    fn asking_a_mount_does_not_keep_it_alive() {
        if child::argument().is_none() {
            return child::in_own_mounts("mount::tests::asking_a_mount_does_not_keep_it_alive");
        }
        let node = Node::new();
        let target = node.target("mount");
        let path = target.path().to_str().unwrap();
        // A thread whose request was taken and not answered cannot be killed; if it held the connection, neither could its process.
        let mut process = child::start(A_PROCESS_THAT_DIES, path, std::process::Stdio::null());
        let ended = rustix::process::pidfd_open(Pid::from_child(&process), PidfdFlags::empty()).unwrap();
        let minute = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&minute)), Ok(1), "it cannot end");
        assert_eq!(process.wait().unwrap().signal(), Some(libc::SIGKILL));
        let Occupant::Ours { device, .. } = target.occupant(&mountinfo::read().unwrap()) else {
            panic!("nothing was mounted");
        };
        assert!(is_dead(target.path(), device).unwrap());
    }
}
