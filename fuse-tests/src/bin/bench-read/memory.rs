//! Memory of the agent: PSS as the kernel sums it up, all volumes read once. Every volume has three small secrets of its
//! own, so nothing is shared that need not be.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::peers::{Many, Server};
use crate::store::{Store, THREE};
use crate::{Error, Plan};
use fuse_tests::report::{Limit, Row, Section};

const ONE: f64 = 15.0 * 1024.0;
const FURTHER: f64 = 48.0;
const GIVEN_BACK: f64 = 1.1;
/// The agent gives memory back once, when all that served the volumes has gone.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn measure(plan: &Plan, store: &Store) -> Result<Section, Error> {
    let server = Server::product(store, &store.three("1h", "memory/only")?)?;
    read(server.directory())?;
    let one = pss(server.process())?;
    drop(server);
    let mut rows = vec![Row {
        name: "PSS of fuse-secrets mount, one volume".to_owned(),
        promised: "<= 15 MiB",
        found: format!("{:.2} MiB", one / 1024.0),
        limit: Some(Limit { found: one / ONE, most: 1.0 }),
        series: Vec::new(),
    }];
    let mut many = Many::start(store)?;
    let grow = |many: &mut Many, to: usize| -> Result<f64, Error> {
        for n in many.mounted().len()..to {
            many.mount(&store.directory()?, &store.three("1h", &format!("memory/{n}"))?)?;
        }
        many.mounted().iter().try_for_each(|directory| read(directory))?;
        pss(many.process())
    };
    let first = grow(&mut many, 1)?;
    for &volumes in plan.volumes {
        let all = grow(&mut many, volumes)?;
        let each = (all - first) / (volumes as f64 - 1.0);
        rows.push(Row {
            name: format!("PSS per further volume, {volumes} volumes"),
            promised: "<= 48 KiB",
            found: format!("{each:.1} KiB ({:.1} MiB in all)", all / 1024.0),
            limit: Some(Limit { found: each / FURTHER, most: 1.0 }),
            series: Vec::new(),
        });
    }
    many.unmount_all_but(1)?;
    let left = settled(many.process(), first * GIVEN_BACK)?;
    rows.push(Row {
        name: "PSS with one volume, 20 s after the others were unmounted".to_owned(),
        promised: "within 10 % of before",
        found: format!("{:.2} MiB, before {:.2} MiB", left / 1024.0, first / 1024.0),
        limit: Some(Limit { found: left / first, most: GIVEN_BACK }),
        series: Vec::new(),
    });
    Ok(rows)
}

fn read(directory: &Path) -> Result<(), Error> {
    THREE.iter().try_for_each(|file| Ok(fs::read(directory.join(file)).map(drop)?))
}

/// PSS in KiB, as soon as it is `wanted` or less, else when patience ends.
fn settled(process: u32, wanted: f64) -> Result<f64, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = pss(process)?;
        if now <= wanted || Instant::now() > deadline {
            return Ok(now);
        }
        // Looking at it is work for the kernel that the agent would have to wait for.
        std::thread::park_timeout(Duration::from_millis(100));
    }
}

/// KiB.
fn pss(process: u32) -> Result<f64, Error> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no Pss in smaps_rollup")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
