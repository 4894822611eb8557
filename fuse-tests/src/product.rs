//! The real program as a child: `fuse-secrets` as `cargo build` made it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::SystemTime;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use crate::agent::{end, read_log};
use crate::mounted::Mounted;
use crate::wait;

/// The program, beside another one of this workspace.
///
/// # Panics
/// It is not there, or older than its source: `cargo build --workspace` was not run.
#[must_use]
pub fn program(sibling: &str) -> PathBuf {
    let path = Path::new(sibling).with_file_name("fuse-secrets");
    let remedy = "run `cargo build --workspace` (cargo xtask test does)";
    let built = modified(&path).unwrap_or_else(|| panic!("{} is missing: {remedy}", path.display()));
    // What cargo made it from, in the format of make.
    let sources = std::fs::read_to_string(path.with_extension("d")).unwrap();
    let sources = sources.split_once(": ").map_or("", |(_, sources)| sources);
    for source in sources.split_whitespace() {
        let newer = modified(Path::new(source)).is_some_and(|at| at > built);
        assert!(!newer, "{} is older than {source}: {remedy}", path.display());
    }
    path
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn appending(log: &NamedTempFile) -> std::fs::File {
    std::fs::File::options().append(true).open(log.path()).unwrap()
}

/// Runs a command of the program to its end.
///
/// # Panics
/// It does not start.
#[must_use]
pub fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program).env("FUSE_SECRETS_LOG", "trace").args(arguments).output().unwrap()
}

/// `fuse-secrets mount`, serving.
pub struct Mount {
    child: Child,
    log: NamedTempFile,
    // Goes after the child.
    mounted: Mounted,
}

impl Mount {
    /// Starts it with these arguments, the directory aside, and waits until it serves.
    ///
    /// # Errors
    /// It ended instead: its exit code and what it printed.
    ///
    /// # Panics
    /// It does neither within 40 s.
    pub fn start(program: &Path, arguments: &[&str]) -> Result<Self, (Option<i32>, String)> {
        let (mounted, log) = (Mounted::new(), NamedTempFile::new().unwrap());
        let child = Command::new(program)
            .env("FUSE_SECRETS_LOG", "trace")
            .arg("mount")
            .args(arguments)
            .arg(mounted.path())
            .stdin(Stdio::null())
            .stdout(appending(&log))
            .stderr(appending(&log))
            .spawn()
            .unwrap();
        let mut mount = Self { child, log, mounted };
        let ended = wait::until("mount or end", std::time::Duration::from_secs(40), || {
            if let Some(status) = mount.child.try_wait().unwrap() {
                return Some(Some(status.code()));
            }
            // It says so when INIT is answered.
            mount.log().contains("mounted").then(|| mount.mounted.is_mounted().then_some(None)).flatten()
        });
        match ended {
            Some(code) => Err((code, mount.log())),
            None => Ok(mount),
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        read_log(self.log.path())
    }

    /// Ends it as Ctrl-C does. Returns its exit code and what it printed.
    ///
    /// # Panics
    /// It does not end.
    pub fn stop(mut self) -> (Option<i32>, String) {
        self.signal();
        let status = wait::until("end", wait::SOON, || self.child.try_wait().unwrap());
        (status.code(), self.log())
    }

    fn signal(&self) {
        if let Some(pid) = Pid::from_raw(i32::try_from(self.child.id()).unwrap()) {
            let _ = kill_process(pid, Signal::INT);
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal();
        }
        end(&mut self.child, "fuse-secrets mount");
    }
}
