//! Parts of the cluster that end and come back, under pods that read. Each of these leaves the driver as it found it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::handover;
use fuse_secrets_csi::wire::message::Handover;
use fuse_tests::cluster::certificates::NODE;
use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::shared::Alone;
use fuse_tests::cluster::stamped::STAMPED;
use fuse_tests::cluster::{Cluster, PATIENCE, Tenant, alone, api};
use fuse_tests::node::kill;
use fuse_tests::readers::{Readers, Seen};
use fuse_tests::{stamp, wait};
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::{Value, json};

/// Pods that read.
const PODS: usize = 5;

/// The cluster with the driver on it.
fn cluster() -> Option<Alone> {
    let cluster = alone()?;
    cluster.wait_whole_driver();
    Some(cluster)
}

/// Pods whose volumes hold the stamped secret.
struct Stage<'a> {
    cluster: &'a Cluster,
    tenant: Tenant<'a>,
    pods: Vec<String>,
}

impl<'a> Stage<'a> {
    fn new(cluster: &'a Cluster, name: &str, pods: usize) -> Self {
        let tenant = cluster.tenant(name);
        tenant.stamped_class();
        let pods: Vec<String> = (0..pods).map(|n| format!("reader-{n}")).collect();
        pods.iter().for_each(|pod| tenant.create(&tenant.reader(pod, STAMPED)));
        pods.iter().for_each(|pod| drop(cluster.wait_ready(&tenant.namespace, pod)));
        Self { cluster, tenant, pods }
    }

    fn readers(&self) -> Readers {
        let readers = self.cluster.readers(&self.tenant, &self.pods);
        readers.go_on();
        readers
    }

    /// Writes a version, and waits until each pod shows it.
    fn rotate(&self, version: u32) {
        self.tenant.stamp(version);
        for pod in &self.pods {
            wait_version(&self.cluster.stamped(&self.tenant, pod), version);
        }
    }

    /// Another pod starts, and reads.
    fn another(&self) {
        self.tenant.run(&self.tenant.reader("another", STAMPED));
        stamp::check(&std::fs::read(self.cluster.stamped(&self.tenant, "another")).unwrap()).unwrap();
    }

    /// Processes of all containers, so that one that was started again is seen.
    fn containers(&self) -> Vec<Vec<u32>> {
        self.pods.iter().map(|pod| self.cluster.processes(&self.tenant.namespace, pod, "app")).collect()
    }
}

fn wait_version(path: &Path, version: u32) {
    wait::until_true(&format!("version {version}"), PATIENCE, || {
        stamp::check(&std::fs::read(path).unwrap()).unwrap() == version
    });
}

fn assert_unharmed(seen: &Seen) {
    assert!(seen.failed.is_empty(), "{seen:?}");
}

/// No read failed; where this kernel's requests are not sent again, at most one per reader, which the agent had in flight.
fn assert_unharmed_by_a_kill(mut seen: Seen) {
    if handover::suits(&rustix::system::uname().release().to_string_lossy()) == Handover::Clone {
        let aborted = seen.failed.remove(&Errno::CONNABORTED.raw_os_error()).unwrap_or(0);
        assert!(aborted <= PODS as u64, "{aborted} aborted, {seen:?}");
    }
    assert_unharmed(&seen);
}

#[test]
fn a_pod_deleted_while_the_shim_is_down_leaves_nothing() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "orphan", 1);
    let uid = cluster.pod(&stage.tenant.namespace, "reader-0").unwrap()["metadata"]["uid"].clone();
    let uid = uid.as_str().unwrap();
    let before = stage.containers();
    cluster.take_away(Part::Shim);
    let path = format!("api/v1/namespaces/{}/pods/reader-0", stage.tenant.namespace);
    let (status, why) = cluster.ask("DELETE", &path, None);
    assert!(matches!(status, 200 | 202), "{status} {}", why["message"]);
    wait::until_true("the end of its container", PATIENCE, || {
        before[0].iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
    assert!(cluster.mountinfo().contains(uid), "nobody is there who could take its mount away");
    cluster.put_back(Part::Shim);
    cluster.wait_gone(&stage.tenant.namespace, "reader-0");
    cluster.wait_driver(Part::Shim);
    cluster.leaves_nothing();
    assert!(!cluster.mountinfo().contains(uid));
}

#[test]
fn kubelet_restarts_and_pods_go_on_reading() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "kubelet", PODS);
    let (before, readers) = (stage.containers(), stage.readers());
    cluster.restart_kubelet();
    // A pod starts only by the next kubelet, which has found the driver again.
    stage.another();
    stage.rotate(2);
    readers.go_on();
    assert_unharmed(&readers.report("kubelet restarted"));
    assert_eq!(stage.containers(), before);
}

