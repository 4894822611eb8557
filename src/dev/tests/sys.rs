use serde_json::{Value, json};

use super::super::{Embedded, Options, StartError};
use super::{Client, ENVELOPE, got, has_members};

#[tokio::test]
async fn it_refuses_to_listen_off_loopback() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let options = Options { listen: address.parse().unwrap(), ..Options::default() };
        let error = Embedded::start(options).await.err().unwrap();
        assert!(matches!(error, StartError::NotLoopback(_)));
        assert!(error.to_string().contains("127.0.0.1"));
    }
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let store = Embedded::start(Options::default()).await.unwrap();
    let port = store.address().url().port().unwrap();
    let options = Options { listen: ([127, 0, 0, 1], port).into(), ..Options::default() };
    let error = Embedded::start(options).await.err().unwrap();
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")));
}

#[tokio::test]
async fn after_shutdown_nobody_listens() {
    let client = Client::start().await;
    client.get("sys/health").await.ok();
    let url = format!("{}/v1/sys/health", client.store.address());
    client.store.shutdown().await;
    assert!(client.http.get(url).send().await.unwrap_err().is_connect());
}

#[tokio::test]
async fn the_banner_says_what_it_is_and_no_token() {
    let store = Embedded::start(Options::default()).await.unwrap();
    let banner = store.banner();
    assert!(banner.contains("for development and tests") && banner.contains("not a secret store"));
    assert!(!banner.contains(store.root_token().expose()));
}

#[tokio::test]
async fn health_needs_no_token_and_tells_sealed_by_its_status() {
    let client = Client::start().await;
    let health = async |query: &str| client.ask_as("", "GET", &format!("sys/health{query}"), None).await;
    let got = health("").await;
    assert_eq!((got.status, &got.json["sealed"]), (200, &json!(false)));
    assert_eq!(health("?activecode=204").await.status, 204);
    client.post("sys/seal", json!({})).await.ok();
    let got = health("").await;
    assert_eq!((got.status, &got.json["sealed"]), (503, &json!(true)));
    assert_eq!(health("?sealedcode=299").await.status, 299);
}

#[tokio::test]
async fn a_sealed_store_answers_503_until_unsealed() {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "v"})).unwrap();
    client.store.seal();
    client.get("secret/data/app").await.refused(503, "Vault is sealed");
    client.post("auth/approle/login", json!({})).await.refused(503, "Vault is sealed");
    let status = client.ask_as("", "GET", "sys/seal-status", None).await.ok();
    assert_eq!((&status["sealed"], &status["initialized"]), (&json!(true), &json!(true)));
    let status = client.ask_as("", "PUT", "sys/unseal", Some(json!({"key": "ab"}))).await.ok();
    assert_eq!(status["sealed"], false);
    client.get("secret/data/app").await.ok();
}

#[tokio::test]
async fn mounts_are_listed_beside_and_inside_the_envelope() {
    let client = Client::start().await;
    let mounts = client.get("sys/mounts").await.ok();
    has_members(&mounts, &format!("kv/ secret/ {ENVELOPE}"));
    assert_eq!(mounts["data"]["secret/"], mounts["secret/"]);
    has_members(
        &mounts["secret/"],
        "accessor config deprecation_status description external_entropy_access local options plugin_version \
         running_plugin_version running_sha256 seal_wrap type uuid",
    );
    assert_eq!(mounts["secret/"]["options"], json!({"version": "2"}));
    assert_eq!(mounts["kv/"]["options"], json!({"version": "1"}));
}

#[tokio::test]
async fn a_path_is_traced_to_its_mount() {
    let client = Client::start().await;
    client.post("sys/mounts/team/x", json!({"type": "kv-v2", "description": "theirs"})).await.ok();
    let mount = client.get("sys/internal/ui/mounts/team/x/some/where").await.ok();
    assert_eq!((&mount["data"]["path"], &mount["mount_type"]), (&json!("team/x/"), &json!("")));
    assert_eq!(mount["data"]["options"]["version"], "2");
    let all = client.get("sys/internal/ui/mounts").await.ok();
    has_members(&all["data"]["secret"], "kv/ secret/ team/x/");
    let text = "preflight capability check returned 403, please ensure client's policies grant access to path \"no/x/\"";
    client.get("sys/internal/ui/mounts/no/x").await.refused(403, text);
    client.ask("DELETE", "sys/mounts/team/x", None).await.ok();
    let text = "no handler for route \"team/x/data/a\". route entry not found.";
    client.get("team/x/data/a").await.refused(404, text);
}

