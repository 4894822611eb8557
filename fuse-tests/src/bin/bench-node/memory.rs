//! What shim, supervisor and worker take when nothing happens. Every volume has three small secrets of its own, so that nothing is
//! shared that need not be.

use std::ops::Add;
use std::time::{Duration, Instant};

use fuse_tests::node::{Node, Volume};
use fuse_tests::report::{Error, Limit, Row, Section};
use fuse_tests::usage::{Usage, cpu, usage};
use fuse_tests::wait::pause;

use crate::{BUSY, Plan, fill, node};

/// Volumes of a node with many small pods.
const MANY: usize = 500;
/// The agent gives memory back some seconds after the last volume has gone.
const PATIENCE: Duration = Duration::from_secs(20);
const MOST: f64 = 30.0 * 1024.0;
const MOST_FIXED: f64 = 14.0 * 1024.0;
const MOST_IDLE: Duration = Duration::from_millis(100);

pub(crate) fn measure(plan: &Plan) -> Result<Section, Error> {
    let mut node = node()?;
    let mut volumes = Vec::new();
    let mut rows = Vec::new();
    let none = sum(&mut node)?;
    rows.push(row("PSS, no volume", none, None));
    let mut room = String::new();
    for many in [BUSY, MANY] {
        if let Err(error) = fill(&node, &mut volumes, many) {
            room = format!("{} volumes fit: {error}", volumes.len());
        }
        let all = each(&mut node)?;
        let total = all.iter().map(|(_, usage)| *usage).fold(Usage::default(), Usage::add);
        let limit = (many == BUSY).then_some(MOST);
        rows.push(row(&format!("PSS, {} volumes", volumes.len()), total, limit));
        for (name, usage) in all {
            rows.push(row(&format!("  {name}"), usage, None));
        }
        if many == BUSY {
            let fixed = total.anonymous + total.locked;
            let mut row = row("  of it anonymous or locked", total, None);
            row.promised = "<= 14 MiB";
            row.found = format!("{:.2} MiB", fixed / 1024.0);
            row.limit = Some(Limit { found: fixed / MOST_FIXED, most: 1.0 });
            rows.push(row);
        }
    }
    if !room.is_empty() {
        rows.push(Row::counted(&format!("volumes that did not fit ({room})"), "0", 1, 0));
    }
    rows.push(idle(plan, &mut node, volumes.len())?);
    empty(&node, &volumes)?;
    let left = settled(&mut node, none.pss * 1.1)?;
    let mut row = row("PSS, 20 s after all were unpublished", left, None);
    row.promised = "within 10 % of before";
    row.limit = Some(Limit { found: left.pss / none.pss, most: 1.1 });
    rows.push(row);
    Ok(rows)
}

fn idle(plan: &Plan, node: &mut Node, volumes: usize) -> Result<Row, Error> {
    let processes = processes(node);
    let spent = || -> Result<Vec<Duration>, Error> { processes.iter().map(|(_, pid)| cpu(*pid)).collect() };
    // What the last publish left to do is done by then.
    pause(PATIENCE);
    let before = spent()?;
    pause(plan.idle);
    let took: Vec<Duration> = spent()?.iter().zip(&before).map(|(now, before)| *now - *before).collect();
    let all = took.iter().sum::<Duration>().mul_f64(60.0 / plan.idle.as_secs_f64());
    let parts = processes
        .iter()
        .zip(&took)
        .map(|((name, _), took)| format!("{name} {:.1}", took.as_secs_f64() * 1e3));
    let parts: Vec<String> = parts.collect();
    Ok(Row {
        name: format!("CPU of all three in 60 s, {volumes} volumes, idle"),
        promised: "<= 0.1 s",
        found: format!(
            "{:.1} ms (in {} s, ms: {})",
            all.as_secs_f64() * 1e3,
            plan.idle.as_secs(),
            parts.join(", ")
        ),
        limit: Some(Limit { found: all.as_secs_f64() / MOST_IDLE.as_secs_f64(), most: 1.0 }),
        series: Vec::new(),
    })
}

fn empty(node: &Node, volumes: &[Volume]) -> Result<(), Error> {
    volumes.iter().try_for_each(|volume| Ok(node.unpublish(volume)?))
}

fn row(name: &str, usage: Usage, most: Option<f64>) -> Row {
    let Usage { pss, anonymous, locked } = usage;
    Row {
        name: name.to_owned(),
        promised: if most.is_some() { "<= 30 MiB" } else { "-" },
        found: format!(
            "{:.2} MiB (anonymous {:.2}, locked {:.2})",
            pss / 1024.0,
            anonymous / 1024.0,
            locked / 1024.0
        ),
        limit: most.map(|most| Limit { found: pss / most, most: 1.0 }),
        series: Vec::new(),
    }
}

/// Shim, supervisor, worker.
fn processes(node: &mut Node) -> [(&'static str, u32); 3] {
    let (shim, worker) = (node.shim().pid(), node.wait_served().pid);
    [("shim", shim), ("supervisor", node.agents()[0].process.pid()), ("worker", worker)]
}

fn each(node: &mut Node) -> Result<Vec<(&'static str, Usage)>, Error> {
    processes(node).into_iter().map(|(name, pid)| Ok((name, usage(pid)?))).collect()
}

fn sum(node: &mut Node) -> Result<Usage, Error> {
    Ok(each(node)?.into_iter().map(|(_, usage)| usage).fold(Usage::default(), Usage::add))
}

/// As soon as PSS is `wanted` or less, else when patience ends.
fn settled(node: &mut Node, wanted: f64) -> Result<Usage, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = sum(node)?;
        if now.pss <= wanted || Instant::now() > deadline {
            return Ok(now);
        }
        pause(Duration::from_millis(500));
    }
}
