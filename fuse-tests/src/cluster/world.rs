//! What is around the node and outlives its reboots: a network, and a pid namespace whose end is the end of everything in it.
//!
//! ```text
//!   test ──pipe──▶ world (first process of its pid namespace; waits for the pipe's end)
//!     │              ├─ network: lo with the node's and the API server's address
//!     ├──spawn──────▶├─ Vault, kubectl
//!     └──spawn──────▶└─ node (its own mount, pid, ipc, uts, cgroup namespaces inside)
//! ```
//! The kernel closes the pipe however the test ends, the world's first process ends, and the kernel then ends the rest.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitOptions, wait};
use tokio::runtime::Runtime;

/// The node's address, where the API server and the store listen too.
pub const NODE_IP: &str = "10.88.0.1";
/// The address of the service `kubernetes`.
pub const SERVICE_IP: &str = "10.96.0.1";

/// Ends, with everything in it, when this is dropped.
pub struct World {
    child: Child,
}

impl World {
    /// A world with nothing in it.
    ///
    /// # Panics
    /// It cannot be made; this needs root.
    #[must_use]
    pub fn new(program: &Path) -> Self {
        let mut command = Command::new(program);
        command.arg("world").stdin(Stdio::piped()).stdout(Stdio::piped());
        // Ctrl-C is for the test, which ends the world in order.
        command.process_group(0);
        // The namespaces are for this thread, and its next child.
        let mut child = apart(move || {
            unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET).unwrap();
            command.spawn().unwrap()
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the world's first process ended");
        Self { child }
    }

    /// Starts a program in it.
    ///
    /// # Panics
    /// It does not start.
    pub fn spawn(&self, mut command: Command) -> Child {
        let [network, processes] = ["net", "pid"].map(|kind| self.namespace(kind));
        apart(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            setns(processes, CloneFlags::CLONE_NEWPID).unwrap();
            command.spawn().unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()))
        })
    }

    /// A runtime whose tasks are in its network: spawn what connects or listens, as a future that is only waited for stays with
    /// the thread that waits.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn runtime(&self) -> Runtime {
        let network = self.namespace("net");
        apart(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            // Threads inherit the namespace of the one that makes them.
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
    }

    fn namespace(&self, kind: &str) -> File {
        File::open(format!("/proc/{}/ns/{kind}", self.child.id())).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        // Returns when every process of the namespace has ended.
        let _ = self.child.wait();
    }
}

/// Runs something on a thread of its own, whose namespaces may then be others.
fn apart<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The program `test-cluster world`: the network's addresses, then nothing until standard input ends.
///
/// # Panics
/// The network cannot be set up.
pub fn first_process() {
    ip(&["link", "set", "lo", "up"]);
    for address in [NODE_IP, SERVICE_IP] {
        ip(&["address", "add", &format!("{address}/32"), "dev", "lo"]);
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    {
        use std::io::Write as _;
        let mut said = std::io::stdout();
        said.write_all(b"ready\n").and_then(|()| said.flush()).unwrap();
    }
    while !ended(&std::io::stdin()) {
        // Orphans become children of a namespace's first process.
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    }
}

/// Runs `ip`.
pub(super) fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {}: {status}", arguments.join(" "));
}

/// Whether a pipe has ended, on which nothing is said; waits a little for it.
fn ended(pipe: &impl std::os::fd::AsFd) -> bool {
    let mut polled = [PollFd::new(pipe, PollFlags::IN)];
    let moment = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    poll(&mut polled, Some(&moment)).unwrap() > 0
}
