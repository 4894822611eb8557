//! The cluster by itself: what every other test in here takes for granted.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use fuse_tests::cluster::certificates::NODE;
use fuse_tests::cluster::tenant::ACCOUNT;
use fuse_tests::cluster::{alone, api, shared};
use fuse_tests::{needs, wait};
use serde_json::{Value, json};

#[test]
fn a_pod_runs_and_prints_and_its_end_leaves_nothing() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("plain");
    let mut pod = tenant.pod("hello");
    pod["spec"]["containers"][0]["command"] =
        json!(["sh", "-c", "echo hello from $(hostname); exec sleep 86400"]);
    let uid = tenant.run(&pod);
    assert_eq!(tenant.logs("hello"), "hello from hello\n");
    assert_eq!(tenant.exec("hello", &["cat", "/etc/hostname"]).unwrap(), "hello\n");
    let refused = tenant.exec("hello", &["cat", "/nothing"]).unwrap_err();
    assert!(refused.contains("No such file"), "{refused}");
    let processes = cluster.processes(&tenant.namespace, "hello", "app");
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", processes[0])).unwrap();
    assert_eq!(line, "sleep\086400\0");
    assert!(cluster.mountinfo().contains(&uid), "its service account's token is a mount of the node");
    tenant.remove("hello");
    cluster.leaves_nothing();
    assert!(!cluster.mountinfo().contains(&uid));
}

#[test]
fn a_pod_that_cannot_start_says_why_in_an_event() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("wrong");
    let mut pod = tenant.pod("waits");
    pod["spec"]["containers"][0]["image"] = json!("localhost/nothing:1");
    tenant.create(&pod);
    let message = tenant.wait_event("waits", "localhost/nothing:1");
    assert!(message.contains("is not present with pull policy of Never"), "{message}");
}

#[test]
fn a_service_account_logs_in_at_the_store_both_ways_and_another_one_does_not() {
    let Some(cluster) = shared() else { return };
    if !cluster.has_store() {
        // Which was said when the cluster was started.
        return;
    }
    let tenant = cluster.tenant("login");
    tenant.account("stranger");
    tenant.put("app", &json!({"password": "value-of-a-test"}));
    let ways: &[&str] = if cluster.store().ca().is_some() { &["kubernetes", "jwt"] } else { &["jwt"] };
    for way in ways {
        let login = |account: &str, audience: &str| {
            let token = cluster.token(&tenant.namespace, account, audience);
            let body = json!({"role": tenant.role, "jwt": token});
            cluster.store().ask("POST", &format!("auth/{way}/login"), Some(&body))
        };
        let (status, answer) = login(ACCOUNT, "vault");
        let policies = answer["auth"]["token_policies"].as_array();
        assert_eq!(status, 200, "{way}: {}", answer["errors"]);
        assert!(policies.unwrap().contains(&json!(tenant.role)), "{way}");
        for (account, audience) in [("stranger", "vault"), (ACCOUNT, "other")] {
            let (status, answer) = login(account, audience);
            assert!(
                (400..=403).contains(&status),
                "{way}, {account}, {audience}: {status} {}",
                answer["errors"]
            );
        }
    }
    assert!(cluster.store().counts().logins >= 3);
}

#[test]
fn a_pod_reaches_the_store_and_the_api_server() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("network");
    tenant.run(&tenant.pod("asks"));
    for (address, port) in [("10.88.0.1", "443"), ("10.96.0.1", "443"), ("10.88.0.1", "8200")] {
        if port != "8200" || cluster.has_store() {
            let connect = format!("nc -w 5 {address} {port} </dev/null");
            tenant.exec("asks", &["sh", "-c", &connect]).unwrap();
        }
    }
}

