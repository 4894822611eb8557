//! Who is on the node socket and is no agent gets nothing: no descriptor, a refusal or the end of the connection, and a line in
//! the log. An agent that does not behave loses its volumes to the next. Meanwhile a volume is read all the time.

use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use fuse_secrets_csi::wire::link::{Asked, End, Link};
use fuse_secrets_csi::wire::message::{
    Done, Event, Hello, Poke, Publish, Refused, Role, Stats, Unsupported, Volumes, WhoIs, Worker,
};
use fuse_secrets_csi::wire::{HEADER, Header, Message, encode};
use fuse_tests::needs;
use fuse_tests::node::peer::{Peer, Place};
use fuse_tests::node::{Node, UID, Volume};
use fuse_tests::wait::{until, until_true};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;
use tokio::sync::mpsc::Receiver;

use crate::{PATIENCE, SIBLING, settled};

/// A node with a volume that is read all the time.
struct World {
    node: Node,
    volume: Volume,
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    readers: Vec<JoinHandle<Result<(), String>>>,
}

/// One that was let in, and what it is asked.
type Connection = (Link, Receiver<Asked>);

/// What somebody got who said Hello.
enum Got {
    /// A refusal with this text, and then the end.
    Refused(String),
    /// The end.
    Closed,
    /// A connection.
    Let(Link, Receiver<Asked>),
}

impl Got {
    fn text(self) -> String {
        match self {
            Self::Refused(text) => text,
            Self::Closed => panic!("closed without a word"),
            Self::Let(..) => panic!("let in"),
        }
    }

    fn link(self) -> Connection {
        match self {
            Self::Refused(text) => panic!("refused: {text}"),
            Self::Closed => panic!("closed"),
            Self::Let(link, questions) => (link, questions),
        }
    }
}

