use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::{MountFlags, mount_remount};

use super::agent;

/// Every way to change something, and the errno that it ends in; 0 where it worked.
fn attempts(root: &Path) -> Vec<(&'static str, i32)> {
    let (a, new) = (root.join("a"), root.join("new"));
    let io =
        |result: std::io::Result<()>| result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0);
    let raw = |result: rustix::io::Result<()>| io(result.map_err(Into::into));
    let open = |options: &mut OpenOptions, path: &Path| io(options.open(path).map(drop));
    let time = Timespec { tv_sec: 1, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    vec![
        ("open to write", open(OpenOptions::new().write(true), &a)),
        ("open to read and write", open(OpenOptions::new().read(true).write(true), &a)),
        ("open to append", open(OpenOptions::new().append(true), &a)),
        ("open to read and truncate", open(OpenOptions::new().read(true).custom_flags(libc::O_TRUNC), &a)),
        ("open and truncate", open(OpenOptions::new().write(true).truncate(true), &a)),
        ("open frozen to write", open(OpenOptions::new().write(true), &root.join("..data/a"))),
        ("create", open(OpenOptions::new().write(true).create_new(true), &new)),
        (
            "create in a generation",
            open(OpenOptions::new().write(true).create_new(true), &root.join("..data/new")),
        ),
        (
            "truncate",
            raw(rustix::fs::open(&a, rustix::fs::OFlags::PATH, Mode::empty()).and_then(|_| truncate(&a))),
        ),
        ("mkdir", io(std::fs::create_dir(&new))),
        ("mknod", raw(rustix::fs::mknodat(CWD, &new, FileType::Fifo, Mode::RUSR, 0))),
        ("symlink", io(std::os::unix::fs::symlink("a", &new))),
        ("link", io(std::fs::hard_link(&a, &new))),
        ("unlink", io(std::fs::remove_file(&a))),
        ("unlink ..data", io(std::fs::remove_file(root.join("..data")))),
        ("rmdir", io(std::fs::remove_dir(root.join("d")))),
        ("rename", io(std::fs::rename(&a, &new))),
        ("rename over", io(std::fs::rename(&a, root.join("b")))),
        ("chmod", io(std::fs::set_permissions(&a, Permissions::from_mode(0o600)))),
        ("chown", io(std::os::unix::fs::chown(&a, Some(1), Some(1)))),
        ("utimensat", raw(rustix::fs::utimensat(CWD, &a, &times, AtFlags::empty()))),
        ("setxattr", raw(rustix::fs::setxattr(&a, "user.x", b"1", XattrFlags::empty()))),
        ("removexattr", raw(rustix::fs::removexattr(&a, "user.x"))),
    ]
}

fn truncate(path: &Path) -> rustix::io::Result<()> {
    // As `truncate(2)`, which opens nothing.
    let status = std::process::Command::new("truncate").args(["-c", "-s", "0"]).arg(path).output();
    match status {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) if String::from_utf8_lossy(&output.stderr).contains("Read-only") => {
            Err(rustix::io::Errno::ROFS)
        }
        _ => Err(rustix::io::Errno::IO),
    }
}

fn all_refused(root: &Path) {
    for (attempt, errno) in attempts(root) {
        assert_eq!(errno, libc::EROFS, "{attempt}");
    }
    assert_eq!(std::fs::read_to_string(root.join("a")).unwrap(), "1");
}

#[test]
fn every_attempt_to_change_something_is_erofs() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("b", "1"), ("d/c", "1")]);
    all_refused(mounted.path());
}

#[test]
fn every_attempt_is_erofs_also_when_a_runtime_cleared_the_read_only_flag() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("b", "1"), ("d/c", "1")]);
    // Both of the mount and of its superblock, so that it is the agent who refuses.
    mount_remount(mounted.path(), MountFlags::empty(), c"").unwrap();
    let flags = rustix::fs::statvfs(mounted.path()).unwrap().f_flag;
    assert!(!flags.contains(rustix::fs::StatVfsMountFlags::RDONLY), "the flag is clear");
    all_refused(mounted.path());
    let refused = agent.metric("fs_writes_refused_total");
    assert!(refused >= 20, "{refused} were refused by the agent");
    let nameless = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(mounted.path());
    assert_eq!(nameless.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP), "there are no nameless files");
}

#[test]
fn a_descriptor_to_read_cannot_be_used_to_change_the_file() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    mount_remount(mounted.path(), MountFlags::empty(), c"").unwrap();
    let file = std::fs::File::open(mounted.join("a")).unwrap();
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    assert_eq!(errno(std::io::Write::write_all(&mut &file, b"x")), libc::EBADF);
    assert_eq!(errno(file.set_len(0)), libc::EINVAL);
    let allocated = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1);
    assert_eq!(errno(allocated.map_err(Into::into)), libc::EBADF);
    assert_eq!(errno(file.set_permissions(Permissions::from_mode(0o600))), libc::EROFS);
    assert_eq!(mounted.text("a"), "1");
}
