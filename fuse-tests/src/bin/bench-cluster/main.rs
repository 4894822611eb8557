//! `cargo xtask bench cluster`: what a volume costs a pod on a real cluster of one node, and what readers notice of upgrades and deaths.
//!
//! Everything is real: kubelet, containerd, API server, Vault, and the driver from its images and manifests.
//!
//! | file | what it measures |
//! |---|---|
//! | `starts.rs` | from a pod's creation to its container's first line, beside the same pod with an emptyDir; requests at API server and store |
//! | `upgrades.rs` | readers while the agent is upgraded; how long until all read again when everything was killed |
//! | `capacity.rs` | memory, descriptors, threads, CPU and requests by the number of pods |

// It prints tables. What fails in a cluster ends the bench.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

mod capacity;
mod starts;
mod upgrades;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fuse_tests::cluster::{Cluster, PATIENCE, Tenant};
use fuse_tests::report::{self, Error, Report, Row, Series};
use fuse_tests::{needs, wait};
use serde_json::{Value, json};

/// How many and how often.
struct Plan {
    /// Pairs of pods that start one after the other.
    pairs: usize,
    /// Pods of a deployment.
    many: usize,
    /// Deployments of so many, of either kind.
    bursts: usize,
    /// Upgrades of each kind, and deaths.
    rounds: usize,
    /// kubelet's `syncFrequency`: kubelet publishes each volume again every 1.2 to 1.6 times that.
    sync: &'static str,
    /// Numbers of pods at which is measured what the driver takes.
    capacity: &'static [usize],
    /// How long idling is watched at each.
    idle: Duration,
}

const FULL: Plan = Plan {
    pairs: 20,
    many: 30,
    bursts: 3,
    rounds: 3,
    sync: "1m",
    capacity: &[0, 30, 110, 250],
    idle: Duration::from_secs(120),
};
const QUICK: Plan = Plan {
    pairs: 3,
    many: 30,
    bursts: 1,
    rounds: 1,
    sync: "5s",
    capacity: &[0, 10],
    idle: Duration::from_secs(10),
};

/// The label of a deployment's pods.
const LABEL: &str = "bench";
/// A measure without a promise.
const TOLD: &str = "none: it is told";

fn main() -> ExitCode {
    report::main("cluster", [&FULL, &QUICK], bench)
}

/// Measures these sections; none means all.
fn bench(plan: &Plan, only: &[&str], to: &Path) -> Result<(), Error> {
    let mut options = needs::cluster().ok_or("cannot be measured on this machine")?;
    options.sync = plan.sync.to_owned();
    options.kubelet = json!({"maxPods": 300});
    let cluster = Cluster::start(options);
    if !cluster.has_driver() || !cluster.has_store() {
        return Err("the driver's images or Vault are missing".into());
    }
    cluster.install();
    let mut report = Report::new("cluster", plan.pairs);
    let wanted = |section: &str| only.is_empty() || only.contains(&section);
    if wanted("starts") {
        report.show("pods that start", starts::measure(plan, &cluster)?);
    }
    if wanted("upgrades") {
        report.show("readers while the agent is upgraded", upgrades::measure(plan, &cluster)?);
    }
    if wanted("deaths") {
        report.show("everything killed at once", upgrades::deaths(plan, &cluster)?);
    }
    if wanted("capacity") {
        report.show("what the driver takes", capacity::measure(plan, &cluster)?);
    }
    report.save(to)
}

/// Makes a deployment of so many pods like this one; returns names and uids of those that it has come to.
fn deploy(tenant: &Tenant<'_>, cluster: &Cluster, pod: &Value, many: usize) -> Vec<(String, String)> {
    let name = pod["metadata"]["name"].as_str().unwrap();
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": many, "selector": {"matchLabels": {LABEL: name}},
            "template": {"metadata": {"labels": {LABEL: name}}, "spec": pod["spec"]},
        },
    });
    cluster.create(&deployments(tenant), &deployment);
    wait::until("the deployment's pods", PATIENCE, || {
        let pods = pods(tenant, cluster, name);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let identify = |pod: &Value| (text(&pod["metadata"]["name"]), text(&pod["metadata"]["uid"]));
        (pods.len() == many).then(|| pods.iter().map(identify).collect())
    })
}

/// Deletes it, and waits until nothing is left of it.
fn remove(tenant: &Tenant<'_>, cluster: &Cluster, name: &str) {
    let (status, why) = cluster.ask("DELETE", &format!("{}/{name}", deployments(tenant)), None);
    assert_eq!(status, 200, "{}", why["message"]);
    wait::until_true("the end of the deployment's pods", PATIENCE, || {
        wait::pause(Duration::from_millis(100));
        pods(tenant, cluster, name).is_empty()
    });
    cluster.leaves_nothing();
}

fn deployments(tenant: &Tenant<'_>) -> String {
    format!("apis/apps/v1/namespaces/{}/deployments", tenant.namespace)
}

fn pods(tenant: &Tenant<'_>, cluster: &Cluster, name: &str) -> Vec<Value> {
    cluster.list(&format!("api/v1/namespaces/{}/pods?labelSelector={LABEL}={name}", tenant.namespace))
}

/// A row of a length of time for which nothing is promised.
fn told(name: &str, nanoseconds: f64, series: Vec<Series>) -> Row {
    let found = format!("{:.0} ms", nanoseconds / 1e6);
    Row { name: name.to_owned(), promised: TOLD, found, limit: None, series }
}
