//! A deployment's pods read again and again, each through its own mounts, while the agent is replaced, or everything is killed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::stamped::STAMPED;
use fuse_tests::cluster::{Cluster, PATIENCE, Tenant};
use fuse_tests::report::{Error, Row, Section, Series};
use fuse_tests::{stamp, wait};
use serde_json::json;

use crate::{Plan, deploy, remove, told};

/// The deployment.
const NAME: &str = "readers";
/// kubelet calls again within 1.6 times its `syncFrequency`, which is up to a minute.
const HEALED: Duration = Duration::from_secs(180);

/// The readers' pods, running.
fn pods(plan: &Plan, cluster: &Cluster, tenant: &Tenant<'_>) -> Vec<String> {
    tenant.stamped_class();
    let pod = tenant.reader(NAME, STAMPED);
    let pods = deploy(tenant, cluster, &pod, plan.many).into_iter().map(|(name, _)| name);
    let pods: Vec<String> = pods.collect();
    pods.iter().for_each(|pod| drop(cluster.wait_ready(&tenant.namespace, pod)));
    pods
}

pub(crate) fn measure(plan: &Plan, cluster: &Cluster) -> Result<Section, Error> {
    cluster.wait_whole_driver();
    let tenant = cluster.tenant("upgrades");
    let pods = pods(plan, cluster, &tenant);
    let mut same = Series::new("kubectl rollout restart");
    let mut other = Series::new("a changed setting");
    let mut took = Series::new("the roll-out itself");
    let (mut failed, mut reads) = (0, 0);
    for round in 0..plan.rounds {
        for kind in [&mut same, &mut other] {
            let former = cluster.wait_driver(Part::Agent);
            let readers = cluster.readers(&tenant, &pods);
            readers.go_on();
            let start = Instant::now();
            if kind.peer == "a changed setting" {
                cluster.install_with(&json!({"publishDeadline": format!("{}s", 21 + round)}), &[]);
            } else {
                cluster.rollout("restart", Part::Agent);
            }
            if cluster.wait_driver(Part::Agent) == former {
                return Err("the agent's pod is the former one".into());
            }
            took.times.push(start.elapsed().as_secs_f64() * 1e9);
            readers.go_on();
            let seen = readers.report(kind.peer);
            failed += seen.failed.values().sum::<u64>();
            reads += seen.reads;
            kind.times.push(seen.longest.as_secs_f64() * 1e9);
        }
    }
    remove(&tenant, cluster, NAME);
    let longest = same.longest().max(other.longest());
    let many = pods.len();
    Ok(vec![
        Row::counted(
            &format!("failed of {reads} reads in {many} pods, agent upgraded {} times", 2 * plan.rounds),
            "0",
            failed,
            0,
        ),
        told(
            &format!("longest read of {many} pods that read, agent upgraded"),
            longest,
            vec![same, other, took],
        ),
    ])
}

pub(crate) fn deaths(plan: &Plan, cluster: &Cluster) -> Result<Section, Error> {
    cluster.wait_whole_driver();
    let tenant = cluster.tenant("deaths");
    let pods = pods(plan, cluster, &tenant);
    let paths: Vec<PathBuf> = pods.iter().map(|pod| cluster.stamped(&tenant, pod)).collect();
    let (mut first, mut last) = (Series::new("until the first reads"), Series::new("until the last reads"));
    for _ in 0..plan.rounds {
        cluster.kill_driver(&Part::ALL);
        let start = Instant::now();
        if paths.iter().any(|path| std::fs::read(path).is_ok()) {
            return Err("a mount outlives everything".into());
        }
        let mut healed: Vec<Duration> = Vec::new();
        let mut dead: Vec<&PathBuf> = paths.iter().collect();
        while !dead.is_empty() {
            if start.elapsed() > HEALED {
                return Err(format!("{} pods are not healed after {HEALED:?}", dead.len()).into());
            }
            let mut still = Vec::new();
            for path in dead {
                match std::fs::read(path) {
                    Ok(value) => {
                        stamp::check(&value)?;
                        healed.push(start.elapsed());
                    }
                    Err(_) => still.push(path),
                }
            }
            dead = still;
            wait::pause(Duration::from_millis(10));
        }
        first.times.extend(healed.first().map(|time| time.as_secs_f64() * 1e9));
        last.times.extend(healed.last().map(|time| time.as_secs_f64() * 1e9));
        // kubelet starts a container later and later; a fresh pod's at once.
        Part::ALL.into_iter().rev().for_each(|part| cluster.restart_driver(part));
        wait::until_true("every pod reads", PATIENCE, || {
            paths.iter().all(|path| std::fs::read(path).is_ok())
        });
    }
    remove(&tenant, cluster, NAME);
    let name = format!("until all of {} pods read again, syncFrequency {}", pods.len(), plan.sync);
    Ok(vec![told(&name, last.median(), vec![first, last])])
}
