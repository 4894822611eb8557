//! The node's cgroups: one directory per hierarchy on a machine with version 1, one directory on a machine with version 2. Seen from
//! inside a cgroup namespace that is begun there, each is the root, so kubelet and the runtime need no other setting.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{MountFlags, mount};

use crate::wait;

const ROOT: &str = "/sys/fs/cgroup";

/// Where this machine keeps cgroups.
enum Machine {
    /// A mount per hierarchy: its directory's name, and what it is mounted with.
    V1(Vec<(String, String)>),
    V2,
}

fn machine() -> Machine {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut hierarchies = Vec::new();
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4) else { continue };
        let right: Vec<&str> = right.split(' ').collect();
        let [kind, _, options] = right[..] else { continue };
        match (kind, point.strip_prefix(ROOT)) {
            ("cgroup2", Some("")) => return Machine::V2,
            ("cgroup", Some(name)) => {
                let with: Vec<&str> =
                    options.split(',').filter(|word| !matches!(*word, "rw" | "ro" | "xattr")).collect();
                let with = with.join(",");
                let with = if with.starts_with("name=") { format!("none,{with}") } else { with };
                hierarchies.push((name.trim_start_matches('/').to_owned(), with));
            }
            _ => {}
        }
    }
    Machine::V1(hierarchies)
}

/// Makes the directories.
///
/// # Panics
/// They cannot be made.
pub(super) fn make(name: &str) {
    match machine() {
        Machine::V1(hierarchies) => {
            for (hierarchy, _) in hierarchies {
                let directory = Path::new(ROOT).join(&hierarchy).join(name);
                fs::create_dir_all(&directory).unwrap();
                // A whole node, of which probes and deadlines expect that it is not starved by a compiler beside it.
                if directory.join("cpu.shares").exists() {
                    fs::write(directory.join("cpu.shares"), "4096").unwrap();
                }
                // Empty ones let no process in.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if directory.join(file).exists() {
                        let all = fs::read(Path::new(ROOT).join(&hierarchy).join(file)).unwrap();
                        fs::write(directory.join(file), all).unwrap();
                    }
                }
            }
        }
        Machine::V2 => {
            let root = Path::new(ROOT);
            delegate(root);
            fs::create_dir_all(root.join(name).join("node")).unwrap();
            // See above.
            fs::write(root.join(name).join("cpu.weight"), "400").unwrap();
        }
    }
}

/// Puts the caller into them, for itself and all of its children to come.
///
/// # Panics
/// They do not take it.
pub(super) fn enter(name: &str) {
    match machine() {
        Machine::V1(hierarchies) => {
            for (hierarchy, _) in hierarchies {
                fs::write(Path::new(ROOT).join(hierarchy).join(name).join("cgroup.procs"), "0").unwrap();
            }
        }
        Machine::V2 => fs::write(Path::new(ROOT).join(name).join("cgroup.procs"), "0").unwrap(),
    }
}

/// After a cgroup namespace was begun: in version 2 a directory with processes hands no controller on, so they go one down.
///
/// # Panics
/// The leaf does not take the caller.
pub(super) fn settle(name: &str) {
    if matches!(machine(), Machine::V2) {
        let directory = Path::new(ROOT).join(name);
        fs::write(directory.join("node/cgroup.procs"), "0").unwrap();
        delegate(&directory);
    }
}

/// Mounts the hierarchies again, as the namespace shows them.
///
/// # Panics
/// A mount fails.
pub(super) fn mount_again() {
    let none = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let machine = machine();
    // A new sysfs shows the network of this namespace, and an empty directory for cgroups.
    mount("sysfs", "/sys", "sysfs", none, None).unwrap();
    match machine {
        Machine::V2 => mount("cgroup", ROOT, "cgroup2", none, None).unwrap(),
        Machine::V1(hierarchies) => {
            mount("cgroups", ROOT, "tmpfs", none, Some(c"mode=755")).unwrap();
            for (name, with) in hierarchies {
                let directory = Path::new(ROOT).join(&name);
                fs::create_dir(&directory).unwrap();
                let with = std::ffi::CString::new(with).unwrap();
                mount("cgroup", &directory, "cgroup", none, Some(with.as_c_str())).unwrap();
                // Two controllers on one mount are found under each name.
                for alias in name.split(',').filter(|alias| *alias != name) {
                    std::os::unix::fs::symlink(&name, Path::new(ROOT).join(alias)).unwrap();
                }
            }
        }
    }
}

