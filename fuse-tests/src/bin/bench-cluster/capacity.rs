//! What shim and agent take by the number of pods: the table of docs/operations.md, and what the manifests give them.
//!
//! Each pod has a class of its own with three small secrets of its own, asked for every minute; all have one service account. Pods are in
//! the node's network, because making networks is not what is measured.

use std::time::Duration;

use fuse_tests::cluster::cgroups::{Charged, charged};
use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::pods::{SECRETS, descriptors};
use fuse_tests::cluster::{Cluster, Tenant};
use fuse_tests::report::{Error, Limit, Row, Section};
use fuse_tests::usage::{Usage, threads, usage};
use fuse_tests::wait;
use serde_json::{Value, json};

use crate::{Plan, TOLD};

/// Names of a volume's files.
const THREE: [&str; 3] = ["password", "key", "certificate"];
const VALUE: &str = "correct horse battery staple";
/// Pods that kubelet is given at once.
const AT_ONCE: usize = 10;
/// What the last publish left to do is done by then.
const SETTLED: Duration = Duration::from_secs(5);
/// Shares of a container's limits that it may come to.
const HALF: f64 = 0.5;

pub(crate) fn measure(plan: &Plan, cluster: &Cluster) -> Result<Section, Error> {
    // As a node has them that nobody has used yet.
    Part::ALL.into_iter().for_each(|part| cluster.restart_driver(part));
    let tenant = cluster.tenant("capacity");
    let mut rows = Section::new();
    let mut pods: Vec<String> = Vec::new();
    for many in plan.capacity {
        let before = Part::ALL.map(|part| container(cluster, part));
        while pods.len() < *many {
            let names: Vec<String> = (pods.len()..*many).take(AT_ONCE).map(|n| format!("pod-{n}")).collect();
            let classes: Vec<Value> = names.iter().map(|name| class(&tenant, name)).collect();
            cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": classes}));
            names.iter().for_each(|name| tenant.create(&pod(&tenant, name)));
            for name in &names {
                cluster.wait_ready(&tenant.namespace, name);
                read(cluster, &tenant, name)?;
            }
            pods.extend(names);
        }
        let filled = Part::ALL.map(|part| container(cluster, part));
        wait::pause(SETTLED);
        for (n, part) in Part::ALL.into_iter().enumerate() {
            rows.push(taken(cluster, part, *many)?);
            rows.push(spent(part, *many, before[n], filled[n]));
        }
        rows.extend(idle(plan, cluster, &tenant, *many));
    }
    // A namespace with so many pods takes longer to go than anybody waits for one.
    for names in pods.chunks(AT_ONCE) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let delete = ["delete", "pod", "--wait=false", "--namespace", &tenant.namespace];
        cluster.kubectl(&[&delete[..], &names].concat());
        names.iter().for_each(|name| cluster.wait_gone(&tenant.namespace, name));
    }
    Ok(rows)
}

/// A class of three secrets of its own.
fn class(tenant: &Tenant<'_>, name: &str) -> Value {
    let secrets = THREE.map(|file| format!("{name}-{file}"));
    secrets.iter().for_each(|secret| tenant.put(secret, &json!({"value": VALUE})));
    let files: Vec<_> =
        THREE.iter().zip(&secrets).map(|(file, secret)| (*file, secret.as_str(), "value")).collect();
    tenant.class_of(name, &files, &json!({"refreshInterval": "1m"}))
}

/// A pod with a volume of the class of its name.
fn pod(tenant: &Tenant<'_>, name: &str) -> Value {
    let mut pod = tenant.reader(name, name);
    pod["spec"]["hostNetwork"] = json!(true);
    pod
}

fn read(cluster: &Cluster, tenant: &Tenant<'_>, name: &str) -> Result<(), Error> {
    for file in THREE {
        let path = cluster.path_in(&tenant.namespace, name, "app", &format!("{SECRETS}/{file}"));
        if std::fs::read(path)? != VALUE.as_bytes() {
            return Err(format!("{name}: {file} holds something else").into());
        }
    }
    Ok(())
}

