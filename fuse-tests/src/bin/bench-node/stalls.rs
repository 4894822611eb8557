//! What readers notice of agents that come and go: the longest that one of their reads took.
//!
//! Eight readers open, read and close a file of a volume each, a thousand times a second; so none of them misses a pause
//! of some milliseconds. Another one goes once through all volumes from the moment of the kill on: it is done when the last volume is
//! served again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuse_tests::node::{Node, Volume, kill};
use fuse_tests::report::{Error, Row, Section, Series};
use fuse_tests::wait::{SOON, pause, until, until_true};
use rustix::process::Signal;

use crate::{BUSY, Plan, THREE, fill, first, node, timed};

const READERS: usize = 8;
const PACE: Duration = Duration::from_millis(1);
/// A worker that lives shorter is followed by a pause: what is measured is the first death.
const LIVES: Duration = Duration::from_millis(1300);

pub(crate) fn measure(plan: &Plan) -> Result<Section, Error> {
    let mut node = node()?;
    let mut volumes = Vec::new();
    fill(&node, &mut volumes, BUSY)?;
    let watch = Watch::start(&volumes);
    let mut rows = kills(plan, &node, &volumes, &watch)?;
    rows.extend(hand_overs(plan, &mut node, &watch)?);
    let failed = watch.finish()?;
    rows.push(Row::counted("reads that failed or were wrong during all of these", "0", failed, 0));
    Ok(rows)
}

fn kills(plan: &Plan, node: &Node, volumes: &[Volume], watch: &Watch) -> Result<Vec<Row>, Error> {
    let mut longest = Series::new("8 readers");
    let mut last = Series::new("until all volumes are served");
    for _ in 0..plan.kills {
        pause(LIVES);
        let before = node.wait_served();
        watch.longest();
        let start = Instant::now();
        kill(before.pid, Signal::KILL);
        volumes.iter().try_for_each(|volume| first(volume, THREE[1]))?;
        last.times.push(start.elapsed().as_secs_f64() * 1e9);
        watch.settle();
        longest.times.push(watch.longest().as_secs_f64() * 1e9);
    }
    let (found, most) = (longest.median(), Duration::from_millis(50));
    Ok(vec![timed(
        "longest wait of a reader, worker killed, 110 volumes",
        "median <= 50 ms",
        found,
        most,
        vec![longest, last],
    )])
}

fn hand_overs(plan: &Plan, node: &mut Node, watch: &Watch) -> Result<Vec<Row>, Error> {
    let mut longest = Series::new("8 readers");
    for _ in 0..plan.hand_overs {
        pause(LIVES);
        let before = node.wait_served();
        watch.longest();
        node.start_agent(&[]);
        until("the next agent", SOON, || node.serving().filter(|now| now.agent != before.agent));
        until_true("all volumes at the next agent", SOON, || {
            let (volumes, _) = node.observe();
            volumes.iter().all(|volume| volume.state == "serving" && volume.agent != before.agent)
        });
        watch.settle();
        longest.times.push(watch.longest().as_secs_f64() * 1e9);
        node.agents().remove(0).process.stop();
    }
    let (found, most) = (longest.longest(), Duration::from_millis(10));
    Ok(vec![timed(
        "longest wait of a reader, planned hand-over, 110 volumes",
        "<= 10 ms, each time",
        found,
        most,
        vec![longest],
    )])
}

/// The readers.
struct Watch {
    stop: Arc<AtomicBool>,
    readers: Vec<(Arc<Seen>, JoinHandle<()>)>,
}

/// What one of them saw.
#[derive(Default)]
struct Seen {
    /// Nanoseconds of the longest read since it was last asked for.
    longest: AtomicU64,
    reads: AtomicU64,
    failed: AtomicU64,
}

impl Watch {
    /// On volumes that lie evenly among these.
    fn start(volumes: &[Volume]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let watched = volumes.iter().step_by(volumes.len().div_ceil(READERS)).cloned();
        let start = |volume: Volume| {
            let (stop, seen) = (Arc::clone(&stop), Arc::new(Seen::default()));
            let kept = Arc::clone(&seen);
            (kept, std::thread::spawn(move || seen.watch(&volume, &stop)))
        };
        let readers = watched.map(start).collect();
        Self { stop, readers }
    }

    /// Waits until each has begun and ended a read.
    fn settle(&self) {
        for (seen, _) in &self.readers {
            let before = seen.reads.load(Ordering::Acquire);
            until_true("readers that go on", SOON, || seen.reads.load(Ordering::Acquire) > before + 1);
        }
    }

    /// The longest read since this was last asked for.
    fn longest(&self) -> Duration {
        let longest = self.readers.iter().map(|(seen, _)| seen.longest.swap(0, Ordering::AcqRel)).max();
        Duration::from_nanos(longest.unwrap_or_default())
    }

    /// Stops them. How many reads failed.
    fn finish(self) -> Result<u64, Error> {
        self.stop.store(true, Ordering::Release);
        let mut failed = 0;
        for (seen, reader) in self.readers {
            reader.join().map_err(|_| "a reader panicked")?;
            failed += seen.failed.load(Ordering::Acquire);
        }
        Ok(failed)
    }
}

impl Seen {
    fn watch(&self, volume: &Volume, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            let start = Instant::now();
            if let Err(error) = first(volume, THREE[0]) {
                eprintln!("bench node: a read failed: {error}");
                self.failed.fetch_add(1, Ordering::AcqRel);
            }
            let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.longest.fetch_max(took, Ordering::AcqRel);
            self.reads.fetch_add(1, Ordering::AcqRel);
            pause(PACE);
        }
    }
}
