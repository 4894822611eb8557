//! One body over every store that this machine has.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use fuse_tests::backend::{Backend, Kind};
use fuse_tests::product::{self, Mount};
use fuse_tests::wait::{SOON, until_true};
use fuse_tests::{mounted::Mounted, needs};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::AGENT;

/// A class with files as (name, path at the store, key).
pub(super) fn class(name: &str, files: &[(&str, &str, Option<&str>)]) -> String {
    let objects: Vec<Value> = (files.iter())
        .map(|(name, path, key)| {
            let mut object = json!({"objectName": name, "secretPath": path});
            if let Some(key) = key {
                object["secretKey"] = json!(key);
            }
            object
        })
        .collect();
    let parameters = json!({"roleName": "app", "objects": Value::from(objects).to_string()});
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": {"name": name},
        "spec": {"provider": "vault", "parameters": parameters},
    })
    .to_string()
}

/// Files with what a mount is given beside its class; gone when dropped.
pub(super) struct Files(TempDir);

impl Files {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Writes one, for this user alone.
    pub(super) fn write(&self, name: &str, text: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, private).unwrap();
        path.display().to_string()
    }
}

/// Starts `fuse-secrets mount`, with the arguments for the class and the store before these.
fn mount(backend: &Backend, class: &str, arguments: &[&str]) -> Result<Mount, (Option<i32>, String)> {
    let address = backend.address();
    let all = [&["--class", class, "--address", &address], arguments].concat();
    Mount::start(&product::program(AGENT), &all)
}

/// Path, key, login, exit code, words of the message.
type Refusal<'a> = (&'a str, Option<&'a str>, &'a [&'a str], i32, &'a [&'a str]);

/// A row of `fuse-secrets mounts -o json`.
fn row(mounted: &Mounted) -> Value {
    let output = product::run(&product::program(AGENT), &["mounts", "-o", "json"]);
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = mounted.path().to_str().unwrap();
    rows.as_array().unwrap().iter().find(|row| row["path"] == path).cloned().unwrap()
}

/// Secrets of both kinds, and a policy that allows some of them.
fn fill(backend: &Backend) {
    backend.put("shop/db", &json!({"password": "first", "port": 5432}));
    backend.put("shop/db", &json!({"password": "second", "port": 5433}));
    backend.put("closed/db", &json!({"password": "closed"}));
    backend.write("sys/mounts/old", &json!({"type": "kv", "options": {"version": "1"}}));
    backend.write("old/app", &json!({"user": "alice", "nested": {"a": [1, 2]}}));
    let policy = "path \"secret/data/shop/*\" { capabilities = [\"read\"] }\n\
                  path \"secret/shop/*\" { capabilities = [\"read\"] }\n\
                  path \"old/*\" { capabilities = [\"read\"] }";
    backend.write("sys/policies/acl/app", &json!({ "policy": policy }));
}

/// A role of AppRole; its secret id is `the-secret-id`.
pub(super) fn approle(backend: &Backend, ttl: &str, max_ttl: &str) {
    backend.write("sys/auth/approle", &json!({"type": "approle"}));
    let role = json!({
        "token_policies": "app", "token_ttl": ttl, "token_max_ttl": max_ttl, "role_id": "the-role",
    });
    backend.write("auth/approle/role/app", &role);
    backend.write("auth/approle/role/app/custom-secret-id", &json!({"secret_id": "the-secret-id"}));
}

/// The API server as Vault asks it: every token that the test signs is good.
fn token_review() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    // Ends with the test's process; it holds nothing.
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut request = Vec::new();
            let mut part = [0; 4_096];
            // Head and body; the body is JSON, whose last byte is a brace.
            while !request.ends_with(b"}") && !request.ends_with(b"}\n") {
                match stream.read(&mut part) {
                    Ok(0) | Err(_) => break,
                    Ok(length) => request.extend(&part[..length]),
                }
            }
            let user = json!({"username": "system:serviceaccount:prod:app", "uid": "u-1",
                              "groups": ["system:serviceaccounts"]});
            let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
                                "status": {"authenticated": true, "user": user, "audiences": ["vault"]}});
            let body = review.to_string();
            let head = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nConnection: close\r\n";
            let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    address
}

/// Signs a service account's token. Returns the public key as PEM, and the token.
fn signed_token() -> (String, String) {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
    let text = base64::engine::general_purpose::STANDARD.encode(public.as_ref());
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let account = json!({"namespace": "prod", "serviceaccount": {"name": "app", "uid": "u-1"}});
    let claims = json!({
        "iss": "https://cluster", "aud": ["vault"], "iat": now, "nbf": now, "exp": now + 600,
        "sub": "system:serviceaccount:prod:app", "kubernetes.io": account,
    });
    let key = jsonwebtoken::EncodingKey::from_ec_der(pair.to_pkcs8v1().unwrap().as_ref());
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    (pem, jsonwebtoken::encode(&header, &claims, &key).unwrap())
}

