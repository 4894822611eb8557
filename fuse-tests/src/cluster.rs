//! A Kubernetes cluster of one node, for tests: the real programs, in namespaces of their own, from pinned Go modules.
//!
//! ```text
//!   test ──▶ Cluster ─┬─ world.rs     network and pid namespace; ends with the test
//!                     ├─ init.rs      the node's first process: mounts, etcd, containerd, control plane, kubelet
//!                     ├─ api.rs       the API server, asked over HTTP as its administrator
//!                     ├─ kubectl.rs   kubectl: apply, delete, exec, logs
//!                     ├─ waits.rs     until a pod is ready, an event is there
//!                     ├─ csi.rs       the driver's socket, called past kubelet
//!                     ├─ pods.rs      what a pod is made of on the node, and what is left of it
//!                     ├─ store.rs     Vault beside the node, which trusts the cluster's service accounts
//!                     ├─ tenant.rs    a namespace with everything that a test's pods need
//!                     └─ audit.rs     who asked the API server for what
//! ```
//! Start: `shared()` and `alone()` in `shared.rs`: all tests of a binary use one cluster.
//!
//! Whatever way the test's process ends, all processes and mounts of the cluster end with it, and its directory and cgroups are
//! removed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::backend::{Backend, Kind};
use crate::wait::{SOON, until, until_true};

/// The API server over HTTP.
pub mod api;
/// Requests that the API server had.
pub mod audit;
/// Cgroups.
pub mod cgroups;
/// Certificates and keys.
pub mod certificates;
/// Programs and their arguments.
pub mod components;
/// The driver's own socket.
pub mod csi;
/// The driver on the cluster.
pub mod deploy;
/// The driver's pods and processes.
pub mod driver;
/// The node's first process.
pub mod init;
/// kubectl.
pub mod kubectl;
/// Pods on the node.
pub mod pods;
/// A directory that goes.
pub mod scratch;
/// One cluster for many tests.
pub mod shared;
/// Secrets of which every read can be judged.
pub mod stamped;
/// Vault.
pub mod store;
/// A test's own namespace.
pub mod tenant;
/// Waiting for what the API server says.
pub mod waits;
/// What is around the node.
pub mod world;

use api::Api;
use certificates::{Certificates, NODE};
use init::Plan;
use scratch::Scratch;
use world::World;

pub use shared::{alone, shared};
pub use tenant::Tenant;

/// Longest wait for what a cluster does by itself, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Where the programs of Kubernetes are.
pub const PROGRAMS: &str = "FUSE_SECRETS_TEST_KUBERNETES";
/// Where the archives of images are.
pub const IMAGES: &str = "FUSE_SECRETS_TEST_IMAGES";
/// The binary of Vault.
pub const VAULT: &str = "FUSE_SECRETS_TEST_VAULT";

/// What a cluster is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory with hyperkube, etcd, containerd, containerd-shim-runc-v2, ctr, runc.
    pub programs: PathBuf,
    /// The directory with archives of images, all of which are put on the node: at least pause.tar and tools.tar.
    pub images: PathBuf,
    /// Which store listens at [`store::ADDRESS`]; default: none.
    pub store: Option<Kind>,
    /// kubelet's `syncFrequency`. Default: `5s`, so that volumes are published again every 6 to 8 s.
    pub sync: String,
    /// Fields of kubelet's configuration that replace ours.
    pub kubelet: Value,
}

impl Options {
    /// As the environment names things.
    ///
    /// # Errors
    /// It does not name the programs, or the images.
    pub fn from_env() -> Result<Self, String> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let required = |name: &str| variable(name).ok_or_else(|| format!("{name} names no directory"));
        Ok(Self {
            programs: required(PROGRAMS)?,
            images: required(IMAGES)?,
            store: variable(VAULT).map(Kind::Binary),
            sync: "5s".to_owned(),
            kubelet: json!({}),
        })
    }
}

/// A cluster that runs, until this is dropped.
pub struct Cluster {
    // In the order in which they must go.
    node: Option<Node>,
    store: Option<Backend>,
    api: Api,
    world: Arc<World>,
    certificates: Certificates,
    options: Options,
    program: PathBuf,
    scratch: Scratch,
}

/// The node's processes.
struct Node {
    /// Waits for the first process.
    boot: Child,
    /// The node's first process, in the numbers of the test.
    init: u32,
}

