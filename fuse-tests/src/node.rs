//! A node with everything that belongs to one: kubelet's directory, a store, the shim, agents, and calls as kubelet makes them.
//! The programs are the real ones, as `cargo build --workspace` made them.
//!
//! ```text
//!   <directory>/kubelet/pods/UID/volumes/kubernetes.io~csi/secrets/mount   targets
//!              /kubelet/plugins/fuse-secrets/csi.sock, plugins_registry/   the shim's sockets for kubelet
//!              /node/shim.sock                                             the shim's socket for agents
//!              /classes/NAMESPACE/NAME.yaml                                classes
//!              /log/                                                       what each process prints
//! ```
//! The shim and its agents share the test's cgroup and mount namespace; each agent is the first process of a pid namespace of its
//! own, with the uid, the (missing) capabilities and the limit of locked memory that a container has. Dropping the node ends
//! everything and takes every mount below its directory away.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::{End, Link};
use fuse_secrets_csi::wire::message::{
    Abort, AgentStatus, Hello, Refused, Role, Unsupported, VolumeStatus, Volumes,
};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::mounted::mounts_below;
use crate::wait::{SOON, until, until_true};
use crate::{product, wait};

/// The API server's part: who signs tokens, what the store knows of them, classes.
pub mod cluster;
/// kubelet's calls.
pub mod kubelet;
/// Who is on the node socket, and is no agent.
pub mod peer;
/// A process that goes when it is dropped.
pub mod process;

pub use cluster::Cluster;
pub use kubelet::{Kubelet, Volume};
pub use process::{Process, UID};

/// Classes may name any store.
const ANYWHERE: &str = r#"--allow=[{namespaces: ["*"], addresses: ["*"]}]"#;

/// In the node's directory.
const CSI_SOCKET: &str = "kubelet/plugins/fuse-secrets/csi.sock";

/// A node. Processes are started by its methods; a fresh one has none.
pub struct Node {
    // Processes go before what they use.
    agents: Vec<Agent>,
    shim: Option<Process>,
    /// Its store, tokens and classes.
    pub cluster: Cluster,
    runtime: Runtime,
    kubelet: Kubelet,
    programs: Programs,
    /// Where the shim tells its health.
    pub shim_health: SocketAddr,
    /// How much processes log that are started from now on. Default: trace.
    pub log: &'static str,
    started: u32,
    path: PathBuf,
    directory: Option<TempDir>,
}

/// An agent: the supervisor is `process`, the worker its child.
pub struct Agent {
    /// The supervisor.
    pub process: Process,
    /// Where it tells its health.
    pub health: SocketAddr,
}

struct Programs {
    agent: PathBuf,
    shim: PathBuf,
}

/// What the node holds at a moment, to be compared with another: see [`Node::holdings`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// The shim's descriptors: how many of each kind.
    pub descriptors: BTreeMap<String, usize>,
    /// Mounts below kubelet's directory.
    pub mounts: usize,
    /// Targets that exist.
    pub targets: Vec<PathBuf>,
}