impl World {
    fn new(shim: &[&str]) -> Option<Self> {
        if !needs::kernel() {
            return None;
        }
        let node = Node::start_with(SIBLING, shim, &[]);
        node.cluster.store.put("app", &json!({"password": "p".repeat(5_000)}));
        node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
        let volume = node.volume("web-0", "app");
        node.publish(&volume).unwrap();
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let reader = |_| {
            let (path, stop, reads) = (volume.join("password"), Arc::clone(&stop), Arc::clone(&reads));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let text = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
                    if text.len() != 5_000 || text.bytes().any(|byte| byte != b'p') {
                        return Err(format!("{} other bytes", text.len()));
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                    fuse_tests::wait::pause(std::time::Duration::from_millis(1));
                }
                Ok(())
            })
        };
        let readers = (0..2).map(reader).collect();
        Some(Self { node, volume, stop, reads, readers })
    }

    fn connect(&self, peer: &Peer) -> UnixStream {
        peer.connect(&self.node.node_socket())
    }

    fn speak(&self, socket: UnixStream) -> (Link, Receiver<Asked>) {
        self.node.block_on(async {
            socket.set_nonblocking(true).unwrap();
            Link::start(tokio::net::UnixStream::from_std(socket).unwrap(), End::Connected)
        })
    }

    fn ask(&self, link: &Link, message: &Message, files: Vec<OwnedFd>) -> Option<Message> {
        self.node.block_on(link.ask(message, files, Instant::now() + PATIENCE)).ok()
    }

    /// Says Hello as somebody.
    fn hello(&self, peer: &Peer, role: Role) -> Got {
        let (link, mut questions) = self.speak(self.connect(peer));
        let hello = Hello { program: "peer".to_owned(), role, ..Hello::default() };
        match self.ask(&link, &Message::Hello(hello), Vec::new()) {
            Some(Message::Hello(_)) => Got::Let(link, questions),
            answer => {
                let nothing_else = self.node.block_on(async {
                    tokio::time::timeout(PATIENCE, questions.recv())
                        .await
                        .expect("the connection lives on")
                        .is_none()
                });
                assert!(nothing_else, "who is refused is asked something");
                match answer {
                    Some(Message::Refused(Refused { code: 7, text })) => Got::Refused(text),
                    None => Got::Closed,
                    Some(other) => panic!("a message of kind {}", other.kind()),
                }
            }
        }
    }

    /// It is refused with these words, which are in the log with its number.
    fn refuses(&self, peer: &Peer, role: Role, words: &str) {
        let pid = peer.pid();
        let text = self.hello(peer, role).text();
        assert!(text.contains(words), "{words:?} is missing in: {text}");
        until_true("the log", PATIENCE, || {
            let log = self.node.logs();
            log.lines().any(|line| {
                line.contains("refused on the node socket")
                    && line.contains(&format!("pid={pid} "))
                    && line.contains(words)
            })
        });
    }

    fn announce(&self, supervisor: &Link, worker: &Peer) -> Option<Message> {
        let pidfd = worker.pidfd().try_clone_to_owned().unwrap();
        self.ask(supervisor, &Message::Worker(Worker::default()), vec![pidfd])
    }

    /// Readers go on, and always did.
    fn is_read(&mut self) {
        let before = self.reads.load(Ordering::Relaxed);
        let failed = |reader: &mut JoinHandle<_>| reader.is_finished();
        until_true("reads", PATIENCE, || {
            if let Some(reader) = self.readers.extract_if(.., failed).next() {
                panic!("a reader failed: {:?}", reader.join());
            }
            self.reads.load(Ordering::Relaxed) > before + 20
        });
    }

    fn end(mut self) {
        self.is_read();
        self.stop.store(true, Ordering::Release);
        for reader in self.readers.drain(..) {
            reader.join().unwrap().unwrap();
        }
        assert!(self.node.shim().ended().is_none());
        self.node.unpublish(&self.volume).unwrap();
        assert_eq!((self.node.holdings().mounts, self.node.holdings().targets.len()), (0, 0));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

#[test]
fn who_has_the_agents_user_but_is_no_agent_gets_nothing() {
    let Some(mut world) = World::new(&[]) else { return };
    // Images share users: this one is of another pod.
    let beside = world.node.peer(UID, Place::Beside);
    world.refuses(&beside, Role::Supervisor, "not the first process of a container");
    world.refuses(&beside, Role::Worker, "no supervisor that is connected announced this process");
    world.refuses(&beside, Role::Observer, "only root observes");
    world.refuses(&beside, Role::Shim, "no such role");
    world.refuses(&beside, Role::Unknown, "no such role");

    let other = world.node.peer(UID + 1, Place::Container);
    world.refuses(&other, Role::Supervisor, "uid 65533 is not the agent's, 65532");
    world.refuses(&other, Role::Worker, "no supervisor that is connected announced this process");
    world.refuses(&other, Role::Observer, "only root observes");

    // In the agent's container, and a child of its first process by adoption: all is as a worker's, but that it was not announced.
    let supervisor = world.node.agents()[0].process.pid();
    let stranger = world.node.peer(UID, Place::Inside(supervisor));
    let orphan = stranger.spawn();
    drop(stranger);
    let parent = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", orphan.pid())).unwrap();
        status.contains(&format!("PPid:\t{supervisor}\n"))
    };
    until_true("an orphan", PATIENCE, parent);
    world.refuses(&orphan, Role::Worker, "no supervisor that is connected announced this process");
    world.refuses(&orphan, Role::Supervisor, "not the first process of a container");
    orphan.kill();
    world.end();
}

