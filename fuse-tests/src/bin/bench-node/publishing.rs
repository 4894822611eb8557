//! What kubelet waits for. The clock runs from the call until a file was read, so the store's time is in it.
//!
//! Beside it stand calls that do nothing (the floor of any answer of the shim), the mount of a file system that answers constants
//! by a process of its own, and what drivers do that copy to tmpfs, without their store.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use fuse_secrets_csi::proto::csi::NodeGetInfoRequest;
use fuse_tests::mounted::Mounted;
use fuse_tests::node::{Node, Volume};
use fuse_tests::report::{Error, Row, Section, Series};
use rustix::mount::{MountFlags, mount};

use crate::{Plan, THREE, VALUE, first, node, read, three, timed};

/// Callers at once.
const BURST: usize = 100;

pub(crate) fn measure(plan: &Plan) -> Result<Section, Error> {
    let mut rows = vec![one_at_a_time(plan)?];
    rows.extend(at_once(plan)?);
    rows.extend(calls(plan)?);
    Ok(rows)
}

fn one_at_a_time(plan: &Plan) -> Result<Row, Error> {
    let node = node()?;
    let publish = |class: &str| -> Result<(f64, Volume), Error> {
        let volume = node.volume("pod", class);
        let start = Instant::now();
        node.publish(&volume)?;
        first(&volume, THREE[0])?;
        Ok((nanoseconds(start), volume))
    };
    let mut fresh = Series::new("three paths nobody read yet");
    let mut known = Series::new("paths that were read before");
    let (mut floor, mut bare) = (Series::new("a call that does nothing"), Series::new("bare fuse process"));
    let mut tmpfs = Series::new("tmpfs, three files written");
    // One round more: the first logs in.
    for n in 0..=plan.publishes {
        let class = format!("class-{}", n % 50);
        three(&node, &class)?;
        let (first, volume) = publish(&class)?;
        let (again, second) = publish(&class)?;
        if n > 0 {
            // The first fifty classes are new.
            if n < 50 {
                fresh.times.push(first);
            }
            known.times.push(again);
            floor.times.push(nothing(&node)?);
            tmpfs.times.push(copied()?);
        }
        if n < 20 {
            bare.times.push(bare_fuse()?);
        }
        node.unpublish(&volume)?;
        node.unpublish(&second)?;
    }
    let (found, most) = (fresh.median(), Duration::from_millis(3));
    Ok(timed(
        "NodePublishVolume to first byte, known identity",
        "p50 <= 3 ms",
        found,
        most,
        vec![fresh, known, floor, bare, tmpfs],
    ))
}

/// A hundred volumes of one identity and class, on nodes that know nothing yet.
fn at_once(plan: &Plan) -> Result<Vec<Row>, Error> {
    let mut published = Series::new("100 published and read");
    let mut unpublished = Series::new("100 unpublished");
    let (mut logins, mut reads) = (0, 0);
    for _ in 0..plan.bursts {
        let node = node()?;
        three(&node, "app")?;
        let volumes: Vec<Volume> = (0..BURST).map(|n| node.volume(&format!("pod-{n}"), "app")).collect();
        nothing(&node)?;
        let before = node.cluster.store.counts();
        published.times.push(together(&volumes, |volume| {
            node.publish(volume)?;
            read(volume)
        })?);
        let counts = node.cluster.store.counts();
        logins = logins.max(counts.logins - before.logins);
        reads = counts.reads.values().copied().max().unwrap_or_default().max(reads);
        unpublished.times.push(together(&volumes, |volume| Ok(node.unpublish(volume)?))?);
    }
    let (slowest, most) = (published.longest(), Duration::from_millis(150));
    let (last, unmount) = (unpublished.longest(), Duration::from_millis(100));
    Ok(vec![
        timed(
            "100 volumes, 100 callers: all published and read",
            "<= 150 ms, each time",
            slowest,
            most,
            vec![published],
        ),
        Row::counted("logins for these, on a node that knows nothing", "1", logins, 1),
        Row::counted("reads at the store for these, per path", "1", reads, 1),
        timed("100 volumes unpublished at once", "<= 100 ms, each time", last, unmount, vec![unpublished]),
    ])
}

/// Errors of calls, one burst after the other on one node.
fn calls(plan: &Plan) -> Result<Vec<Row>, Error> {
    let node = node()?;
    three(&node, "app")?;
    let (mut errors, mut made) = (0, 0);
    let (mut published, mut unpublished) = (Series::new("100 published"), Series::new("100 unpublished"));
    while made < plan.calls {
        let volumes: Vec<Volume> = (0..BURST).map(|n| node.volume(&format!("pod-{n}"), "app")).collect();
        for (series, outcome) in [
            (&mut published, together(&volumes, |volume| Ok(node.publish(volume)?))),
            (&mut unpublished, together(&volumes, |volume| Ok(node.unpublish(volume)?))),
        ] {
            made += BURST;
            match outcome {
                Ok(time) => series.times.push(time),
                Err(_) => errors += 1,
            }
        }
    }
    let mut row = Row::counted(&format!("errors in {made} calls, published paths known"), "0", errors, 0);
    row.series = vec![published, unpublished];
    Ok(vec![row])
}

/// Nanoseconds until a hundred callers are done.
fn together(volumes: &[Volume], call: impl Fn(&Volume) -> Result<(), Error> + Sync) -> Result<f64, Error> {
    let ready = Barrier::new(volumes.len() + 1);
    std::thread::scope(|scope| {
        let callers: Vec<_> = volumes
            .iter()
            .map(|volume| {
                scope.spawn(|| {
                    ready.wait();
                    call(volume)
                })
            })
            .collect();
        ready.wait();
        let start = Instant::now();
        let outcomes: Vec<_> = callers.into_iter().map(|caller| caller.join()).collect();
        let time = nanoseconds(start);
        for outcome in outcomes {
            outcome.map_err(|_| "a caller panicked")??;
        }
        Ok(time)
    })
}

fn nothing(node: &Node) -> Result<f64, Error> {
    let start = Instant::now();
    node.block_on(async { node.kubelet().client().node_get_info(NodeGetInfoRequest {}).await })?;
    Ok(nanoseconds(start))
}

fn bare_fuse() -> Result<f64, Error> {
    let (mounted, program) = (Mounted::new(), std::env::current_exe()?.with_file_name("bench-floor"));
    let start = Instant::now();
    let mut floor = Command::new(program)
        .arg(mounted.path())
        .args(["1", "131072", "4096"])
        .stdout(Stdio::piped())
        .spawn()?;
    let output = floor.stdout.take().ok_or("no output")?;
    BufReader::new(output).read_line(&mut String::new())?;
    std::fs::read(mounted.join("small"))?;
    let time = nanoseconds(start);
    floor.kill()?;
    floor.wait()?;
    Ok(time)
}

fn copied() -> Result<f64, Error> {
    let mounted = Mounted::new();
    let start = Instant::now();
    mount("tmpfs", mounted.path(), "tmpfs", MountFlags::empty(), None)?;
    for n in 0..THREE.len() {
        std::fs::write(mounted.join(&n.to_string()), VALUE)?;
    }
    std::fs::read(mounted.join("0"))?;
    Ok(nanoseconds(start))
}

fn nanoseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e9
}
