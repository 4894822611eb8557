//! The keeper with agents as processes of their own, in a mount namespace of the test's own.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use fuse_secrets_csi::wire::link::{Asked, End};
use fuse_secrets_csi::wire::message::{self, Adopt, Deposit, Hello, Part, Role, Worker};
use rustix::process::{Pid, PidfdFlags, getgid, getuid, pidfd_open};
use tokio::net::UnixStream;

use fuse_secrets_csi::node::Volumes as _;

use super::*;
use crate::child;

const SOON: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + SOON
}

/// A shim, a supervisor, and a directory for all that they make.
struct Node {
    keeper: Keeper,
    supervisor: Link,
    directory: Directory,
}

/// Takes mounts away before it is removed: this process must not look into them.
struct Directory(tempfile::TempDir);

impl Directory {
    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Our mounts below it: this namespace began as a copy of one that may have others.
    fn mounts(&self) -> Vec<PathBuf> {
        let ours =
            |entry: &mountinfo::Entry| entry.volume().is_some() && entry.point.starts_with(self.path());
        mountinfo::read().unwrap().into_iter().filter(ours).map(|entry| entry.point).collect()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        for point in self.mounts() {
            rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }
}

impl Node {
    async fn start(handover: Handover, gap_deadline: Duration) -> Self {
        crate::sys::install_wake_signal().unwrap();
        let directory = Directory(tempfile::tempdir().unwrap());
        let keeper =
            Keeper::start(settings(directory.path(), handover, gap_deadline), Arc::default()).unwrap();
        let supervisor = supervise(directory.path()).await;
        Self { keeper, supervisor, directory }
    }

    /// A worker, announced and attached.
    async fn worker(&self) -> Process {
        let process = Process::start(self.directory.path());
        announce(&self.supervisor, &process).await;
        let before = self.keeper.kept().machine.serving();
        process.go();
        let newer = |kept: &Kept| kept.machine.serving().filter(|now| Some(*now) > before);
        self.keeper.until(soon(), newer).await.expect("no worker is attached");
        process
    }

    fn target(&self, volume: &str) -> PathBuf {
        self.directory.path().join(volume)
    }

    async fn publish(&self, volume: &str, attribute: &str) -> Result<Vec<String>, Refusal> {
        let publish = Publish {
            volume: volume.to_owned(),
            target: self.target(volume),
            pod: BTreeMap::new(),
            attributes: BTreeMap::from([(attribute.to_owned(), String::new())]),
            group: None,
            tokens: BTreeMap::new(),
            secret_ref: false,
        };
        self.keeper.publish(publish).await
    }

    /// What `stat` says of a volume, from a process that serves nothing; `None`: nothing within some seconds.
    async fn stat(&self, volume: &str) -> Option<String> {
        let target = self.target(volume);
        let stat =
            move || Command::new("timeout").args(["-s", "KILL", "15", "stat"]).arg(target).output().unwrap();
        let output = tokio::task::spawn_blocking(stat).await.unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (!text.is_empty()).then_some(text)
    }

