//! `cargo xtask demo crash`: a reader prints a secret once a second, while one process after the other below it is killed.
//!
//! Everything is real: the shim and the agent as they run on a node, an embedded store, kubelet's calls. Only the cluster is
//! missing. A second reader, which prints nothing, reads a thousand times a second, so that no pause is missed.

// It is there to be watched.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fuse_tests::needs;
use fuse_tests::node::Node;
use fuse_tests::report::Error;
use fuse_tests::wait::{SOON, pause, until};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
/// Between two events: a few lines of the reader.
const EVENTS: Duration = Duration::from_millis(2500);
/// How soon the end of the time is noticed.
const GLANCE: Duration = Duration::from_millis(50);

/// The time is over, or somebody pressed Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    if !needs::kernel() {
        eprintln!("demo: it mounts a file system: run it as root, on a machine with /dev/fuse");
        return ExitCode::FAILURE;
    }
    let seconds = std::env::args().nth(1).and_then(|seconds| seconds.parse().ok()).unwrap_or(30);
    match demo(Duration::from_secs(seconds)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns how many reads failed.
fn demo(length: Duration) -> Result<u64, Error> {
    let sibling = std::env::current_exe()?;
    let mut node = Node::new(sibling.to_str().ok_or("a path that is no text")?);
    node.log = "error";
    stop_on_signals(&node)?;
    node.start_shim(&[]);
    node.start_agent(&[]);
    node.cluster.class(
        "app",
        &[("db-password", "secret/data/app", Some("password"))],
        // No read waits for the store: it is stopped now and then.
        &[("refreshInterval", "1s"), ("maxAge", "1h")],
    );
    let mut stage = Stage { node, start: Instant::now(), version: 0, killed: 0 };
    stage.rotate();
    let volume = stage.node.volume("web-0", "app");
    stage.node.publish(&volume)?;
    let path = volume.join("db-password");
    println!("\nA pod's secret, served by an agent, whose mount a shim keeps:\n\n  {}\n", path.display());
    println!("It is read once a second, and everything that serves it is killed. Ctrl-C ends this.\n");
    let (shown, quick) = (Reader::default(), Reader::default());
    let start = stage.start;
    std::thread::scope(|scope| {
        scope.spawn(|| shown.read(&path, SECOND, |line| say(start, &line)));
        scope.spawn(|| quick.read(&path, MILLISECOND, drop));
        stage.play(length);
        STOP.store(true, Ordering::Release);
    });
    let failed = shown.count(&shown.failed) + quick.count(&quick.failed);
    println!(
        "\n{} processes killed. {} reads, {failed} failed, the longest took {:.1} ms.",
        stage.killed,
        shown.count(&shown.reads) + quick.count(&quick.reads),
        shown.count(&shown.longest).max(quick.count(&quick.longest)) as f64 / 1e6,
    );
    stage.node.unpublish(&volume)?;
    Ok(failed)
}

/// What happens, and to whom.
struct Stage {
    node: Node,
    start: Instant,
    version: u32,
    killed: u32,
}

impl Stage {
    /// One event after the other, from the first again after the last, until the time is over.
    fn play(&mut self, length: Duration) {
        let events = [
            Self::kill_worker,
            Self::rotate,
            Self::hand_over,
            Self::kill_shim,
            Self::stop_store,
            Self::kill_worker,
            Self::start_store,
            Self::kill_supervisor,
        ];
        for event in events.iter().cycle() {
            let next = Instant::now() + EVENTS;
            while Instant::now() < next {
                if STOP.load(Ordering::Acquire) || self.start.elapsed() >= length {
                    return;
                }
                pause(GLANCE);
            }
            event(self);
        }
    }

    fn kill_worker(&mut self) {
        let (before, after) = self.node.kill_worker();
        self.killed += 1;
        self.tell(&format!("worker {} killed (SIGKILL); its supervisor started {}", before.pid, after.pid));
    }

    fn kill_supervisor(&mut self) {
        let mut agent = self.node.agents().remove(0);
        let pid = agent.process.pid();
        agent.process.kill();
        // It takes its worker along.
        self.killed += 2;
        // As kubelet does.
        self.node.start_agent(&[]);
        let after = self.node.wait_served();
        self.tell(&format!(
            "supervisor {pid} and its worker killed; a new agent serves, worker {}",
            after.pid
        ));
    }

    fn hand_over(&mut self) {
        let before = self.node.wait_served();
        self.node.start_agent(&[]);
        let after =
            until("the second agent", SOON, || self.node.serving().filter(|now| now.agent != before.agent));
        self.node.agents().remove(0).process.stop();
        self.tell(&format!(
            "a second agent was started: worker {} took over from {}, which has left",
            after.pid, before.pid
        ));
    }

    fn kill_shim(&mut self) {
        let pid = self.node.shim().pid();
        self.node.restart_shim(&[]);
        self.killed += 1;
        let after = self.node.shim().pid();
        self.tell(&format!(
            "shim {pid} killed (SIGKILL); {after} runs, and agents give everything back to it"
        ));
        self.node.wait_served();
    }

    fn stop_store(&mut self) {
        self.node.cluster.store.stop();
        self.tell("the store is stopped");
    }

    fn start_store(&mut self) {
        self.node.cluster.store.resume();
        self.node.cluster.introduce();
        self.rotate();
        self.tell("the store is back");
    }

    fn rotate(&mut self) {
        self.version += 1;
        let value = format!("hunter-{}", self.version);
        self.node.cluster.store.put("app", &json!({ "password": value }));
        if self.version > 1 {
            self.tell(&format!("the secret was rotated to \"{value}\""));
        }
    }

    fn tell(&self, event: &str) {
        say(self.start, &format!("     ── {event}"));
    }
}

/// Reads, again and again.
#[derive(Default)]
struct Reader {
    reads: AtomicU64,
    failed: AtomicU64,
    /// Nanoseconds.
    longest: AtomicU64,
}

impl Reader {
    fn read(&self, path: &Path, pace: Duration, tell: impl Fn(String)) {
        let mut next = Instant::now();
        while !STOP.load(Ordering::Acquire) {
            let start = Instant::now();
            let read = std::fs::read_to_string(path);
            let took = start.elapsed();
            self.reads.fetch_add(1, Ordering::AcqRel);
            self.longest.fetch_max(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::AcqRel);
            match read {
                Ok(value) => tell(format!("{value}   in {:.2} ms", took.as_secs_f64() * 1e3)),
                Err(error) => {
                    self.failed.fetch_add(1, Ordering::AcqRel);
                    println!("           a read failed: {error}");
                }
            }
            next += pace;
            while Instant::now() < next && !STOP.load(Ordering::Acquire) {
                pause(next.saturating_duration_since(Instant::now()).min(GLANCE));
            }
        }
    }

    fn count(&self, counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Acquire)
    }
}

/// Ends in order at Ctrl-C and when the terminal closes, so that nothing stays mounted. The node's processes share the terminal,
/// and leave then by themselves.
fn stop_on_signals(node: &Node) -> Result<(), Error> {
    let mut signals = node.block_on(async {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        kinds.into_iter().map(signal).collect::<Result<Vec<_>, _>>()
    })?;
    node.spawn(async move {
        let [interrupt, terminate, hangup] = signals.as_mut_slice() else { return };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        STOP.store(true, Ordering::Release);
    });
    Ok(())
}

fn say(start: Instant, line: &str) {
    println!("{:6.1} s   {line}", start.elapsed().as_secs_f64());
}
