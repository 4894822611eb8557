use std::time::Duration;

use serde_json::json;

use super::{Client, ENVELOPE, has_members};

#[tokio::test]
async fn a_secret_written_is_read_with_its_version() {
    let client = Client::start().await;
    let written = client.post("secret/data/a/b", json!({"data": {"k": "v", "n": 1.50}})).await.ok();
    has_members(&written, ENVELOPE);
    has_members(&written["data"], "created_time custom_metadata deletion_time destroyed version");
    let read = client.get("secret/data/a/b").await.ok();
    has_members(&read, ENVELOPE);
    has_members(&read["data"], "data metadata");
    assert_eq!(read["data"]["data"], json!({"k": "v", "n": 1.5}));
    assert_eq!(read["data"]["metadata"], written["data"]);
    assert_eq!(read["data"]["metadata"]["version"], 1);
    assert_eq!((&read["mount_type"], &read["lease_duration"]), (&json!("kv"), &json!(0)));
}

#[tokio::test]
async fn numbers_keep_their_digits() {
    let client = Client::start().await;
    let body = r#"{"data": {"big": 123456789012345678901234567890, "exact": 1.10}}"#;
    let request =
        client.request("POST", "secret/data/n").header("X-Vault-Token", client.store.root_token().expose());
    assert!(request.body(body).send().await.unwrap().status().is_success());
    let request =
        client.request("GET", "secret/data/n").header("X-Vault-Token", client.store.root_token().expose());
    let text = request.send().await.unwrap().text().await.unwrap();
    assert!(text.contains(r#""data":{"big":123456789012345678901234567890,"exact":1.10}"#));
}

#[tokio::test]
async fn keys_may_hold_any_character() {
    let client = Client::start().await;
    let data = json!({"a\n\"b\"": "1", "é": "2", "": "3"});
    client.store.put("secret/app", &data).unwrap();
    client.store.put("kv/app", &data).unwrap();
    assert_eq!(client.get("secret/data/app").await.ok()["data"]["data"], data);
    assert_eq!(client.get("kv/app").await.ok()["data"], data);
}

#[tokio::test]
async fn an_older_version_is_read_by_number() {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "one"})).unwrap();
    client.store.put("secret/app", &json!({"k": "two"})).unwrap();
    assert_eq!(client.get("secret/data/app?version=1").await.ok()["data"]["data"]["k"], "one");
    assert_eq!(client.get("secret/data/app?version=0").await.ok()["data"]["data"]["k"], "two");
    let missing = client.get("secret/data/app?version=3").await;
    assert_eq!((missing.status, missing.json), (404, json!({"errors": []})));
    assert_eq!(client.get("secret/data/app?version=x").await.status, 400);
}

#[tokio::test]
async fn check_and_set_refuses_a_version_that_moved_on() {
    let client = Client::start().await;
    let write = |cas: u64| json!({"data": {"k": "v"}, "options": {"cas": cas}});
    client.post("secret/data/app", write(0)).await.ok();
    client.post("secret/data/app", write(1)).await.ok();
    let text = "check-and-set parameter did not match the current version";
    client.post("secret/data/app", write(1)).await.refused(400, text);
    client.post("secret/config", json!({"cas_required": true})).await.ok();
    let refused = client.post("secret/data/app", json!({"data": {}})).await;
    refused.refused(400, "check-and-set parameter required for this call");
}

#[tokio::test]
async fn a_deleted_version_answers_404_with_its_metadata_until_undeleted() {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "v"})).unwrap();
    client.ask("DELETE", "secret/data/app", None).await.ok();
    let gone = client.get("secret/data/app").await;
    assert_eq!(gone.status, 404);
    has_members(&gone.json, ENVELOPE);
    assert!(gone.json["data"]["data"].is_null());
    assert_ne!(gone.json["data"]["metadata"]["deletion_time"], "");
    client.post("secret/undelete/app", json!({"versions": [1]})).await.ok();
    assert_eq!(client.get("secret/data/app").await.ok()["data"]["data"]["k"], "v");
    client.post("secret/delete/app", json!({"versions": "1"})).await.ok();
    assert_eq!(client.get("secret/data/app").await.status, 404);
}

#[tokio::test]
async fn a_destroyed_version_never_comes_back() {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "v"})).unwrap();
    client.ask("PUT", "secret/destroy/app", Some(json!({"versions": [1]}))).await.ok();
    client.post("secret/undelete/app", json!({"versions": [1]})).await.ok();
    let gone = client.get("secret/data/app").await;
    assert_eq!((gone.status, &gone.json["data"]["metadata"]["destroyed"]), (404, &json!(true)));
    client.post("secret/destroy/app", json!({})).await.refused(400, "No version number provided");
}

#[tokio::test]
async fn metadata_names_every_version_that_is_kept() {
    let client = Client::start().await;
    client
        .post("secret/metadata/app", json!({"max_versions": 2, "custom_metadata": {"owner": "me"}}))
        .await
        .ok();
    for n in 1..=4 {
        client.store.put("secret/app", &json!({"n": n})).unwrap();
    }
    let data = client.get("secret/metadata/app").await.ok()["data"].take();
    has_members(
        &data,
        "cas_required created_time current_version custom_metadata delete_version_after last_updated_by \
         max_versions oldest_version updated_time versions",
    );
    has_members(&data["versions"], "3 4");
    has_members(&data["versions"]["3"], "created_by created_time deleted_by deletion_time destroyed");
    assert_eq!((&data["current_version"], &data["oldest_version"]), (&json!(4), &json!(3)));
    assert_eq!(data["custom_metadata"], json!({"owner": "me"}));
    client.ask("DELETE", "secret/metadata/app", None).await.ok();
    assert_eq!(client.get("secret/metadata/app").await.json, json!({"errors": []}));
    assert_eq!(client.get("secret/data/app").await.status, 404);
}