#[tokio::test]
async fn a_holder_sees_only_mounts_that_its_policies_reach() {
    let client = Client::start().await;
    let policy = json!({"policy": "path \"secret/data/a/*\" { capabilities = [\"read\"] }"});
    client.store.write("sys/policies/acl/app", &policy).unwrap();
    let token = client.token(&["app"]);
    let seen = client.ask_as(&token, "GET", "sys/internal/ui/mounts/secret/a", None).await.ok();
    assert_eq!(seen["data"]["path"], "secret/");
    assert_eq!(client.ask_as(&token, "GET", "sys/internal/ui/mounts/kv/a", None).await.status, 403);
    let all = client.ask_as(&token, "GET", "sys/internal/ui/mounts", None).await.ok();
    has_members(&all["data"]["secret"], "secret/");
    client.ask_as("", "GET", "sys/internal/ui/mounts/secret", None).await.refused(403, "permission denied");
}

#[tokio::test]
async fn a_mount_in_use_or_of_an_unknown_type_is_refused() {
    let client = Client::start().await;
    let kv = json!({"type": "kv"});
    client.post("sys/mounts/secret", kv.clone()).await.refused(400, "path is already in use at secret/");
    client.post("sys/mounts/secret/x", kv).await.refused(400, "path is already in use at secret/");
    let refused = client.post("sys/mounts/x", json!({"type": "pki"})).await;
    refused.refused(400, "plugin not found in the catalog: pki");
}

#[tokio::test]
async fn policies_are_written_listed_read_and_deleted() {
    let client = Client::start().await;
    let text = "path \"a\" { capabilities = [\"read\"] }";
    client.ask("PUT", "sys/policies/acl/app", Some(json!({"policy": text}))).await.ok();
    assert_eq!(client.get("sys/policies/acl/app").await.ok()["data"], json!({"name": "app", "policy": text}));
    assert_eq!(client.get("sys/policy/app").await.ok()["rules"], text);
    let listed = client.ask("LIST", "sys/policies/acl", None).await.ok();
    assert_eq!(listed["data"]["keys"], json!(["app", "default", "root"]));
    client.ask("DELETE", "sys/policies/acl/app", None).await.ok();
    assert_eq!(client.get("sys/policies/acl/app").await.json, json!({"errors": []}));
    let refused =
        client.post("sys/policies/acl/x", json!({"policy": "path \"x\" { capabilities = [\"fly\"] }"})).await;
    refused.refused(400, "failed to parse policy: path \"x\": invalid capability \"fly\"");
}

#[tokio::test]
async fn a_namespace_changes_nothing_and_is_counted() {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "v"})).unwrap();
    for namespace in ["", "team-a", "team-a"] {
        let request = client.request("GET", "secret/data/app").header("X-Vault-Namespace", namespace);
        let request =
            request.header("Authorization", format!("Bearer {}", client.store.root_token().expose()));
        assert_eq!(got(request.send().await.unwrap()).await.status, 200);
    }
    assert_eq!(client.store.counts().namespaces, [("team-a".to_owned(), 2)].into());
}

#[tokio::test]
async fn an_unknown_path_or_method_is_refused() {
    let client = Client::start().await;
    client.get("sys/nope").await.refused(404, "1 error occurred:\n\t* unsupported path\n\n");
    client.get("nope/x").await.refused(404, "no handler for route \"nope/x\". route entry not found.");
    client
        .ask("LIST", "nope/x", None)
        .await
        .refused(404, "no handler for route \"nope/x/\". route entry not found.");
    client.get("secret/delete/x").await.refused(405, "1 error occurred:\n\t* unsupported operation\n\n");
    let none = client.http.get(client.store.address().url().clone()).send().await.unwrap();
    assert_eq!(got(none).await.json, json!({"errors": []}));
    assert_eq!(
        client.ask("OPTIONS", "secret/data/x", None).await.json,
        json!({"errors": Value::Array(vec![])})
    );
}
