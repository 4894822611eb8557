//! Who is on the node socket. Images share uids, so a uid alone proves nothing: the kernel says which process connected, and
//! `/proc` what that is. The process is pinned by a pidfd first and found alive by it last, so that what was read in between was
//! read of it and of no later process with the same number.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;

use crate::sys;

/// A process.
pub(crate) struct Peer {
    /// Its number in the node's process table.
    pub pid: u32,
    /// Its effective user.
    pub uid: u32,
    /// Its parent's number.
    pub parent: u32,
    /// `/proc/PID/cgroup`, whole.
    pub cgroup: String,
    /// Whether it is the first of a pid namespace that is not the shim's.
    pub is_init: bool,
    /// Pins it.
    pub pidfd: OwnedFd,
}

/// Who may be a supervisor.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// Its user.
    pub uid: u32,
    /// Its cgroup, as the shim sees it; without one, it must be the first process of a pid namespace, as in a container.
    pub cgroup: Option<String>,
}

impl Peer {
    /// Who connected. Reads `/proc`: not for an async thread.
    ///
    /// # Errors
    /// It is gone, or not in the shim's process table (is the shim's pod without hostPID?).
    pub(crate) fn of(socket: &UnixStream) -> io::Result<Self> {
        let invisible =
            || io::Error::other("the peer is not in this process table; the shim's pod needs hostPID");
        let raw = socket.peer_cred()?.pid().filter(|pid| *pid > 0).ok_or_else(invisible)?;
        let pidfd = sys::peer_pidfd(socket.as_fd())?;
        let read = |file: &str| fs::read_to_string(format!("/proc/{raw}/{file}"));
        let status = status(&read("status")?)
            .ok_or_else(|| io::Error::other("/proc/PID/status is not as expected"))?;
        let cgroup = read("cgroup")?;
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid"));
        let is_init = status.innermost == 1 && namespace(&raw.to_string())? != namespace("self")?;
        if has_ended(pidfd.as_fd()) {
            return Err(io::Error::other("the peer is gone"));
        }
        Ok(Self { pid: raw.unsigned_abs(), uid: status.uid, parent: status.parent, cgroup, is_init, pidfd })
    }

    /// Whether it may be a supervisor.
    ///
    /// # Errors
    /// Which condition it does not meet.
    pub(crate) fn may_supervise(&self, rule: &Rule) -> Result<(), String> {
        if self.uid != rule.uid {
            return Err(format!("uid {} is not the agent's, {}", self.uid, rule.uid));
        }
        match &rule.cgroup {
            Some(path) if !is_within(&self.cgroup, path) => Err(format!("not in the cgroup {path}")),
            None if !self.is_init => {
                Err("not the first process of a container (or set --agent-cgroup)".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Whether it is the worker with this number of this supervisor.
    ///
    /// # Errors
    /// Which condition it does not meet.
    pub(crate) fn may_work_for(&self, supervisor: &Self, announced: Option<u32>) -> Result<(), &'static str> {
        match () {
            () if announced != Some(self.pid) => Err("no supervisor announced this process"),
            () if self.parent != supervisor.pid => Err("its parent is not the supervisor that announced it"),
            () if self.uid != supervisor.uid => Err("its user is not the supervisor's"),
            () if self.cgroup != supervisor.cgroup => Err("its cgroup is not the supervisor's"),
            () => Ok(()),
        }
    }
}

/// Which process a pidfd means.
///
/// # Errors
/// It is no pidfd, or its process has ended or is not in the shim's process table.
pub(crate) fn pid_of(pidfd: BorrowedFd<'_>) -> io::Result<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    // One that nobody has waited for has its number still.
    pinned(&info)
        .filter(|_| !has_ended(pidfd))
        .ok_or_else(|| io::Error::other("not the pidfd of a living process"))
}

/// Whether a pidfd's process has ended.
#[must_use]
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).map_or(true, |ready| ready > 0)
}

struct Status {
    uid: u32,
    parent: u32,
    innermost: u32,
}

/// The fields of `/proc/PID/status` that count.
fn status(text: &str) -> Option<Status> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_ascii_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<u32>>>()
    };
    // Real, effective, saved, of the file system.
    let uid = *field("Uid")?.get(1)?;
    Some(Status { uid, parent: *field("PPid")?.first()?, innermost: *field("NSpid")?.last()? })
}

