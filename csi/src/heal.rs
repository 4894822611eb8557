//! Healing: running pods whose mount died get the new one.
//!
//! A mount dies when the last process that held its connection ends. The shim covers it at its target; that reaches pods whose
//! mounts follow the host's. All others hold the dead mount in a mount namespace of their own, as a whole or as a bind of one
//! of its files:
//!
//! ```text
//! every mount namespace ──mountinfo──▶ has the dead device on top of some point?
//!    on a secluded thread:  open each point below that process's root; is it the dead mount?   ┐ all that looks anything up
//!                           clone the new mount, or the same file of it, with the same mapping ┘ happens before entering
//!                           setns(2) ──▶ move_mount(2) of each clone onto its point
//! ```
//! A namespace that is healed has the dead mount covered, so it is not healed twice. One without a process cannot be found.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::mount::{self, ATTRIBUTES};
use crate::mountinfo::{self, Device, Entry};
use crate::sys;
use crate::target::Target;

/// For one namespace. A path in a pod may lead through a file system that hangs.
const DEADLINE: Duration = Duration::from_secs(5);

/// What healing did.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Mounts that were covered by the new one.
    pub healed: usize,
    /// Mounts that stay dead until their process is restarted: a process of that namespace, the point, the reason.
    pub failed: Vec<(u32, PathBuf, String)>,
}

/// Covers every mount of the file system `dead`, in whatever mount namespace, with what is mounted on `over`. Blocks, for at
/// most five seconds per namespace.
pub(crate) fn heal(dead: Device, over: &Target) -> Report {
    let mut report = Report::default();
    let mut seen = HashSet::new();
    let processes = match processes() {
        Ok(processes) => processes,
        Err(error) => {
            report.failed.push((
                std::process::id(),
                over.path().to_owned(),
                format!("cannot read /proc: {error}"),
            ));
            return report;
        }
    };
    for process in processes {
        // A process that has ended holds nothing; if others share its namespace, it is found with them.
        let Ok(namespace) = std::fs::read_link(format!("/proc/{process}/ns/mnt")) else { continue };
        if seen.contains(&namespace) {
            continue;
        }
        let Ok(points) = dead_points(process, dead) else { continue };
        seen.insert(namespace);
        if points.is_empty() {
            continue;
        }
        let new = over.path().to_owned();
        match sys::seclude(DEADLINE, move || cover(process, dead, &new)) {
            Ok(outcomes) => {
                for (point, outcome) in outcomes {
                    match outcome {
                        Ok(()) => report.healed += 1,
                        Err(error) => report.failed.push((process, point, error.to_string())),
                    }
                }
            }
            Err(error) => {
                let failed = points.into_iter().map(|entry| (process, entry.point, error.to_string()));
                report.failed.extend(failed);
            }
        }
    }
    report
}