#[test]
fn a_second_supervisor_has_its_own_worker_and_nobody_elses() {
    let Some(world) = World::new(&[]) else { return };
    let containers: Vec<Peer> = (0..4).map(|_| world.node.peer(UID, Place::Container)).collect();
    let supervisors: Vec<_> =
        containers[..3].iter().map(|peer| world.hello(peer, Role::Supervisor).link()).collect();
    world.refuses(&containers[3], Role::Supervisor, "4 supervisors are connected already");
    let (own, others) = (&supervisors[0].0, &supervisors[1].0);

    // A worker that is dead, no worker, two of them.
    let dead = containers[0].spawn();
    dead.kill();
    until_true("its end", PATIENCE, || has_ended(&dead));
    let refusal = |answer: Option<Message>| match answer {
        Some(Message::Refused(Refused { code: 3, text })) => text,
        Some(other) => panic!("a message of kind {}", other.kind()),
        None => panic!("no answer"),
    };
    assert!(refusal(world.announce(own, &dead)).contains("not the pidfd of a living process"));
    let worker = Message::Worker(Worker::default());
    assert_eq!(refusal(world.ask(own, &worker, Vec::new())), "not one pidfd");
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    refusal(world.ask(own, &worker, vec![file()]));
    assert_eq!(refusal(world.ask(own, &worker, vec![file(), file()])), "not one pidfd");

    // Announced by another than its parent; then by its parent, but from another cgroup.
    let child = containers[0].spawn();
    assert!(matches!(world.announce(others, &child), Some(Message::Done(_))));
    world.refuses(&child, Role::Worker, "its parent is not the supervisor that announced it");
    let grandchild = child.spawn();
    assert!(matches!(world.announce(others, &grandchild), Some(Message::Done(_))));
    world.refuses(&grandchild, Role::Worker, "its parent is not the supervisor that announced it");
    let sibling = containers[0].spawn();
    world.refuses(&sibling, Role::Worker, "no supervisor that is connected announced this process");
    if let Some(cgroup) = needs::cgroup() {
        sibling.enter(&cgroup);
        assert!(matches!(world.announce(own, &sibling), Some(Message::Done(_))));
        world.refuses(&sibling, Role::Worker, "its cgroup is not the supervisor's");
        sibling.kill();
    }
    // A supervisor speaks of workers, and of nothing else.
    for message in [Message::Volumes(Volumes::default()), Message::Publish(Publish::default())] {
        let answer = world.ask(own, &message, Vec::new());
        assert!(matches!(answer, Some(Message::Unsupported(Unsupported { kind })) if kind == message.kind()));
    }
    drop(containers);
    world.end();
}

fn has_ended(peer: &Peer) -> bool {
    let mut polled = [rustix::event::PollFd::from_borrowed_fd(peer.pidfd(), rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&now)).unwrap() > 0
}

#[test]
fn where_the_agents_cgroup_is_named_only_its_processes_are_agents() {
    if !needs::kernel() {
        return;
    }
    let Some(cgroup) = needs::cgroup() else { return };
    let mut node = Node::new(SIBLING);
    node.start_shim(&["--agent-cgroup", &cgroup.name]);
    let outside = node.peer(UID, Place::Container);
    let inside = node.peer(UID, Place::Beside);
    inside.enter(&cgroup);
    let (stop, reads) = (Arc::default(), Arc::default());
    let volume = node.volume("none", "none");
    let world = World { node, volume, stop, reads, readers: Vec::new() };
    world.refuses(&outside, Role::Supervisor, &format!("not in the cgroup {}", cgroup.name));
    let (supervisor, _questions) = world.hello(&inside, Role::Supervisor).link();
    let worker = inside.spawn();
    assert!(matches!(world.announce(&supervisor, &worker), Some(Message::Done(_))));
    drop(world.hello(&worker, Role::Worker).link());
    worker.kill();
    drop(inside);
}

/// A header, with its numbers.
fn header(magic: &[u8; 4], version: u16, kind: u16, length: u32, descriptors: u16) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    for number in [version, kind] {
        bytes.extend(number.to_le_bytes());
    }
    for number in [1, length] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(descriptors.to_le_bytes());
    bytes.extend([0, 0]);
    bytes
}

/// Everything that comes until the end of the connection.
fn rest(mut socket: UnixStream) -> Vec<u8> {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        ended => drop(ended.expect("the connection lives on")),
    }
    bytes
}