/// Whether a `/proc/PID/cgroup` names this cgroup or one below it, in any hierarchy.
fn is_within(cgroups: &str, path: &str) -> bool {
    if !path.starts_with('/') {
        return false;
    }
    let path = path.trim_end_matches('/');
    cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|cgroup| {
        let below = cgroup.strip_prefix(path);
        below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// The process of a pidfd's `/proc/self/fdinfo`: −1 when it is gone, 0 when it is not visible.
fn pinned(info: &str) -> Option<u32> {
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    line.trim().parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    fn ourselves() -> OwnedFd {
        pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap()
    }

    fn peer(pid: u32, parent: u32) -> Peer {
        Peer { pid, uid: 65532, parent, cgroup: "0::/pods/a\n".to_owned(), is_init: true, pidfd: ourselves() }
    }

    #[test]
    fn status_gives_effective_user_parent_and_innermost_number() {
        let text = "Name:\tx y\nPid:\t70\nPPid:\t60\nUid:\t1\t2\t3\t4\nGid:\t9\t9\t9\t9\nNSpid:\t70\t8\t1\n";
        let status = super::status(text).unwrap();
        assert_eq!((status.uid, status.parent, status.innermost), (2, 60, 1));
        for broken in [
            "",
            "Uid:\t1\nPPid:\t1\nNSpid:\t1\n",
            "PPid:\tx\nUid:\t1\t2\t3\t4\nNSpid:\t1\n",
            "Uid\nPPid\nNSpid",
        ] {
            assert!(super::status(broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn a_cgroup_is_itself_or_below_never_a_longer_name() {
        let cgroups = "8:memory:/other\n0::/kubepods/pod1/agent:x\n";
        for path in ["/", "/kubepods", "/kubepods/pod1/", "/kubepods/pod1/agent:x", "/other"] {
            assert!(is_within(cgroups, path), "{path}");
        }
        for path in ["/kubepods/pod", "/kubepods/pod1/agent:x/y", "", "kubepods"] {
            assert!(!is_within(cgroups, path), "{path}");
        }
    }

    #[test]
    fn only_the_agents_user_in_its_own_container_or_cgroup_may_supervise() {
        let mut rule = Rule { uid: 65532, cgroup: None };
        let mut supervisor = peer(5, 1);
        supervisor.may_supervise(&rule).unwrap();
        supervisor.is_init = false;
        assert!(supervisor.may_supervise(&rule).unwrap_err().contains("container"));
        rule.cgroup = Some("/pods/a".to_owned());
        supervisor.may_supervise(&rule).unwrap();
        rule.cgroup = Some("/pods/b".to_owned());
        supervisor.is_init = true;
        assert!(supervisor.may_supervise(&rule).unwrap_err().contains("/pods/b"));
        supervisor.uid = 0;
        assert!(supervisor.may_supervise(&rule).unwrap_err().contains("uid 0"));
    }

    #[test]
    fn only_the_announced_child_of_the_supervisor_may_work() {
        let supervisor = peer(5, 1);
        peer(6, 5).may_work_for(&supervisor, Some(6)).unwrap();
        assert!(peer(6, 5).may_work_for(&supervisor, None).is_err());
        assert!(peer(7, 5).may_work_for(&supervisor, Some(6)).is_err());
        assert!(peer(6, 1).may_work_for(&supervisor, Some(6)).is_err(), "started by another process");
        let elsewhere = Peer { cgroup: "0::/pods/b\n".to_owned(), ..peer(6, 5) };
        assert!(elsewhere.may_work_for(&supervisor, Some(6)).is_err());
        let other = Peer { uid: 0, ..peer(6, 5) };
        assert!(other.may_work_for(&supervisor, Some(6)).is_err());
    }

    #[test]
    fn a_pidfd_tells_its_process_until_that_is_gone() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert_eq!(pid_of(pidfd.as_fd()).unwrap(), child.id());
        assert!(!has_ended(pidfd.as_fd()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(has_ended(pidfd.as_fd()));
        assert!(pid_of(pidfd.as_fd()).is_err());
        assert!(pid_of(std::io::stdin().as_fd()).is_err(), "no pidfd at all");
    }

    #[tokio::test]
    async fn whoever_connects_is_known_by_the_kernel() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.cgroup, fs::read_to_string("/proc/self/cgroup").unwrap());
        assert!(!peer.is_init, "in the same pid namespace as the shim");
    }
}
