use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType, makedev, mknodat};

/// Where the program under test is found in every world.
const BIN: &str = "/run/bin";
/// Ordinary users that every system has a name for; fusermount3 asks for it.
pub(crate) const NOBODY: u32 = 65_534;
pub(crate) const DAEMON: u32 = 1;

/// What the present test alone sees: its thread is in a mount namespace of its own, and so are the processes that it starts.
/// Gone with the thread.
pub(crate) struct World(());

impl World {
    /// Moves the present thread into one. `None`: this needs root, and is a failure in CI.
    pub(crate) fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "these tests need root");
            println!("skipped: needs root");
            return None;
        }
        let program = program();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // A copy of somebody else's mount would keep it alive here when its owner unmounts it.
        for point in fuse_mounts() {
            match umount2(&point, MntFlags::MNT_DETACH) {
                // Its owner has taken its directory away meanwhile: no path leads to it any more.
                Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
                Err(error) => panic!("{}: {error}", point.display()),
            }
        }
        // The program may lie below /tmp or where only root may look: bound first.
        mount(Some("none"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
        std::fs::create_dir_all(BIN).unwrap();
        let seen = Path::new(BIN).join("fuse-secrets");
        std::fs::write(&seen, "").unwrap();
        mount(Some(program), &seen, none, MsFlags::MS_BIND, none).unwrap();
        mount(Some("none"), "/tmp", Some("tmpfs"), MsFlags::empty(), Some("mode=1777")).unwrap();
        // Open to everybody, as udev makes it.
        mknodat(CWD, "/run/fuse", FileType::CharacterDevice, 0o666.into(), makedev(10, 229)).unwrap();
        std::fs::set_permissions("/run/fuse", PermissionsExt::from_mode(0o666)).unwrap();
        mount(Some("/run/fuse"), "/dev/fuse", none, MsFlags::MS_BIND, none).unwrap();
        std::fs::create_dir("/run/user").unwrap();
        Some(Self(()))
    }

    /// The program as root.
    pub(crate) fn program(&self) -> Command {
        self.command("fuse-secrets")
    }

    /// Any program as root, with a plain environment.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("/usr/bin/env");
        command.env_clear().env("PATH", format!("{BIN}:/usr/sbin:/usr/bin:/sbin:/bin")).current_dir("/tmp");
        command.arg(program);
        command
    }

    /// The program as an ordinary user, with a runtime directory as a session has it.
    pub(crate) fn program_as(&self, user: u32) -> Command {
        self.command_as(user, "fuse-secrets")
    }

    /// Any program as an ordinary user.
    pub(crate) fn command_as(&self, user: u32, program: &str) -> Command {
        let runtime = format!("/run/user/{user}");
        if !Path::new(&runtime).exists() {
            std::fs::create_dir(&runtime).unwrap();
            std::fs::set_permissions(&runtime, PermissionsExt::from_mode(0o700)).unwrap();
            chown(&runtime, Some(user), Some(user)).unwrap();
        }
        let mut command = self.command("setpriv");
        command.env("XDG_RUNTIME_DIR", runtime);
        command.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".to_owned()]);
        command.args(["--inh-caps=-all", "--"]).arg(program);
        command
    }

    /// A file in /tmp, readable for everybody.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = Path::new("/tmp").join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A directory in /tmp that belongs to a user.
    pub(crate) fn directory(&self, name: &str, user: u32) -> PathBuf {
        let path = Path::new("/tmp").join(name);
        std::fs::create_dir(&path).unwrap();
        chown(&path, Some(user), Some(user)).unwrap();
        path
    }

    /// Whether there is a mount of FUSE at a path. Touches nothing.
    pub(crate) fn is_mounted(&self, path: impl AsRef<Path>) -> bool {
        fuse_mounts().iter().any(|point| point == path.as_ref())
    }
}

/// Mount points of FUSE that this thread sees, the newest first.
fn fuse_mounts() -> Vec<PathBuf> {
    // /proc/self is the main thread's.
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let points = table.lines().rev().filter(|line| line.contains(" - fuse"));
    points.filter_map(|line| line.split(' ').nth(4)).map(|point| point.replace("\\040", " ").into()).collect()
}

/// The program of this build, built if it is not there.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let own = std::env::current_exe().unwrap();
        let profile = own.parent().and_then(Path::parent).unwrap();
        let program = profile.join("fuse-secrets");
        if !program.exists() {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--package", "fuse-secrets", "--bin", "fuse-secrets"]);
            if profile.ends_with("release") {
                cargo.arg("--release");
            }
            cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
            assert!(cargo.status().unwrap().success(), "the program cannot be built");
        }
        program
    })
}
