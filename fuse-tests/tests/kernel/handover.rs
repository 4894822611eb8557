//! Readers while agents come, are killed, and hand over. The test plays the shim: it holds the mount and all that agents deposit.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use fuse_tests::agent::{Agent, Command};
use fuse_tests::needs;
use fuse_tests::shim::{Handover, Held, Shim, Worker};
use fuse_tests::stamp::{Content, check, stamp};
use fuse_tests::wait::{SOON, pause, until_true};

use super::AGENT;

const READERS: usize = 8;
const KILLS: u32 = 20;

/// What all readers saw.
#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    reads: AtomicU64,
    aborted: AtomicU64,
}

/// Readers of one file: each value whole, none older than one seen before, no error but ECONNABORTED, which is counted.
struct Crowd {
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<Result<u32, String>>>,
}

impl Crowd {
    fn new(held: &Held) -> Self {
        let seen = Arc::<Seen>::default();
        let path = held.mounted.join("a");
        let start = |_| {
            let (path, seen) = (path.clone(), Arc::clone(&seen));
            std::thread::spawn(move || read(&path, &seen))
        };
        let threads = (0..READERS).map(start).collect();
        Self { seen, threads }
    }

    fn reads(&self) -> u64 {
        self.seen.reads.load(Ordering::Relaxed)
    }

    /// All readers get on: each of them read something since.
    fn goes_on(&self) {
        let before = self.reads();
        until_true("reads", SOON, || self.reads() > before + 3 * READERS as u64);
    }

    /// Reads in all, and those that were aborted.
    fn finish(self, newest: u32) -> (u64, u64) {
        self.seen.stop.store(true, Ordering::Release);
        for thread in self.threads {
            assert!(thread.join().unwrap().unwrap() <= newest);
        }
        (self.seen.reads.load(Ordering::Relaxed), self.seen.aborted.load(Ordering::Relaxed))
    }
}

fn read(path: &PathBuf, seen: &Seen) -> Result<u32, String> {
    let mut newest = 0;
    while !seen.stop.load(Ordering::Acquire) {
        let value = match std::fs::read(path) {
            Ok(value) => value,
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {
                seen.aborted.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(error) => return Err(error.to_string()),
        };
        let version = check(&value)?;
        if version < newest {
            return Err(format!("{version} after {newest}"));
        }
        newest = version;
        seen.reads.fetch_add(1, Ordering::Relaxed);
    }
    Ok(newest)
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
    let crowd = Crowd::new(&held);
    for round in 1..=KILLS {
        crowd.goes_on();
        install(&mut worker, &held, round + 1);
        let next = shim.worker(AGENT);
        // At another moment of the switch each time.
        pause(Duration::from_millis(u64::from(round % 7)));
        worker.agent.kill();
        shim.adopt(&next, &held);
        worker = next;
    }
    crowd.goes_on();
    let (reads, aborted) = crowd.finish(KILLS + 1);
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
    let crowd = Crowd::new(&held);
    let mut other = shim.worker(AGENT);
    for round in 1..=KILLS {
        crowd.goes_on();
        install(&mut worker, &held, round + 1);
        shim.drain(&worker, &held);
        shim.adopt(&other, &held);
        std::mem::swap(&mut worker, &mut other);
    }
    crowd.goes_on();
    let (reads, aborted) = crowd.finish(KILLS + 1);
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