impl Node {
    /// A node with a store and no process yet. `sibling` is another program of this build, as `env!("CARGO_BIN_EXE_...")` names it.
    ///
    /// # Panics
    /// The programs are not built, or the store does not start.
    #[must_use]
    pub fn new(sibling: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("fuse-node-").tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap();
        for inner in [
            "kubelet/pods",
            "kubelet/plugins/fuse-secrets",
            "kubelet/plugins_registry",
            "node",
            "classes",
            "log",
            "bin",
        ] {
            std::fs::create_dir_all(path.join(inner)).unwrap();
        }
        // Agents must get to their socket, their classes and their program.
        for open in [".", "classes", "bin"] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(path.join(open), mode).unwrap();
        }
        let agent = product::program(sibling);
        let shim = agent.with_file_name("fuse-secrets-csi");
        assert!(shim.exists(), "{} is missing: run `cargo build --workspace`", shim.display());
        let programs = Programs { agent: process::reachable(&agent, &path.join("bin")), shim };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let kubelet = {
            let _inside = runtime.enter();
            Kubelet::new(&path.join(CSI_SOCKET))
        };
        let cluster = Cluster::new(path.join("classes"));
        Self {
            agents: Vec::new(),
            shim: None,
            cluster,
            runtime,
            kubelet,
            programs,
            shim_health: free_address(),
            log: "trace",
            started: 0,
            path,
            directory: Some(directory),
        }
    }

    /// A node with the shim and one agent, serving.
    ///
    /// # Panics
    /// They do not within 10 s.
    #[must_use]
    pub fn start(sibling: &str) -> Self {
        Self::start_with(sibling, &[], &[])
    }

    /// The same, with these arguments of shim and agent beside the usual ones.
    ///
    /// # Panics
    /// They do not serve within 10 s.
    #[must_use]
    pub fn start_with(sibling: &str, shim: &[&str], agent: &[&str]) -> Self {
        let mut node = Self::new(sibling);
        node.start_shim(shim);
        node.start_agent(agent);
        node.wait_served();
        node
    }

    /// Starts the shim, with these arguments beside the usual ones, and waits until its sockets are there.
    ///
    /// # Panics
    /// They are not within 10 s.
    pub fn start_shim(&mut self, arguments: &[&str]) {
        let mut command = Command::new(&self.programs.shim);
        command.env_clear().args(["--node-id", "node-1", "--log", self.log]);
        command.args(["--agent-uid", &UID.to_string(), "--agent-gid", &UID.to_string()]);
        command.args(["--health-address", &self.shim_health.to_string()]);
        command.arg("--endpoint").arg(format!("unix://{}", self.path.join(CSI_SOCKET).display()));
        command.arg("--kubelet-root").arg(self.path.join("kubelet"));
        command.arg("--registration-dir").arg(self.path.join("kubelet/plugins_registry"));
        command.arg("--node-socket").arg(self.node_socket()).args(arguments);
        let log = self.next_log("shim");
        let sockets = [self.path.join(CSI_SOCKET), self.node_socket()];
        let shim = self.shim.insert(Process::spawn(command, log));
        // Those of a dead predecessor are still there: one that takes a connection counts.
        until_true("the shim's sockets", SOON, || {
            assert!(shim.ended().is_none(), "the shim ended: {}", shim.log());
            sockets.iter().all(|socket| std::os::unix::net::UnixStream::connect(socket).is_ok())
        });
    }

    /// Starts an agent, with these arguments beside the usual ones. Returns its place in [`Node::agents`].
    ///
    /// # Panics
    /// It does not start.
    pub fn start_agent(&mut self, arguments: &[&str]) -> usize {
        let health = free_address();
        let mut command = process::as_in_a_container(&self.programs.agent);
        command.env_clear().env("FUSE_SECRETS_LOG", self.log).arg("agent");
        command.arg("--node-socket").arg(self.node_socket()).arg("--classes").arg(self.path.join("classes"));
        command.args(["--address", &self.cluster.store.address(), "--auth-method", "jwt"]);
        // The store is on this machine, and some classes name it in a way of their own.
        for usual in ["--allow-local-addresses=true", ANYWHERE] {
            let (name, _) = usual.split_once('=').unwrap();
            if !arguments
                .iter()
                .any(|argument| argument.starts_with(name) && !argument[name.len()..].starts_with('-'))
            {
                command.arg(usual);
            }
        }
        command.args(["--health-address", &health.to_string()]).args(arguments);
        let process = Process::spawn_init(command, self.next_log("agent"));
        self.agents.push(Agent { process, health });
        self.agents.len() - 1
    }

    /// Waits until an agent serves; returns what the shim says of it.
    ///
    /// # Panics
    /// None does within 10 s.
    pub fn wait_served(&self) -> AgentStatus {
        until("an agent that serves", SOON, || self.serving())
    }

    /// The agent that serves now.
    #[must_use]
    pub fn serving(&self) -> Option<AgentStatus> {
        let (_, agents) = self.try_observe()?;
        agents.into_iter().find(|agent| agent.state == "serving" && agent.pid != 0)
    }

    /// The running agents, in the order in which they were started.
    pub fn agents(&mut self) -> &mut Vec<Agent> {
        &mut self.agents
    }

    /// The running shim.
    ///
    /// # Panics
    /// It was not started.
    pub fn shim(&mut self) -> &mut Process {
        self.shim.as_mut().expect("a shim")
    }

    /// Kills the worker that serves, and waits until another one does. Returns both.
    ///
    /// # Panics
    /// None serves before, or after within 10 s.
    pub fn kill_worker(&self) -> (AgentStatus, AgentStatus) {
        let before = self.wait_served();
        kill(before.pid, Signal::KILL);
        let after = until("the next worker", SOON, || self.serving().filter(|now| now.agent != before.agent));
        (before, after)
    }

    /// Kills the shim and starts it again, with these arguments beside the usual ones.
    ///
    /// # Panics
    /// It does not start.
    pub fn restart_shim(&mut self, arguments: &[&str]) {
        self.shim().kill();
        self.start_shim(arguments);
    }

    /// kubelet, for calls at once: run them with [`Node::block_on`].
    #[must_use]
    pub fn kubelet(&self) -> Kubelet {
        self.kubelet.clone()
    }

    /// Runs a future.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Runs a future beside the test.
    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.runtime.spawn(future)
    }

    /// A pod's volume of a class in the namespace `shop`, with a fresh token of the service account `app`: not published yet.
    ///
    /// # Panics
    /// kubelet's directory for it cannot be made.
    #[must_use]
    pub fn volume(&self, pod: &str, class: &str) -> Volume {
        let volume = Volume::new(&self.path.join("kubelet"), pod, class);
        self.cluster.renew(volume)
    }

    /// Publishes.
    ///
    /// # Errors
    /// The shim's refusal.
    pub fn publish(&self, volume: &Volume) -> Result<(), tonic::Status> {
        self.block_on(self.kubelet.publish(volume))
    }

    /// Unpublishes.
    ///
    /// # Errors
    /// The shim's refusal.
    pub fn unpublish(&self, volume: &Volume) -> Result<(), tonic::Status> {
        self.block_on(self.kubelet.unpublish(volume))
    }

    /// What the shim tells root: its volumes and its agents.
    ///
    /// # Panics
    /// It does not answer within 10 s.
    #[must_use]
    pub fn observe(&self) -> (Vec<VolumeStatus>, Vec<AgentStatus>) {
        until("the shim's answer", SOON, || self.try_observe())
    }

    /// What the shim tells of one volume.
    #[must_use]
    pub fn status(&self, volume: &Volume) -> Option<VolumeStatus> {
        self.observe().0.into_iter().find(|status| status.volume == volume.id)
    }

    fn try_observe(&self) -> Option<(Vec<VolumeStatus>, Vec<AgentStatus>)> {
        match self.block_on(self.ask(&Message::Volumes(Volumes::default())))? {
            Message::Volumes(Volumes { volumes, agents }) => Some((volumes, agents)),
            other => panic!("another answer: {}", describe(&other)),
        }
    }

    /// Ends a volume as root does.
    ///
    /// # Errors
    /// The shim's refusal.
    ///
    /// # Panics
    /// It does not answer.
    pub fn abort(&self, volume: &Volume) -> Result<(), String> {
        let abort = Message::Abort(Abort { volume: volume.id.clone() });
        match self.block_on(self.ask(&abort)).expect("an answer") {
            Message::Done(_) => Ok(()),
            other => Err(describe(&other)),
        }
    }

    /// Asks the shim as an observer.
    async fn ask(&self, question: &Message) -> Option<Message> {
        let socket = UnixStream::connect(self.node_socket()).await.ok()?;
        let (link, _questions) = Link::start(socket, End::Connected);
        let hello = Hello { program: "fuse-tests".to_owned(), role: Role::Observer, ..Hello::default() };
        let deadline = Instant::now() + SOON;
        match link.ask(&Message::Hello(hello), Vec::new(), deadline).await.ok()? {
            Message::Hello(_) => link.ask(question, Vec::new(), deadline).await.ok(),
            other => panic!("an observer is refused: {}", describe(&other)),
        }
    }

    /// The socket on which the shim listens for agents.
    #[must_use]
    pub fn node_socket(&self) -> PathBuf {
        self.path.join("node/shim.sock")
    }

    /// The node's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is held now. The shim's listening and idle connections are among its descriptors: compare with a moment at which
    /// kubelet had already called it.
    ///
    /// # Panics
    /// The shim does not run.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let shim = self.shim.as_ref().expect("a shim");
        let root = self.path.join("kubelet");
        Holdings {
            descriptors: shim.descriptors(),
            mounts: mounts_below(&root),
            targets: kubelet::targets(&root),
        }
    }

    /// Waits until the same is held as at an earlier moment.
    ///
    /// # Panics
    /// It is not within 10 s: says what is held instead.
    pub fn wait_settled(&self, before: &Holdings) {
        let end = Instant::now() + SOON;
        while self.holdings() != *before {
            assert!(Instant::now() < end, "held before: {before:#?}, now: {:#?}", self.holdings());
            wait::pause(Duration::from_millis(10));
        }
    }

    /// What the next process prints to.
    fn next_log(&mut self, name: &str) -> PathBuf {
        self.started += 1;
        self.path.join(format!("log/{:02}-{name}", self.started))
    }

    /// Everything that all processes printed so far.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn logs(&self) -> String {
        let logs = std::fs::read_dir(self.path.join("log")).unwrap();
        let mut logs: Vec<PathBuf> = logs.map(|entry| entry.unwrap().path()).collect();
        logs.sort();
        logs.iter().map(|log| format!("{}:\n{}", log.display(), crate::agent::read_log(log))).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.logs();
            let shown = logs.char_indices().rev().nth(20_000).map_or(0, |(at, _)| at);
            // Shown with the failure.
            #[allow(clippy::print_stderr, reason = "of a test that fails")]
            {
                eprintln!("--- what the node's processes printed last\n{}", &logs[shown..]);
            }
        }
        self.agents.clear();
        self.shim = None;
        // The newest first. By the raw call: umount(8) looks at the mount first, and would hang.
        let root = self.path.join("kubelet");
        for point in kubelet::mounts(&root).into_iter().rev() {
            let _ = unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        if mounts_below(&root) > 0 {
            // Removing would go through the mount.
            let _kept = self.directory.take().map(TempDir::keep);
            assert!(std::thread::panicking(), "{} stays mounted", root.display());
        }
    }
}

/// Sends a signal to a process.
///
/// # Panics
/// There is none with this number.
pub fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// An address of this machine that nobody listens on.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn describe(message: &Message) -> String {
    match message {
        Message::Refused(Refused { code, text }) => format!("refused with {code}: {text}"),
        Message::Unsupported(Unsupported { kind }) => format!("message {kind} is not supported"),
        other => format!("a message of kind {}", other.kind()),
    }
}