    async fn assert_served(&self, volume: &str, agent: u64) {
        let served = |kept: &Kept| (kept.machine.state(volume) == Some(State::Served(agent))).then_some(());
        self.keeper
            .until(soon(), served)
            .await
            .unwrap_or_else(|| panic!("{:?}", self.keeper.status().volumes));
        let text = self.stat(volume).await.expect("its readers hang");
        assert!(text.contains("directory"), "{text}");
    }
}

fn settings(directory: &Path, handover: Handover, gap_deadline: Duration) -> Settings {
    Settings {
        kubelet_root: directory.to_owned(),
        node_socket: directory.join("node/shim.sock"),
        agents: Rule { uid: getuid().as_raw(), cgroup: Some("/".to_owned()) },
        agent_gid: getgid().as_raw(),
        memlock: 1 << 20,
        handover,
        gap_deadline,
        mount: mount::Options { max_read: 128 << 10, selinux_context: None },
        max_volumes: 3,
    }
}

type Connection = (Link, tokio::sync::mpsc::Receiver<Asked>, Message);

async fn connect(directory: &Path, role: Role) -> Connection {
    try_connect(directory, role).await.expect("no shim answers")
}

/// `None`: there is no shim, or it goes.
async fn try_connect(directory: &Path, role: Role) -> Option<Connection> {
    let socket = UnixStream::connect(directory.join("node/shim.sock")).await.ok()?;
    let (link, asked) = Link::start(socket, End::Connected);
    let hello = Message::Hello(Hello { role, ..Hello::default() });
    let answer = link.ask(&hello, Vec::new(), soon()).await.ok()?;
    Some((link, asked, answer))
}

async fn supervise(directory: &Path) -> Link {
    let (link, asked, answer) = connect(directory, Role::Supervisor).await;
    assert!(matches!(answer, Message::Hello(Hello { role: Role::Shim, .. })));
    // Its connection lasts as long as somebody would take questions.
    tokio::spawn(async move {
        let mut asked = asked;
        while asked.recv().await.is_some() {}
    });
    link
}

async fn announce(supervisor: &Link, process: &Process) {
    let worker = Message::Worker(Worker { ended: "exited with 7".to_owned() });
    let answer = supervisor.ask(&worker, vec![process.pidfd()], soon()).await.unwrap();
    assert!(matches!(answer, Message::Done(_)));
}

struct Process(Child);

impl Process {
    fn start(directory: &Path) -> Self {
        Self(child::start("keeper::driver::tests::worker", directory.to_str().unwrap(), Stdio::piped()))
    }

    fn go(&self) {
        self.0.stdin.as_ref().unwrap().write_all(b"go\n").unwrap();
    }

    fn pidfd(&self) -> OwnedFd {
        let pid = Pid::from_raw(self.0.id().try_into().unwrap()).unwrap();
        pidfd_open(pid, PidfdFlags::empty()).unwrap()
    }