#[test]
fn an_agent_restarts_and_no_read_fails() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "agent", PODS);
    let readers = stage.readers();
    cluster.restart_driver(Part::Agent);
    readers.go_on();
    stage.rotate(2);
    stage.another();
    assert_unharmed(&readers.report("the agent's pod deleted and made again"));
}

#[test]
fn an_agent_is_killed_and_no_read_fails() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "killed", PODS);
    let agent = cluster.driver_processes(Part::Agent);
    let [supervisor, worker] = agent[..] else { panic!("neither one nor two processes more: {agent:?}") };
    let readers = stage.readers();
    kill(worker, Signal::KILL);
    wait::until_true("the next worker", PATIENCE, || {
        let now = cluster.driver_processes(Part::Agent);
        now.len() == 2 && now[0] == supervisor && now[1] != worker
    });
    readers.go_on();
    assert_unharmed_by_a_kill(readers.report("the agent's worker killed"));
    let readers = stage.readers();
    cluster.kill_driver(&[Part::Agent]);
    readers.go_on();
    stage.rotate(2);
    assert_unharmed_by_a_kill(readers.report("the agent's container killed"));
    // kubelet starts a container later and later; a fresh pod's at once.
    cluster.restart_driver(Part::Agent);
}

#[test]
fn the_shim_restarts_and_no_read_fails() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "shim", PODS);
    let readers = stage.readers();
    cluster.restart_driver(Part::Shim);
    stage.another();
    stage.rotate(2);
    readers.go_on();
    assert_unharmed(&readers.report("the shim's pod deleted and made again"));
    let readers = stage.readers();
    cluster.kill_driver(&[Part::Shim]);
    cluster.wait_driver(Part::Shim);
    stage.rotate(3);
    readers.go_on();
    assert_unharmed(&readers.report("the shim killed"));
    cluster.restart_driver(Part::Shim);
}

#[test]
fn a_rolling_upgrade_of_the_agent_fails_no_read() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "upgrade", PODS);
    let (former, readers) = (cluster.wait_driver(Part::Agent), stage.readers());
    let name = format!("daemonset/{}", Part::Agent.name());
    cluster.kubectl(&["rollout", "restart", &name, "--namespace", Part::Agent.namespace()]);
    cluster.wait_daemon(Part::Agent.namespace(), Part::Agent.name());
    assert_ne!(cluster.wait_driver(Part::Agent), former);
    readers.go_on();
    stage.rotate(2);
    stage.another();
    assert_unharmed(&readers.report("a rolling upgrade of the agent"));
}

/// Pods that have a volume in each way that a runtime brings it into them: name, path of the file.
fn ways(tenant: &Tenant<'_>) -> Vec<(Value, &'static str)> {
    let slave = |mut pod: Value| {
        pod["spec"]["containers"][0]["volumeMounts"][0]["mountPropagation"] = json!("HostToContainer");
        pod
    };
    let user = |mut pod: Value| {
        pod["spec"]["hostUsers"] = json!(false);
        pod
    };
    let sub = |mut pod: Value| {
        let mount = &mut pod["spec"]["containers"][0]["volumeMounts"][0];
        (mount["subPath"], mount["mountPath"]) = (json!(STAMPED), json!("/mnt/one"));
        pod
    };
    let pod = |name: &str| tenant.reader(name, STAMPED);
    let file = "/mnt/secrets/stamped";
    vec![
        (pod("plain"), file),
        (slave(pod("propagated")), file),
        (user(pod("user-namespace")), file),
        (user(slave(pod("user-namespace-propagated"))), file),
        (sub(pod("sub-path")), "/mnt/one"),
        (user(sub(pod("user-namespace-sub-path"))), "/mnt/one"),
    ]
}

