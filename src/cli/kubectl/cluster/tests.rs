use serde_json::{Value, json};

use super::*;
use crate::cli::doctor::{Report, Verdict};

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn pod(name: &str, node: &str, image: &str, ready: bool) -> Value {
    let state = if ready {
        json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}})
    } else {
        json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}})
    };
    json!({
        "metadata": {"name": name, "namespace": "fuse-secrets"},
        "spec": {"nodeName": node, "containers": [{"name": "agent", "image": image}]},
        "status": {"phase": "Running", "containerStatuses": [{"name": "agent", "ready": ready, "state": state}]},
    })
}

fn set(ready: u32, desired: u32) -> Value {
    json!({
        "metadata": {"name": "fuse-secrets-agent"},
        "status": {"desiredNumberScheduled": desired, "numberReady": ready, "numberMisscheduled": 0},
    })
}

fn node(name: &str, drivers: &[&str]) -> Value {
    let drivers: Vec<Value> =
        drivers.iter().map(|name| json!({"name": name, "nodeID": "n", "topologyKeys": null})).collect();
    json!({"metadata": {"name": name}, "spec": {"drivers": drivers}})
}

fn definition(version: &str) -> Value {
    json!({"spec": {"versions": [{"name": version, "served": true}, {"name": "v0", "served": false}]}})
}

/// The CSIDriver as the manifests make it, with this in place of what they say.
fn csi_driver(change: Value) -> Value {
    let mut spec = json!({
        "attachRequired": false, "podInfoOnMount": true, "requiresRepublish": true, "fsGroupPolicy": "None",
        "volumeLifecycleModes": ["Ephemeral"], "tokenRequests": [{"audience": "vault", "expirationSeconds": 3600}],
        "storageCapacity": false, "seLinuxMount": false,
    });
    for (key, value) in change.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({"kind": "CSIDriver", "metadata": {"name": "fuse-secrets"}, "spec": spec})
}

fn pods(all: &[Value]) -> Asked<List<Pod>> {
    Ok(read(json!({"kind": "List", "items": all})))
}

/// A cluster of two nodes with everything.
fn facts() -> Facts {
    let of =
        |name: &str| ["a", "b"].map(|node| pod(&format!("{name}-{node}"), node, "registry/agent:1", true));
    Facts {
        driver: "fuse-secrets".to_owned(),
        csi_driver: Ok(Some(read(csi_driver(json!({}))))),
        definitions: [Ok(Some(read(definition("v1")))), Ok(Some(read(definition("v1alpha1"))))],
        sets: [
            ("agent", Ok(Some(read(set(2, 2)))), pods(&of("agent"))),
            ("shim", Ok(Some(read(set(2, 2)))), pods(&of("shim"))),
        ],
        csi_nodes: Ok(read(
            json!({"items": [node("a", &["other", "fuse-secrets"]), node("b", &["fuse-secrets"])]}),
        )),
    }
}

/// The verdict and all that is told of what is not good.
fn judged(facts: &Facts) -> (Verdict, String) {
    let bad: Vec<_> = facts.judge().into_iter().filter(|check| check.verdict != Verdict::Good).collect();
    let worst = if bad.iter().any(|check| check.verdict == Verdict::Lost) {
        Verdict::Lost
    } else if bad.is_empty() {
        Verdict::Good
    } else {
        Verdict::Note
    };
    (worst, bad.iter().map(|check| format!("{} {} {}\n", check.check, check.found, check.remedy)).collect())
}

#[test]
fn a_cluster_with_everything_has_no_finding() {
    assert_eq!(judged(&facts()), (Verdict::Good, String::new()));
    let text = Report { checks: facts().judge() }.to_string();
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert_eq!(facts().judge()[0].found, "fuse-secrets, tokens for \"vault\"");
}

#[test]
fn each_field_of_the_csidriver_that_is_wrong_is_lost_with_its_remedy() {
    for (change, words) in [
        (json!({"attachRequired": true}), "attachRequired: false"),
        (json!({"attachRequired": null}), "attachRequired: missing"),
        (json!({"podInfoOnMount": false}), "podInfoOnMount: true"),
        (json!({"requiresRepublish": false}), "requiresRepublish: true"),
        (json!({"volumeLifecycleModes": ["Persistent"]}), "volumeLifecycleModes: [Ephemeral]"),
        (json!({"tokenRequests": []}), "`- audience: vault`"),
    ] {
        let mut facts = facts();
        facts.csi_driver = Ok(Some(read(csi_driver(change))));
        let (verdict, text) = judged(&facts);
        assert_eq!(verdict, Verdict::Lost, "{text}");
        assert!(text.contains(words), "{words}: {text}");
    }
    let mut facts = facts();
    facts.csi_driver = Ok(Some(read(csi_driver(json!({"fsGroupPolicy": "File"})))));
    assert_eq!(judged(&facts).0, Verdict::Note);
}

#[test]
fn what_is_missing_in_the_cluster_is_named_with_where_it_is_missing() {
    let cluster = |change: fn(&mut Facts)| {
        let mut facts = facts();
        change(&mut facts);
        judged(&facts)
    };
    for ((verdict, text), wanted, words) in [
        (cluster(|f| f.csi_driver = Ok(None)), Verdict::Lost, "no CSIDriver fuse-secrets"),
        (cluster(|f| f.definitions[1] = Ok(None)), Verdict::Note, "secretsStoreImport are refused"),
        (cluster(|f| f.definitions = [Ok(None), Ok(None)]), Verdict::Lost, "no pod can name a class"),
        (cluster(|f| f.sets[0].1 = Ok(None)), Verdict::Lost, "agent pods no DaemonSet"),
        (cluster(|f| f.sets[0].1 = Ok(Some(read(set(0, 0))))), Verdict::Lost, "nodeSelector"),
        (
            cluster(|f| {
                f.sets[1].1 = Ok(Some(read(set(1, 2))));
                f.sets[1].2 = pods(&[pod("shim-a", "a", "i", true), pod("shim-b", "b", "i", false)]);
            }),
            Verdict::Lost,
            "shim pods 1 of 2 ready on their nodes volumes wait: shim-b on b (Running, CrashLoopBackOff)",
        ),
        (
            cluster(|f| {
                f.csi_nodes = Ok(read(json!({"items": [node("a", &["fuse-secrets"]), node("b", &[])]})))
            }),
            Verdict::Lost,
            "registered on 1 of 2 nodes pods with secrets do not start on b",
        ),
        (
            cluster(|f| {
                f.csi_nodes = Ok(read(
                    json!({"items": [node("a", &["fuse-secrets"]), node("b", &["fuse-secrets"]), node("c", &[])]}),
                ));
            }),
            Verdict::Note,
            "no shim is meant for c",
        ),
        (
            cluster(|f| {
                f.sets[0].2 = pods(&[
                    pod("x", "a", "registry/agent:2", true),
                    pod("y", "b", "registry/agent:2", true),
                    pod("z", "c", "registry/agent:1", true),
                ]);
            }),
            Verdict::Note,
            "registry/agent:1 on c",
        ),
        (
            cluster(|f| f.csi_nodes = Err("you may not list csinodes".to_owned())),
            Verdict::Note,
            "may not list csinodes",
        ),
    ] {
        assert_eq!(verdict, wanted, "{words}: {text}");
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn what_could_not_be_asked_is_no_good_answer() {
    assert!(facts().is_whole());
    let mut facts = facts();
    facts.csi_nodes = Err("you may not list csinodes".to_owned());
    assert!(!facts.is_whole());
}
