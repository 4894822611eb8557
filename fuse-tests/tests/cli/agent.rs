use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};

use fuse_secrets_csi::wire::link::{End, Link};
use fuse_secrets_csi::wire::message::{
    AgentStatus, Done, Handover, Hello, Message, Refused, Role, VolumeStatus, Volumes,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::process::{PATIENCE, Process, run, until};
use crate::world::{DAEMON, World};

const SOCKET: &str = "/tmp/node/shim.sock";

/// What the scripted shim heard.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Hello(Role),
    Worker(u32),
    Abort(String),
}

/// A shim that lets everybody in and keeps nothing. Ends with the test's process.
fn shim() -> Receiver<Heard> {
    let directory = Path::new(SOCKET).parent().unwrap();
    std::fs::create_dir_all(directory).unwrap();
    let listener = UnixListener::bind(SOCKET).unwrap();
    std::os::unix::fs::chown(SOCKET, Some(DAEMON), None).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (tell, heard) = channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                let (link, asked) = Link::start(socket, End::Accepted);
                tokio::spawn(answer(link, asked, tell.clone()));
            }
        });
    });
    heard
}

async fn answer(
    _link: Link,
    mut asked: tokio::sync::mpsc::Receiver<fuse_secrets_csi::wire::link::Asked>,
    tell: Sender<Heard>,
) {
    while let Some(asked) = asked.recv().await {
        let (heard, answer) = match &asked.message {
            Message::Hello(hello) => {
                let handover = Handover::Clone;
                let shim = Hello { role: Role::Shim, handover, agent: 1, program: "scripted".to_owned() };
                (Heard::Hello(hello.role), Message::Hello(shim))
            }
            Message::Worker(_) => (Heard::Worker(pid(&asked.descriptors[0])), Message::Done(Done::default())),
            Message::Volumes(_) => {
                let volume = VolumeStatus {
                    volume: "csi-1".to_owned(),
                    pod: "app/web-0".to_owned(),
                    state: "serving".to_owned(),
                    ..VolumeStatus::default()
                };
                let agent = AgentStatus {
                    agent: 1,
                    state: "killed by signal 9".to_owned(),
                    since: "2026-01-01T00:00:00Z".to_owned(),
                    ..AgentStatus::default()
                };
                let kept = Volumes { volumes: vec![volume], agents: vec![agent] };
                asked.answer(Message::Volumes(kept));
                continue;
            }
            Message::Abort(abort) if abort.volume == "csi-1" => {
                (Heard::Abort(abort.volume.clone()), Message::Done(Done::default()))
            }
            Message::Abort(_) => {
                let refused = Refused { code: 5, text: "there is no such volume".to_owned() };
                asked.answer(Message::Refused(refused));
                continue;
            }
            _ => continue,
        };
        asked.answer(answer);
        let _ = tell.send(heard);
    }
}

/// The process that a pidfd is of.
fn pid(pidfd: &OwnedFd) -> u32 {
    use std::os::fd::AsRawFd as _;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
    info.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap().trim().parse().unwrap()
}

/// An agent of an ordinary user, with its health port at this number.
fn agent(world: &World, port: u16) -> Command {
    std::fs::create_dir_all("/tmp/classes").unwrap();
    let mut command = world.program_as(DAEMON);
    command.args(["agent", "--classes", "/tmp/classes", "--node-socket", SOCKET]);
    command.args(["--health-address", &format!("127.0.0.1:{port}")]);
    command
}

/// What the health port answers: status and body.
fn ask(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// A port that nobody listens on now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn without_a_shim_it_says_so_once_is_healthy_and_not_ready_and_ends_at_sigterm() {
    let Some(world) = World::new() else { return };
    let port = free_port();
    let mut agent = Process::start(&mut agent(&world, port));
    agent.logs("no shim answers");
    until("it is healthy", || ask(port, "/healthz").is_some_and(|(status, _)| status == 200));
    let (status, why) = ask(port, "/readyz").unwrap();
    assert_eq!(status, 503, "{why}");
    let (status, metrics) = ask(port, "/metrics").unwrap();
    assert_eq!(status, 200);
    assert!(metrics.contains("\nfuse_secrets_node_attached 0\n"), "{metrics}");
    assert!(metrics.contains("\nfuse_secrets_node_refusals_total{code=\"not_found\"} 0\n"), "{metrics}");
    assert_eq!(metrics.matches("# TYPE fuse_secrets_node_refusals_total counter").count(), 1);
    let ended = agent.end_by(Signal::TERM);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(ended.err.matches("no shim answers").count(), 1, "{}", ended.err);
    assert!(ended.err.contains("every capability is dropped"), "{}", ended.err);
}

#[test]
fn a_worker_that_is_killed_is_followed_by_another_and_sigterm_ends_both_processes() {
    let Some(world) = World::new() else { return };
    let port = free_port();
    let heard = shim();
    let next = || heard.recv_timeout(PATIENCE).unwrap();
    let agent = Process::start(&mut agent(&world, port));
    assert_eq!(next(), Heard::Hello(Role::Supervisor));
    let mut workers = Vec::new();
    for _ in 0..3 {
        let Heard::Worker(worker) = next() else { panic!("no worker") };
        assert_eq!(next(), Heard::Hello(Role::Worker));
        until("it is ready", || ask(port, "/readyz").is_some_and(|(status, _)| status == 200));
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
        for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            let line = status.lines().find(|line| line.starts_with(set)).unwrap();
            assert!(line.ends_with("\t0000000000000000"), "{line}");
        }
        workers.push(worker);
        if workers.len() < 3 {
            kill_process(Pid::from_raw(worker.cast_signed()).unwrap(), Signal::KILL).unwrap();
        }
    }
    let supervisor = agent.id();
    let ended = agent.end_by(Signal::TERM);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(ended.err.matches("killed by signal 9").count(), 2, "{}", ended.err);
    assert!(!workers.iter().any(|worker| is_there(*worker)) && !is_there(supervisor));
}