impl Cluster {
    /// Starts one, and waits until its node is ready.
    ///
    /// # Panics
    /// It is not in time: says what its programs printed last. This needs root.
    #[must_use]
    pub fn start(options: Options) -> Self {
        let program = program();
        let scratch = Scratch::new(&program);
        let directory = scratch.path();
        for inner in ["log", "kubelet", "pods", "etcd", "containerd", "cache"] {
            fs::create_dir(directory.join(inner)).unwrap();
        }
        let certificates = Certificates::new(&directory.join("certificates"));
        let world = Arc::new(World::new(&program));
        let api = Api::new(&world, &certificates);
        let mut kubelet = components::kubelet(&certificates, &options.sync);
        for (field, value) in options.kubelet.as_object().into_iter().flatten() {
            kubelet[field] = value.clone();
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let plan = Plan {
            directory: directory.to_owned(),
            cgroup: scratch.name().to_owned(),
            path: format!("{}:{path}", options.programs.display()),
            components: components::all(directory, &options.programs, &certificates, &kubelet),
        };
        fs::write(directory.join("plan.json"), serde_json::to_vec(&plan).unwrap()).unwrap();
        let mut cluster =
            Self { node: None, store: None, api, world, certificates, options, program, scratch };
        cluster.boot(true);
        cluster.store = cluster.options.store.as_ref().map(|kind| cluster.start_store(kind));
        cluster
    }

    /// Ends every process of the node at once and starts it again, as a machine that was reset: what kubelet, etcd and containerd
    /// have on disk is kept, mounts, cgroups, addresses and /run are new. The store is elsewhere, and goes on. Returns when the node is
    /// ready; its pods may not be yet.
    ///
    /// # Panics
    /// It is not in time.
    pub fn reboot(&mut self) {
        self.shut_down();
        self.boot(false);
    }

    fn shut_down(&mut self) {
        let Some(mut node) = self.node.take() else { return };
        // Its first process takes every other with it, and is waited for by this one.
        crate::node::kill(node.init, Signal::KILL);
        node.boot.wait().unwrap();
        cgroups::remove(self.scratch.name()).unwrap();
        let mut ip = self.inside(Path::new("ip"));
        ip.args(["link", "delete", components::BRIDGE]).stderr(Stdio::null());
        // There is none before the first pod.
        let _ = self.world.spawn(ip).wait();
    }

    fn boot(&mut self, first: bool) {
        let directory = self.scratch.path();
        let number = rand::random::<u128>();
        let id = format!("{number:032x}");
        let id = [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-");
        fs::write(directory.join("boot_id"), format!("{id}\n")).unwrap();
        cgroups::make(self.scratch.name());
        let log = fs::File::options().create(true).append(true).open(directory.join("log/init")).unwrap();
        let mut command = Command::new(&self.program);
        command.arg("boot").arg(directory.join("plan.json"));
        command.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log);
        command.process_group(0);
        let mut boot = self.world.spawn(command);
        let init = until("the node's first process", SOON, || {
            if let Some(status) = boot.try_wait().unwrap() {
                panic!("the node does not boot: {status}: {}", self.log("init"));
            }
            children(boot.id()).first().copied()
        });
        self.node = Some(Node { boot, init });
        for name in ["etcd", "containerd", "kube-apiserver"] {
            self.tell("start", name);
        }
        self.until("containerd", || {
            UnixStream::connect(self.root().join(&components::CONTAINERD[1..])).is_ok()
        });
        if first {
            self.import_images();
        }
        self.until("the API server", || {
            self.api.try_ask("GET", "readyz", None).is_some_and(|(status, _)| status == 200)
        });
        for name in ["kube-controller-manager", "kube-scheduler", "kubelet"] {
            self.tell("start", name);
        }
        self.until("the node", || {
            let Some(node) = self.find(&format!("api/v1/nodes/{NODE}")) else { return false };
            // What was said of the node before it was reset is not true any more.
            node["status"]["nodeInfo"]["bootID"] == *id && api::condition(&node, "Ready")
        });
        let account = "api/v1/namespaces/default/serviceaccounts/default";
        self.until("the default service account", || self.find(account).is_some());
    }

    fn import_images(&self) {
        let mut archives: Vec<PathBuf> =
            fs::read_dir(&self.options.images).unwrap().map(|entry| entry.unwrap().path()).collect();
        archives.retain(|path| path.extension().is_some_and(|end| end == "tar"));
        archives.sort();
        for archive in archives {
            let archive = archive.canonicalize().unwrap();
            let output = self.ctr(&["images", "import", &archive.display().to_string()]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {said}", archive.display());
        }
    }

    /// Waits for something of the node; if it does not come, says what its programs printed.
    fn until(&self, what: &str, probe: impl Fn() -> bool) {
        let end = std::time::Instant::now() + PATIENCE;
        while !probe() {
            if std::time::Instant::now() > end {
                let names = ["init", "etcd", "containerd", "kube-apiserver", "kubelet"];
                let logs: Vec<String> =
                    names.iter().map(|name| format!("--- {name}\n{}", last(&self.log(name), 20))).collect();
                panic!("{what}: not within {PATIENCE:?}\n{}", logs.join("\n"));
            }
            crate::wait::pause(Duration::from_millis(50));
        }
    }

    /// What a program of the node printed: `kubelet`, `containerd`, `kube-apiserver`, `etcd`, …
    #[must_use]
    pub fn log(&self, component: &str) -> String {
        let log = self.directory().join("log").join(component);
        fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Kills kubelet, and returns when the next one runs.
    ///
    /// # Panics
    /// None does within 10 s.
    pub fn restart_kubelet(&self) {
        self.restart("kubelet");
    }

    /// The same for any of the node's programs; `containerd` leaves the containers running.
    ///
    /// # Panics
    /// It does not run again within 10 s.
    pub fn restart(&self, component: &str) {
        let before = until("a running program", SOON, || self.component(component));
        crate::node::kill(before, Signal::KILL);
        until("the next one", SOON, || self.component(component).filter(|now| *now != before));
    }

    /// Kills one of the node's programs; it stays away until [`Cluster::resume`].
    ///
    /// # Panics
    /// It does not end within 10 s.
    pub fn stop(&self, component: &str) {
        self.tell("stop", component);
        until_true("its end", SOON, || self.component(component).is_none());
    }

    /// Starts what was stopped.
    ///
    /// # Panics
    /// It does not start within 10 s.
    pub fn resume(&self, component: &str) {
        self.tell("start", component);
        until("its start", SOON, || self.component(component));
    }

    /// The process of one of the node's programs, in the numbers of the test.
    #[must_use]
    pub fn component(&self, name: &str) -> Option<u32> {
        children(self.node_pid()).into_iter().find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0).take(2);
            words.any(|word| {
                Path::new(&*String::from_utf8_lossy(word)).file_name().is_some_and(|file| file == name)
            })
        })
    }

