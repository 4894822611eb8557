//! Everything killed at once, and a machine that was reset: running pods get their secrets back, and whoever cannot is told.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::stamped::STAMPED;
use fuse_tests::cluster::{PATIENCE, Tenant, api};
use fuse_tests::wait;
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::stage::{cluster, read, wait_version};

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

#[test]
fn a_mount_that_cannot_be_healed_is_told_as_an_event_of_its_pod() {
    let Some(cluster) = cluster() else { return };
    let tenant = cluster.tenant("dead");
    tenant.put("app", &json!({"password": "value-of-a-test"}));
    tenant.class("app", &[("password", "app", "password"), ("old", "app", "password")], &json!({}));
    let mut pod = tenant.reader("holds-one-file", "app");
    let mount = &mut pod["spec"]["containers"][0]["volumeMounts"][0];
    (mount["subPath"], mount["mountPath"]) = (json!("old"), json!("/mnt/old"));
    tenant.run(&pod);
    tenant.run(&tenant.reader("holds-all", "app"));
    assert_eq!(tenant.sh("holds-one-file", "cat /mnt/old"), "value-of-a-test");
    // The next volume has no such file.
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    cluster.kill_driver(&Part::ALL);
    let told = tenant.wait_event("holds-one-file", "died and cannot be replaced");
    let text = "1 mounts of this volume died and cannot be replaced, such as \"/mnt/old\": the volume has no /old any more; restart the pod";
    assert_eq!(told, text, "in its owner's words: not kubelet's paths");
    assert!(tenant.exec("holds-one-file", &["cat", "/mnt/old"]).is_err(), "it is as was told");
    // Its neighbour has nothing to complain of.
    wait::until_true("its neighbour reads", PATIENCE, || {
        tenant.exec("holds-all", &["cat", "/mnt/secrets/password"]).as_deref() == Ok("value-of-a-test")
    });
    let events = cluster.events(&tenant.namespace, "holds-all");
    assert!(events.iter().all(|(reason, _)| reason != "SecretMountDead"), "{events:#?}");
    cluster.restart_driver(Part::Agent);
    cluster.restart_driver(Part::Shim);
}

#[test]
fn a_rebooted_node_publishes_everything_again() {
    let Some(mut cluster) = cluster() else { return };
    let tenant = cluster.tenant("reboot");
    tenant.stamped_class();
    let pods: Vec<(String, &str)> = ways(&tenant)
        .into_iter()
        .map(|(pod, file)| {
            tenant.run(&pod);
            (pod["metadata"]["name"].as_str().unwrap().to_owned(), file)
        })
        .collect();
    let namespace = tenant.namespace.clone();
    // The namespace outlives the node's run, which it borrows.
    std::mem::forget(tenant);
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
    for (pod, file) in &pods {
        started_again(&namespace, pod);
        assert_eq!(read(&cluster.path_in(&namespace, pod, "app", file)), Ok(1), "{pod}");
    }
    cluster.kubectl(&["delete", "namespace", &namespace]);
    cluster.leaves_nothing();
    cluster.restart_driver(Part::Agent);
    cluster.restart_driver(Part::Shim);
}
