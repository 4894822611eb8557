//! What docs/operations.md tells people to do to nodes and to the driver, done as it says.

use std::path::Path;
use std::process::Output;

use fuse_tests::cluster::certificates::NODE;
use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::shared::settings;
use fuse_tests::cluster::stamped::STAMPED;
use fuse_tests::cluster::{Cluster, PATIENCE, api};
use fuse_tests::wait;
use serde_json::{Value, json};

use crate::stage::{PODS, Stage, assert_unharmed, cluster};

/// Runs a script of this repository, or one that is given as `-c`, as the cluster's administrator does.
fn sh(cluster: &Cluster, words: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let mut command = cluster.with_kubectl(directory.path(), Path::new("sh"));
    command.args(words).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap());
    cluster.world().spawn(command).wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The settings that the agents' DaemonSet has now: the name of their ConfigMap.
fn settings_of(cluster: &Cluster) -> String {
    let volumes = cluster.daemon_set(Part::Agent)["spec"]["template"]["spec"]["volumes"].take();
    let names: Vec<&str> = volumes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|volume| volume["configMap"]["name"].as_str())
        .collect();
    let [name] = names[..] else { panic!("one ConfigMap: {names:?}") };
    name.to_owned()
}

#[test]
fn an_upgrade_of_the_agent_is_rolled_back_and_no_read_fails() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "rollback", PODS);
    let (former, readers) = (settings_of(&cluster), stage.readers());
    let mut changed = settings();
    changed["publishDeadline"] = json!("19s");
    cluster.install_with(&changed, &[]);
    assert_ne!(settings_of(&cluster), former);
    stage.rotate(2);
    cluster.rollout("undo", Part::Agent);
    assert_eq!(settings_of(&cluster), former, "its ConfigMap is still there");
    stage.rotate(3);
    stage.another();
    readers.go_on();
    assert_unharmed(&readers.report("settings rolled out and back"));
}

#[test]
fn an_agent_that_never_gets_ready_stops_the_rollout_and_the_former_one_serves() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "never", PODS);
    let (former, readers) = (cluster.wait_driver(Part::Agent), stage.readers());
    let name = format!("daemonset/{}", Part::Agent.name());
    let image =
        format!("{}=localhost/fuse-secrets-csi:{}", Part::Agent.container(), env!("CARGO_PKG_VERSION"));
    // An image that exists and is no agent.
    cluster.kubectl(&["set", "image", &name, &image, "--namespace", Part::Agent.namespace()]);
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
    wait::until_true("the new one ends again and again", PATIENCE, || {
        cluster.driver_pods(Part::Agent).iter().any(|pod| restarts(pod) >= Some(2))
    });
    let pods = cluster.driver_pods(Part::Agent);
    let [kept] = &pods.iter().filter(|pod| pod["metadata"]["name"] == *former).collect::<Vec<_>>()[..] else {
        panic!("the former one is gone: {pods:#?}")
    };
    assert!(kept["metadata"]["deletionTimestamp"].is_null() && api::condition(kept, "Ready"));
    stage.rotate(2);
    stage.another();
    cluster.rollout("undo", Part::Agent);
    assert_eq!(cluster.wait_driver(Part::Agent), former, "it was never replaced");
    readers.go_on();
    assert_unharmed(&readers.report("an agent that never gets ready"));
}

#[test]
fn a_drained_node_lets_go_of_every_volume_and_keeps_the_driver() {
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "drain", PODS);
    let before = Part::ALL.map(|part| cluster.driver_processes(part));
    // No controller makes these pods again elsewhere, which a drain wants to be told.
    cluster.kubectl(&["drain", NODE, "--ignore-daemonsets", "--force", "--timeout=60s"]);
    for pod in &stage.pods {
        cluster.wait_gone(&stage.tenant.namespace, pod);
    }
    cluster.leaves_nothing();
    assert_eq!(Part::ALL.map(|part| cluster.driver_processes(part)), before);
    cluster.kubectl(&["uncordon", NODE]);
    stage.another();
}

