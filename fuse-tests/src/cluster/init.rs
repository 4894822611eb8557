//! The node's first process. It makes the node's mounts, then starts what it is told to on standard input, and starts again what
//! ends; when standard input ends it ends, and the kernel ends every other process of the node with it.
//!
//! ```text
//!   boot PLAN   enters the cgroups, begins the namespaces, waits for its child
//!     └─ init PLAN   `start NAME`, `stop NAME`: one a line
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};
use serde::{Deserialize, Serialize};

use super::certificates::NODE;
use super::{cgroups, components};

/// What a node is to be.
#[derive(Serialize, Deserialize)]
pub(super) struct Plan {
    /// Everything that it writes, as far as it survives a reboot.
    pub(super) directory: PathBuf,
    /// The name of its cgroups.
    pub(super) cgroup: String,
    /// Where programs are looked for.
    pub(super) path: String,
    /// Command lines by name.
    pub(super) components: BTreeMap<String, Vec<String>>,
}

/// The program `test-cluster boot`.
///
/// # Panics
/// The namespaces cannot be begun.
#[must_use]
pub fn boot(plan: &Path) -> ExitCode {
    let name = read(plan).cgroup;
    cgroups::enter(&name);
    unshare(
        CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .unwrap();
    cgroups::settle(&name);
    let status = Command::new("/proc/self/exe").arg("init").arg(plan).status().unwrap();
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// The program `test-cluster init`.
///
/// # Panics
/// A mount fails, or it is told something that it does not know.
pub fn first_process(plan: &Path) {
    let plan = read(plan);
    mounts(&plan);
    let mut running = Running { plan: &plan, wanted: BTreeSet::new(), pids: HashMap::new() };
    let mut input = std::io::stdin();
    let mut said = Vec::new();
    loop {
        let mut polled = [PollFd::new(&input, PollFlags::IN)];
        let moment = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        if poll(&mut polled, Some(&moment)).unwrap() > 0 {
            let mut bytes = [0; 256];
            match input.read(&mut bytes).unwrap() {
                0 => return,
                length => said.extend_from_slice(&bytes[..length]),
            }
        }
        while let Some(end) = said.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = said.drain(..=end).collect();
            running.obey(std::str::from_utf8(&line).unwrap().trim());
        }
        running.reap();
    }
}

struct Running<'a> {
    plan: &'a Plan,
    wanted: BTreeSet<String>,
    pids: HashMap<Pid, String>,
}

impl Running<'_> {
    fn obey(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("start", name)) => {
                if self.wanted.insert(name.to_owned()) {
                    self.start(name);
                }
            }
            Some(("stop", name)) => {
                self.wanted.remove(name);
                for (pid, _) in self.pids.iter().filter(|(_, running)| *running == name) {
                    // It may have ended by itself a moment ago.
                    let _ = kill_process(*pid, Signal::KILL);
                }
            }
            _ => panic!("{line:?}: neither start nor stop"),
        }
    }

    fn start(&mut self, name: &str) {
        let [program, arguments @ ..] = &self.plan.components[name][..] else {
            panic!("{name} has no program")
        };
        let log = self.plan.directory.join(format!("log/{name}"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", &self.plan.path).env("HOME", "/run");
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        #[allow(clippy::zombie_processes, reason = "all children are waited for in one place, orphans too")]
        let child = command.spawn().unwrap();
        self.pids.insert(Pid::from_child(&child), name.to_owned());
    }

    /// Waits for whatever has ended, its own children and the orphans of the node, and starts again what should run.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(name) = self.pids.remove(&pid) else { continue };
            let status = std::process::ExitStatus::from_raw(status.as_raw());
            self.note(&format!("{name}: {status}"));
            if self.wanted.contains(&name) {
                // One that ends at once would fill the machine.
                crate::wait::pause(Duration::from_millis(100));
                self.start(&name);
            }
        }
    }

    fn note(&self, line: &str) {
        use std::io::Write as _;
        let log = self.plan.directory.join("log/init");
        let mut log = File::options().create(true).append(true).open(log).unwrap();
        writeln!(log, "{} {line}", humantime::format_rfc3339_millis(std::time::SystemTime::now())).unwrap();
    }
}

fn read(plan: &Path) -> Plan {
    serde_json::from_slice(&fs::read(plan).unwrap()).unwrap()
}

/// Standard paths of a node's own, on this machine's file system. Shared with each other, as the containers of a node need it, and
/// with nobody outside.
fn mounts(plan: &Plan) {
    let none = MountFlags::empty();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let_go();
    let proc = |point: &str| {
        mount("proc", point, "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
            .unwrap();
    };
    proc("/proc");
    fs::write("/proc/sys/kernel/hostname", NODE).unwrap();
    // kubelet sees by this number that its node was booted again.
    mount_bind(plan.directory.join("boot_id"), "/proc/sys/kernel/random/boot_id").unwrap();
    cgroups::mount_again();
    mount("run", "/run", "tmpfs", none, Some(c"mode=755")).unwrap();
    mount("lib", "/var/lib", "tmpfs", none, Some(c"mode=755")).unwrap();
    mount("log", "/var/log", "tmpfs", none, Some(c"mode=755")).unwrap();
    for (ours, theirs) in [("kubelet", "/var/lib/kubelet"), ("pods", "/var/log/pods")] {
        fs::create_dir(theirs).unwrap();
        mount_bind(plan.directory.join(ours), theirs).unwrap();
    }
    // A user namespace gets a proc of its own only where there is one that nothing lies on, as there is on every machine: `hostUsers`.
    fs::create_dir("/run/proc").unwrap();
    proc("/run/proc");
    fs::create_dir("/var/log/containers").unwrap();
    fs::create_dir("/run/cni").unwrap();
    fs::write("/run/cni/10-pods.conflist", components::network().to_string()).unwrap();
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
}

/// Gives up what others on this machine have mounted for a while: a copy in this namespace would keep their file systems from ending
/// with their own mounts.
fn let_go() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    // The last mounted first, as it may lie on another one.
    for line in mounts.lines().rev() {
        let Some(point) = line.split(' ').nth(4) else { continue };
        if line.contains(" - fuse") || point.starts_with("/tmp/") {
            // By the raw call, which asks no server. It may be gone with one that lay below.
            let _ = unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}