/// Removes them, once their processes have gone.
///
/// # Errors
/// One stays for 10 s: which, and why.
pub(super) fn remove(name: &str) -> Result<(), String> {
    for directory in directories(name) {
        let end = std::time::Instant::now() + wait::SOON;
        while let Err(error) = remove_tree(&directory) {
            if std::time::Instant::now() > end {
                return Err(format!("{}: {error}", directory.display()));
            }
            wait::pause(Duration::from_millis(20));
        }
    }
    Ok(())
}

/// Names of those that begin like this.
pub(super) fn names(prefix: &str) -> Vec<String> {
    let mut found: Vec<String> = directories("")
        .iter()
        .flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    found.sort();
    found.dedup();
    found
}

fn directories(name: &str) -> Vec<PathBuf> {
    match machine() {
        Machine::V2 => vec![Path::new(ROOT).join(name)],
        Machine::V1(hierarchies) => {
            hierarchies.iter().map(|(hierarchy, _)| Path::new(ROOT).join(hierarchy).join(name)).collect()
        }
    }
}

/// Removes directories from the leaves up: files in them cannot be removed, and need not.
fn remove_tree(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Hands every controller of a directory of version 2 on to its children.
fn delegate(directory: &Path) {
    let controllers = fs::read_to_string(directory.join("cgroup.controllers")).unwrap();
    for controller in controllers.split_whitespace() {
        fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
    }
}

/// What the kernel counts of a container.
#[derive(Clone, Copy, Debug, Default)]
pub struct Charged {
    /// Bytes that cannot be had back at once: what `kubectl top` shows, and what a limit is compared with in the end.
    pub working_set: u64,
    /// CPU time that it had.
    pub cpu: Duration,
    /// How long it wanted to run and was not let.
    pub throttled: Duration,
}

/// What the container of a process was charged with so far.
///
/// # Panics
/// The process has ended.
#[must_use]
pub fn charged(pid: u32) -> Charged {
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let directory = |controller: &str| {
        let of = |line: &'_ str| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            controllers
                .split(',')
                .any(|name| name == controller)
                .then(|| path.trim_start_matches('/').to_owned())
        };
        Path::new(ROOT).join(controller).join(own.lines().find_map(of).unwrap())
    };
    let number = |file: PathBuf, key: &str| -> u64 {
        let text = fs::read_to_string(&file).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("{}: no {key}", file.display())).trim().parse().unwrap()
    };
    match machine() {
        Machine::V1(_) => {
            let (memory, cpu) = (directory("memory"), directory("cpu"));
            let inactive = number(memory.join("memory.stat"), "total_inactive_file ");
            Charged {
                working_set: number(memory.join("memory.usage_in_bytes"), "").saturating_sub(inactive),
                cpu: Duration::from_nanos(number(directory("cpuacct").join("cpuacct.usage"), "")),
                throttled: Duration::from_nanos(number(cpu.join("cpu.stat"), "throttled_time ")),
            }
        }
        Machine::V2 => {
            let directory = directory("");
            let inactive = number(directory.join("memory.stat"), "inactive_file ");
            Charged {
                working_set: number(directory.join("memory.current"), "").saturating_sub(inactive),
                cpu: Duration::from_micros(number(directory.join("cpu.stat"), "usage_usec ")),
                throttled: Duration::from_micros(number(directory.join("cpu.stat"), "throttled_usec ")),
            }
        }
    }
}