#[test]
fn a_start_up_taint_keeps_pods_away_until_the_driver_is_there() {
    let Some(cluster) = cluster() else { return };
    let document = include_str!("../../../docs/operations.md");
    let (_, section) = document.split_once("## New nodes").unwrap();
    let (_, recipe) = section.split_once("```sh\n").unwrap();
    let (recipe, _) = recipe.split_once("```").unwrap();
    let take_off = || {
        let done = sh(&cluster, &["-c", recipe]);
        assert!(done.status.success(), "{}", text(&done.stderr));
    };
    let taints = || cluster.find(&format!("api/v1/nodes/{NODE}")).unwrap()["spec"]["taints"].to_string();
    let tenant = cluster.tenant("taint");
    tenant.stamped_class();
    cluster.take_away(Part::Shim);
    wait::until_true("a node without the driver", PATIENCE, || !cluster.is_registered());
    cluster.kubectl(&["taint", "node", NODE, "fuse-secrets/starting:NoSchedule"]);
    tenant.create(&tenant.reader("early", STAMPED));
    cluster.wait_pod(&tenant.namespace, "early", "kept away", |pod| {
        let conditions = pod["status"]["conditions"].as_array()?;
        conditions.iter().find(|condition| condition["reason"] == "Unschedulable").map(drop)
    });
    take_off();
    assert!(taints().contains("fuse-secrets/starting"), "{}", taints());
    cluster.put_back(Part::Shim);
    wait::until_true("the taint is off", PATIENCE, || {
        take_off();
        !taints().contains("fuse-secrets/starting")
    });
    cluster.wait_ready(&tenant.namespace, "early");
    cluster.wait_whole_driver();
}

#[test]
fn an_uninstall_is_refused_while_a_pod_has_a_volume_and_then_leaves_nothing() {
    const SCRIPT: &str = "deploy/uninstall.sh";
    let Some(cluster) = cluster() else { return };
    let stage = Stage::new(&cluster, "uninstall", 1);
    let names = [
        "apis/storage.k8s.io/v1/csidrivers/fuse-secrets",
        "api/v1/namespaces/fuse-secrets",
        "api/v1/namespaces/fuse-secrets-csi",
        "apis/rbac.authorization.k8s.io/v1/clusterroles/fuse-secrets-agent",
        "apis/rbac.authorization.k8s.io/v1/clusterrolebindings/fuse-secrets-agent",
    ];
    let readers = stage.readers();
    for words in [&[SCRIPT][..], &[SCRIPT, "--check"]] {
        let refused = sh(&cluster, words);
        assert_eq!(refused.status.code(), Some(1));
        let why = text(&refused.stderr);
        let pod = format!("these have volumes of fuse-secrets:\n  pod {}/reader-0\n", stage.tenant.namespace);
        assert_eq!(why, pod, "{}", text(&refused.stdout));
    }
    assert!(names.iter().all(|name| cluster.find(name).is_some()));
    readers.go_on();
    assert_unharmed(&readers.report("refused uninstalls"));
    stage.tenant.remove("reader-0");
    cluster.leaves_nothing();

    let done = sh(&cluster, &[SCRIPT]);
    assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr));
    for name in names {
        assert!(cluster.find(name).is_none(), "{name}");
    }
    assert!(!cluster.mountinfo().contains(" - fuse"), "{}", cluster.mountinfo());
    let registry = cluster.directory().join("kubelet/plugins_registry");
    assert_eq!(std::fs::read_dir(registry).unwrap().count(), 0, "kubelet is to know that it is gone");
    // Classes and their definitions are not the driver's alone.
    assert!(stage.tenant.has_class(STAMPED));
    // Whoever comes too late is told by kubelet, and starts when there is a driver again.
    stage.tenant.create(&stage.tenant.reader("late", STAMPED));
    stage
        .tenant
        .wait_event("late", "driver name fuse-secrets not found in the list of registered CSI drivers");
    cluster.install_with(&settings(), &[]);
    cluster.wait_ready(&stage.tenant.namespace, "late");
    stage.another();
}
