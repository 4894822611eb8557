//! What doctor asks of the node, raw, as the kernel says it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::secret::harden::Swap;
use crate::secret::locked::Locked;
use crate::secret::pages::{Backing, MemoryError, SecretMemory};

/// What is asked of one node: raw, as the kernel says it.
pub(super) struct Facts {
    /// For an agent is asked, who mounts nothing.
    pub(super) agent: bool,
    /// `uname -r`.
    pub(super) release: String,
    pub(super) root: bool,
    /// Opening /dev/fuse for reading and writing.
    pub(super) fuse_device: io::Result<()>,
    pub(super) fusermount: Option<Fusermount>,
    /// /etc/fuse.conf; empty where there is none.
    pub(super) fuse_conf: String,
    /// What secret pages are made of, one page tried.
    pub(super) backing: Result<Backing, String>,
    /// Whether the kernel knows secret memory at all, switched on or off.
    pub(super) knows_secret_memory: bool,
    pub(super) locked: io::Result<Locked>,
    pub(super) swap: io::Result<Swap>,
    /// The sysctls `fs.fuse.default_request_timeout` and `max_request_timeout` in seconds; 0: none.
    pub(super) request_timeouts: [u64; 2],
}

/// The program with which an ordinary user mounts.
pub(super) struct Fusermount {
    pub(super) path: PathBuf,
    pub(super) setuid: bool,
}

impl Facts {
    /// For this process, or for the agent with this process number.
    pub(super) fn gather(agent: Option<u32>) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        // Before 6.15 the kernel has no such timeouts.
        let seconds = |name: &str| text(&format!("/proc/sys/fs/fuse/{name}")).trim().parse().unwrap_or(0);
        // Read before secret memory is tried, which raises the soft limit.
        let locked = agent.map_or_else(Locked::read, |pid| Locked::read_of(worker(pid)));
        let backing = SecretMemory::new().map(|memory| memory.backing()).map_err(|error| match error {
            MemoryError::Kernel(source) => source.to_string(),
            full @ MemoryError::Full { .. } => full.to_string(),
        });
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        Self {
            agent: agent.is_some(),
            release: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            root: rustix::process::geteuid().is_root(),
            fuse_device: device.map(|_: File| ()),
            fusermount: Fusermount::find(std::env::var_os("PATH").unwrap_or_default().as_ref()),
            fuse_conf: text("/etc/fuse.conf"),
            backing,
            knows_secret_memory: Path::new("/sys/module/secretmem/parameters/enable").exists(),
            locked,
            swap: Swap::read(),
            request_timeouts: ["default_request_timeout", "max_request_timeout"].map(seconds),
        }
    }
}

/// The process that serves: the agent's child, where there is one.
fn worker(agent: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap_or_default();
    children.split_whitespace().find_map(|pid| pid.parse().ok()).unwrap_or(agent)
}

impl Fusermount {
    fn find(path: &Path) -> Option<Self> {
        let program = |directory: PathBuf| {
            let path = directory.join("fusermount3");
            let mode = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?.permissions().mode();
            (mode & 0o111 != 0).then_some(Self { path, setuid: mode & 0o4000 != 0 })
        };
        std::env::split_paths(path).find_map(program)
    }
}
