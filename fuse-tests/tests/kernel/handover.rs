//! Readers while agents come, are killed, and hand over. The test plays the shim: it holds the mount and all that agents deposit.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use fuse_tests::agent::{Agent, Command};
use fuse_tests::needs;
use fuse_tests::readers::Readers;
use fuse_tests::shim::{Handover, Held, Shim, Worker};
use fuse_tests::stamp::{Content, check, stamp};
use fuse_tests::wait::{SOON, pause, until_true};

use super::AGENT;

const READERS: usize = 8;
const KILLS: u32 = 20;

/// Readers of one file.
fn crowd(held: &Held) -> Readers {
    Readers::start((0..READERS).map(|_| held.mounted.join("a")))
}

/// Reads in all, and those that were aborted: no other fails.
fn finish(readers: Readers, newest: u32) -> (u64, u64) {
    let mut seen = readers.report("agents of a test");
    assert!(seen.version <= newest);
    let aborted = seen.failed.remove(&libc::ECONNABORTED).unwrap_or(0);
    assert!(seen.failed.is_empty(), "{seen:?}");
    (seen.reads, aborted)
}

fn content(version: u32) -> Vec<Content> {
    vec![Content::Stamped { version, length: 20_000 + version as usize }]
}

fn install(worker: &mut Worker, held: &Held, version: u32) {
    let path = held.mounted.path().to_owned();
    worker.agent.ask(&Command::Install { path, contents: content(version) }).unwrap();
}

fn begin(handover: Handover) -> (Shim, Worker, Held) {
    let shim = Shim::new(handover);
    let mut worker = shim.worker(AGENT);
    let held = shim.lend(&mut worker, &["a".into()], &content(1));
    (shim, worker, held)
}

/// Kills one agent after the other amid reads. Returns reads in all, and those that were aborted.
fn kill_again_and_again(handover: Handover) -> (u64, u64) {
    let (shim, mut worker, held) = begin(handover);
    let readers = crowd(&held);
    for round in 1..=KILLS {
        readers.go_on();
        install(&mut worker, &held, round + 1);
        let next = shim.worker(AGENT);
        // At another moment of the switch each time.
        pause(Duration::from_millis(u64::from(round % 7)));
        worker.agent.kill();
        shim.adopt(&next, &held);
        worker = next;
    }
    readers.go_on();
    let (reads, aborted) = finish(readers, KILLS + 1);
    until_true("the newest", SOON, || check(&held.mounted.read("a")) == Ok(KILLS + 1));
    held.mounted.unmount();
    (reads, aborted)
}

#[test]
fn no_read_fails_when_agents_are_killed_and_requests_are_sent_again() {
    if !needs::kernel() {
        return;
    }
    let (reads, aborted) = kill_again_and_again(Handover::Resend);
    assert_eq!(aborted, 0, "of {reads} reads");
}

#[test]
fn a_killed_agent_fails_the_requests_that_it_had_read_and_no_other_where_none_is_sent_again() {
    if !needs::kernel() {
        return;
    }
    let (reads, aborted) = kill_again_and_again(Handover::Clone);
    // A reader waits for one request at a time.
    assert!(aborted <= u64::from(KILLS) * READERS as u64, "{aborted} of {reads} reads");
}

fn hand_over_again_and_again(handover: Handover) {
    let (shim, mut worker, held) = begin(handover);
    let readers = crowd(&held);
    let mut other = shim.worker(AGENT);
    for round in 1..=KILLS {
        readers.go_on();
        install(&mut worker, &held, round + 1);
        shim.drain(&worker, &held);
        shim.adopt(&other, &held);
        std::mem::swap(&mut worker, &mut other);
    }
    readers.go_on();
    let (reads, aborted) = finish(readers, KILLS + 1);
    assert_eq!(aborted, 0, "of {reads} reads");
    held.mounted.unmount();
}

#[test]
fn no_read_fails_in_a_planned_handover_with_requests_sent_again() {
    if needs::kernel() {
        hand_over_again_and_again(Handover::Resend);
    }
}

#[test]
fn no_read_fails_in_a_planned_handover_with_clones() {
    if needs::kernel() {
        hand_over_again_and_again(Handover::Clone);
    }
}

fn generations(agent: &mut Agent, held: &Held) -> Vec<u32> {
    agent.generations(&held.mounted)
}

#[test]
fn an_open_file_keeps_its_version_across_agents_and_lets_it_go_when_it_is_closed() {
    if !needs::kernel() {
        return;
    }
    let (shim, mut worker, held) = begin(Handover::Resend);
    let mut file = File::open(held.mounted.join("a")).unwrap();
    let mut start = vec![0; 1_000];
    file.read_exact(&mut start).unwrap();
    for version in 2..=5 {
        let next = shim.worker(AGENT);
        worker.agent.kill();
        shim.adopt(&next, &held);
        worker = next;
        install(&mut worker, &held, version);
        until_true("the new version", SOON, || check(&held.mounted.read("a")) == Ok(version));
    }
    let expected = stamp(1, 20_001);
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).unwrap();
    assert!(start == expected[..1_000] && rest == expected[1_000..]);
    assert_eq!(file.read_at(&mut start, 19_500).unwrap(), 501);
    assert_eq!(generations(&mut worker.agent, &held), [1, 4, 5]);
    drop(file);
    until_true("the release", SOON, || generations(&mut worker.agent, &held) == [4, 5]);
    held.mounted.unmount();
}

#[test]
fn size_and_bytes_agree_right_after_an_adoption() {
    if !needs::kernel() {
        return;
    }
    let (shim, mut worker, held) = begin(Handover::Resend);
    for version in 2..=8 {
        // The kernel learns the size, which the next agent must take back from it.
        assert!(std::fs::metadata(held.mounted.join("a")).unwrap().len() > 20_000);
        install(&mut worker, &held, version);
        let next = shim.worker(AGENT);
        worker.agent.kill();
        shim.adopt(&next, &held);
        worker = next;
        until_true("the new version", SOON, || {
            let mut file = File::open(held.mounted.join("a")).unwrap();
            let size = file.metadata().unwrap().len();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, size);
            check(&bytes) == Ok(version)
        });
    }
    held.mounted.unmount();
}
