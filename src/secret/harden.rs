//! The process closed to core dumps, tracers and swap, once, at the start of `main`. What cannot be had is no error: it is
//! told, in the log and by `fuse-secrets doctor`.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use super::locked::Locked;

/// One measure, and how it went.
#[derive(Debug)]
pub struct Measure {
    /// What it is for, such as `no core dump`.
    pub name: &'static str,
    /// How it went.
    pub outcome: Outcome,
}

/// How a measure went.
#[derive(Debug)]
pub enum Outcome {
    /// It holds.
    Done,
    /// It could not be had: what is lost, and what to change.
    Lost {
        /// What may now happen to a secret, and the remedy.
        loss: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Takes all measures. Afterwards `/proc/self` belongs to root: an ordinary user's process can no longer open `mem`, `fd` and
/// `environ` there, its own ones included.
#[must_use]
pub fn harden() -> Vec<Measure> {
    let measure = |name, result: io::Result<()>, loss| Measure {
        name,
        outcome: result.map_or_else(|source| Outcome::Lost { loss, source }, |()| Outcome::Done),
    };
    vec![
        measure(
            "no tracer",
            set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Into::into),
            "another process of this user may read this one's memory",
        ),
        measure(
            "no core dump",
            setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(Into::into),
            "a crash may write a core dump; set LimitCORE=0",
        ),
        measure(
            "no swap",
            Swap::read().and_then(stay_in_memory),
            "buffers on the heap may be swapped out; turn swap off (memory.swap.max=0) or grant CAP_IPC_LOCK",
        ),
    ]
}

/// Locks the heap too where there is swap: pages as they are touched, now and later. Only without a limit: under one, every
/// later mapping would count in full, and fail.
fn stay_in_memory(swap: Swap) -> io::Result<()> {
    if swap == Swap::Off {
        return Ok(());
    }
    if Locked::raise()?.room().is_some() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "RLIMIT_MEMLOCK is limited"));
    }
    Ok(mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?)
}

/// Whether this process's memory may be swapped out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The node has none, or the memory cgroup may use none.
    Off,
    /// It may.
    On,
}

impl Swap {
    /// Asks the kernel.
    ///
    /// # Errors
    /// /proc is not readable.
    pub fn read() -> io::Result<Self> {
        let areas = match std::fs::read_to_string("/proc/swaps") {
            // A kernel built without swap.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Off),
            text => text?,
        };
        let group = std::fs::read_to_string("/proc/self/cgroup")?;
        let limit = |group: &Path| std::fs::read_to_string(group.join("memory.swap.max")).ok();
        let off = !has_swap(&areas)
            || groups(&group).iter().any(|group| limit(group).is_some_and(|max| max.trim() == "0"));
        Ok(if off { Self::Off } else { Self::On })
    }
}

/// Whether `/proc/swaps` lists an area below its heading.
fn has_swap(swaps: &str) -> bool {
    swaps.lines().skip(1).any(|line| !line.trim().is_empty())
}

/// The directories of the cgroup (version 2) of `/proc/self/cgroup` and of all above it: a limit of any of them holds. None
/// under version 1, where the limit of swap includes memory and is never 0.
fn groups(cgroup: &str) -> Vec<PathBuf> {
    const ROOT: &str = "/sys/fs/cgroup";
    let Some(path) = cgroup.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    let group = Path::new(ROOT).join(path);
    group.ancestors().take_while(|above| above.starts_with(ROOT)).map(Path::to_path_buf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::child;
    use crate::secret::pages::SecretMemory;

    #[test]
    fn a_heading_alone_is_no_swap() {
        let heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert!(!has_swap(heading));
        assert!(has_swap(&format!("{heading}/dev/zram0 partition\t8388604\t0\t100\n")));
    }

    #[test]
    fn a_limit_of_any_group_above_counts() {
        let expected =
            ["/sys/fs/cgroup/system.slice/agent.service", "/sys/fs/cgroup/system.slice", "/sys/fs/cgroup"];
        assert_eq!(groups("0::/system.slice/agent.service\n"), expected.map(PathBuf::from));
        assert_eq!(groups("0::/\n"), [PathBuf::from("/sys/fs/cgroup")]);
        assert_eq!(groups("9:memory:/agent\n1:name=systemd:/\n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_hardened_process_cannot_be_dumped() {
        if !child::is_one() {
            // In a process of its own: it cannot be undone for core dumps.
            return child::run("secret::harden::tests::a_hardened_process_cannot_be_dumped", &[]);
        }
        let unlimited = Locked::read().unwrap().room().is_none();
        let expected = [true, true, Swap::read().unwrap() == Swap::Off || unlimited];
        let done = |measure: Measure| matches!(measure.outcome, Outcome::Done);
        assert!(harden().into_iter().map(done).eq(expected));
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(rustix::process::getrlimit(Resource::Core).maximum, Some(0));
        assert!(SecretMemory::new().is_ok(), "secret memory can be had after it");
    }
}