    fn tell(&self, verb: &str, component: &str) {
        let mut input = self.node().boot.stdin.as_ref().unwrap();
        writeln!(input, "{verb} {component}").unwrap();
    }

    /// The node's first process, in the numbers of the test. Another one after a reboot.
    #[must_use]
    pub fn node_pid(&self) -> u32 {
        self.node().init
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("a node that runs")
    }

    /// The node's file system with its mounts, as a path of the test: `root().join("var/lib/kubelet")`.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.node_pid()))
    }

    /// The mounts of the node, as mountinfo has them.
    ///
    /// # Panics
    /// The node has ended.
    #[must_use]
    pub fn mountinfo(&self) -> String {
        fs::read_to_string(format!("/proc/{}/mountinfo", self.node_pid())).unwrap()
    }

    /// A command inside of all of the node's namespaces. It ends with the node.
    #[must_use]
    pub fn in_node(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.node_pid()));
        command.args(["--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--"]).args(words);
        command
    }

    /// containerd's own client, in the namespace of kubelet's containers.
    #[must_use]
    pub fn ctr(&self, words: &[&str]) -> Command {
        let ctr = self.options.programs.join("ctr").display().to_string();
        let start = [ctr.as_str(), "--address", components::CONTAINERD, "--namespace", "k8s.io"];
        self.in_node(&[&start, words].concat())
    }

    /// Whether it was started with a store.
    #[must_use]
    pub fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// Where the archives of its images are.
    #[must_use]
    pub fn images(&self) -> &Path {
        &self.options.images
    }

    /// Where everything is that the cluster writes.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.scratch.path()
    }

    /// A kubeconfig of the administrator. Its server is reached only in the cluster's network.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.certificates.path("admin.kubeconfig")
    }

    /// The certificate of the authority that signed the API server's, in PEM.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn authority(&self) -> String {
        fs::read_to_string(self.certificates.path("ca.crt")).unwrap()
    }

    /// The key that checks tokens of service accounts, in PEM.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn issuer_key(&self) -> String {
        fs::read_to_string(self.certificates.path("sa.pub")).unwrap()
    }

    /// The key that signs tokens of service accounts, in PEM.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn signing_key(&self) -> String {
        fs::read_to_string(self.certificates.path("sa.key")).unwrap()
    }

    /// The network, to run something in.
    #[must_use]
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// The store, which listens at [`store::ADDRESS`].
    ///
    /// # Panics
    /// The cluster was started without one.
    #[must_use]
    pub fn store(&self) -> &Backend {
        self.store.as_ref().expect("a cluster with a store")
    }

    /// A program for [`World::spawn`].
    fn inside(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).current_dir("/");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut node) = self.node.take() {
            drop(node.boot.stdin.take());
            let _ = node.boot.wait();
        }
    }
}

/// The program of this package that is the cluster's first processes, as `cargo` built it beside the one that runs.
///
/// # Panics
/// It is not there.
fn program() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let found = own.ancestors().skip(1).take(2).map(|directory| directory.join("test-cluster"));
    let found = found.into_iter().find(|path| path.exists());
    found.expect("test-cluster is missing: run `cargo build --workspace`")
}

/// The children of a process.
fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// The last lines of a text.
fn last(text: &str, lines: usize) -> String {
    let start = text.lines().count().saturating_sub(lines);
    text.lines().skip(start).collect::<Vec<_>>().join("\n")
}

/// Counts by something.
fn count<K: Ord>(keys: impl Iterator<Item = K>) -> BTreeMap<K, u64> {
    let mut counts = BTreeMap::new();
    keys.for_each(|key| *counts.entry(key).or_default() += 1);
    counts
}
