//! Stores and agents that stay away, and states that are broken.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::message::AgentStatus;
use fuse_tests::node::kill;
use fuse_tests::sys::{Map, spoil};
use fuse_tests::wait::until;
use rustix::mm::MapFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};

use crate::stage::{PATIENCE, Stage, assert_unharmed};

const RESEND: [&str; 2] = ["--handover", "resend"];

/// `cat` of this file.
fn cat(file: impl Into<Stdio>) -> Child {
    Command::new("cat").stdin(file).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The code with which it ends, and what it complains of.
fn end(mut cat: Child) -> (Option<i32>, String) {
    let status = until("the end of a reader", PATIENCE, || cat.try_wait().unwrap());
    let mut complaint = String::new();
    cat.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    (status.code(), complaint)
}

#[test]
fn without_an_agent_readers_get_an_error_after_a_time_volumes_go_and_an_agent_that_comes_serves_again() {
    let Some(mut stage) = Stage::new(&["--gap-deadline", "2s"], 2, "1h") else { return };
    let agent = stage.settled();
    let open = || File::open(stage.volumes[0].join("value")).unwrap();
    let (file, other) = (open(), open());
    stage.node.agents().remove(0).process.kill();
    let (reader, mut killed) = (cat(file), cat(other));
    // One that is killed while it waits.
    killed.kill().unwrap();
    let (code, complaint) = end(reader);
    assert!(code == Some(1) && complaint.contains("Input/output error"), "{code:?} {complaint}");
    assert_eq!(end(killed).0, None);
    assert_eq!(stage.versions(), [Err(libc::EIO); 2]);
    assert!(stage.node.observe().0.iter().all(|volume| volume.state == "failing"));
    let gone = stage.volumes.pop().unwrap();
    stage.node.unpublish(&gone).unwrap();
    assert_eq!(stage.node.holdings().mounts, 1);
    stage.node.start_agent(&[]);
    stage.succeeded(&agent);
    assert_eq!(stage.versions(), [Ok(1)]);
    stage.node.unpublish(&stage.volumes[0]).unwrap();
    assert_eq!((stage.node.holdings().mounts, stage.node.holdings().targets.len()), (0, 0));
}

#[test]
fn what_was_served_last_is_served_after_a_kill_without_a_store_and_an_open_file_keeps_its_version() {
    let Some(mut stage) = Stage::new(&RESEND, 4, "1s") else { return };
    let mut agent = stage.settled();
    let mut file = File::open(stage.volumes[0].join("value")).unwrap();
    let mut first = vec![0; 1_000];
    file.read_exact(&mut first).unwrap();
    let readers = stage.readers();
    readers.go_on();
    stage.put(2);
    // Seen by a reader, so it is deposited.
    stage.wait_version(2);
    kill(agent.pid, Signal::KILL);
    stage.node.cluster.store.stop();
    agent = stage.succeeded(&agent);
    assert_eq!(stage.versions(), [Ok(2); 4]);
    kill(agent.pid, Signal::KILL);
    stage.succeeded(&agent);
    assert_eq!(stage.versions(), [Ok(2); 4]);
    readers.go_on();
    assert_unharmed(&readers.report("workers killed without a store, resend"));
    file.read_to_end(&mut first).unwrap();
    assert_eq!(fuse_tests::stamp::check(&first), Ok(1), "an open file");
    // And when the store is back, life goes on.
    stage.node.cluster.store.resume();
    stage.node.cluster.introduce();
    stage.put(3);
    stage.wait_version(3);
}

/// The next agent after this one, stopped amid its adoptions: some are finished or not begun, some not finished.
fn amid_adoptions(stage: &Stage, mut former: AgentStatus) -> AgentStatus {
    until("an agent amid its adoptions", PATIENCE, || {
        let now = stage.node.serving().filter(|now| now.agent != former.agent)?;
        kill(now.pid, Signal::STOP);
        let (volumes, _) = stage.node.observe();
        let adopting = |volume: &fuse_secrets_csi::wire::message::VolumeStatus| {
            volume.state == "handing_over" && volume.agent == now.agent
        };
        if volumes.iter().any(adopting) {
            return Some(now);
        }
        // Too late: the next one.
        kill(now.pid, Signal::KILL);
        former = now;
        None
    })
}

#[test]
fn a_worker_killed_amid_its_adoptions_costs_no_value_though_the_store_is_down() {
    let Some(mut stage) = Stage::new(&RESEND, 24, "1h") else { return };
    let agent = stage.settled();
    stage.node.cluster.store.stop();
    let readers = stage.readers();
    readers.go_on();
    kill(agent.pid, Signal::KILL);
    let adopting = amid_adoptions(&stage, agent);
    kill(adopting.pid, Signal::KILL);
    stage.succeeded(&adopting);
    readers.go_on();
    assert_eq!(stage.versions(), vec![Ok(1); 24]);
    assert_unharmed(&readers.report("a worker killed amid its adoptions without a store, resend"));
}

#[test]
fn workers_killed_as_fast_as_they_attach_cost_no_volume() {
    let Some(stage) = Stage::new(&RESEND, 24, "1h") else { return };
    let mut last = stage.settled();
    kill(last.pid, Signal::KILL);
    let (end, mut killed) = (Instant::now() + Duration::from_secs(2), 1);
    while Instant::now() < end {
        last = until("the next", PATIENCE, || stage.node.serving().filter(|now| now.agent != last.agent));
        kill(last.pid, Signal::KILL);
        killed += 1;
    }
    assert!(killed > 3, "only {killed} killed");
    stage.succeeded(&last);
    stage.wait_version(1);
    assert_eq!(stage.node.holdings().mounts, 24);
}

/// The generations that the shim keeps, as memory files.
fn deposited(shim: u32) -> Vec<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(shim).unwrap()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut generations = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{shim}/fd")).unwrap() {
        let entry = entry.unwrap();
        let Ok(link) = std::fs::read_link(entry.path()) else { continue };
        let link = link.to_string_lossy().into_owned();
        if !(link.contains("secretmem") || link.contains("memfd:")) {
            continue;
        }
        let number = entry.file_name().to_str().unwrap().parse().unwrap();
        let file = pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty()).unwrap();
        let file = File::from(file);
        if Map::new(&file, 8, MapFlags::SHARED).unwrap().to_vec() == b"fusesec\0" {
            generations.push(file.into());
        }
    }
    generations
}

