//! `cargo xtask bench node`: what a node's life costs: publishing, agents that die or hand over, memory, idling.
//!
//! This process is kubelet, the store and the readers; shim and agent are the real programs, with the rights and limits of
//! containers.
//!
//! | file | what it measures |
//! |---|---|
//! | `publishing.rs` | from NodePublishVolume to the first byte, one at a time and a hundred at once; unpublish; errors |
//! | `stalls.rs` | the longest that a reader waits when an agent is killed, or hands over |
//! | `memory.rs` | PSS and CPU of shim, supervisor and worker |

// It prints tables. What fails in a node ends the bench.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod memory;
mod publishing;
mod stalls;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fuse_tests::needs;
use fuse_tests::node::{Node, Volume};
use fuse_tests::report::{self, Error, Limit, Report, Row, Series};
use serde_json::json;

/// How long and how often.
struct Plan {
    /// Volumes that are published one after the other.
    publishes: usize,
    /// Fresh nodes on which a hundred are published at once.
    bursts: usize,
    /// Calls of publish and unpublish in which no error may be.
    calls: usize,
    /// Workers that are killed.
    kills: usize,
    /// Agents that take over from another.
    hand_overs: usize,
    /// How long idling is watched.
    idle: Duration,
}

const FULL: Plan =
    Plan { publishes: 100, bursts: 5, calls: 4000, kills: 30, hand_overs: 20, idle: Duration::from_secs(60) };
const QUICK: Plan =
    Plan { publishes: 20, bursts: 1, calls: 400, kills: 5, hand_overs: 3, idle: Duration::from_secs(5) };

/// Volumes of a busy node: kubelet's default limit of pods.
const BUSY: usize = 110;
/// Names of the files of a volume of three small secrets.
const THREE: [&str; 3] = ["database/password", "api-key", "tls.key"];
/// What they hold.
const VALUE: &str = "correct horse battery staple";

fn main() -> ExitCode {
    report::main("node", [&FULL, &QUICK], bench)
}

/// Measures these sections; none means all.
fn bench(plan: &Plan, only: &[&str], to: &Path) -> Result<(), Error> {
    if !needs::kernel() {
        return Err("cannot be measured on this machine".into());
    }
    let mut report = Report::new("node", plan.kills);
    let wanted = |section: &str| only.is_empty() || only.contains(&section);
    if wanted("publish") {
        report.show("publish, read, unpublish", publishing::measure(plan)?);
    }
    if wanted("stalls") {
        report.show("readers while agents come and go", stalls::measure(plan)?);
    }
    if wanted("memory") {
        report.show("memory and idling", memory::measure(plan)?);
    }
    report.save(to)
}

/// A node with shim and agent, which log no more than it takes to see what went wrong.
fn node() -> Result<Node, Error> {
    let sibling = std::env::current_exe()?;
    let mut node = Node::new(sibling.to_str().ok_or("a path that is no text")?);
    node.log = "warn";
    node.start_shim(&[]);
    node.start_agent(&[]);
    node.wait_served();
    Ok(node)
}

/// A class of three small secrets at paths of their own, refreshed hourly.
fn three(node: &Node, class: &str) -> Result<(), Error> {
    let paths: Vec<String> = (0..THREE.len()).map(|n| format!("{class}/{n}")).collect();
    for path in &paths {
        let put = node.cluster.store.embedded().put(&format!("secret/{path}"), &json!({ "value": VALUE }));
        put.map_err(|refusal| format!("embedded store: {refusal:?}"))?;
    }
    let paths: Vec<String> = paths.iter().map(|path| format!("secret/data/{path}")).collect();
    let files: Vec<_> =
        THREE.iter().zip(&paths).map(|(file, path)| (*file, path.as_str(), Some("value"))).collect();
    node.cluster.class(class, &files, &[("refreshInterval", "1h")]);
    Ok(())
}

/// Publishes volumes of three secrets each, of their own, until there are `many`.
fn fill(node: &Node, volumes: &mut Vec<Volume>, many: usize) -> Result<(), Error> {
    for n in volumes.len()..many {
        let class = format!("own-{n}");
        three(node, &class)?;
        let volume = node.volume(&format!("pod-{n}"), &class);
        node.publish(&volume)?;
        read(&volume)?;
        volumes.push(volume);
    }
    Ok(())
}

/// Reads all files of a volume.
fn read(volume: &Volume) -> Result<(), Error> {
    THREE.iter().try_for_each(|file| first(volume, file))
}

/// Reads one.
fn first(volume: &Volume, file: &str) -> Result<(), Error> {
    let value = std::fs::read(volume.join(file))?;
    if value == VALUE.as_bytes() { Ok(()) } else { Err(format!("{file} holds something else").into()) }
}

/// A row of a length of time that may be so long, in the middle or in the worst case.
fn timed(name: &str, promised: &'static str, found: f64, most: Duration, series: Vec<Series>) -> Row {
    Row {
        name: name.to_owned(),
        promised,
        found: format!("{:.2} ms", found / 1e6),
        limit: Some(Limit { found: found / 1e9 / most.as_secs_f64(), most: 1.0 }),
        series,
    }
}