#[test]
fn every_login_mounts_every_kind_of_secret() {
    if !needs::kernel() {
        return;
    }
    for (store, kind) in Kind::all() {
        let backend = Backend::start(&kind, false);
        fill(&backend);
        approle(&backend, "10m", "15m");
        let (pem, token) = signed_token();
        backend.write("sys/auth/jwt", &json!({"type": "jwt"}));
        backend.write("auth/jwt/config", &json!({"jwt_validation_pubkeys": [pem]}));
        let role = json!({"role_type": "jwt", "bound_audiences": ["vault"], "user_claim": "sub", "token_policies": "app"});
        backend.write("auth/jwt/role/app", &role);
        backend.write("sys/auth/kubernetes", &json!({"type": "kubernetes"}));
        let cluster = json!({"kubernetes_host": token_review(), "pem_keys": [pem], "disable_local_ca_jwt": true,
                             "token_reviewer_jwt": token});
        backend.write("auth/kubernetes/config", &cluster);
        let role = json!({"bound_service_account_names": "app", "bound_service_account_namespaces": "prod",
                          "audience": "vault", "token_policies": "app"});
        backend.write("auth/kubernetes/role/app", &role);

        let files = Files::new();
        let token_file = files.write("token", backend.root_token());
        let jwt = files.write("jwt", &token);
        let secret_id = files.write("secret-id", "the-secret-id");
        let class = files.write(
            "class.yaml",
            &class(
                "shop",
                &[
                    ("password", "secret/data/shop/db", Some("password")),
                    ("port", "secret/data/shop/db", Some("port")),
                    ("first", "secret/data/shop/db?version=1", Some("password")),
                    ("whole.json", "secret/data/shop/db", None),
                    ("old/user", "old/app", Some("user")),
                    ("old/nested", "old/app", Some("nested")),
                ],
            ),
        );
        let logins: [&[&str]; 4] = [
            &["--token-file", &token_file],
            &["--role-id", "the-role", "--secret-id-file", &secret_id],
            &["--auth-method", "jwt", "--role", "app", "--jwt-file", &jwt],
            &["--auth-method", "kubernetes", "--role", "app", "--jwt-file", &jwt],
        ];
        for login in logins {
            let mount =
                mount(&backend, &class, login).unwrap_or_else(|error| panic!("{store} {login:?}: {error:?}"));
            let text = |name: &str| mount.mounted().text(name);
            assert_eq!(
                (text("password"), text("port")),
                ("second".into(), "5433".into()),
                "{store} {login:?}"
            );
            assert_eq!((text("first"), text("old/user")), ("first".into(), "alice".into()), "{store}");
            let json = |name: &str| serde_json::from_str::<Value>(&text(name)).unwrap();
            assert_eq!(json("old/nested"), json!({"a": [1, 2]}), "{store}");
            assert_eq!(json("whole.json")["data"]["data"]["password"], "second", "{store}");
            assert_eq!(row(mount.mounted())["state"], "fresh");
            assert_eq!(mount.stop().0, Some(0));
        }
    }
}

#[test]
fn a_refusal_says_what_to_change_and_leaves_nothing_mounted() {
    if !needs::kernel() {
        return;
    }
    for (store, kind) in Kind::all() {
        let backend = Backend::start(&kind, false);
        fill(&backend);
        approle(&backend, "10m", "15m");
        let files = Files::new();
        let (token, secret_id) =
            (files.write("token", backend.root_token()), files.write("secret-id", "the-secret-id"));
        let (bad_token, bad_id) = (files.write("bad-token", "hvs.nope"), files.write("bad-id", "nope"));
        let root: &[&str] = &["--token-file", &token];
        let app: &[&str] = &["--role-id", "the-role", "--secret-id-file", &secret_id];
        let cases: [Refusal; 8] = [
            ("secret/data/shop/none", Some("password"), root, 77, &["404", "secret/data/shop/none"]),
            ("secret/shop/db", Some("password"), root, 77, &["KV v2", "secret/data/shop/db"]),
            ("nothing/app", Some("password"), root, 77, &["nothing"]),
            ("secret/data/shop/db", Some("pasword"), root, 65, &["pasword", "password"]),
            ("secret/data/closed/db", Some("password"), app, 77, &["403", "policy", "secret/data/closed/db"]),
            ("secret/shop/db", Some("password"), app, 77, &["secret/data/shop/db"]),
            ("secret/data/shop/db", Some("password"), &["--token-file", &bad_token], 77, &["403", "token"]),
            (
                "secret/data/shop/db",
                Some("password"),
                &["--role-id", "the-role", "--secret-id-file", &bad_id],
                77,
                &["role id", "secret id"],
            ),
        ];
        for (path, key, login, code, words) in cases {
            let class = files.write("class.yaml", &class("shop", &[("f", path, key)]));
            let Err((ended, text)) = mount(&backend, &class, login) else {
                panic!("{store}: {path} was mounted")
            };
            let line = text.lines().rfind(|line| line.starts_with("fuse-secrets: ")).unwrap_or_default();
            assert_eq!(ended, Some(code), "{store} {path}: {line}");
            for word in words {
                assert!(line.contains(word), "{store} {path}: {word:?} is not in: {line}");
            }
            for secret in ["second", "closed\"", "hvs.nope", "the-secret-id"] {
                assert!(!text.contains(secret), "{store} {path}: {secret:?} in: {line}");
            }
        }
    }
}