#[test]
fn a_worker_that_finds_broken_generations_fetches_again_and_loses_no_mount() {
    let Some(mut stage) = Stage::new(&RESEND, 3, "1h") else { return };
    let agent = stage.settled();
    let before: Vec<u32> = stage.node.observe().0.iter().map(|volume| volume.generation).collect();
    let mounts = stage.node.holdings().mounts;
    // Nobody replaces the worker while its heritage is spoilt.
    let supervisor = stage.node.agents()[0].process.pid();
    kill(supervisor, Signal::STOP);
    kill(agent.pid, Signal::KILL);
    until("its end", PATIENCE, || stage.node.serving().is_none().then_some(()));
    let generations = deposited(stage.node.shim().pid());
    assert_eq!(generations.len(), 3);
    generations.iter().for_each(|generation| spoil(generation.as_fd()).unwrap());
    kill(supervisor, Signal::CONT);
    stage.succeeded(&agent);
    stage.wait_version(1);
    let after: Vec<u32> = stage.node.observe().0.iter().map(|volume| volume.generation).collect();
    assert!(before.iter().zip(&after).all(|(before, after)| after > before), "{before:?} {after:?}");
    assert_eq!(stage.node.holdings().mounts, mounts);
    // And what was fetched survives the next.
    let agent = stage.settled();
    stage.node.cluster.store.stop();
    kill(agent.pid, Signal::KILL);
    stage.succeeded(&agent);
    assert_eq!(stage.versions(), [Ok(1); 3]);
}
