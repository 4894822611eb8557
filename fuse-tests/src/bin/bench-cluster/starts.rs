//! From a pod's creation to the first line of its container, by the runtime's own clock on that line; beside it the same pod with an
//! emptyDir instead of the volume. The difference is what the volume costs.
//!
//! What these mounts cost others is counted in the audit logs of API server and store.

use std::time::{Duration, SystemTime};

use fuse_tests::cluster::audit::Mark;
use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::{Cluster, PATIENCE, Tenant};
use fuse_tests::report::{Error, Row, Section, Series};
use fuse_tests::wait;
use serde_json::{Value, json};

use crate::{Plan, TOLD, deploy, remove, told};

/// What the pods' file holds.
const VALUE: &str = "correct horse battery staple";
/// Paths of a class.
const FILES: [&str; 2] = ["password", "key"];

pub(crate) fn measure(plan: &Plan, cluster: &Cluster) -> Result<Section, Error> {
    cluster.wait_whole_driver();
    let mark = cluster.audit_mark();
    let mut rows = vec![pairs(plan, cluster)?];
    rows.extend(at_once(plan, cluster)?);
    let mounts = plan.pairs + 1 + plan.bursts * plan.many;
    rows.extend(requests(cluster, mark, mounts)?);
    Ok(rows)
}

/// A namespace with a class of two secrets that nobody has read.
fn tenant<'a>(cluster: &'a Cluster, name: &str) -> Tenant<'a> {
    let tenant = cluster.tenant(name);
    FILES.iter().for_each(|file| tenant.put(file, &json!({"value": VALUE})));
    let files = FILES.map(|file| (file, file, "value"));
    tenant.class("app", &files, &json!({"refreshInterval": "1h"}));
    tenant
}

/// A pod that prints a file of its volume; or one with an emptyDir that prints another file. Their shells do the same.
fn pod(tenant: &Tenant<'_>, name: &str, with: bool) -> Value {
    let mut pod = tenant.reader(name, "app");
    let file = if with { "/mnt/secrets/password" } else { "/etc/hostname" };
    let script = format!("echo \"$(cat {file})\"; exec sleep 86400");
    pod["spec"]["containers"][0]["command"] = json!(["sh", "-c", script]);
    if !with {
        pod["spec"]["volumes"][0] = json!({"name": "secrets", "emptyDir": {}});
    }
    pod
}

fn pairs(plan: &Plan, cluster: &Cluster) -> Result<Row, Error> {
    let tenant = tenant(cluster, "pairs");
    let (mut with, mut without) = (Series::new("with the volume"), Series::new("with an emptyDir"));
    let mut differences = Series::new("difference");
    for n in 0..=plan.pairs {
        let mut took = [0.0; 2];
        // Neither is always the first.
        for kind in [n % 2, 1 - n % 2] {
            let pod = pod(&tenant, &format!("pod-{n}-{kind}"), kind == 0);
            let name = pod["metadata"]["name"].as_str().ok_or("a pod without a name")?;
            let created = SystemTime::now();
            tenant.create(&pod);
            let uid = cluster.pod(&tenant.namespace, name).ok_or("no pod")?["metadata"]["uid"].take();
            let uid = uid.as_str().ok_or("a pod without a uid")?;
            took[kind] = nanoseconds(created, first_line(cluster, &tenant, (name, uid), kind == 0)?)?;
            tenant.remove(name);
            cluster.leaves_nothing();
        }
        // The first pod logs in, and reads what nobody has read.
        if n > 0 {
            with.times.push(took[0]);
            without.times.push(took[1]);
            differences.times.push(took[0] - took[1]);
        }
    }
    let found = differences.median();
    Ok(told(
        "pod created to its first line: what the volume adds, in the middle",
        found,
        vec![with, without, differences],
    ))
}

