//! `kubectl fuse-secrets` on the real cluster: the real kubectl finds the program in PATH, and runs it with real rights.

use std::os::unix::fs::symlink;
use std::path::Path;

use fuse_tests::cluster::certificates::NODE;
use fuse_tests::cluster::{Cluster, shared};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A value that must be nowhere but in its file.
const VALUE: &str = "value-of-the-plugins-tests";

/// A directory for PATH with both programs.
struct Plugin<'a> {
    cluster: &'a Cluster,
    directory: TempDir,
}

struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl<'a> Plugin<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_test-agent")).with_file_name("kubectl-fuse_secrets");
        assert!(program.exists(), "{} is missing: run `cargo build --workspace`", program.display());
        symlink(program, directory.path().join("kubectl-fuse_secrets")).unwrap();
        Self { cluster, directory }
    }

    /// `kubectl fuse-secrets`, as the cluster's administrator.
    fn run(&self, words: &[&str]) -> Ended {
        self.run_with(&self.cluster.kubeconfig(), words)
    }

    fn run_with(&self, kubeconfig: &Path, words: &[&str]) -> Ended {
        let directory = self.directory.path();
        let mut command = self.cluster.with_kubectl(directory, &directory.join("kubectl"));
        command.env("KUBECONFIG", kubeconfig).arg("fuse-secrets").args(words);
        let output = self.cluster.world().spawn(command).wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ended =
            Ended { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!ended.out.contains(VALUE) && !ended.err.contains(VALUE), "a value is printed");
        ended
    }

    fn json(&self, words: &[&str]) -> Value {
        let ended = self.run(&[words, &["-o", "json"]].concat());
        serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {}{}", ended.out, ended.err))
    }
}

#[test]
fn kubectl_fuse_secrets_lists_the_mounts_of_pods() {
    let Some(cluster) = shared() else { return };
    let (plugin, tenant) = (Plugin::new(&cluster), cluster.tenant("plugin-mounts"));
    tenant.put("app", &json!({"password": VALUE}));
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    tenant.run(&tenant.reader("reads", "app"));
    let table = plugin.run(&["mounts", "-n", &tenant.namespace]);
    assert_eq!(table.code, 0, "{}{}", table.out, table.err);
    for word in ["NODE", NODE, "fresh", "1 mount, 0 stale, 0 gone"] {
        assert!(table.out.contains(word), "{word}: {}", table.out);
    }
    assert!(table.out.lines().all(|line| line.chars().count() <= 80), "{}", table.out);
    let mounts = plugin.json(&["mounts", "--node", NODE, "-n", &tenant.namespace]);
    let mount = &mounts[0];
    assert_eq!((&mount["node"], &mount["pod"], &mount["files"]), (&json!(NODE), &json!("reads"), &json!(1)));
    assert_eq!(mounts.as_array().unwrap().len(), 1);
    let none = plugin.run(&["mounts", "--node", "no-such-node"]);
    assert_eq!(none.code, 65, "{}", none.err);
}

#[test]
fn kubectl_fuse_secrets_doctor_finds_the_driver_as_the_manifests_make_it() {
    let Some(cluster) = shared() else { return };
    let found = Plugin::new(&cluster).json(&["doctor"]);
    let checks = found["cluster"].as_array().unwrap();
    let bad: Vec<&Value> = checks.iter().filter(|check| check["verdict"] != "good").collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert!(checks.len() >= 8, "{checks:#?}");
    let node = &found["nodes"][0];
    assert_eq!((&node["node"], &node["why"]), (&json!(NODE), &Value::Null));
    assert_eq!(node["checks"][0]["check"], "kernel");
}

#[test]
fn kubectl_fuse_secrets_check_reads_what_a_pod_reads() {
    let Some(cluster) = shared() else { return };
    let (plugin, tenant) = (Plugin::new(&cluster), cluster.tenant("plugin-check"));
    tenant.put("app", &json!({"password": VALUE}));
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    tenant.run(&tenant.reader("reads", "app"));
    let pod = format!("{}/reads", tenant.namespace);
    let check = plugin.run(&["check", "--pod", &pod]);
    assert_eq!(check.code, 0, "{}{}", check.out, check.err);
    for step in [
        "CSIDriver",
        "registered",
        "agent",
        "attributes",
        "class",
        "policy",
        "token",
        "account",
        "signature",
        "login",
        "read",
    ] {
        assert!(check.out.contains(&format!("✓ {step}")), "{step}: {}", check.out);
    }
    let found = plugin.json(&["check", "--pod", &pod]);
    assert_eq!(found["volumes"][0]["files"][0]["bytes"], VALUE.len());
}

#[test]
fn kubectl_fuse_secrets_check_says_word_for_word_what_the_pod_was_told() {
    let Some(cluster) = shared() else { return };
    let (plugin, tenant) = (Plugin::new(&cluster), cluster.tenant("plugin-told"));
    tenant.put("app", &json!({"password": VALUE}));
    tenant.class("no-key", &[("password", "app", "pasword")], &json!({}));
    for (name, class, step) in [("one", "nope", "class"), ("two", "no-key", "read")] {
        tenant.create(&tenant.reader(name, class));
        let event = tenant.wait_event(name, "rpc error");
        let found = plugin.json(&["check", "--pod", &format!("{}/{name}", tenant.namespace)]);
        let volume = &found["volumes"][0];
        let refused = format!(
            "rpc error: code = {} desc = {}",
            volume["refused"]["code"].as_str().unwrap(),
            volume["refused"]["text"].as_str().unwrap()
        );
        assert!(event.contains(&refused), "{event}\n{refused}");
        assert_eq!(volume["steps"].as_array().unwrap().last().unwrap()["step"], step);
        let events = found["events"].as_array().unwrap();
        assert!(events[0]["message"].as_str().unwrap().contains("rpc error"), "{events:#?}");
        tenant.remove(name);
    }
}

#[test]
fn kubectl_fuse_secrets_names_the_rights_that_a_person_lacks() {
    let Some(cluster) = shared() else { return };
    let (plugin, tenant) = (Plugin::new(&cluster), cluster.tenant("plugin-rights"));
    // A person with the rights of a service account, which has none.
    let config = cluster.kubectl(&["config", "view", "--raw", "-o", "json"]);
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let token = cluster.kubectl(&["create", "token", "app", "-n", &tenant.namespace, "--duration", "10m"]);
    config["users"][0]["user"] = json!({"token": token.trim()});
    let file = plugin.directory.path().join("account.kubeconfig");
    std::fs::write(&file, config.to_string()).unwrap();
    let mounts = plugin.run_with(&file, &["mounts"]);
    assert_eq!(mounts.code, 77, "{}{}", mounts.out, mounts.err);
    assert!(mounts.err.contains("you may not list pods in namespace fuse-secrets: "), "{}", mounts.err);
}
