//! The embedded store over HTTP. Shapes and texts that are compared here were read from a real Vault 1.21.

mod auth;
mod faults;
mod kv;
mod sys;

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::Value;

use super::{Embedded, Options};

/// One answer.
struct Got {
    status: u16,
    json: Value,
    retry_after: Option<String>,
}

/// A store and a client of it.
struct Client {
    store: Embedded,
    http: reqwest::Client,
}

impl Client {
    async fn start() -> Self {
        let store = Embedded::start(Options::default()).await.unwrap();
        Self { store, http: reqwest::Client::new() }
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        self.http.request(method, format!("{}/v1/{path}", self.store.address()))
    }

    /// As the holder of a token.
    async fn ask_as(&self, token: &str, method: &str, path: &str, body: Option<Value>) -> Got {
        let mut request = self.request(method, path);
        if !token.is_empty() {
            request = request.header("X-Vault-Token", token);
        }
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        got(request.send().await.unwrap()).await
    }

    /// As root.
    async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Got {
        self.ask_as(self.store.root_token().expose(), method, path, body).await
    }

    async fn get(&self, path: &str) -> Got {
        self.ask("GET", path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> Got {
        self.ask("POST", path, Some(body)).await
    }

    /// A token with these policies beside `default`.
    fn token(&self, policies: &[&str]) -> String {
        let body = serde_json::json!({ "policies": policies, "ttl": "1h" });
        let answer = self.store.write("auth/token/create", &body).unwrap();
        answer["auth"]["client_token"].as_str().unwrap().to_owned()
    }
}

impl Got {
    fn error(&self) -> &str {
        self.json["errors"][0].as_str().unwrap_or_default()
    }

    #[track_caller]
    fn refused(&self, status: u16, error: &str) {
        assert_eq!((self.status, self.error()), (status, error));
    }

    #[track_caller]
    fn ok(self) -> Value {
        assert!(matches!(self.status, 200 | 204), "{} {}", self.status, self.error());
        self.json
    }
}

async fn got(response: reqwest::Response) -> Got {
    let status = response.status().as_u16();
    let retry_after = response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
    let json = serde_json::from_str(&response.text().await.unwrap()).unwrap_or(Value::Null);
    Got { status, json, retry_after }
}

#[track_caller]
fn has_members(object: &Value, names: &str) {
    let found: BTreeSet<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(found, names.split(' ').collect());
}

/// Every answer's envelope.
const ENVELOPE: &str = "request_id lease_id renewable lease_duration data wrap_info warnings auth mount_type";