    fn signal(&self, signal: Signal) {
        pidfd_send_signal(self.pidfd(), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The worker's process: attaches, and again when the shim comes back; serves an empty directory per volume.
#[test]
fn worker() {
    let Some(directory) = child::argument().map(PathBuf::from) else { return };
    if std::io::stdin().lines().next().is_none() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.spawn(async move {
        let mut served: HashMap<String, OwnedFd> = HashMap::new();
        loop {
            let connected = try_connect(&directory, Role::Worker).await;
            let Some((link, mut asked, Message::Hello(hello))) = connected else {
                // No shim, or not announced to it yet.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            for (volume, fuse) in &served {
                let target = directory.join(volume).to_string_lossy().into_owned();
                let adopt = Message::Adopt(Adopt { volume: volume.clone(), target, ..Adopt::default() });
                link.ask(&adopt, vec![fuse.try_clone().unwrap()], soon()).await.unwrap();
            }
            while let Some(Asked { message, descriptors, reply }) = asked.recv().await {
                reply.answer(work(&link, message, descriptors, &mut served, hello.handover).await);
            }
        }
    });
    // Ends with the test.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    runtime.shutdown_background();
}

async fn work(
    link: &Link,
    message: Message,
    descriptors: Vec<OwnedFd>,
    served: &mut HashMap<String, OwnedFd>,
    handover: Handover,
) -> Message {
    let fresh = matches!(message, Message::Publish(_));
    let volume = match message {
        Message::Stats(stats) => return Message::Stats(stats),
        Message::Publish(message::Publish { attributes, .. }) if attributes.contains_key("refuse") => {
            return Message::Refused(Refused { code: 5, text: "no such class".to_owned() });
        }
        Message::Drain(_) | Message::Unpublish(_) => {
            let (Message::Drain(Drain { volume }) | Message::Unpublish(message::Unpublish { volume })) =
                message
            else {
                return done();
            };
            // Its thread still reads: what it takes, it answers as well as any other would.
            served.remove(&volume);
            return done();
        }
        Message::Publish(publish) => {
            let part = std::fs::File::open("/dev/null").unwrap().into();
            let deposit =
                Deposit { volume: publish.volume.clone(), part: Part::Generation(1), gone: Vec::new() };
            let kept = link.ask(&Message::Deposit(deposit), vec![part], soon()).await;
            // A republish comes without a descriptor.
            if descriptors.is_empty() {
                return done();
            }
            assert!(matches!(kept, Ok(Message::Done(_))));
            publish.volume
        }
        Message::Adopt(adopt) => {
            assert_eq!(descriptors.len(), 2, "the connection and what was deposited");
            adopt.volume
        }
        _ => return done(),
    };
    let fuse = descriptors.into_iter().next().unwrap();
    if handover == Handover::Resend && !fresh {
        let resend = [16_u32.to_ne_bytes(), 7_u32.to_ne_bytes(), [0; 4], [0; 4]].concat();
        rustix::io::write(&fuse, &resend).unwrap();
    }
    if fresh {
        assert!(serve_one(&fuse, &mut vec![0; 1 << 17]), "INIT");
    }
    let reads = fuse.try_clone().unwrap();
    served.insert(volume, fuse);
    std::thread::spawn(move || {
        let mut request = vec![0; 1 << 17];
        while serve_one(&reads, &mut request) {}
    });
    done()
}

/// Answers INIT and GETATTR; `false`: the mount is gone.
fn serve_one(fuse: &OwnedFd, request: &mut [u8]) -> bool {
    let Ok(read) = rustix::io::read(fuse, &mut *request) else { return false };
    let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
    let mut body = Vec::new();
    let mut error = 0_i32;
    match opcode {
        2 | 36 | 42 => return true,
        // fuse_init_out: 7.31, then zeros, max_write 4096.
        26 => {
            body = vec![0; 64];
            body[0] = 7;
            body[4] = 31;
            body[21] = 16;
        }
        // fuse_attr_out: ino 1, mode directory 0755, nlink 1.
        3 => {
            body = vec![0; 104];
            body[16] = 1;
            body[76..80].copy_from_slice(&0o040_755_u32.to_ne_bytes());
            body[80] = 1;
        }
        _ => error = -38,
    }
    assert!(read >= 40);
    let length = u32::try_from(16 + body.len()).unwrap();
    let header = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16], &body].concat();
    let _ = rustix::io::write(fuse, &header);
    true
}

/// Runs a test in a process with mounts of its own.
fn in_own_mounts<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    if child::argument().is_some() {
        tokio::runtime::Runtime::new().unwrap().block_on(test());
    } else {
        child::in_own_mounts(&format!("keeper::driver::tests::{name}"));
    }
}

async fn outlives_its_workers(handover: Handover) {
    let node = Node::start(handover, Duration::from_secs(60)).await;
    assert!(node.keeper.ready().is_err());
    let first = node.worker().await;
    node.publish("a", "").await.unwrap();
    node.publish("b", "").await.unwrap();
    node.assert_served("a", 2).await;
    node.publish("a", "").await.unwrap();
    // Killed: the next worker gets everything.
    first.signal(Signal::KILL);
    let second = node.worker().await;
    node.assert_served("a", 3).await;
    node.assert_served("b", 3).await;
    // Beside it a newer one: handed over.
    let third = node.worker().await;
    node.assert_served("a", 4).await;
    node.assert_served("b", 4).await;
    assert!(node.keeper.safe(soon()).await);
    // That one dies: the older one serves again.
    third.signal(Signal::KILL);
    node.assert_served("a", 3).await;
    let status = node.keeper.status();
    let states: Vec<_> = status.agents.iter().map(|agent| agent.state.as_str()).collect();
    assert_eq!(states[1], "serving", "{states:?}");
    let a = &status.volumes[0];
    assert_eq!((a.volume.as_str(), a.state.as_str(), a.generation, a.parts), ("a", "serving", 1, 1));
    node.keeper.unpublish("a", &node.target("a")).await.unwrap();
    node.keeper.unpublish("a", &node.target("a")).await.unwrap();
    assert!(!node.target("a").exists());
    node.keeper.clone().abort("b").await.unwrap();
    assert!(node.keeper.status().volumes.is_empty());
    // It stays, dead, until the next publish covers it or this.
    node.keeper.unpublish("b", &node.target("b")).await.unwrap();
    assert!(node.directory.mounts().is_empty());
    drop(second);
}

#[test]
fn a_volume_outlives_its_workers_when_requests_are_sent_again() {
    in_own_mounts("a_volume_outlives_its_workers_when_requests_are_sent_again", || {
        outlives_its_workers(Handover::Resend)
    });
}

#[test]
fn a_volume_outlives_its_workers_with_a_clone_for_each() {
    in_own_mounts("a_volume_outlives_its_workers_with_a_clone_for_each", || {
        outlives_its_workers(Handover::Clone)
    });
}

#[test]
fn without_an_agent_readers_get_an_error_and_with_one_their_files_again() {
    in_own_mounts("without_an_agent_readers_get_an_error_and_with_one_their_files_again", || async {
        let node = Node::start(Handover::Resend, Duration::ZERO).await;
        let first = node.worker().await;
        node.publish("a", "").await.unwrap();
        first.signal(Signal::KILL);
        let failing = |kept: &Kept| (kept.machine.state("a") == Some(State::Failing)).then_some(());
        node.keeper.until(soon(), failing).await.unwrap();
        let text = node.stat("a").await.expect("its readers hang");
        assert!(text.contains("Input/output error"), "{text}");
        let stats = node.keeper.stats("a", &node.target("a")).await.unwrap();
        assert!(stats.fault.unwrap().contains("no agent"));
        let _second = node.worker().await;
        node.assert_served("a", 3).await;
    });
}

#[test]
fn a_refused_publish_leaves_nothing_behind() {
    in_own_mounts("a_refused_publish_leaves_nothing_behind", || async {
        let node = Node::start(Handover::Resend, Duration::from_secs(60)).await;
        let _worker = node.worker().await;
        let refusal = Refusal::new(5, "no such class");
        assert_eq!(node.publish("a", "refuse").await, Err(refusal));
        assert!(!node.target("a").exists());
        assert!(node.keeper.status().volumes.is_empty());
        assert!(node.directory.mounts().is_empty());
        assert_eq!(node.keeper.stats("a", &node.target("a")).await.unwrap_err().code, code::NOT_FOUND);
        for volume in ["a", "b", "c"] {
            node.publish(volume, "").await.unwrap();
        }
        let full = node.publish("d", "").await.unwrap_err();
        assert_eq!(full.code, code::RESOURCE_EXHAUSTED);
        assert!(!node.target("d").exists());
        assert_eq!(node.publish("../d", "").await.unwrap_err().code, code::INVALID_ARGUMENT);
    });
}

#[test]
fn a_foreign_mount_is_left_alone_by_publish_and_goes_with_unpublish() {
    in_own_mounts("a_foreign_mount_is_left_alone_by_publish_and_goes_with_unpublish", || async {
        let node = Node::start(Handover::Resend, Duration::from_secs(60)).await;
        let target = node.target("a");
        std::fs::create_dir(&target).unwrap();
        assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&target).status().unwrap().success());
        node.publish("a", "").await.unwrap();
        assert!(
            mountinfo::read().unwrap().iter().any(|entry| entry.point == target && entry.kind == "tmpfs")
        );
        node.keeper.unpublish("a", &target).await.unwrap();
        assert!(!target.exists());
    });
}

