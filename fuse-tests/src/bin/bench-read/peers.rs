//! The processes that are measured.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use fuse_secrets::fuse::mount::detach_dead;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Error;
use crate::store::{LARGE, ROLE, Store};

const START: Duration = Duration::from_secs(30);

/// A process that serves one directory; ended and unmounted on drop.
pub(crate) struct Server {
    child: Child,
    directory: PathBuf,
    /// Where it tells its service manager how it is; heard until it has ended.
    _manager: Option<UnixDatagram>,
}

impl Server {
    /// `fuse-secrets mount`, ready to be read.
    pub(crate) fn product(store: &Store, class: &Path) -> Result<Self, Error> {
        let directory = store.directory()?;
        // As systemd does it: readiness comes as a datagram, so nobody polls.
        let socket = directory.with_extension("ready");
        let ready = UnixDatagram::bind(&socket)?;
        ready.set_read_timeout(Some(START))?;
        let mut command = program("fuse-secrets")?;
        command.args(["--log", "warn", "mount", "--address", &store.address(), "--role-id", ROLE]);
        command.arg("--secret-id-file").arg(store.secret_id_file()).arg("--class").arg(class).arg(&directory);
        let child = command.env("NOTIFY_SOCKET", &socket).spawn()?;
        let server = Self { child, directory, _manager: Some(ready.try_clone()?) };
        ready.recv(&mut [0; 64]).map_err(|error| format!("fuse-secrets mount is not ready: {error}"))?;
        Ok(server)
    }

    /// `bench-floor` with as many threads and the same largest reply as a product that runs.
    pub(crate) fn floor(store: &Store, as_product: &Self) -> Result<Self, Error> {
        let directory = store.directory()?;
        let mut command = program("bench-floor")?;
        command.arg(&directory).arg(as_product.threads()?.to_string()).arg(as_product.max_read()?);
        command.arg(LARGE.to_string()).stdout(Stdio::piped());
        let mut server = Self { child: command.spawn()?, directory, _manager: None };
        let output = server.child.stdout.take().ok_or("no output")?;
        if BufReader::new(output).read_line(&mut String::new())? == 0 {
            return Err("bench-floor did not start".into());
        }
        Ok(server)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Moves all its threads to one core.
    pub(crate) fn pin(&self, core: usize) -> Result<(), Error> {
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let id = task?.file_name().to_string_lossy().parse()?;
            sched_setaffinity(Pid::from_raw(id), &only(core))?;
        }
        Ok(())
    }

    /// How many threads answer the kernel, by the name that fuser gives them.
    fn threads(&self) -> Result<usize, Error> {
        let mut count = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let name = std::fs::read_to_string(task?.path().join("comm"))?;
            count += usize::from(name.starts_with("fuser-"));
        }
        Ok(count)
    }

    /// The largest reply, as it stands in the mount's options.
    fn max_read(&self) -> Result<String, Error> {
        let table = std::fs::read_to_string("/proc/self/mountinfo")?;
        let line = table.lines().find(|line| line.split(' ').nth(4).map(Path::new) == Some(&self.directory));
        let options = line.and_then(|line| line.rsplit(' ').next()).ok_or("the mount is not listed")?;
        let found = options.split(',').find_map(|option| option.strip_prefix("max_read="));
        Ok(found.ok_or("the mount has no max_read")?.to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.child);
        if let Err(error) = detach_dead(&self.directory) {
            eprintln!("bench read: {} stays mounted: {error}", self.directory.display());
        }
    }
}

/// `bench-agent`: many volumes in one process.
pub(crate) struct Many {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    mounted: Vec<PathBuf>,
}

impl Many {
    pub(crate) fn start(store: &Store) -> Result<Self, Error> {
        let mut command = program("bench-agent")?;
        command.arg(store.address()).arg(ROLE).arg(store.secret_id_file());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let commands = child.stdin.take().ok_or("no input")?;
        let answers = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self { child, commands, answers, mounted: Vec::new() })
    }

    /// Mounts a class on a directory; returns when it can be read.
    pub(crate) fn mount(&mut self, directory: &Path, class: &Path) -> Result<(), Error> {
        self.tell(&format!("mount {} {}\n", directory.display(), class.display()))?;
        self.mounted.push(directory.to_owned());
        Ok(())
    }

    /// Unmounts all but the first `keep` volumes.
    pub(crate) fn unmount_all_but(&mut self, keep: usize) -> Result<(), Error> {
        for directory in self.mounted.split_off(keep) {
            self.tell(&format!("unmount {}\n", directory.display()))?;
        }
        Ok(())
    }

    pub(crate) fn mounted(&self) -> &[PathBuf] {
        &self.mounted
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    fn tell(&mut self, line: &str) -> Result<(), Error> {
        self.commands.write_all(line.as_bytes())?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        if answer == "done\n" { Ok(()) } else { Err(format!("bench-agent: {line}: {answer}").into()) }
    }
}

impl Drop for Many {
    fn drop(&mut self) {
        end(&mut self.child);
        for directory in &self.mounted {
            if let Err(error) = detach_dead(directory) {
                eprintln!("bench read: {} stays mounted: {error}", directory.display());
            }
        }
    }
}

/// A program that was built with this one.
pub(crate) fn program(name: &str) -> Result<Command, Error> {
    Ok(Command::new(std::env::current_exe()?.with_file_name(name)))
}

/// Starts a process on one core. A child inherits the cores of the thread that makes it, so that thread is one of its own.
pub(crate) fn spawn(command: &mut Command, core: usize) -> Result<Child, Error> {
    let spawning = || -> io::Result<Child> {
        sched_setaffinity(None, &only(core))?;
        command.spawn()
    };
    let spawned = std::thread::scope(|scope| scope.spawn(spawning).join());
    Ok(spawned.map_err(|_| "the thread that starts a process panicked")??)
}

fn only(core: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(core);
    set
}

fn end(child: &mut Child) {
    let ended = Pid::from_raw(child.id().cast_signed())
        .map_or(Ok(()), |id| kill_process(id, Signal::TERM).map_err(io::Error::from))
        .and_then(|()| child.wait());
    if let Err(error) = ended {
        eprintln!("bench read: a process does not end: {error}");
    }
}
