use std::path::PathBuf;

use fuse_secrets::dev::{Embedded, Options};
use fuse_secrets::secret::Token;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::world::World;

/// The value that no output may hold.
pub(crate) const CANARY: &str = "canary-5f2e81c7-value";
/// The root token, which no output may hold either.
pub(crate) const TOKEN: &str = "hvs.canary-93ab-token";

/// An embedded store in this process.
pub(crate) struct Store {
    pub(crate) inner: Option<Embedded>,
    runtime: Runtime,
}

impl Store {
    /// One with `secret/app {password}`.
    pub(crate) fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let root_token = Some(Token::new(TOKEN.to_owned()).unwrap());
        let inner = runtime.block_on(Embedded::start(Options { root_token, ..Options::default() })).unwrap();
        let store = Self { inner: Some(inner), runtime };
        store.put(CANARY);
        store
    }

    pub(crate) fn embedded(&self) -> &Embedded {
        self.inner.as_ref().unwrap()
    }

    pub(crate) fn put(&self, password: &str) {
        self.embedded().put("secret/app", &json!({ "password": password })).unwrap();
    }

    pub(crate) fn write(&self, path: &str, body: &Value) -> Value {
        self.embedded().write(path, body).unwrap()
    }

    pub(crate) fn address(&self) -> String {
        self.embedded().address().to_string()
    }

    pub(crate) fn stop(&mut self) {
        if let Some(inner) = self.inner.take() {
            self.runtime.block_on(inner.shutdown());
        }
    }
}

/// The token's file, for whoever mounts.
pub(crate) fn token_file(world: &World) -> PathBuf {
    world.file("token", TOKEN)
}

/// A class with the store's one secret, or with what `objects` lists instead.
pub(crate) fn class(world: &World, name: &str, objects: &str) -> PathBuf {
    let objects = if objects.is_empty() {
        "{objectName: password, secretPath: secret/data/app, secretKey: password}"
    } else {
        objects
    };
    world.file(
        &format!("{name}.yaml"),
        &format!(
            "apiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\nmetadata: {{name: {name}}}\n\
             spec:\n  provider: vault\n  parameters:\n    roleName: app\n    refreshInterval: 1s\n    objects: |\n      - {}\n",
            objects.replace('\n', "\n      - ")
        ),
    )
}

/// No value and no token in what a program said.
pub(crate) fn assert_silent(text: &str) {
    for secret in [CANARY, TOKEN] {
        assert!(!text.contains(secret), "a secret in the output: {}", text.replace(secret, "[HERE]"));
    }
}
