//! However a pod ends: no mount, directory, process or descriptor is left of its volume.

use std::collections::BTreeSet;

use fuse_tests::cluster::{Cluster, PATIENCE, Tenant, shared};
use fuse_tests::wait;
use serde_json::{Value, json};

const VALUE: &str = "value-of-a-test";

/// A tenant whose secret is read by pods that never stop reading.
fn reading<'a>(cluster: &'a Cluster, name: &str) -> Tenant<'a> {
    let tenant = cluster.tenant(name);
    tenant.put("app", &json!({"password": VALUE}));
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    tenant
}

/// A pod that reads all the time, and holds its file open beside; it prints the value once, when it has begun.
fn reader(tenant: &Tenant<'_>, name: &str) -> Value {
    let mut pod = tenant.reader(name, "app");
    // The pause is for the other pods of this machine.
    let script = format!(
        "cd /mnt/secrets; exec 3< password; cat password; echo
         while [ \"$(cat password)\" = {VALUE} ]; do sleep 0.02; done; echo failed"
    );
    pod["spec"]["containers"][0]["command"] = json!(["sh", "-c", script]);
    pod
}

/// Runs such pods; answers with their uids when all of them read.
fn run(cluster: &Cluster, tenant: &Tenant<'_>, pods: &[&str]) -> BTreeSet<String> {
    pods.iter().for_each(|name| tenant.create(&reader(tenant, name)));
    let uids: BTreeSet<String> =
        pods.iter().map(|name| cluster.wait_ready(&tenant.namespace, name)).collect();
    let printed = format!("{VALUE}\n");
    for name in pods {
        wait::until_true("its first read", PATIENCE, || tenant.logs(name) == printed);
    }
    assert!(uids.iter().all(|uid| cluster.mounts_of(uid) == 1));
    uids
}

/// Nothing is left on the node, of these pods and of any other that is gone.
fn nothing_of(cluster: &Cluster, uids: &BTreeSet<String>) {
    cluster.leaves_nothing();
    for uid in uids {
        assert!(!cluster.mountinfo().contains(uid), "{uid} is mounted");
        assert!(!cluster.directory().join("kubelet/pods").join(uid).exists(), "{uid} has a directory");
    }
}

#[test]
fn a_pod_deleted_while_it_reads_leaves_nothing() {
    let Some(cluster) = shared() else { return };
    let tenant = reading(&cluster, "deleted");
    let uids = run(&cluster, &tenant, &["reads"]);
    tenant.remove("reads");
    nothing_of(&cluster, &uids);
}

#[test]
fn a_deleted_namespace_leaves_nothing() {
    let Some(cluster) = shared() else { return };
    let tenant = reading(&cluster, "namespace");
    let uids = run(&cluster, &tenant, &["one", "two", "three"]);
    cluster.kubectl(&["delete", "namespace", &tenant.namespace, "--timeout=90s"]);
    nothing_of(&cluster, &uids);
}

#[test]
fn a_forced_deletion_leaves_nothing() {
    let Some(cluster) = shared() else { return };
    let tenant = reading(&cluster, "forced");
    let uids = run(&cluster, &tenant, &["stays", "goes"]);
    let forced = ["delete", "pod", "goes", "--namespace", &tenant.namespace, "--grace-period=0", "--force"];
    cluster.kubectl(&forced);
    cluster.wait_gone(&tenant.namespace, "goes");
    let (gone, stays) = {
        let stays = cluster.pod(&tenant.namespace, "stays").unwrap();
        let stays = stays["metadata"]["uid"].as_str().unwrap().to_owned();
        (uids.iter().filter(|uid| **uid != stays).cloned().collect(), stays)
    };
    nothing_of(&cluster, &gone);
    // Its neighbour, with the same secret, reads on.
    assert_eq!(cluster.mounts_of(&stays), 1);
    assert_eq!(tenant.sh("stays", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(tenant.logs("stays"), format!("{VALUE}\n"), "it has not failed");
}