#[test]
fn bytes_that_are_no_frame_end_their_connection_and_no_other() {
    let Some(world) = World::new(&[]) else { return };
    let peer = world.node.peer(UID, Place::Container);
    let before = settled(&world.node);
    let hello = |role| {
        let hello = Hello { program: "peer".to_owned(), role, ..Hello::default() };
        encode(0, &Message::Hello(hello), 0).unwrap()
    };
    let good = hello(Role::Supervisor);
    let cases: [(&str, Vec<u8>); 8] = [
        ("half a header", good[..HEADER / 2].to_vec()),
        ("half a payload", good[..good.len() - 5].to_vec()),
        ("another protocol", b"GET / HTTP/1.1\r\nHost: shim\r\n\r\n".to_vec()),
        ("another magic", header(b"FSCT", 1, 1, 2, 0)),
        ("a later framing", header(b"FSCS", 2, 1, 2, 0)),
        ("too long", header(b"FSCS", 1, 1, u32::MAX, 0)),
        ("more descriptors than are taken", header(b"FSCS", 1, 1, 2, 65)),
        ("descriptors that do not come", header(b"FSCS", 1, 1, 2, 3)),
    ];
    for (name, bytes) in cases {
        let mut socket = world.connect(&peer);
        socket.write_all(&bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(rest(socket), [0_u8; 0], "{name}");
        // The same after a good start.
        let mut socket = world.connect(&peer);
        socket.write_all(&good).unwrap();
        socket.write_all(&bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        // The answer to the first, or what there was time for of it.
        drop(rest(socket));
    }
    // Descriptors that nobody announced, as many as the kernel takes and as many as it cuts off.
    for count in [1, 64, 65, 253] {
        let socket = world.connect(&peer);
        let files: Vec<OwnedFd> = (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect();
        let carried: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&carried)));
        sendmsg(&socket, &[IoSlice::new(&good)], &mut rights, SendFlags::empty()).unwrap();
        assert_eq!(rest(socket), [0_u8; 0], "{count} descriptors");
    }
    // What can be read, and is no way to begin; a Hello of an older program; a word of a newer one.
    let first = |kind: u16, payload: &[u8]| {
        let mut socket = world.connect(&peer);
        let mut frame = header(b"FSCS", 1, kind, u32::try_from(payload.len()).unwrap(), 0);
        frame.extend(payload);
        // The side that connected asks with even numbers.
        frame[8] = 0;
        socket.write_all(&frame).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut head = [0; HEADER];
        socket.read_exact(&mut head).unwrap();
        let mut text = vec![0; Header::decode(&head).unwrap().length];
        socket.read_exact(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    };
    assert!(first(12, b"{}").contains("Hello comes first"));
    assert!(first(1, b"{}").contains("no such role"));
    assert!(first(1, br#"{"role":"janitor","since":[1,2]}"#).contains("no such role"));
    assert!(
        first(1, br#"{"role":"supervisor"}"#).contains("fuse-secrets-csi"),
        "an older supervisor is let in"
    );
    assert!(first(1, b"{\"role\":").contains("cannot be read"));
    assert!(first(4_711, b"{}").contains("4711"), "an unknown message is answered with its number");
    drop(peer);
    world.node.wait_settled(&before);
    world.end();
}

#[test]
fn silent_connections_are_few_and_end_by_themselves() {
    let Some(world) = World::new(&[]) else { return };
    let peer = world.node.peer(UID, Place::Beside);
    let before = settled(&world.node);
    let silent: Vec<UnixStream> = (0..20).map(|_| world.connect(&peer)).collect();
    let held = |node: &Node| {
        let sockets =
            |held: &fuse_tests::node::Holdings| held.descriptors.get("socket").copied().unwrap_or(0);
        sockets(&node.holdings()) - sockets(&before)
    };
    until_true("all that are taken at once", PATIENCE, || held(&world.node) >= 10);
    assert!(held(&world.node) <= 16);
    for socket in silent {
        assert_eq!(rest(socket), [0_u8; 0]);
    }
    assert!(world.node.logs().contains("said nothing on the node socket"));
    world.node.wait_settled(&before);
    world.end();
}

/// A worker of the test's, let in and given the volume.
fn usurp(world: &World, container: &Peer) -> (Peer, Connection, Connection) {
    let supervisor = world.hello(container, Role::Supervisor).link();
    let worker = container.spawn();
    assert!(matches!(world.announce(&supervisor.0, &worker), Some(Message::Done(_))));
    let link = world.hello(&worker, Role::Worker).link();
    (worker, supervisor, link)
}

#[test]
fn a_worker_that_is_silent_answers_nonsense_or_floods_loses_its_volumes() {
    let Some(mut world) = World::new(&[]) else { return };
    let served_by_agent = |world: &mut World, supervisor: u32| {
        until_true("the volume back with the agent", PATIENCE, || {
            let status = world.node.serving();
            let parent = status.and_then(|status| {
                let stat = std::fs::read_to_string(format!("/proc/{}/status", status.pid)).ok()?;
                Some(stat.contains(&format!("PPid:\t{supervisor}\n")))
            });
            parent == Some(true)
                && world.node.status(&world.volume).is_some_and(|status| status.state == "serving")
        });
        world.is_read();
    };
    let agent = world.node.agents()[0].process.pid();

    // Silent: it is given the volume, and says nothing, not even to heartbeats.
    let container = world.node.peer(UID, Place::Container);
    let (worker, supervisor, link) = usurp(&world, &container);
    until_true("the end of the silent one", PATIENCE, || has_ended(&worker));
    served_by_agent(&mut world, agent);
    assert!(world.node.logs().contains("hung: killed"));
    drop((supervisor, link, container));

    // Nonsense: each question is answered with something else, or with bytes that are no frame.
    let container = world.node.peer(UID, Place::Container);
    let (worker, supervisor, (link, mut questions)) = usurp(&world, &container);
    let asked = world.node.block_on(async {
        let mut asked = 0;
        while let Ok(Some(question)) = tokio::time::timeout(PATIENCE, questions.recv()).await {
            asked += 1;
            question.answer(match asked % 3 {
                0 => Message::Done(Done::default()),
                1 => Message::Event(Event::default()),
                _ => Message::Unsupported(Unsupported { kind: 4 }),
            });
        }
        asked
    });
    assert!(asked > 2, "{asked} questions");
    drop(link);
    until_true("the end of the one that talks nonsense", PATIENCE, || has_ended(&worker));
    served_by_agent(&mut world, agent);
    drop((supervisor, container));

    // Asks what nobody answers yet, well behaved otherwise; then without end, and reads no answer.
    let container = world.node.peer(UID, Place::Container);
    let (worker, supervisor, (link, mut questions)) = usurp(&world, &container);
    let answering = async {
        while let Some(question) = questions.recv().await {
            let answer = match &question.message {
                Message::Stats(_) => Message::Stats(Stats::default()),
                _ => Message::Refused(Refused { code: 14, text: "not now".to_owned() }),
            };
            question.answer(answer);
        }
    };
    let asking = async {
        for round in 0..1_000 {
            for message in [
                Message::Poke(Poke::default()),
                Message::WhoIs(WhoIs::default()),
                Message::Event(Event::default()),
            ] {
                let answer = link.ask(&message, Vec::new(), Instant::now() + PATIENCE).await;
                let unsupported = matches!(answer, Ok(Message::Unsupported(Unsupported { kind })) if kind == message.kind());
                assert!(unsupported, "round {round}, message {}", message.kind());
            }
        }
    };
    world.node.block_on(async {
        tokio::select! {
            () = answering => panic!("the connection ended"),
            () = asking => {}
        }
    });
    drop((link, questions));
    worker.kill();
    served_by_agent(&mut world, agent);
    drop((supervisor, container));

    let container = world.node.peer(UID, Place::Container);
    let supervisor = world.hello(&container, Role::Supervisor).link();
    let worker = container.spawn();
    assert!(matches!(world.announce(&supervisor.0, &worker), Some(Message::Done(_))));
    let mut socket = world.connect(&worker);
    let hello = Hello { program: "peer".to_owned(), role: Role::Worker, ..Hello::default() };
    socket.write_all(&encode(0, &Message::Hello(hello), 0).unwrap()).unwrap();
    let flood =
        encode(2, &Message::Poke(Poke { files: vec!["f".repeat(1_000)], ..Poke::default() }), 0).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    // Until the shim reads no more, and ends it.
    until("the end of the flood", PATIENCE * 2, || (0..10_000).find(|_| socket.write_all(&flood).is_err()));
    until_true("the end of the one that floods", PATIENCE, || has_ended(&worker));
    served_by_agent(&mut world, agent);
    let resident = crate::leaks::resident(world.node.shim().pid());
    assert!(resident < 64 << 10, "the shim has {resident} KiB after a flood");
    world.end();
}