/// All processes, the oldest numbers first: a container's first process before what it started.
fn processes() -> io::Result<Vec<u32>> {
    let names = std::fs::read_dir("/proc")?.map(|entry| entry.map(|entry| entry.file_name()));
    let names: Vec<_> = names.collect::<io::Result<_>>()?;
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn dead_points(process: u32, dead: Device) -> io::Result<Vec<Entry>> {
    let text = std::fs::read(format!("/proc/{process}/mountinfo"))?;
    // A node has hundreds of namespaces with hundreds of mounts each, and few of them have this one.
    let mark = format!(" {dead} ").into_bytes();
    if !text.windows(mark.len()).any(|bytes| bytes == mark) {
        return Ok(Vec::new());
    }
    let entries = mountinfo::parse(&text)?;
    let on_top = |entry: &&Entry| entry.device == dead && !entry.is_covered(&entries);
    Ok(entries.iter().filter(on_top).cloned().collect())
}

/// Covers the dead mounts of one namespace. Runs on a thread of its own, which stays in that namespace.
fn cover(process: u32, dead: Device, new: &Path) -> io::Result<Vec<(PathBuf, io::Result<()>)>> {
    let of = |name: &str, flags| {
        rustix::fs::open(format!("/proc/{process}/{name}"), flags | OFlags::CLOEXEC, Mode::empty())
    };
    let namespace = of("ns/mnt", OFlags::RDONLY)?;
    let users = of("ns/user", OFlags::RDONLY)?;
    let root = of("root", OFlags::PATH | OFlags::DIRECTORY)?;
    let new = mount::open_handle(new)?;
    if mount::device(new.as_fd())? == dead {
        return Err(io::Error::other("the dead mount is not covered on the host"));
    }
    let mut pairs = Vec::new();
    for entry in dead_points(process, dead)? {
        let pair = match point(root.as_fd(), &entry) {
            Ok(None) => continue,
            Ok(Some(point)) => clone(new.as_fd(), &entry, users.as_fd()).map(|clone| (clone, point)),
            Err(error) => Err(error),
        };
        pairs.push((entry.point, pair));
    }
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
    let attach = |(clone, point): (OwnedFd, OwnedFd)| mount::move_onto(clone.as_fd(), point.as_fd());
    Ok(pairs.into_iter().map(|(path, pair)| (path, pair.and_then(attach))).collect())
}

/// The root of a dead mount, found where it is said to be. `None`: the path leads elsewhere, so that nobody can reach this
/// one. A bind on the host has its like in the mount that it was bound from, below what covers that.
fn point(root: BorrowedFd<'_>, entry: &Entry) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let point = match openat2(root, &entry.point, flags, Mode::empty(), resolve) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        opened => opened?,
    };
    Ok((mount::identity(point.as_fd())? == (entry.id, entry.device)).then_some(point))
}

