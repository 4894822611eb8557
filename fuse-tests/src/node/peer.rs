//! Processes on the node socket that are not what they say: each connects, and the test speaks.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags,
    SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::{Node, UID, kill, process};

/// Where a peer runs.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// As the first process of a pid namespace, as in a container of its own.
    Container,
    /// Beside the test.
    Beside,
    /// In the pid namespace of this process.
    Inside(u32),
}

/// A process that connects. It ends when it is dropped.
pub struct Peer {
    control: OwnedFd,
    child: Option<Child>,
    pidfd: Option<OwnedFd>,
}

impl Node {
    /// Starts a peer with this user, and the group of agents.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn peer(&self, uid: u32, place: Place) -> Peer {
        let program = self.programs.shim.with_file_name("test-peer");
        let program = process::reachable(&program, &self.path.join("bin"));
        let (control, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut command = Command::new("/usr/bin/setpriv");
        command.args([format!("--reuid={uid}"), format!("--regid={UID}")]);
        command.args(["--clear-groups", "--no-new-privs", "--"]).arg(program).stdin(Stdio::from(theirs));
        // The namespace is for a thread's next child.
        let start = move || {
            match place {
                Place::Container => unshare(CloneFlags::CLONE_NEWPID).unwrap(),
                Place::Beside => {}
                Place::Inside(pid) => {
                    let namespace = File::open(format!("/proc/{pid}/ns/pid")).unwrap();
                    setns(namespace, CloneFlags::CLONE_NEWPID).unwrap();
                }
            }
            command.spawn().unwrap()
        };
        let child = std::thread::spawn(start).join().unwrap();
        Peer { control, child: Some(child), pidfd: None }
    }
}

impl Peer {
    /// Has it connect; what is said on the connection is said by it.
    ///
    /// # Panics
    /// It cannot.
    #[must_use]
    pub fn connect(&self, socket: &Path) -> UnixStream {
        let [connection] = self.ask(&format!("connect {}", socket.display()));
        connection.into()
    }

    /// Has it start a child.
    ///
    /// # Panics
    /// It does not.
    #[must_use]
    pub fn spawn(&self) -> Self {
        let [control, pidfd] = self.ask("spawn");
        Self { control, child: None, pidfd: Some(pidfd) }
    }

    /// Its number in this process table.
    ///
    /// # Panics
    /// It is gone.
    #[must_use]
    pub fn pid(&self) -> u32 {
        if let Some(child) = &self.child {
            return child.id();
        }
        let info = format!("/proc/self/fdinfo/{}", self.pidfd().as_raw_fd());
        let info = std::fs::read_to_string(info).unwrap();
        info.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap().trim().parse().unwrap()
    }

    /// What pins it, if it is the child of another.
    ///
    /// # Panics
    /// It is not.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_ref().unwrap().as_fd()
    }

    /// Kills it. Its parent takes no notice.
    ///
    /// # Panics
    /// It is gone.
    pub fn kill(&self) {
        kill(self.pid(), rustix::process::Signal::KILL);
    }

    /// Moves it into a cgroup.
    ///
    /// # Panics
    /// It cannot be moved.
    pub fn enter(&self, cgroup: &Cgroup) {
        std::fs::write(cgroup.path.join("cgroup.procs"), self.pid().to_string()).unwrap();
    }

    fn ask<const N: usize>(&self, what: &str) -> [OwnedFd; N] {
        let mut nothing = SendAncillaryBuffer::default();
        sendmsg(&self.control, &[IoSlice::new(what.as_bytes())], &mut nothing, SendFlags::empty()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut answer = [0; 16];
        let flags = RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.control, &mut [IoSliceMut::new(&mut answer)], &mut rights, flags).unwrap();
        let files = rights.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let files: Vec<OwnedFd> = files.flatten().collect();
        <[OwnedFd; N]>::try_from(files).unwrap_or_else(|files| panic!("{what}: {} descriptors", files.len()))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A cgroup that goes when it is dropped, once its processes have gone.
pub struct Cgroup {
    path: PathBuf,
    /// As `/proc/PID/cgroup` shows it.
    pub name: String,
}

impl Cgroup {
    /// A fresh one, in the first hierarchy that can be written; `None`: there is none.
    #[must_use]
    pub fn new() -> Option<Self> {
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (hierarchy, own) = (fields.next()?, fields.next()?);
            let name = format!("{}/fuse-tests-{:016x}", own.trim_end_matches('/'), rand::random::<u64>());
            let places = match hierarchy {
                "" => ["/sys/fs/cgroup".to_owned(), "/sys/fs/cgroup/unified".to_owned()],
                v1 => [format!("/sys/fs/cgroup/{v1}"), String::new()],
            };
            let path = places.iter().map(|place| PathBuf::from(format!("{place}{name}")));
            let path = path.into_iter().find(|path| std::fs::create_dir(path).is_ok())?;
            // One without this file is an ordinary directory.
            if !path.join("cgroup.procs").exists() {
                let _ = std::fs::remove_dir(path);
                return None;
            }
            Some(Self { path, name })
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let path = &self.path;
        let gone = || (std::fs::remove_dir(path).is_ok() || !path.exists()).then_some(());
        crate::wait::until("the cgroup's end", crate::wait::SOON, gone);
    }
}