#[tokio::test]
async fn a_version_may_delete_itself_after_a_while() {
    let client = Client::start().await;
    client.post("secret/metadata/app", json!({"delete_version_after": "1h"})).await.ok();
    client.store.put("secret/app", &json!({"k": "v"})).unwrap();
    client.get("secret/data/app").await.ok();
    client.store.advance(Duration::from_secs(3_600));
    assert_eq!(client.get("secret/data/app").await.status, 404);
}

#[tokio::test]
async fn list_names_secrets_and_directories_by_either_method() {
    let client = Client::start().await;
    for name in ["a", "dir/x", "dir/y/z", "dir2/x"] {
        client.store.put(&format!("secret/{name}"), &json!({"k": "v"})).unwrap();
        client.store.put(&format!("kv/{name}"), &json!({"k": "v"})).unwrap();
    }
    for root in ["secret/metadata", "kv"] {
        let listed = client.ask("LIST", root, None).await.ok();
        has_members(&listed, ENVELOPE);
        assert_eq!(listed["data"], json!({"keys": ["a", "dir/", "dir2/"]}));
        let below = client.get(&format!("{root}/dir/?list=true")).await.ok();
        assert_eq!(below["data"], json!({"keys": ["x", "y/"]}));
        let none = client.ask("LIST", &format!("{root}/nope"), None).await;
        assert_eq!((none.status, none.json), (404, json!({"errors": []})));
    }
}

#[tokio::test]
async fn a_version_1_path_in_a_version_2_mount_is_answered_with_a_warning() {
    let client = Client::start().await;
    let got = client.get("secret/app").await;
    assert_eq!(got.status, 404);
    has_members(&got.json, ENVELOPE);
    assert!(got.json["data"].is_null());
    let warning = got.json["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("Invalid path for a versioned K/V secrets engine."));
}

#[tokio::test]
async fn a_merge_patch_changes_single_keys() {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"keep": "1", "drop": "2", "in": {"a": 1}})).unwrap();
    let patch = |kind: &'static str, path: &str| {
        let request =
            client.request("PATCH", path).header("X-Vault-Token", client.store.root_token().expose());
        let body = json!({"data": {"drop": null, "new": "3", "in": {"b": 2}}}).to_string();
        request.header("Content-Type", kind).body(body).send()
    };
    let merge = "application/merge-patch+json";
    assert_eq!(patch("application/json", "secret/data/app").await.unwrap().status(), 415);
    assert_eq!(patch(merge, "secret/data/none").await.unwrap().status(), 404);
    assert_eq!(patch(merge, "secret/data/app").await.unwrap().status(), 200);
    let data = client.get("secret/data/app").await.ok();
    assert_eq!(data["data"]["data"], json!({"in": {"a": 1, "b": 2}, "keep": "1", "new": "3"}));
}

#[tokio::test]
async fn a_body_without_data_is_refused_without_being_quoted() {
    let client = Client::start().await;
    client.post("secret/data/app", json!({"dat": {}})).await.refused(400, "no data provided");
    assert_eq!(client.post("secret/data/app", json!({"data": "hunter2"})).await.status, 400);
    let request =
        client.request("POST", "secret/data/app").header("X-Vault-Token", client.store.root_token().expose());
    let broken = request.body("{hunter2").send().await.unwrap();
    assert_eq!(broken.status(), 500);
    assert!(!broken.text().await.unwrap().contains("hunter2"));
    client.post("kv/app", json!({})).await.refused(400, "missing data fields");
}

#[tokio::test]
async fn a_version_1_secret_is_its_body() {
    let client = Client::start().await;
    client.ask("PUT", "kv/a/b", Some(json!({"k": "v", "in": {"x": 1}}))).await.ok();
    let read = client.get("kv/a/b").await.ok();
    has_members(&read, ENVELOPE);
    assert_eq!(read["data"], json!({"k": "v", "in": {"x": 1}}));
    assert_eq!((&read["lease_duration"], &read["mount_type"]), (&json!(2_764_800), &json!("kv")));
    client.post("kv/a/b", json!({"k": "v", "ttl": "30s"})).await.ok();
    assert_eq!(client.get("kv/a/b").await.ok()["lease_duration"], 30);
    client.ask("DELETE", "kv/a/b", None).await.ok();
    assert_eq!(client.get("kv/a/b").await.json, json!({"errors": []}));
}

#[tokio::test]
async fn names_may_hold_any_character() {
    let client = Client::start().await;
    client.post("secret/data/%C3%A9%20%2B%25%3F", json!({"data": {"k": "v"}})).await.ok();
    let listed = client.ask("LIST", "secret/metadata", None).await.ok();
    assert_eq!(listed["data"]["keys"], json!(["é +%?"]));
    assert_eq!(client.get("secret/data/%C3%A9%20+%25%3F").await.ok()["data"]["data"]["k"], "v");
}

#[tokio::test]
async fn metadata_without_a_setting_makes_no_secret() {
    let client = Client::start().await;
    client.post("secret/metadata/app", json!({})).await.ok();
    assert_eq!(client.get("secret/metadata/app").await.status, 404);
    client.post("secret/metadata/app", json!({"cas_required": "true"})).await.ok();
    let data = client.get("secret/metadata/app").await.ok()["data"].take();
    assert_eq!((&data["current_version"], &data["cas_required"]), (&json!(0), &json!(true)));
    assert_eq!(client.get("secret/data/app").await.json, json!({"errors": []}));
}