#[test]
fn only_the_announced_child_of_a_supervisor_gets_anything() {
    in_own_mounts("only_the_announced_child_of_a_supervisor_gets_anything", || async {
        let node = Node::start(Handover::Resend, Duration::from_secs(60)).await;
        let directory = node.directory.path();
        // This process has the right user and cgroup, and is nobody's worker.
        let (link, _asked, answer) = connect(directory, Role::Worker).await;
        assert!(matches!(answer, Message::Refused(Refused { code: code::PERMISSION_DENIED, .. })));
        tokio::time::timeout(SOON, link.closed()).await.unwrap();
        for role in [Role::Unknown, Role::Shim] {
            let (_, _asked, answer) = connect(directory, role).await;
            assert!(matches!(answer, Message::Refused(Refused { code: code::PERMISSION_DENIED, .. })));
        }
        let (observer, _asked, answer) = connect(directory, Role::Observer).await;
        assert!(matches!(answer, Message::Hello(_)));
        let question = Message::Volumes(Volumes::default());
        let answer = observer.ask(&question, Vec::new(), soon()).await.unwrap();
        assert!(matches!(answer, Message::Volumes(Volumes { agents, .. }) if agents.is_empty()));
        let drain = Message::Drain(Drain::default());
        assert!(matches!(observer.ask(&drain, Vec::new(), soon()).await.unwrap(), Message::Unsupported(_)));
        // Announced as a worker, but the child of another process.
        let process = Process::start(directory);
        announce(&node.supervisor, &process).await;
        process.go();
        node.keeper.until(soon(), |kept| kept.machine.serving()).await.unwrap();
    });
}