#[test]
fn both_killed_at_once_every_running_pod_heals() {
    let Some(cluster) = cluster() else { return };
    let tenant = cluster.tenant("heal");
    tenant.stamped_class();
    let ways = ways(&tenant);
    ways.iter().for_each(|(pod, _)| tenant.create(pod));
    let mut paths: Vec<(String, PathBuf)> = Vec::new();
    for (pod, file) in &ways {
        let name = pod["metadata"]["name"].as_str().unwrap();
        cluster.wait_ready(&tenant.namespace, name);
        let path = cluster.path_in(&tenant.namespace, name, "app", file);
        assert_eq!(read(&path), Ok(1), "{name}");
        paths.push((name.to_owned(), path));
    }
    let pids = |name: &str| cluster.processes(&tenant.namespace, name, "app");
    let before: Vec<_> = paths.iter().map(|(name, _)| pids(name)).collect();
    cluster.kill_driver(&[Part::Shim, Part::Agent]);
    let start = Instant::now();
    for (name, path) in &paths {
        assert_eq!(read(path), Err(Errno::NOTCONN.raw_os_error()), "{name}: its mount has ended");
    }
    let mut took: Vec<Option<Duration>> = vec![None; paths.len()];
    while took.contains(&None) {
        for ((name, path), took) in paths.iter().zip(&mut took).filter(|(_, took)| took.is_none()) {
            match read(path) {
                Ok(version) => {
                    assert_eq!(version, 1);
                    *took = Some(start.elapsed());
                }
                Err(error) => assert!(start.elapsed() < PATIENCE, "{name}: still {error}"),
            }
        }
        wait::pause(Duration::from_millis(10));
    }
    for ((name, _), took) in paths.iter().zip(took.iter().flatten()) {
        #[allow(clippy::print_stdout, reason = "a figure, shown when asked for")]
        {
            println!("{name}: healed after {took:.1?}, kubelet's syncFrequency 5s");
        }
    }
    // And they follow again, in the containers that they were.
    tenant.stamp(2);
    paths.iter().for_each(|(_, path)| wait_version(path, 2));
    assert_eq!(paths.iter().map(|(name, _)| pids(name)).collect::<Vec<_>>(), before);
    for (pod, file) in &ways {
        let name = pod["metadata"]["name"].as_str().unwrap();
        let length = tenant.exec(name, &["sh", "-c", &format!("wc -c < {file}")]).unwrap();
        assert!(length.trim().parse::<usize>().unwrap() > 4096, "{name}: {length}");
    }
    cluster.restart_driver(Part::Agent);
    cluster.restart_driver(Part::Shim);
}

/// The version in a file, or the number of the error.
fn read(path: &Path) -> Result<u32, i32> {
    let value = std::fs::read(path).map_err(|error| error.raw_os_error().unwrap_or(0))?;
    Ok(stamp::check(&value).unwrap())
}

#[test]
fn a_rebooted_node_publishes_everything_again() {
    let Some(mut cluster) = cluster() else { return };
    let (namespace, pods) = {
        let stage = Stage::new(&cluster, "reboot", 3);
        let all = (stage.tenant.namespace.clone(), stage.pods.clone());
        // The namespace outlives this one.
        std::mem::forget(stage.tenant);
        all
    };
    cluster.reboot();
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
    let started_again = |namespace: &str, pod: &str| {
        cluster.wait_pod(namespace, pod, "started again", |pod| {
            (restarts(pod) >= Some(1) && api::condition(pod, "Ready")).then_some(())
        });
    };
    for part in Part::ALL {
        started_again(part.namespace(), &cluster.wait_driver(part));
    }
    for pod in &pods {
        started_again(&namespace, pod);
        let path = cluster.path_in(&namespace, pod, "app", "/mnt/secrets/stamped");
        assert_eq!(read(&path), Ok(1), "{pod}");
    }
    cluster.kubectl(&["delete", "namespace", &namespace]);
    cluster.leaves_nothing();
    cluster.restart_driver(Part::Agent);
    cluster.restart_driver(Part::Shim);
}

