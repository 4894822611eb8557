//! Parts of the cluster that end and come back, under pods that read. Each of these leaves the driver as it found it.

use std::path::Path;
use std::time::Instant;

use fuse_tests::cluster::PATIENCE;
use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::stamped::STAMPED;
use fuse_tests::node::kill;
use fuse_tests::wait;
use rustix::process::Signal;
use serde_json::json;

use crate::stage::{PODS, Stage, assert_unharmed, assert_unharmed_by_a_kill, cluster, read, wait_version};

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
    cluster.rollout("restart", Part::Agent);
    assert_ne!(cluster.wait_driver(Part::Agent), former);
    readers.go_on();
    stage.rotate(2);
    stage.another();
    assert_unharmed(&readers.report("a rolling upgrade of the agent"));
}

#[test]
fn pods_that_wait_for_the_driver_start_when_it_registers() {
    const MANY: usize = 30;
    let Some(cluster) = cluster() else { return };
    let tenant = cluster.tenant("wait");
    tenant.stamped_class();
    Part::ALL.into_iter().for_each(|part| cluster.take_away(part));
    wait::until_true("a node without the driver", PATIENCE, || !cluster.is_registered());
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
    assert!(cluster.is_registered());
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
