//! The API server, asked as its administrator: a request is a hundred times cheaper than a start of kubectl, so waiting is done here.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Runtime;

use super::Cluster;
use super::certificates::Certificates;
use super::components::SERVER;
use super::world::World;

/// A client in the cluster's network.
pub(super) struct Api {
    http: reqwest::Client,
    runtime: Runtime,
}

impl Api {
    pub(super) fn new(world: &World, certificates: &Certificates) -> Self {
        let pem = |file: &str| fs::read(certificates.path(file)).unwrap();
        let authority = reqwest::Certificate::from_pem(&pem("ca.crt")).unwrap();
        let identity = [pem("admin.crt"), pem("admin.key")].concat();
        let identity = reqwest::Identity::from_pem(&identity).unwrap();
        let http = reqwest::Client::builder().add_root_certificate(authority).identity(identity);
        let http = http.timeout(Duration::from_secs(30)).no_proxy().build().unwrap();
        Self { http, runtime: world.runtime() }
    }

    /// Status and JSON; `None`: no answer.
    pub(super) fn try_ask(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let mut request = self.http.request(method, format!("{SERVER}/{path}"));
        if let Some(body) = body {
            request = request.header("Content-Type", kind).body(body.to_string());
        }
        // Spawned, as only the runtime's own threads are in the cluster's network.
        let asked = self.runtime.spawn(async move {
            let answer = request.send().await.ok()?;
            let status = answer.status().as_u16();
            let text = answer.text().await.ok()?;
            Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
        });
        self.runtime.block_on(asked).unwrap()
    }
}

impl Cluster {
    /// Asks the API server: status and answer. `path` begins with `api/v1` or `apis/`; `PATCH` is a merge patch.
    ///
    /// # Panics
    /// No answer comes.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.api.try_ask(method, path, body).unwrap_or_else(|| panic!("{method} {path}: no answer"))
    }

    /// An object, or a list of them, if there is one.
    #[must_use]
    pub fn find(&self, path: &str) -> Option<Value> {
        match self.api.try_ask("GET", path, None)? {
            (200, object) => Some(object),
            _ => None,
        }
    }

    /// The items of a list.
    ///
    /// # Panics
    /// There is no such list.
    #[must_use]
    pub fn list(&self, path: &str) -> Vec<Value> {
        match self.ask("GET", path, None) {
            (200, mut list) => match list["items"].take() {
                Value::Array(items) => items,
                other => panic!("{path}: {other}"),
            },
            (status, why) => panic!("{path}: {status} {}", why["message"]),
        }
    }

    /// Makes an object below a path of a list.
    ///
    /// # Panics
    /// It is refused.
    pub fn create(&self, path: &str, object: &Value) -> Value {
        let (status, answer) = self.ask("POST", path, Some(object));
        assert!(status == 201, "POST {path}: {status} {}", answer["message"]);
        answer
    }

    /// A token of a service account, valid for ten minutes, as `kubectl create token` makes it.
    ///
    /// # Panics
    /// It is refused.
    #[must_use]
    pub fn token(&self, namespace: &str, account: &str, audience: &str) -> String {
        let wanted = serde_json::json!({"spec": {"audiences": [audience], "expirationSeconds": 600}});
        let path = format!("api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = self.create(&path, &wanted);
        answer["status"]["token"].as_str().unwrap().to_owned()
    }
}

/// Whether an object's condition holds.
#[must_use]
pub fn condition(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == kind && condition["status"] == "True")
}