/// Deployments of many pods: until the last of them has printed.
fn at_once(plan: &Plan, cluster: &Cluster) -> Result<Vec<Row>, Error> {
    let (mut with, mut without) = (Series::new("with the volume"), Series::new("with an emptyDir"));
    let (mut logins, mut reads) = (0, 0);
    for _ in 0..plan.bursts {
        // Nobody has logged in from it, or read its paths.
        let tenant = tenant(cluster, "many");
        for kind in [1, 0] {
            let before = cluster.store().counts();
            let pod = pod(&tenant, &format!("kind-{kind}"), kind == 0);
            let created = SystemTime::now();
            let pods = deploy(&tenant, cluster, &pod, plan.many);
            let mut last = created;
            for (name, uid) in &pods {
                last = last.max(first_line(cluster, &tenant, (name, uid), kind == 0)?);
            }
            let series = if kind == 0 { &mut with } else { &mut without };
            series.times.push(nanoseconds(created, last)?);
            if kind == 0 {
                let after = cluster.store().counts();
                logins = logins.max(after.logins - before.logins);
                let of_path = FILES.map(|file| after.reads.get(&tenant.path(file)).copied().unwrap_or(0));
                reads = of_path.into_iter().fold(reads, u64::max);
            }
            remove(&tenant, cluster, &format!("kind-{kind}"));
        }
    }
    let many = plan.many;
    let found = with.median() - without.median();
    Ok(vec![
        told(
            &format!("{many} pods at once, until the last has printed: what volumes add"),
            found,
            vec![with, without],
        ),
        Row::counted(&format!("logins for a deployment of {many}"), "1", logins, 1),
        Row::counted("reads at the store for it, per path", "1", reads, 1),
    ])
}

/// What shim and agent have asked the API server for.
fn requests(cluster: &Cluster, mark: Mark, mounts: usize) -> Result<Vec<Row>, Error> {
    let users = Part::ALL.map(Part::user);
    // Else nothing would be counted of it.
    if !cluster.requests_since(Mark::default()).iter().any(|request| request.user == Part::Agent.user()) {
        return Err("the agent is not in the audit log".into());
    }
    let (mut writes, mut reads, mut watches, mut keys) = (0, 0, 0, 0);
    for ((user, verb, resource), count) in cluster.counts_since(mark) {
        if !users.contains(&user) {
            continue;
        }
        match &*verb {
            "watch" => watches += count,
            "get" if resource.starts_with("/openid/") || resource.starts_with("/.well-known/") => {
                keys += count
            }
            "get" | "list" => reads += count,
            _ => writes += count,
        }
    }
    let mut rest =
        Row::counted("watches begun meanwhile, issuer's keys asked for (both by the clock)", TOLD, 0, 0);
    (rest.found, rest.limit) = (format!("{watches}, {keys}"), None);
    Ok(vec![
        Row::counted(
            &format!("API requests that write, of agent and shim, for {mounts} mounts"),
            "0",
            writes,
            0,
        ),
        Row::counted("API requests that read, beyond watches", "0", reads, 0),
        rest,
    ])
}

/// When a pod's container printed its first line, and whether it is the right one.
fn first_line(
    cluster: &Cluster,
    tenant: &Tenant<'_>,
    (name, uid): (&str, &str),
    with: bool,
) -> Result<SystemTime, Error> {
    let line = wait::until(&format!("the first line of {name}"), PATIENCE, || {
        let log = cluster.container_log(&tenant.namespace, name, uid, "app");
        log.split_once('\n').map(|(line, _)| line.to_owned())
    });
    let (at, text) =
        line.split_once(" stdout F ").ok_or_else(|| format!("{name} printed otherwise: {line}"))?;
    if text != if with { VALUE } else { name } {
        return Err(format!("{name} printed something else").into());
    }
    Ok(humantime::parse_rfc3339(at).map_err(|error| format!("{at}: {error}"))?)
}

fn nanoseconds(from: SystemTime, to: SystemTime) -> Result<f64, Error> {
    let took: Duration = to.duration_since(from)?;
    Ok(took.as_secs_f64() * 1e9)
}
