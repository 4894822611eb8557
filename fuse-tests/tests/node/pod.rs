//! Processes in mount namespaces of their own, as containers are.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

/// Mounts of the host do not reach it.
pub(crate) const PRIVATE: &[&str] = &["unshare", "--mount", "--propagation", "private"];
/// They do: `HostToContainer`.
pub(crate) const SLAVE: &[&str] = &["unshare", "--mount", "--propagation", "slave"];

/// A shell that reads files when it is told to, from beginning to end the same one.
pub(crate) struct Pod {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Pod {
    /// By a command that makes the namespaces; there, `script` runs first.
    pub(crate) fn start(namespaces: &[&str], script: &str) -> Self {
        let reading = "set +e; echo ready; while read -r path; do cat \"$path\" 2>&1; echo \" $?\"; done";
        let mut child = Command::new(namespaces[0])
            .args(&namespaces[1..])
            .args(["sh", "-e", "-c", &format!("{script}\n{reading}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ask = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut pod = Self { child, ask, answers };
        assert_eq!(pod.line(), "ready");
        pod
    }

    /// In a user namespace (`hostUsers: false`), with `volume` on `point`, its owners mapped into that, as a runtime mounts it.
    pub(crate) fn mapped(volume: &Path, point: &Path) -> Self {
        let sandbox = Self::start(&["unshare", "--user"], "");
        let of = sandbox.pid().to_string();
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{of}/{map}"), "0 100000 65536").unwrap();
        }
        let users = std::fs::File::open(format!("/proc/{of}/ns/user")).unwrap();
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, volume, flags).unwrap();
        fuse_tests::sys::map_owners(mount.as_fd(), users.as_fd()).unwrap();
        let at = open(point, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", &at, "", empty).unwrap();
        let mut namespaces = vec!["nsenter", "--user", "--target", &of];
        namespaces.extend(PRIVATE);
        let pod = Self::start(&namespaces, "");
        // The runtime's own copy.
        unmount(point, UnmountFlags::DETACH).unwrap();
        pod
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What is in a file, seen from there, or cat's complaint. The file has one line at most.
    pub(crate) fn read(&mut self, path: &Path) -> Result<String, String> {
        writeln!(self.ask, "{}", path.display()).unwrap();
        let mut text = self.line();
        // A complaint has a line of its own.
        if !text.ends_with(" 0") && !text.ends_with(" 1") {
            text += &self.line();
        }
        match text.strip_suffix(" 0") {
            Some(content) => Ok(content.to_owned()),
            None => Err(text),
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end_matches('\n').to_owned()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