#[test]
fn pods_that_wait_for_the_driver_start_when_it_registers() {
    const MANY: usize = 30;
    let Some(cluster) = cluster() else { return };
    let tenant = cluster.tenant("wait");
    tenant.stamped_class();
    let csi_node = format!("apis/storage.k8s.io/v1/csinodes/{NODE}");
    let is_registered = || {
        let drivers = cluster.find(&csi_node).unwrap()["spec"]["drivers"].take();
        drivers.as_array().into_iter().flatten().any(|driver| driver["name"] == "fuse-secrets")
    };
    Part::ALL.into_iter().for_each(|part| cluster.take_away(part));
    // As on a node that never had it.
    std::fs::remove_file(cluster.registration_socket()).unwrap();
    wait::until_true("a node without the driver", PATIENCE, || !is_registered());
    let before = cluster.store().counts();
    let pods: Vec<String> = (0..MANY).map(|n| format!("waits-{n}")).collect();
    pods.iter().for_each(|pod| tenant.create(&tenant.reader(pod, STAMPED)));
    for pod in &pods {
        tenant.wait_event(pod, "driver name fuse-secrets not found in the list of registered CSI drivers");
    }
    let start = Instant::now();
    Part::ALL.into_iter().for_each(|part| cluster.put_back(part));
    pods.iter().for_each(|pod| drop(cluster.wait_ready(&tenant.namespace, pod)));
    #[allow(clippy::print_stdout, reason = "a figure, shown when asked for")]
    {
        println!("{MANY} pods ready {:.1?} after the driver was let in", start.elapsed());
    }
    pods.iter().for_each(|pod| assert_eq!(read(&cluster.stamped(&tenant, pod)), Ok(1), "{pod}"));
    let after = cluster.store().counts();
    assert_eq!(after.logins - before.logins, 1, "one identity");
    assert!(is_registered());
    cluster.wait_whole_driver();
}

#[test]
fn a_lost_api_server_stops_no_mount_of_a_known_class() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "lost", 1);
    let (path, readers) = (cluster.stamped(&stage.tenant, "reader-0"), stage.readers());
    let shim = cluster.driver_processes(Part::Shim)[0];
    // Held in the moment in which kubelet has the pod's token and calls the driver.
    kill(shim, Signal::STOP);
    let mark = cluster.audit_mark();
    let mut pod = stage.tenant.reader("late", STAMPED);
    // The API server would be asked for a token of this kind too.
    pod["spec"]["automountServiceAccountToken"] = json!(false);
    pod["spec"]["containers"][0]["command"] =
        json!(["sh", "-c", "wc -c < /mnt/secrets/stamped; exec sleep 86400"]);
    stage.tenant.create(&pod);
    let namespace = &stage.tenant.namespace;
    wait::until_true("kubelet has the pod's token", PATIENCE, || {
        let requests = cluster.requests_since(mark);
        let mut tokens = requests.iter().filter(|request| request.resource == "serviceaccounts/token");
        tokens.any(|request| request.namespace == *namespace && request.code == 201)
    });
    let uid = cluster.pod(namespace, "late").unwrap()["metadata"]["uid"].as_str().unwrap().to_owned();
    cluster.stop("kube-apiserver");
    kill(shim, Signal::CONT);
    wait::until_true("what the pod printed", PATIENCE, || {
        cluster.container_log(namespace, "late", &uid, "app").contains("stdout F ")
    });
    // Whoever has a volume goes on, and follows.
    stage.tenant.stamp(2);
    wait_version(&path, 2);
    cluster.resume("kube-apiserver");
    cluster.wait_ready(namespace, "late");
    let length = stage.tenant.logs("late");
    assert!(length.trim().parse::<usize>().unwrap() > 4096, "{length}");
    readers.go_on();
    assert_unharmed(&readers.report("the API server away"));
    cluster.wait_whole_driver();
}