/// A detached mount of the same part of the new file system, owners mapped as they were. Private, for what a pod mounts on it
/// must not reach the host.
fn clone(new: BorrowedFd<'_>, entry: &Entry, users: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let part = match entry.root.strip_prefix("/") {
        Ok(part) if part != Path::new("") => part,
        _ => Path::new("."),
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let part =
        openat2(new, part, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(|error| {
            match error {
                Errno::NOENT => {
                    io::Error::other(format!("the volume has no {} any more", entry.root.display()))
                }
                error => error.into(),
            }
        })?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = open_tree(part, "", flags)?;
    let mapped = entry.options.split(',').any(|option| option == "idmapped");
    sys::set_mount_attributes(clone.as_fd(), ATTRIBUTES, mapped.then_some(users))?;
    Ok(clone)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};
    use std::time::SystemTime;

    use fuser::{FileAttr, FileType, INodeNo};

    use super::*;
    use crate::child::{self, Node, options};

    const A_SERVER: &str = "heal::tests::a_server_for_the_other_tests";

    /// A process of its own, killed when dropped.
    struct Process(Child);

    impl Drop for Process {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    /// One file, `file`, of this content.
    struct OneFile(String);

    impl OneFile {
        fn attributes(&self, inode: INodeNo) -> FileAttr {
            let (kind, perm, size) = match inode.0 {
                1 => (FileType::Directory, 0o555, 0),
                _ => (FileType::RegularFile, 0o444, self.0.len() as u64),
            };
            let time = SystemTime::UNIX_EPOCH;
            FileAttr {
                ino: inode,
                size,
                blocks: 1,
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

    impl fuser::Filesystem for OneFile {
        fn init(&mut self, _: &fuser::Request, config: &mut fuser::KernelConfig) -> io::Result<()> {
            config
                .add_capabilities(fuser::InitFlags::FUSE_ALLOW_IDMAP)
                .map_err(|_| io::ErrorKind::Unsupported.into())
        }

        fn lookup(&self, _: &fuser::Request, _: INodeNo, name: &OsStr, reply: fuser::ReplyEntry) {
            // With nothing to say there is no file.
            if name != "file" || self.0.is_empty() {
                return reply.error(fuser::Errno::ENOENT);
            }
            reply.entry(&DEADLINE, &self.attributes(INodeNo(2)), fuser::Generation(0));
        }

        fn getattr(
            &self,
            _: &fuser::Request,
            inode: INodeNo,
            _: Option<fuser::FileHandle>,
            reply: fuser::ReplyAttr,
        ) {
            reply.attr(&DEADLINE, &self.attributes(inode));
        }

        fn read(
            &self,
            _: &fuser::Request,
            _: INodeNo,
            _: fuser::FileHandle,
            offset: u64,
            _: u32,
            _: fuser::OpenFlags,
            _: Option<fuser::LockOwner>,
            reply: fuser::ReplyData,
        ) {
            reply.data(if offset == 0 { self.0.as_bytes() } else { &[] });
        }
    }

    #[test]
    fn a_server_for_the_other_tests() {
        let Some(content) = child::argument() else { return };
        let fuse = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        let mut config = fuser::Config::default();
        config.acl = fuser::SessionACL::All;
        let session =
            fuser::Session::from_fd(OneFile(content), fuse, fuser::SessionACL::All, config).unwrap();
        session.spawn().unwrap().join().unwrap();
    }

    fn serve(fuse: &OwnedFd, content: &str) -> Process {
        Process(child::start(A_SERVER, content, Stdio::from(fuse.try_clone().unwrap())))
    }

    /// A mount on `target` that is served in another process, and everything that keeps it alive.
    fn publish(target: &Target, content: &str) -> (Device, (OwnedFd, Process)) {
        let (fuse, mount) = mount::create("csi-1", &options()).unwrap();
        let device = mount.attach(target).unwrap();
        let server = serve(&fuse, content);
        (device, (fuse, server))
    }

    /// A process in a mount namespace of its own, which has run `script` there.
    fn pod(wrapper: &[&str], script: &str) -> Process {
        let mut words = wrapper.iter();
        let child = Command::new(words.next().unwrap())
            .args(words)
            .args(["sh", "-e", "-c", &format!("{script}\necho ready\nexec cat")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut pod = Process(child.unwrap());
        let mut line = String::new();
        BufReader::new(pod.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        pod
    }

    const PRIVATE: [&str; 4] = ["unshare", "--mount", "--propagation", "private"];

    /// What a shell command prints in the namespaces of a pod, or its complaint.
    fn within(pod: &Process, command: &str) -> Result<String, String> {
        let process = pod.0.id().to_string();
        let output = Command::new("nsenter")
            .args(["--mount", "--target", &process, "sh", "-c", command])
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    #[test]
    fn private_mounts_of_the_whole_and_of_a_file_get_the_new_mount_once() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "heal::tests::private_mounts_of_the_whole_and_of_a_file_get_the_new_mount_once",
            );
        }
        let node = Node::new();
        let target = node.target("volume");
        let (dead, life) = publish(&target, "one");
        let (at, whole, file) = (target.path().display(), node.target("whole"), node.path("file"));
        std::fs::write(&file, "").unwrap();
        let (whole, file) = (whole.path().display(), file.display());
        let pod = pod(&PRIVATE, &format!("mount --bind {at} {whole}\nmount --bind {at}/file {file}"));
        let read = format!("cat {at}/file {whole}/file {file}");
        assert_eq!(within(&pod, &read).unwrap(), "oneoneone");
        let early = heal(dead, &target);
        assert_eq!((early.healed, early.failed.len()), (0, 4), "three in the pod, one here");
        assert!(early.failed.iter().all(|(.., reason)| reason.contains("not covered on the host")));
        drop(life);
        assert!(mount::is_dead(target.path(), dead).unwrap());
        assert!(within(&pod, &read).unwrap_err().contains("not connected"));

        let (_new, _life) = publish(&target, "two");
        assert!(within(&pod, &read).unwrap_err().contains("not connected"), "the control: no propagation");
        let report = heal(dead, &target);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        assert_eq!(report.healed, 3);
        assert_eq!(within(&pod, &read).unwrap(), "twotwotwo");
        assert!(within(&pod, &format!("echo x > {file}")).unwrap_err().contains("Read-only"));
        assert_eq!(heal(dead, &target).healed, 0, "a second time");

        within(&pod, &format!("mount -t tmpfs pods-own {at}")).unwrap();
        let entries = mountinfo::read().unwrap();
        assert!(entries.iter().all(|entry| entry.source != "pods-own"), "what a pod mounts stays there");
    }

    #[test]
    fn a_user_namespaced_pod_is_healed() {
        if child::argument().is_none() {
            return child::in_own_mounts("heal::tests::a_user_namespaced_pod_is_healed");
        }
        let node = Node::new();
        let target = node.target("volume");
        let (dead, life) = publish(&target, "one");
        let mut wrapper = vec!["unshare", "--user", "--map-root-user"];
        wrapper.extend(&PRIVATE[1..]);
        let pod = pod(&wrapper, "");
        let read = format!("cat {}/file", target.path().display());
        drop(life);
        assert!(within(&pod, &read).unwrap_err().contains("not connected"));
        let (_new, _life) = publish(&target, "two");
        let report = heal(dead, &target);
        assert_eq!((report.healed, report.failed.len()), (1, 0), "{:?}", report.failed);
        assert_eq!(within(&pod, &read).unwrap(), "two");
    }

    #[test]
    fn a_mount_with_mapped_owners_is_healed_with_the_same_mapping() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "heal::tests::a_mount_with_mapped_owners_is_healed_with_the_same_mapping",
            );
        }
        let node = Node::new();
        let target = node.target("volume");
        let (dead, life) = publish(&target, "one");
        let point = node.target("point");
        // As a runtime does it: the user namespace first, then an id-mapped clone, then the container's mounts. The runtime's
        // own mount of it, in this namespace, goes before anything dies.
        let sandbox = pod(&["unshare", "--user"], "");
        let of = sandbox.0.id().to_string();
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{of}/{map}"), "0 100000 65536").unwrap();
        }
        let users = std::fs::File::open(format!("/proc/{of}/ns/user")).unwrap();
        // A mount that was never asked has not negotiated mapping yet: ask it, from another process.
        let ask = Command::new("cat").arg(target.path().join("file")).output().unwrap();
        assert_eq!(ask.stdout, b"one");
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_EMPTY_PATH;
        let mapped = open_tree(target.open().unwrap(), "", flags).unwrap();
        sys::set_mount_attributes(mapped.as_fd(), ATTRIBUTES, Some(users.as_fd())).unwrap();
        mount::move_onto(mapped.as_fd(), point.open().unwrap().as_fd()).unwrap();
        let mut wrapper = vec!["nsenter", "--user", "--target", &of];
        wrapper.extend(PRIVATE);
        let pod = pod(&wrapper, "");
        mount::detach_all(&point).unwrap();
        drop(mapped);
        let read = format!("cat {0}/file && stat -c :%u {0}/file", point.path().display());
        assert_eq!(within(&pod, &read).unwrap(), "one:100000\n");

        drop(life);
        assert!(within(&pod, &read).unwrap_err().contains("not connected"));
        let (_new, _life) = publish(&target, "two");
        let report = heal(dead, &target);
        assert_eq!((report.healed, report.failed.len()), (2, 0), "{:?}", report.failed);
        assert_eq!(within(&pod, &read).unwrap(), "two:100000\n");
    }

    #[test]
    fn what_cannot_be_healed_is_reported_with_process_point_and_reason() {
        if child::argument().is_none() {
            return child::in_own_mounts(
                "heal::tests::what_cannot_be_healed_is_reported_with_process_point_and_reason",
            );
        }
        let node = Node::new();
        let target = node.target("volume");
        let (dead, life) = publish(&target, "one");
        let file = node.path("file");
        std::fs::write(&file, "").unwrap();
        let pod = pod(&PRIVATE, &format!("mount --bind {}/file {}", target.path().display(), file.display()));
        drop(life);
        let (_new, _life) = publish(&target, "");
        let report = heal(dead, &target);
        assert_eq!(report.healed, 1, "the whole is healed all the same");
        let reason = "the volume has no /file any more".to_owned();
        assert_eq!(report.failed, [(pod.0.id(), file, reason)]);
    }
}