#[test]
fn requests_are_counted_by_who_made_them() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("counts");
    let mark = cluster.audit_mark();
    tenant.run(&tenant.pod("counted"));
    let ours = |user: &str, verb: &str, resource: &str| {
        let requests = cluster.requests_since(mark).into_iter();
        requests
            .filter(|request| request.namespace == tenant.namespace)
            .filter(|request| request.user == user && request.verb == verb && request.resource == resource)
            .count()
    };
    assert_eq!(ours("admin", "create", "pods"), 1);
    assert_eq!(ours("system:kube-scheduler", "create", "pods/binding"), 1);
    assert!(ours(&format!("system:node:{NODE}"), "patch", "pods/status") >= 1);
    let counts = cluster.counts_since(mark);
    assert!(counts[&("admin".to_owned(), "create".to_owned(), "pods".to_owned())] >= 1);
}

#[test]
fn kubelet_and_containerd_are_started_again_and_containers_go_on() {
    let Some(cluster) = alone() else { return };
    let tenant = cluster.tenant("restart");
    tenant.run(&tenant.pod("stays"));
    let before = cluster.processes(&tenant.namespace, "stays", "app");
    cluster.restart_kubelet();
    cluster.restart("containerd");
    cluster.stop("kubelet");
    assert!(cluster.component("kubelet").is_none());
    cluster.resume("kubelet");
    // It answers again.
    wait::until_true("exec by the next kubelet", fuse_tests::cluster::PATIENCE, || {
        tenant.exec("stays", &["true"]).is_ok()
    });
    assert_eq!(cluster.processes(&tenant.namespace, "stays", "app"), before);
}

#[test]
fn a_reboot_ends_every_process_and_keeps_what_the_api_server_knows() {
    let Some(mut cluster) = alone() else { return };
    let (namespace, old, boot) = {
        let tenant = cluster.tenant("reboot");
        tenant.run(&tenant.pod("again"));
        let old = cluster.processes(&tenant.namespace, "again", "app")[0];
        let boot =
            cluster.find(&format!("api/v1/nodes/{NODE}")).unwrap()["status"]["nodeInfo"]["bootID"].clone();
        let namespace = tenant.namespace.clone();
        // The namespace outlives this one.
        std::mem::forget(tenant);
        (namespace, old, boot)
    };
    cluster.reboot();
    assert!(!Path::new(&format!("/proc/{old}")).exists() || !is_sleep(old));
    let node = cluster.find(&format!("api/v1/nodes/{NODE}")).unwrap();
    assert_ne!(node["status"]["nodeInfo"]["bootID"], boot);
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
    cluster.wait_pod(&namespace, "again", "started again", |pod| {
        (restarts(pod) == Some(1) && api::condition(pod, "Ready")).then_some(())
    });
    assert!(is_sleep(cluster.processes(&namespace, "again", "app")[0]));
    cluster.kubectl(&["delete", "namespace", &namespace]);
    cluster.leaves_nothing();
}

#[test]
fn a_killed_process_of_a_test_leaves_no_process_no_directory_no_cgroup() {
    if needs::cluster().is_none() {
        return;
    }
    let mut holder = Command::new(env!("CARGO_BIN_EXE_test-cluster"));
    holder.arg("stay").env_remove("FUSE_SECRETS_TEST_VAULT").stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let state: Value = serde_json::from_str(&line).unwrap();
    let directory = Path::new(state["directory"].as_str().unwrap());
    let name = directory.file_name().unwrap().to_str().unwrap();
    assert!(processes_of(name) > 5);
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait::until_true("nothing of it", Duration::from_secs(30), || {
        !directory.exists() && processes_of(name) == 0
    });
    let mut cgroups = walk("/sys/fs/cgroup", 2);
    cgroups.retain(|path| path.contains(name));
    assert_eq!(cgroups, Vec::<String>::new());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(name));
}

fn is_sleep(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sleep\0"))
}

/// How many processes are in cgroups of this name.
fn processes_of(cluster: &str) -> usize {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter(|entry| {
        std::fs::read_to_string(entry.path().join("cgroup")).is_ok_and(|text| text.contains(cluster))
    })
    .count()
}

fn walk(directory: &str, depth: u32) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path().display().to_string();
            if depth > 1 {
                found.extend(walk(&path, depth - 1));
            }
            found.push(path);
        }
    }
    found
}