#[test]
fn root_sees_the_agent_of_a_node_without_any_setting() {
    let Some(world) = World::new() else { return };
    let _heard = shim();
    // As a service has it: no session, no runtime directory.
    let mut command = agent(&world, free_port());
    let _agent = Process::start(command.env_remove("XDG_RUNTIME_DIR"));
    let name = "fuse_secrets_node_attached{agent=";
    until("root sees it", || run(world.program().args(["mounts", "--metrics"])).out.contains(name));
    let other = run(world.program_as(crate::world::NOBODY).args(["mounts", "--metrics"]));
    assert!(!other.out.contains(name), "{}", other.out);
}

#[test]
fn a_supervisor_that_is_killed_takes_its_worker_along() {
    let Some(world) = World::new() else { return };
    let heard = shim();
    let next = || heard.recv_timeout(PATIENCE).unwrap();
    let agent = Process::start(&mut agent(&world, free_port()));
    assert_eq!(next(), Heard::Hello(Role::Supervisor));
    let Heard::Worker(worker) = next() else { panic!("no worker") };
    assert_eq!(next(), Heard::Hello(Role::Worker));
    agent.end_by(Signal::KILL);
    until("the worker is gone", || {
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    });
}

#[test]
fn what_cannot_become_good_by_a_restart_ends_it_with_a_code_that_says_so() {
    let Some(world) = World::new() else { return };
    std::fs::create_dir("/tmp/classes").unwrap();
    for (arguments, code, text) in [
        (&["--classes", "/tmp/classes"][..], 64, "runs as root"),
        (&["--allow-root"], 64, "no API server is known"),
        (&["--classes", "/tmp/none", "--allow-root"], 66, "cannot read /tmp/none"),
        (&["--classes", "/tmp/classes", "--config", "/tmp/none"], 66, "cannot read /tmp/none"),
        (
            &["--classes", "/tmp/classes", "--health-address", "nowhere"],
            64,
            "--health-address: is not an address",
        ),
        (&["--classes", "/tmp/classes", "--publish-deadline", "20"], 64, "has no unit"),
        (&["--classes", "/tmp/classes", "--unknown-attributes", "x"], 64, "reject or ignore"),
        (&["--classes", "/tmp/classes", "--auth-method", "token"], 64, "choose kubernetes or jwt"),
        (&["--token-file", "x"], 64, "--token-file"),
    ] {
        let ended = run(world.program().arg("agent").args(arguments));
        assert_eq!(ended.code, code, "{arguments:?}: {}", ended.err);
        assert!(ended.err.contains(text), "{arguments:?}: {}", ended.err);
    }
    let foreign =
        run(world.program().env("FUSE_SECRETS_TOKEN_FILE", "x").args(["agent", "--classes", "/tmp/classes"]));
    assert_eq!(foreign.code, 64);
    assert!(foreign.err.contains("FUSE_SECRETS_TOKEN_FILE: is no setting of an agent"), "{}", foreign.err);
}

#[test]
fn a_worker_with_too_little_memory_to_lock_ends_the_agent_with_75_and_names_the_limit() {
    let Some(world) = World::new() else { return };
    let _heard = shim();
    std::fs::create_dir("/tmp/classes").unwrap();
    let mut command = world.command_as(DAEMON, "prlimit");
    command.args(["--memlock=65536:65536", "fuse-secrets", "agent", "--classes", "/tmp/classes"]);
    let ended = run(command.args(["--node-socket", SOCKET, "--health-address", "none"]));
    assert_eq!(ended.code, 75, "{}", ended.err);
    assert!(ended.err.contains("RLIMIT_MEMLOCK"), "{}", ended.err);
}

#[test]
fn root_sees_what_the_shim_keeps_and_ends_a_volume() {
    let Some(world) = World::new() else { return };
    let absent = run(world.program().args(["mounts", "--from-shim"]));
    assert_eq!(absent.code, 1);
    assert!(absent.err.contains("no shim answers at /run/fuse-secrets/node/shim.sock"), "{}", absent.err);
    let heard = shim();
    let shim = ["--node-socket", SOCKET];
    let table = run(world.program().args(["mounts", "--from-shim"]).args(shim));
    assert_eq!(table.code, 0, "{}", table.err);
    for text in ["csi-1", "app/web-0", "serving", "killed by signal 9"] {
        assert!(table.out.contains(text), "{text} is missing: {}", table.out);
    }
    let json = run(world.program().args(["mounts", "--from-shim", "-o", "json"]).args(shim));
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value["volumes"][0]["volume"], "csi-1");
    let unknown = run(world.program().args(["abort", "csi-2"]).args(shim));
    assert_eq!(unknown.code, 1);
    assert!(unknown.err.contains("the shim refused: there is no such volume"), "{}", unknown.err);
    assert_eq!(run(world.program().args(["abort", "csi-1"]).args(shim)).code, 0);
    assert!(heard.iter().any(|heard| heard == Heard::Abort("csi-1".to_owned())));
    let other = run(world.program_as(crate::world::NOBODY).args(["abort", "csi-1"]).args(shim));
    assert_eq!(other.code, 1);
    assert!(other.err.contains("this user may not ask the shim"), "{}", other.err);
}
