use serde_json::{Value, json};

use super::*;

fn pod() -> Pod {
    let pod = json!({
        "metadata": {"name": "orders-0", "namespace": "payments", "uid": "uid-1"},
        "spec": {"nodeName": "worker-3", "serviceAccountName": "orders", "securityContext": {"fsGroup": 2000}},
    });
    serde_json::from_value(pod).unwrap()
}

fn volume() -> Csi {
    let volume = json!({"driver": "fuse-secrets", "readOnly": true, "volumeAttributes": {"secretProviderClass": "app"}});
    serde_json::from_value(volume).unwrap()
}

fn written(driver: &Driver) -> Value {
    let tokens = BTreeMap::from([("vault".to_owned(), Secret::new("a.b.c".to_owned()))]);
    serde_json::from_slice(&document(&pod(), &volume(), driver, tokens).unwrap()).unwrap()
}

#[test]
fn the_document_is_what_kubelet_sends() {
    let document = written(&Driver { pod_info: true, audiences: Vec::new() });
    assert_eq!(document["attributes"], json!({"secretProviderClass": "app"}));
    assert_eq!(document["tokens"], json!({"vault": "a.b.c"}));
    assert_eq!(document["group"], 2000);
    let pod = json!({
        "csi.storage.k8s.io/ephemeral": "true",
        "csi.storage.k8s.io/pod.name": "orders-0",
        "csi.storage.k8s.io/pod.namespace": "payments",
        "csi.storage.k8s.io/pod.uid": "uid-1",
        "csi.storage.k8s.io/serviceAccount.name": "orders",
    });
    assert_eq!(document["pod"], pod);
}

#[test]
fn without_pod_info_on_mount_kubelet_says_nothing_of_the_pod() {
    assert_eq!(written(&Driver { pod_info: false, audiences: Vec::new() })["pod"], json!({}));
}

#[test]
fn a_pod_is_named_by_namespace_and_name() {
    assert!(full_name("payments/orders-0").is_ok());
    for wrong in ["orders-0", "payments/", "/orders-0", "a/b/c", ""] {
        assert!(full_name(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn events_are_told_with_the_time_and_number_of_their_series() {
    let old = json!({"message": "m", "count": 3, "lastTimestamp": "2026-01-01T00:00:00Z", "eventTime": null});
    let old: Event = serde_json::from_value(old).unwrap();
    assert_eq!((old.time(), old.times()), ("2026-01-01T00:00:00Z", 3));
    let new = json!({
        "message": "m", "eventTime": "2026-01-01T00:00:00.000000Z",
        "series": {"count": 7, "lastObservedTime": "2026-01-01T00:10:00.000000Z"},
    });
    let new: Event = serde_json::from_value(new).unwrap();
    assert_eq!((new.time(), new.times()), ("2026-01-01T00:10:00.000000Z", 7));
}
