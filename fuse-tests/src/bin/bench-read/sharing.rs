//! A hundred volumes with the same identity and spec: what the store is asked, at first and when its secrets rotate.

use std::fs;
use std::time::{Duration, Instant};

use crate::peers::Many;
use crate::store::{Store, THREE};
use crate::{Error, Plan};
use fuse_tests::report::{Limit, Row, Section};

const VOLUMES: usize = 100;
/// Long enough that no path is read a second time before all volumes show the first rotation: at the earliest after two
/// intervals less a fifth each.
const INTERVAL: &str = "5s";
const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn measure(_: &Plan, store: &Store) -> Result<Section, Error> {
    let class = store.three(INTERVAL, "shared")?;
    let mut many = Many::start(store)?;
    let (logins, reads) = asked(store);
    for _ in 0..VOLUMES {
        many.mount(&store.directory()?, &class)?;
    }
    let (logins, first) = (asked(store).0 - logins, asked(store).1 - reads);
    for n in 0..THREE.len() {
        store.put(&format!("shared/{n}"), "second version")?;
    }
    let reads = asked(store).1;
    let deadline = Instant::now() + DEADLINE;
    let shown = |file: &std::path::PathBuf| fs::read(file).is_ok_and(|bytes| bytes == b"second version");
    for file in many.mounted().iter().flat_map(|directory| THREE.map(|file| directory.join(file))) {
        // Reads themselves bring it about: an open of a value that is older than its interval waits for a newer one.
        while !shown(&file) {
            if Instant::now() > deadline {
                return Err(format!("{} does not show the second version", file.display()).into());
            }
        }
    }
    let rotated = asked(store).1 - reads;
    let paths = THREE.len() as u64;
    Ok(vec![
        row("logins for 100 volumes of one identity", "1", logins, 1),
        row("reads at the store for 100 volumes of three paths", "1 per path", first, paths),
        row("reads at the store until all show a rotation", "1 per path", rotated, paths),
    ])
}

/// Logins, and reads of the shared paths.
fn asked(store: &Store) -> (u64, u64) {
    let counts = store.counts();
    (counts.logins, (0..THREE.len()).map(|n| counts.reads_of(&format!("secret/data/shared/{n}"))).sum())
}

fn row(name: &str, promised: &'static str, found: u64, most: u64) -> Row {
    Row {
        name: name.to_owned(),
        promised,
        found: found.to_string(),
        limit: Some(Limit { found: found as f64 / most as f64, most: 1.0 }),
        series: Vec::new(),
    }
}