#[test]
fn a_hung_worker_is_killed_and_its_volumes_go_on() {
    in_own_mounts("a_hung_worker_is_killed_and_its_volumes_go_on", || async {
        let node = Node::start(Handover::Resend, Duration::from_secs(60)).await;
        let first = node.worker().await;
        node.publish("a", "").await.unwrap();
        let second = node.worker().await;
        node.assert_served("a", 3).await;
        second.signal(Signal::STOP);
        node.assert_served("a", 2).await;
        assert_eq!(node.keeper.status().agents[1].state, "hung and was killed");
        drop(first);
    });
}

#[test]
fn a_shim_that_comes_back_gets_its_volumes_from_the_worker() {
    if child::argument().is_none() {
        return child::in_own_mounts(
            "keeper::driver::tests::a_shim_that_comes_back_gets_its_volumes_from_the_worker",
        );
    }
    for handover in [Handover::Resend, Handover::Clone] {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (directory, worker) = runtime.block_on(async {
            let node = Node::start(handover, Duration::from_secs(60)).await;
            let worker = node.worker().await;
            node.publish("a", "").await.unwrap();
            (node.directory, worker)
        });
        // Everything that the shim holds goes with its tasks.
        drop(runtime);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let keeper =
                Keeper::start(settings(directory.path(), handover, Duration::from_secs(60)), Arc::default())
                    .unwrap();
            assert_eq!(keeper.kept().machine.state("a"), Some(State::Unclaimed));
            let supervisor = supervise(directory.path()).await;
            announce(&supervisor, &worker).await;
            let node = Node { keeper, supervisor, directory };
            let back = |kept: &Kept| matches!(kept.machine.state("a"), Some(State::Served(_))).then_some(());
            node.keeper.until(soon(), back).await.expect("not given back");
            node.publish("a", "").await.unwrap();
            assert!(node.stat("a").await.unwrap().contains("directory"));
            // And it is held: without the worker's own descriptors it lives on.
            worker.signal(Signal::KILL);
            let next = node.worker().await;
            assert!(node.stat("a").await.unwrap().contains("directory"));
            node.keeper.unpublish("a", &node.target("a")).await.unwrap();
            drop(next);
        });
    }
}

#[test]
fn a_mount_that_died_with_all_who_held_it_is_replaced_by_the_next_publish() {
    if child::argument().is_none() {
        return child::in_own_mounts(
            "keeper::driver::tests::a_mount_that_died_with_all_who_held_it_is_replaced_by_the_next_publish",
        );
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directory = runtime.block_on(async {
        let node = Node::start(Handover::Resend, Duration::from_secs(60)).await;
        let _worker = node.worker().await;
        node.publish("a", "").await.unwrap();
        node.directory
    });
    drop(runtime);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let settings = settings(directory.path(), Handover::Resend, Duration::from_secs(60));
        let keeper = Keeper::start(settings, Arc::default()).unwrap();
        let supervisor = supervise(directory.path()).await;
        let node = Node { keeper, supervisor, directory };
        assert!(node.stat("a").await.unwrap().contains("not connected"));
        let _worker = node.worker().await;
        node.publish("a", "").await.unwrap();
        node.assert_served("a", 2).await;
        node.keeper.unpublish("a", &node.target("a")).await.unwrap();
        assert!(!node.target("a").exists());
    });
}
