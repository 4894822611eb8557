//! Reads: product, floor and tmpfs in turns, so that whatever disturbs the machine disturbs all.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Stdio};

use crate::peers::{Server, program, spawn};
use crate::store::{LARGE, SMALL, Store};
use crate::{Error, Plan};
use fuse_tests::report::{Limit, Row, Section, Series};

struct Scenario {
    name: &'static str,
    operation: &'static str,
    file: &'static str,
    readers: usize,
    /// The core of the servers. Readers have core 0.
    servers: usize,
    /// The time per operation that is promised, as a multiple of the floor's.
    promised: f64,
    words: &'static str,
}

const READERS: usize = 0;

/// On two cores a reader waits longest for the other core to wake; on one, every microsecond of the server is its own.
const SCENARIOS: [Scenario; 5] = [
    Scenario {
        name: "open+read+close of 64 bytes",
        operation: "open-read-close",
        file: "small",
        readers: 1,
        servers: 1,
        promised: 1.10,
        words: "time <= 1.10 x floor",
    },
    Scenario {
        name: "open+read+close of 64 bytes, all on one core",
        operation: "open-read-close",
        file: "small",
        readers: 1,
        servers: 0,
        promised: 1.10,
        words: "time <= 1.10 x floor",
    },
    Scenario {
        name: "read of 1 MiB, file open",
        operation: "read",
        file: "large",
        readers: 1,
        servers: 1,
        promised: 1.0 / 0.70,
        words: "throughput >= 0.70 x floor",
    },
    Scenario {
        name: "open+read+close of 1 MiB",
        operation: "open-read-close",
        file: "large",
        readers: 1,
        servers: 1,
        promised: 1.0 / 0.70,
        words: "throughput >= 0.70 x floor",
    },
    Scenario {
        name: "open+read+close of 64 bytes, 8 readers",
        operation: "open-read-close",
        file: "small",
        readers: 8,
        servers: 1,
        promised: 1.0 / 0.9,
        words: "operations >= 0.9 x floor",
    },
];

/// One peer: where its files are, and who answers.
struct Peer<'a> {
    name: &'static str,
    directory: &'a Path,
    process: Option<u32>,
}

pub(crate) fn measure(plan: &Plan, store: &Store) -> Result<Section, Error> {
    let (small, large) = ("x".repeat(SMALL), "x".repeat(LARGE));
    store.put("read/small", &small)?;
    store.put("read/large", &large)?;
    let files = [("small", "read/small".to_owned()), ("large", "read/large".to_owned())];
    let product = Server::product(store, &store.class("1h", &files)?)?;
    let floor = Server::floor(store, &product)?;
    let tmpfs = tempfile::tempdir_in("/dev/shm")?;
    fs::write(tmpfs.path().join("small"), &small)?;
    fs::write(tmpfs.path().join("large"), &large)?;
    let peers = [
        Peer { name: "floor", directory: floor.directory(), process: Some(floor.process()) },
        Peer { name: "fuse-secrets", directory: product.directory(), process: Some(product.process()) },
        Peer { name: "tmpfs", directory: tmpfs.path(), process: None },
    ];
    let mut rows = Vec::new();
    for scenario in &SCENARIOS {
        product.pin(scenario.servers)?;
        floor.pin(scenario.servers)?;
        let mut series = peers.each_ref().map(|peer| Series::new(peer.name));
        for _ in 0..plan.rounds {
            for (peer, series) in peers.iter().zip(&mut series) {
                let (time, cpu) = round(plan, scenario, peer)?;
                series.times.push(time);
                series.cpu.extend(cpu);
            }
        }
        let ratio = series[1].median() / series[0].median();
        rows.push(Row {
            name: scenario.name.to_owned(),
            promised: scenario.words,
            found: format!("{ratio:.3} x the floor's time ({:.3} x its rate)", 1.0 / ratio),
            limit: Some(Limit { found: ratio, most: scenario.promised }),
            series: series.into(),
        });
    }
    Ok(rows)
}

/// Nanoseconds per operation, of all readers together, and nanoseconds of the server's CPU per operation.
fn round(plan: &Plan, scenario: &Scenario, peer: &Peer<'_>) -> Result<(f64, Option<f64>), Error> {
    let path = peer.directory.join(scenario.file);
    let mut readers = Vec::new();
    for _ in 0..scenario.readers {
        let mut command = program("bench-read")?;
        command.args(["reader", scenario.operation]).arg(&path).arg(plan.round.as_millis().to_string());
        let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()), READERS)?;
        let mut output = BufReader::new(child.stdout.take().ok_or("no output")?);
        output.read_line(&mut String::new())?;
        readers.push((child, output));
    }
    let before = peer.process.map(cpu_time).transpose()?;
    for (child, _) in &mut readers {
        child.stdin.as_mut().ok_or("no input")?.write_all(b"\n")?;
    }
    let (mut rate, mut operations) = (0.0, 0.0);
    for (child, output) in &mut readers {
        let (count, time) = result(child, output)?;
        rate += count / time;
        operations += count;
    }
    let after = peer.process.map(cpu_time).transpose()?;
    Ok((1.0 / rate, before.zip(after).map(|(before, after)| (after - before) / operations)))
}

fn result(child: &mut Child, output: &mut impl std::io::BufRead) -> Result<(f64, f64), Error> {
    let mut line = String::new();
    output.read_line(&mut line)?;
    child.wait()?;
    let (operations, time) = line.trim().split_once(' ').ok_or("a reader failed")?;
    Ok((operations.parse()?, time.parse()?))
}

/// Nanoseconds of CPU that all threads of a process have had (the first number of each task's schedstat).
fn cpu_time(process: u32) -> Result<f64, Error> {
    let mut sum = 0.0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        sum += text.split(' ').next().unwrap_or_default().parse::<f64>()?;
    }
    Ok(sum)
}
