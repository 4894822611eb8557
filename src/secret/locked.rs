//! How much memory this process may lock: `RLIMIT_MEMLOCK`, which counts secret pages and locked pages alike, what is locked
//! already, and whether the kernel exempts the process.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// What the kernel says of this process's locked memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locked {
    /// The limit that counts (`RLIMIT_MEMLOCK`, soft); `None`: no limit.
    pub soft: Option<u64>,
    /// What the soft limit may be raised to; `None`: no limit.
    pub hard: Option<u64>,
    /// Locked already (`VmLck`).
    pub held: u64,
    /// The process has `CAP_IPC_LOCK` where it counts: in the initial user namespace.
    pub exempt: bool,
}

impl Locked {
    /// Asks the kernel.
    ///
    /// # Errors
    /// /proc is not mounted or not readable.
    pub fn read() -> io::Result<Self> {
        let limit = getrlimit(Resource::Memlock);
        let capable = capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK);
        Ok(Self {
            soft: limit.current,
            hard: limit.maximum,
            held: held(&std::fs::read_to_string("/proc/self/status")?),
            exempt: capable && is_initial_namespace(&std::fs::read_to_string("/proc/self/uid_map")?),
        })
    }

    /// The same of another process, whose capabilities do not count: of an agent, which has none.
    ///
    /// # Errors
    /// There is no such process.
    pub fn read_of(pid: u32) -> io::Result<Self> {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
        let [soft, hard] = limits(&read("limits")?).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { soft, hard, held: held(&read("status")?), exempt: false })
    }

    /// Raises the soft limit to the hard one, which needs no privilege, and reads what came of it.
    ///
    /// # Errors
    /// As [`Locked::read`]; setrlimit(2) refused.
    pub fn raise() -> io::Result<Self> {
        let Rlimit { current, maximum } = getrlimit(Resource::Memlock);
        if current != maximum {
            setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum })?;
        }
        Self::read()
    }

    /// Bytes that may still be locked; `None`: as many as there are.
    #[must_use]
    pub fn room(&self) -> Option<u64> {
        if self.exempt { None } else { self.soft.map(|limit| limit.saturating_sub(self.held)) }
    }
}

/// Bytes of the line `VmLck:   64 kB` in `/proc/<pid>/status`.
fn held(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kilobytes =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok());
    kilobytes.map_or(0, |kb: u64| kb << 10)
}

/// Soft and hard limit out of the line `Max locked memory  65536  8388608  bytes` in `/proc/<pid>/limits`.
fn limits(text: &str) -> Option<[Option<u64>; 2]> {
    let rest = text.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    let mut numbers = rest.split_whitespace().map(|word| match word {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    });
    Some([numbers.next()??, numbers.next()??])
}

/// Whether `/proc/<pid>/uid_map` is the one of the initial user namespace: a capability counts for memory only there.
fn is_initial_namespace(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_read_from_the_status_text() {
        assert_eq!(held("VmPin:\t       0 kB\nVmLck:\t      36 kB\nVmHWM:\t    9000 kB\n"), 36 << 10);
        assert_eq!(held("Kthread:\t1\n"), 0);
    }

    #[test]
    fn limits_of_another_process_are_those_that_it_has() {
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         65536                unlimited            bytes\n";
        assert_eq!(limits(text), Some([Some(65_536), None]));
        assert_eq!(limits("Max locked memory  x"), None);
        let (own, read) = (Locked::read().unwrap(), Locked::read_of(std::process::id()).unwrap());
        assert_eq!((own.soft, own.hard), (read.soft, read.hard));
    }

    #[test]
    fn a_capability_counts_only_in_the_initial_namespace() {
        assert!(is_initial_namespace("         0          0 4294967295\n"));
        assert!(!is_initial_namespace("         0     100000      65536\n"));
    }

    #[test]
    fn what_is_held_lessens_the_room_unless_the_process_is_exempt() {
        let locked = Locked { soft: Some(65_536), hard: None, held: 4096, exempt: false };
        assert_eq!(locked.room(), Some(61_440));
        assert_eq!(Locked { exempt: true, ..locked }.room(), None);
        assert_eq!(Locked { soft: None, ..locked }.room(), None);
    }
}