#[test]
fn a_change_shows_and_a_store_that_stops_stops_no_reader() {
    if !needs::kernel() {
        return;
    }
    for (store, kind) in Kind::all() {
        let mut backend = Backend::start(&kind, false);
        backend.put("app", &json!({"password": "one"}));
        let files = Files::new();
        let token = files.write("token", backend.root_token());
        let class =
            files.write("class.yaml", &class("app", &[("password", "secret/data/app", Some("password"))]));
        let mount = mount(&backend, &class, &["--token-file", &token, "--refresh-interval", "1s"]).unwrap();
        let mounted = mount.mounted();
        assert_eq!(mounted.text("password"), "one");
        backend.put("app", &json!({"password": "two"}));
        until_true("the change", SOON, || mounted.text("password") == "two");

        backend.stop();
        until_true("stale", SOON, || row(mounted)["state"] == "stale");
        let stale = row(mounted);
        assert!(stale["stale_since"].is_string() && stale["last_error"].is_string(), "{store}: {stale}");
        for _ in 0..100 {
            assert_eq!(mounted.text("password"), "two", "{store}: last known good");
        }
        backend.resume();
        backend.put("app", &json!({"password": "three"}));
        // Retries are at most 5 s apart at this interval.
        until_true("fresh", Duration::from_secs(20), || mounted.text("password") == "three");
        until_true("fresh", SOON, || row(mounted)["state"] == "fresh");
        assert_eq!(mount.stop().0, Some(0), "{store}");
    }
}

#[test]
fn a_token_that_ends_is_replaced_by_a_new_login_unnoticed() {
    if !needs::kernel() {
        return;
    }
    for (store, kind) in Kind::all() {
        let backend = Backend::start(&kind, false);
        fill(&backend);
        approle(&backend, "2s", "4s");
        let files = Files::new();
        let secret_id = files.write("secret-id", "the-secret-id");
        let class = files
            .write("class.yaml", &class("shop", &[("password", "secret/data/shop/db", Some("password"))]));
        let login = ["--role-id", "the-role", "--secret-id-file", &secret_id, "--refresh-interval", "1s"];
        let mount = mount(&backend, &class, &login).unwrap();
        until_true("a third login", Duration::from_secs(30), || {
            assert_eq!(mount.mounted().text("password"), "second");
            backend.counts().logins >= 3
        });
        backend.put("shop/db", &json!({"password": "third"}));
        until_true("the change", SOON, || mount.mounted().text("password") == "third");
        assert_eq!(row(mount.mounted())["state"], "fresh", "{store}");
    }
}

#[test]
fn a_server_with_tls_is_trusted_by_its_ca_alone() {
    if !needs::kernel() {
        return;
    }
    for (store, kind) in Kind::all().into_iter().filter(|(_, kind)| matches!(kind, Kind::Binary(_))) {
        let backend = Backend::start(&kind, true);
        backend.put("app", &json!({"password": "sealed"}));
        let files = Files::new();
        let token = files.write("token", backend.root_token());
        let class =
            files.write("class.yaml", &class("app", &[("password", "secret/data/app", Some("password"))]));
        let ca = backend.ca().unwrap().display().to_string();
        let mounted = mount(&backend, &class, &["--token-file", &token, "--ca", &ca]).unwrap();
        assert_eq!(mounted.mounted().text("password"), "sealed", "{store}");
        let Err((code, text)) = mount(&backend, &class, &["--token-file", &token]) else {
            panic!("{store}: trusted without its CA")
        };
        assert_eq!(code, Some(69), "{text}");
        assert!(text.contains("certificate"), "{text}");
    }
}
