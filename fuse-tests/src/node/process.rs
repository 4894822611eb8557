//! A process that goes when it is dropped, and what makes one look as in a container.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sched::{CloneFlags, unshare};
use rustix::process::Signal;

use crate::wait::{SOON, until};

/// User and group of agents.
pub const UID: u32 = 65_532;

/// A child, and what it prints.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; it prints to the file `log`.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn spawn(mut command: Command, log: PathBuf) -> Self {
        let file = File::options().create(true).append(true).open(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Self { child: command.spawn().unwrap(), log }
    }

    /// Starts it as the first process of a pid namespace, so that all of its children die with it.
    ///
    /// # Panics
    /// It does not start; this needs root.
    #[must_use]
    pub fn spawn_init(command: Command, log: PathBuf) -> Self {
        // The namespace is for this thread's next child.
        let started = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWPID).unwrap();
            Self::spawn(command, log)
        });
        started.join().unwrap()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        crate::agent::read_log(&self.log)
    }

    /// How it ended, if it did.
    ///
    /// # Panics
    /// The kernel does not say.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// It has ended.
    pub fn signal(&self, signal: Signal) {
        super::kill(self.pid(), signal);
    }

    /// Kills it and waits for its end.
    ///
    /// # Panics
    /// It does not end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as a container is ended, and waits for that.
    ///
    /// # Panics
    /// It does not end within 10 s.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        until("its end", SOON, || self.ended())
    }

    /// Its open descriptors, its log aside: how many of each kind.
    ///
    /// # Panics
    /// It has ended.
    #[must_use]
    pub fn descriptors(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap() {
            // One that was closed meanwhile is not open.
            if let Ok(open) = std::fs::read_link(entry.unwrap().path())
                && open != self.log
            {
                let open = open.display().to_string();
                let kind = open.split_once(":[").map_or(open.as_str(), |(kind, _)| kind);
                *kinds.entry(kind.to_owned()).or_default() += 1;
            }
        }
        kinds
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program with the user of agents, without capabilities or ways to get any, and with the little locked memory that some
/// container runtimes give.
#[must_use]
pub fn as_in_a_container(program: &Path) -> Command {
    let mut command = Command::new("/usr/bin/prlimit");
    command.args(["--memlock=65536:8388608", "/usr/bin/setpriv"]);
    command.args([format!("--reuid={UID}"), format!("--regid={UID}")]);
    command.args(["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"]);
    command.arg(program);
    command
}

/// The path of a program for every user: its own, or that of a copy in `directory`.
pub(super) fn reachable(program: &Path, directory: &Path) -> PathBuf {
    let open = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 == 0o001)
    };
    if program.ancestors().all(open) {
        return program.to_owned();
    }
    let copy = directory.join(program.file_name().unwrap());
    std::fs::hard_link(program, &copy).or_else(|_| std::fs::copy(program, &copy).map(drop)).unwrap();
    copy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::needs;
    use crate::wait::until_true;

    #[test]
    fn an_agent_is_the_first_process_of_its_namespace_and_may_do_nothing() {
        if !needs::kernel() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let mut command = as_in_a_container(Path::new("/bin/sh"));
        command.args([
            "-c",
            "echo pid $$ uid $(id -u) groups $(id -G) locked $(ulimit -l); cat /proc/self/status",
        ]);
        let mut process = Process::spawn_init(command, directory.path().join("log"));
        until("its end", SOON, || process.ended());
        let log = process.log();
        assert!(log.starts_with("pid 1 uid 65532 groups 65532 locked 64\n"), "{log}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(log.contains(&format!("{set}:\t0000000000000000\n")), "{log}");
        }
        assert!(log.contains("NoNewPrivs:\t1\n"), "{log}");
    }

    #[test]
    fn the_children_of_an_agent_die_with_it() {
        if !needs::kernel() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let mut command = as_in_a_container(Path::new("/bin/sh"));
        command.args(["-c", "sleep 1000 & echo started; wait"]);
        let process = Process::spawn_init(command, directory.path().join("log"));
        let children = || {
            let list = format!("/proc/{0}/task/{0}/children", process.pid());
            let list = std::fs::read_to_string(list).unwrap();
            list.split_whitespace().map(|pid| PathBuf::from(format!("/proc/{pid}"))).next()
        };
        let child = until("its child", SOON, children);
        until_true("its word", SOON, || process.log() == "started\n");
        assert!(child.exists());
        drop(process);
        assert!(!child.exists());
    }
}
