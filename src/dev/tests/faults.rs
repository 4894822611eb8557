use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;

use super::super::Fault;
use super::{Client, got};

const SOON: Duration = Duration::from_secs(10);

async fn with_secret() -> Client {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "one"})).unwrap();
    client
}

#[tokio::test]
async fn the_next_requests_below_a_path_fail_as_told() {
    let client = with_secret().await;
    client.store.inject(Fault::status(StatusCode::BAD_GATEWAY).times(2).below("secret/data/a")).unwrap();
    client.get("sys/health").await.ok();
    client.get("secret/data/app").await.refused(502, "injected fault");
    client.get("secret/data/app").await.refused(502, "injected fault");
    client.get("secret/data/app").await.ok();
}

#[tokio::test]
async fn a_rate_limit_says_when_to_come_back() {
    let client = with_secret().await;
    client.store.inject(Fault::rate_limit(7)).unwrap();
    let got = client.get("secret/data/app").await;
    assert_eq!((got.status, got.retry_after.as_deref()), (429, Some("7")));
    client.get("secret/data/app").await.ok();
}

#[tokio::test]
async fn garbage_is_no_json() {
    let client = with_secret().await;
    client.store.inject(Fault::garbage()).unwrap();
    let got = client.get("secret/data/app").await;
    assert_eq!((got.status, got.json), (200, json!(null)));
}

#[tokio::test]
async fn a_request_at_a_gate_is_answered_with_what_is_true_when_it_opens() {
    let client = with_secret().await;
    let gate = client.store.hold("secret/data/app").unwrap();
    let request = client.request("GET", "secret/data/app");
    let request = request.header("X-Vault-Token", client.store.root_token().expose()).send();
    let waiting = tokio::spawn(request);
    gate.arrived(1, SOON).await.unwrap();
    assert!(gate.arrived(2, Duration::ZERO).await.is_err());
    client.store.put("secret/app", &json!({"k": "two"})).unwrap();
    assert!(!waiting.is_finished());
    gate.open();
    assert_eq!(got(waiting.await.unwrap().unwrap()).await.ok()["data"]["data"]["k"], "two");
    client.get("secret/data/app").await.ok();
}

#[tokio::test]
async fn shutdown_does_not_wait_for_who_hangs() {
    let client = with_secret().await;
    let gate = client.store.hold("").unwrap();
    let waiting = tokio::spawn(client.request("GET", "sys/health").send());
    gate.arrived(1, SOON).await.unwrap();
    client.store.shutdown().await;
    assert_eq!(waiting.await.unwrap().unwrap().status(), 503);
}

#[tokio::test]
async fn faults_are_set_over_http_by_root_only() {
    let client = with_secret().await;
    let holder = client.token(&["default"]);
    assert_eq!(client.ask_as(&holder, "POST", "sys/embedded/seal", None).await.status, 403);
    assert_eq!(client.ask_as("", "POST", "sys/embedded/seal", None).await.status, 403);
    client.post("sys/embedded/fail", json!({"status": "503", "times": "1", "path": "secret/"})).await.ok();
    assert_eq!(client.get("secret/data/app").await.status, 503);
    client.post("sys/embedded/rate-limit", json!({"retry_after": 3})).await.ok();
    assert_eq!(client.get("secret/data/app").await.retry_after.as_deref(), Some("3"));
    client.post("sys/embedded/garbage", json!({})).await.ok();
    assert!(client.get("secret/data/app").await.json.is_null());
    client.post("sys/embedded/seal", json!({})).await.ok();
    assert_eq!(client.get("secret/data/app").await.status, 503);
    client.post("sys/embedded/unseal", json!({})).await.ok();
    client.get("secret/data/app").await.ok();
    assert_eq!(client.post("sys/embedded/fail", json!({"status": 99})).await.status, 400);
    assert_eq!(client.post("sys/embedded/nope", json!({})).await.status, 404);
}

#[tokio::test]
async fn what_hangs_over_http_is_released_over_http() {
    let client = with_secret().await;
    client.post("sys/embedded/hang", json!({"path": "secret/"})).await.ok();
    client.post("sys/embedded/fail", json!({"times": 100, "path": "kv/"})).await.ok();
    let request = client.request("GET", "secret/data/app");
    let mut waiting =
        tokio::spawn(request.header("X-Vault-Token", client.store.root_token().expose()).send());
    // Counted as it arrives; whether it hangs yet or will in a moment is the same to what follows.
    tokio::time::timeout(SOON, async {
        while client.store.counts().reads_of("secret/data/app") == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(tokio::time::timeout(Duration::ZERO, &mut waiting).await.is_err());
    client.post("sys/embedded/release", json!({})).await.ok();
    assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    assert_eq!(client.get("kv/x").await.status, 404);
}

#[tokio::test]
async fn requests_are_counted_as_they_arrive() {
    let client = with_secret().await;
    client.get("secret/data/app?version=1").await.ok();
    client.get("secret/data/app").await.ok();
    client.get("kv/none").await;
    client.ask("LIST", "secret/metadata", None).await.ok();
    client.post("auth/approle/login", json!({})).await;
    client.post("auth/token/renew-self", json!({})).await;
    let counts = client.store.counts();
    assert_eq!((counts.total, counts.logins, counts.renewals), (6, 1, 1));
    assert_eq!((counts.reads_of("secret/data/app"), counts.reads_of("kv/none")), (2, 1));
    assert_eq!(counts.reads.len(), 2);
    let over_http = client.get("sys/embedded/counts").await.ok();
    assert_eq!(over_http["data"], serde_json::to_value(&counts).unwrap());
}
