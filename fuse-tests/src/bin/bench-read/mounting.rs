//! From `mount` to the first byte. What the store takes is the store's; the rest is ours: starting, logging in, mounting,
//! telling that it is ready, and one open and read.

use std::time::{Duration, Instant};

use crate::peers::{Many, Server};
use crate::store::{Store, THREE};
use crate::{Error, Plan};
use fuse_tests::report::{Limit, Row, Section, Series};

const MOST: Duration = Duration::from_millis(5);
const WORDS: &str = "store's round trips + <= 5 ms";

pub(crate) fn measure(plan: &Plan, store: &Store) -> Result<Section, Error> {
    let (mut process, mut volume) =
        (Series::new("fuse-secrets mount, a new process"), Series::new("one more volume of an agent"));
    for n in 0..plan.mounts {
        let class = store.three("1h", &format!("mount/{n}"))?;
        let start = Instant::now();
        let server = Server::product(store, &class)?;
        std::fs::read(server.directory().join(THREE[0]))?;
        process.times.push(own(store, start));
    }
    let mut many = Many::start(store)?;
    // One round more: the first mount logs in and is no further one.
    for n in 0..=plan.mounts {
        let (class, directory) = (store.three("1h", &format!("more/{n}"))?, store.directory()?);
        let start = Instant::now();
        many.mount(&directory, &class)?;
        std::fs::read(directory.join(THREE[0]))?;
        if n > 0 {
            volume.times.push(own(store, start));
        }
    }
    Ok([process, volume].into_iter().map(row).collect())
}

/// Nanoseconds since `start` in which no request was at the store.
fn own(store: &Store, start: Instant) -> f64 {
    let end = Instant::now();
    (end.duration_since(start) - store.wire().busy(start, end)).as_secs_f64() * 1e9
}

fn row(series: Series) -> Row {
    let (found, most) = (series.median(), MOST.as_secs_f64() * 1e9);
    Row {
        name: format!("mount to first byte, without the store: {}", series.peer),
        promised: WORDS,
        found: format!("{:.2} ms", found / 1e6),
        limit: Some(Limit { found: found / most, most: 1.0 }),
        series: vec![series],
    }
}
