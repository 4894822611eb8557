//! For tests: the test binary runs one of its tests again as another process, and a node for them to mount on.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};

use crate::mount::Options;
use crate::target::{Root, Target};

const VARIABLE: &str = "FUSE_SECRETS_TEST_CHILD";

/// The argument that [`start`] gave, or nothing if this process was not made here.
pub(crate) fn argument() -> Option<String> {
    std::env::var(VARIABLE).ok()
}

/// Runs the test `name` in a process with a mount namespace of its own, and fails if it fails. What it mounts goes with it.
pub(crate) fn in_own_mounts(name: &str) {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]).arg(std::env::current_exe().unwrap());
    let output = itself(&mut command, name, "").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} failed in its own process: {}", output.status);
    assert!(text.contains("1 passed"), "there is no test {name}");
}

/// Starts the test `name` in a process of its own that has `stdin` and nothing else of this one: it may outlive a test that fails.
pub(crate) fn start(name: &str, argument: &str, stdin: Stdio) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    itself(&mut command, name, argument)
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn itself<'a>(command: &'a mut Command, name: &str, argument: &str) -> &'a mut Command {
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(VARIABLE, argument)
}

pub(crate) fn options() -> Options {
    Options { max_read: 131_072, selinux_context: None }
}

/// A kubelet root on a mount that is shared, as on a real node. Only for processes with mounts of their own.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    pub(crate) root: Root,
}

impl Node {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount("kubelet", directory.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(directory.path(), MountPropagationFlags::SHARED).unwrap();
        let root = Root::open(directory.path()).unwrap();
        Self { directory, root }
    }

    /// A path below the root whose parents exist.
    pub(crate) fn path(&self, below: &str) -> PathBuf {
        let path = self.directory.path().join(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    /// A target whose directory exists.
    pub(crate) fn target(&self, below: &str) -> Target {
        let target = self.root.resolve(&self.path(below)).unwrap();
        target.create().unwrap();
        target
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        unmount(self.directory.path(), UnmountFlags::DETACH).unwrap();
    }
}
