//! Classes that are watched.

use std::process::Command;

use axum::http::StatusCode;
use fuse_secrets::class::{Classes, FindError, Kind};
use fuse_secrets::kubernetes::classes::Watched;
use serde_json::{Value, json};

use crate::api::{Server, connect, metrics, until};

const IMPORT: Kind = Kind::SecretsStoreImport;
const PROVIDER: Kind = Kind::SecretProviderClass;

fn import(namespace: &str, name: &str, role: &str) -> Value {
    json!({
        "apiVersion": "deckhouse.io/v1alpha1", "kind": "SecretsStoreImport",
        "metadata": {
            "name": name, "namespace": namespace, "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x".repeat(1_000), "fuse-secrets/max-age": "7m"},
        },
        "spec": {"type": "CSI", "role": role, "files": [{"name": "a", "source": {"path": "secret/data/a", "key": "k"}}]},
    })
}

fn role(classes: &Watched, namespace: &str, name: &str) -> Option<String> {
    classes.find(IMPORT, namespace, name).unwrap().and_then(|class| class.settings.login.role)
}

async fn known(classes: &Watched) {
    tokio::time::timeout(crate::api::PATIENCE, async {
        classes.known(IMPORT).await;
        classes.known(PROVIDER).await;
    })
    .await
    .expect("classes are known");
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_come_in_pages_and_every_change_is_followed_without_another_request() {
    let server = Server::start().await;
    for number in 0..250 {
        server.put(import("app", &format!("class-{number:03}"), "first"));
    }
    server.put(import("billing", "class-000", "other"));
    let metrics = metrics();
    let classes = Watched::start(server.api(), metrics.clone());
    known(&classes).await;
    assert_eq!(role(&classes, "app", "class-249").as_deref(), Some("first"));
    let class = classes.find(IMPORT, "app", "class-000").unwrap().unwrap();
    assert_eq!(class.full_name(), "app/class-000");
    assert_eq!(class.freshness().max_age.as_secs(), 420, "our annotations are kept");
    assert_eq!(metrics.classes_import.value(), 251);
    let lists = server.count("GET /apis/deckhouse.io/v1alpha1/secretsstoreimports");
    assert!(lists >= 3, "{lists} pages");

    server.put(import("app", "class-000", "second"));
    server.put(import("app", "new", "first"));
    server.delete(IMPORT, "app", "class-001");
    until("the last change", || role(&classes, "app", "class-001").is_none()).await;
    assert_eq!(role(&classes, "app", "class-000").as_deref(), Some("second"));
    assert_eq!(role(&classes, "app", "new").as_deref(), Some("first"));
    assert_eq!(classes.names("app").unwrap().len(), 250);
    assert_eq!(classes.names("ap").unwrap(), []);
    assert_eq!(classes.elsewhere(IMPORT, "shop", "class-000"), ["app", "billing"]);
    assert_eq!(classes.elsewhere(IMPORT, "app", "class-000"), ["billing"]);
    assert_eq!(classes.elsewhere(PROVIDER, "shop", "class-000"), [""; 0]);
    assert_eq!(server.count("GET /apis/deckhouse.io/v1alpha1/secretsstoreimports"), lists.max(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_a_class_are_told_when_it_is_asked_for_and_others_are_good() {
    let server = Server::start().await;
    let mut bad = import("app", "bad", "r");
    bad["spec"]["rolle"] = json!("x");
    bad["spec"]["typ"] = json!("x");
    server.put(bad);
    server.put(import("app", "good", "r"));
    let classes = Watched::start(server.api(), metrics());
    known(&classes).await;
    let Err(FindError::Faults(faults)) = classes.find(IMPORT, "app", "bad") else { panic!("no faults") };
    assert_eq!(faults.iter().len(), 2, "{faults}");
    assert!(faults.to_string().contains("SecretsStoreImport app/bad: spec.rolle"), "{faults}");
    assert!(role(&classes, "app", "good").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_api_server_leaves_the_known_classes_and_says_so_of_others_until_it_is_back() {
    let mut server = Server::start().await;
    server.put(import("app", "db", "first"));
    let metrics = metrics();
    let classes = Watched::start(server.api(), metrics.clone());
    known(&classes).await;
    assert!(classes.find(IMPORT, "app", "later").unwrap().is_none());
    server.stop().await;
    until("a loss", || metrics.classes_behind_import.value() > 0).await;
    assert_eq!(role(&classes, "app", "db").as_deref(), Some("first"));
    let unknown = classes.find(IMPORT, "app", "later").unwrap_err();
    assert!(matches!(unknown, FindError::Unknown { .. }));
    let text = unknown.to_string();
    assert!(
        text.starts_with("cannot tell whether there is a SecretsStoreImport app/later: http://127.0.0.1:"),
        "{text}"
    );
    assert!(text.contains(", since 2") && text.contains("kubelet asks again by itself"), "{text}");
    server.put(import("app", "later", "r"));
    server.put(import("app", "db", "second"));
    server.resume().await;
    until("what happened meanwhile", || {
        classes.find(IMPORT, "app", "later").is_ok_and(|found| found.is_some())
            && role(&classes, "app", "db").as_deref() == Some("second")
    })
    .await;
    until("both watches", || {
        metrics.classes_behind_import.value() == 0 && metrics.classes_behind_provider.value() == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_too_old_has_everything_listed_anew_and_what_went_meanwhile_is_gone() {
    let mut server = Server::start().await;
    server.put(import("app", "gone", "r"));
    server.put(import("app", "kept", "r"));
    let classes = Watched::start(server.api(), metrics());
    known(&classes).await;
    server.stop().await;
    server.delete(IMPORT, "app", "gone");
    server.put(import("app", "new", "r"));
    server.world().oldest = u64::MAX;
    server.resume().await;
    // While the API server is away nobody can tell of one that is not known.
    let is_new = || classes.find(IMPORT, "app", "new").is_ok_and(|found| found.is_some());
    until("a new list", || classes.names("app").unwrap().len() == 2 && is_new()).await;
    assert!(role(&classes, "app", "gone").is_none() && role(&classes, "app", "kept").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_the_cluster_does_not_have_is_no_error() {
    let server = Server::start().await;
    server.world().absent.insert(crate::api::plural(PROVIDER));
    server.put(import("app", "db", "r"));
    let metrics = metrics();
    let classes = Watched::start(server.api(), metrics.clone());
    known(&classes).await;
    assert!(classes.find(PROVIDER, "app", "db").unwrap().is_none());
    assert!(role(&classes, "app", "db").is_some());
    assert_eq!(metrics.classes_behind_provider.value(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_list_nobody_can_tell_and_the_api_servers_own_words_say_why() {
    let server = Server::start().await;
    server.world().broken = Some(StatusCode::FORBIDDEN);
    let metrics = metrics();
    let classes = Watched::start(server.api(), metrics.clone());
    let text = classes.find(IMPORT, "app", "db").unwrap_err().to_string();
    assert!(text.starts_with("cannot tell whether there is a SecretsStoreImport app/db: "), "{text}");
    until("a refusal", || metrics.classes_behind_import.value() > 0).await;
    let text = classes.find(IMPORT, "app", "db").unwrap_err().to_string();
    assert!(text.contains("403: the server says 403"), "{text}");
    let waiting = tokio::time::timeout(std::time::Duration::from_millis(50), classes.known(IMPORT));
    assert!(waiting.await.is_err(), "still unknown");
    server.world().broken = None;
    known(&classes).await;
    assert!(classes.find(IMPORT, "app", "db").unwrap().is_none());
}

/// The variable with which the test below starts itself, as a process that does nothing else.
const CHILD: &str = "FUSE_SECRETS_TEST_API";

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_classes_take_little_memory() {
    const CLASSES: u64 = 5_000;
    if let Ok(address) = std::env::var(CHILD) {
        // Without pages of the program itself, of which one that is not optimised has many.
        let anonymous = || -> u64 {
            let text = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
        };
        let metrics = metrics();
        let before = anonymous();
        let classes = Watched::start(connect(&address), metrics.clone());
        known(&classes).await;
        assert_eq!(metrics.classes_provider.value(), CLASSES);
        assert!(classes.find(PROVIDER, "team-7", "class-0007").unwrap().is_some());
        #[allow(clippy::print_stdout, reason = "for the process that started this one")]
        {
            println!("\ngrown by {}\n", anonymous() - before);
        }
        return;
    }
    let server = Server::start().await;
    for number in 0..CLASSES {
        server.put(realistic(number));
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "classes::five_thousand_classes_take_little_memory", "--nocapture"]);
    child.env(CHILD, server.address());
    let output = tokio::task::spawn_blocking(move || child.output()).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let grown: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("grown by "))
        .unwrap_or_else(|| panic!("{text}"))
        .parse()
        .unwrap();
    let spec: usize = (0..CLASSES).map(|number| realistic(number)["spec"].to_string().len()).sum();
    #[allow(clippy::print_stdout, reason = "docs/measures.md quotes it")]
    {
        println!("{CLASSES} classes: {grown} bytes of memory, {spec} of them the text of their specs");
    }
    assert!(grown < 10 << 20, "{grown}");
}

/// As people write them and tools keep them: six objects, what kubectl applied last, who owns which field.
fn realistic(number: u64) -> Value {
    let objects: String = (0..6)
        .map(|object| {
            format!("- objectName: \"file-{object}\"\n  secretPath: \"secret/data/team-{number}/app\"\n  secretKey: \"key-{object}\"\n")
        })
        .collect();
    let spec = json!({"provider": "vault", "parameters": {
        "roleName": format!("team-{number}"), "vaultAddress": "https://vault.example:8200", "objects": objects,
    }});
    let fields = json!({"f:spec": {"f:parameters": {"f:objects": {}, "f:roleName": {}, "f:vaultAddress": {}}, "f:provider": {}}});
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
        "metadata": {
            "name": format!("class-{number:04}"), "namespace": format!("team-{number}"),
            "uid": "00000000-0000-0000-0000-000000000000", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/name": "app", "helm.sh/chart": "app-1.2.3"},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": spec.to_string()},
            "managedFields": [{"manager": "kubectl", "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": fields}],
        },
        "spec": spec,
    })
}
