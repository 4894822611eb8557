//! The directory of one cluster, and who removes it: a process that waits for its maker's end, however that comes. What a dead one of
//! those left is removed by the next cluster that starts.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use super::cgroups;

/// Not the directory for temporary files that the environment names: all runs on this machine must find each other's.
const PARENT: &str = "/tmp";
/// Cgroups have the name of their cluster's directory.
const PREFIX: &str = "fuse-secrets-cluster-";

/// Goes when it is dropped; so do the cgroups of its name.
pub(super) struct Scratch {
    path: PathBuf,
    sweeper: Child,
    _held: File,
}

impl Scratch {
    pub(super) fn new(program: &Path) -> Self {
        // While it is held, no directory is without its lock.
        let all = File::create(format!("{PARENT}/{PREFIX}lock")).unwrap();
        flock(&all, FlockOperation::LockExclusive).unwrap();
        sweep_dead();
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(PARENT).unwrap();
        let held = File::create(directory.path().join("held")).unwrap();
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        let path = directory.keep();
        let mut sweeper = Command::new(program);
        sweeper.arg("sweep").arg(&path).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // A signal to the test's group, as Ctrl-C is, must not end it.
        sweeper.process_group(0);
        Self { sweeper: sweeper.spawn().unwrap(), path, _held: held }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name of its cgroups.
    pub(super) fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.sweeper.stdin.take());
        let swept = self.sweeper.wait();
        let swept = swept.is_ok_and(|status| status.success());
        assert!(swept || std::thread::panicking(), "{} is not removed", self.path.display());
    }
}

/// The program `test-cluster sweep`: waits for the end of standard input, then removes the cluster's directory and cgroups.
///
/// # Errors
/// Something of it is still there.
pub fn sweep_at_end(path: &Path) -> Result<(), String> {
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map_err(|error| error.to_string())?;
    sweep(path)
}

/// Waits for the last process to leave, then removes.
fn sweep(path: &Path) -> Result<(), String> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or("no directory")?;
    cgroups::remove(name)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {error}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes what belongs to nobody who lives. What cannot be removed is tried again at the next start.
fn sweep_dead() {
    let directories = fs::read_dir(PARENT).unwrap().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        (name.starts_with(PREFIX) && entry.path().is_dir()).then_some(name)
    });
    let mut names: Vec<String> = directories.chain(cgroups::names(PREFIX)).collect();
    names.sort();
    names.dedup();
    for name in names {
        let path = Path::new(PARENT).join(name);
        let held = File::open(path.join("held"))
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err());
        if !held && let Err(why) = sweep(&path) {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "left by another run: {why}");
        }
    }
}