/// A container's limits: CPU as a part of one, memory in bytes.
fn limits(cluster: &Cluster, part: Part) -> (f64, f64) {
    let limits =
        cluster.daemon_set(part)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].take();
    let number = |value: &Value, unit: &str, of: f64| {
        let number: f64 = value.as_str().and_then(|text| text.strip_suffix(unit)).unwrap().parse().unwrap();
        number * of
    };
    (number(&limits["cpu"], "m", 1e-3), number(&limits["memory"], "Mi", f64::from(1 << 20)))
}

fn container(cluster: &Cluster, part: Part) -> Charged {
    charged(cluster.driver_processes(part)[0])
}

/// Memory, descriptors, threads.
fn taken(cluster: &Cluster, part: Part, many: usize) -> Result<Row, Error> {
    let (mut memory, mut open, mut running) = (Usage::default(), 0, 0);
    for pid in cluster.driver_processes(part) {
        memory = memory + usage(pid)?;
        open += descriptors(pid).values().sum::<u64>();
        running += threads(pid)?;
    }
    let (_, limit) = limits(cluster, part);
    let working = container(cluster, part).working_set as f64;
    let mebibytes = f64::from(1 << 20);
    Ok(Row {
        name: format!("{}, {many} pods: memory at most half of its limit", part.container()),
        promised: "half of its limit",
        found: format!(
            "working set {:.1} of {:.0} MiB; PSS {:.1}, of it anonymous {:.1}, locked {:.1}; {open} descriptors, {running} threads",
            working / mebibytes,
            limit / mebibytes,
            memory.pss / 1024.0,
            memory.anonymous / 1024.0,
            memory.locked / 1024.0,
        ),
        limit: Some(Limit { found: working / limit, most: HALF }),
        series: Vec::new(),
    })
}

/// CPU while pods came.
fn spent(part: Part, many: usize, before: Charged, after: Charged) -> Row {
    let (cpu, held) = (after.cpu - before.cpu, after.throttled - before.throttled);
    Row {
        name: format!("{}, until there were {many} pods: CPU", part.container()),
        promised: TOLD,
        found: format!("{:.0} ms; throttled for {:.0} ms", cpu.as_secs_f64() * 1e3, held.as_secs_f64() * 1e3),
        limit: None,
        series: Vec::new(),
    }
}

/// CPU and requests while nothing happens but refreshes.
fn idle(plan: &Plan, cluster: &Cluster, tenant: &Tenant<'_>, many: usize) -> Vec<Row> {
    let ours = |reads: &std::collections::BTreeMap<String, u64>| -> u64 {
        let mine = reads.iter().filter(|(path, _)| path.contains(&tenant.namespace));
        mine.map(|(_, count)| count).sum()
    };
    let before = Part::ALL.map(|part| container(cluster, part));
    let asked = ours(&cluster.store().counts().reads);
    wait::pause(plan.idle);
    let asked = ours(&cluster.store().counts().reads) - asked;
    let seconds = plan.idle.as_secs_f64();
    let mut rows = Vec::new();
    for (part, before) in Part::ALL.into_iter().zip(before) {
        let after = container(cluster, part);
        let (cpu, held) =
            ((after.cpu - before.cpu).as_secs_f64() / seconds, after.throttled - before.throttled);
        let (limit, _) = limits(cluster, part);
        rows.push(Row {
            name: format!("{}, {many} pods that idle: CPU at most half of its limit", part.container()),
            promised: "half of its limit",
            found: format!(
                "{:.1}m of {:.0}m; throttled for {:.0} ms",
                cpu * 1e3,
                limit * 1e3,
                held.as_secs_f64() * 1e3
            ),
            limit: Some(Limit { found: cpu / limit, most: HALF }),
            series: Vec::new(),
        });
    }
    rows.push(Row {
        name: format!("store, {many} pods with three paths each, one account, refreshed each minute"),
        promised: TOLD,
        found: format!("{:.2} reads per second", asked as f64 / seconds),
        limit: None,
        series: Vec::new(),
    });
    rows
}
