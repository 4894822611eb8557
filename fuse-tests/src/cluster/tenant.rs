//! A namespace of one test, with a service account that the store knows, and what the test puts there.

use serde_json::{Value, json};

use super::pods::{SECRETS, add_volume, pod};
use super::store::AUDIENCE;
use super::{Cluster, PATIENCE};
use crate::wait;

/// The service account of its pods.
pub const ACCOUNT: &str = "app";

/// Goes when it is dropped; what a test that passes leaves on the node is then a failure.
pub struct Tenant<'a> {
    cluster: &'a Cluster,
    /// The namespace.
    pub namespace: String,
    /// The store's role for its service account.
    pub role: String,
}

impl Cluster {
    /// A namespace whose name begins like this, its service account `app`, and the store's role for it.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn tenant(&self, name: &str) -> Tenant<'_> {
        let namespace = format!("{name}-{:08x}", rand::random::<u32>());
        self.create("api/v1/namespaces", &json!({"metadata": {"name": namespace}}));
        let role = if self.has_store() { self.admit(&namespace, ACCOUNT) } else { String::new() };
        let tenant = Tenant { cluster: self, namespace, role };
        tenant.account(ACCOUNT);
        // Pods without another one have it.
        let default = format!("api/v1/namespaces/{}/serviceaccounts/default", tenant.namespace);
        self.wait_for(&default, "made by the controller manager", |_| Some(()));
        tenant
    }
}

impl Tenant<'_> {
    /// Makes another service account, which the store does not know.
    ///
    /// # Panics
    /// It is refused.
    pub fn account(&self, name: &str) {
        let path = format!("api/v1/namespaces/{}/serviceaccounts", self.namespace);
        self.cluster.create(&path, &json!({"metadata": {"name": name}}));
    }

    /// Writes a version of `secret/NAMESPACE/name`.
    ///
    /// # Panics
    /// The store refuses.
    pub fn put(&self, name: &str, data: &Value) {
        self.cluster.store().put(&format!("{}/{name}", self.namespace), data);
    }

    /// Its path as a class of the first kind names it: with `data/`.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        format!("secret/data/{}/{name}", self.namespace)
    }

    /// Writes a SecretProviderClass with files as (name, secret, key), and further parameters.
    ///
    /// # Panics
    /// It is refused.
    pub fn class(&self, name: &str, files: &[(&str, &str, &str)], further: &Value) {
        self.cluster.apply(&self.class_of(name, files, further));
    }

    /// The same, not yet written.
    #[must_use]
    pub fn class_of(&self, name: &str, files: &[(&str, &str, &str)], further: &Value) -> Value {
        let objects: Vec<Value> = files
            .iter()
            .map(|(file, secret, key)| {
                json!({"objectName": file, "secretPath": self.path(secret), "secretKey": key})
            })
            .collect();
        let mut parameters = json!({"roleName": self.role, "objects": json!(objects).to_string()});
        for (key, value) in further.as_object().into_iter().flatten() {
            parameters[key] = value.clone();
        }
        json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"provider": "vault", "parameters": parameters},
        })
    }

    /// Whether there is such a SecretProviderClass.
    #[must_use]
    pub fn has_class(&self, name: &str) -> bool {
        let group = "apis/secrets-store.csi.x-k8s.io/v1";
        let path = format!("{group}/namespaces/{}/secretproviderclasses/{name}", self.namespace);
        self.cluster.find(&path).is_some()
    }

    /// Writes a SecretsStoreImport with this specification.
    ///
    /// # Panics
    /// It is refused.
    pub fn import(&self, name: &str, spec: &Value) {
        self.cluster.apply(&json!({
            "apiVersion": "deckhouse.io/v1alpha1", "kind": "SecretsStoreImport",
            "metadata": {"name": name, "namespace": self.namespace}, "spec": spec,
        }));
    }

    /// A pod of its service account, not yet made: to be changed, then [`Tenant::run`].
    #[must_use]
    pub fn pod(&self, name: &str) -> Value {
        let mut pod = pod(&self.namespace, name);
        pod["spec"]["serviceAccountName"] = json!(ACCOUNT);
        pod
    }

    /// The same with the volume `secrets` of a class, mounted at [`SECRETS`].
    #[must_use]
    pub fn reader(&self, name: &str, class: &str) -> Value {
        let mut pod = self.pod(name);
        add_volume(&mut pod, "secrets", SECRETS, &json!({"secretProviderClass": class}));
        pod
    }

    /// Makes a pod.
    ///
    /// # Panics
    /// It is refused.
    pub fn create(&self, pod: &Value) {
        self.cluster.create(&format!("api/v1/namespaces/{}/pods", self.namespace), pod);
    }

    /// Makes a pod and waits until it is ready; returns its uid.
    ///
    /// # Panics
    /// It is refused, or not ready in time.
    pub fn run(&self, pod: &Value) -> String {
        self.create(pod);
        self.cluster.wait_ready(&self.namespace, pod["metadata"]["name"].as_str().unwrap())
    }

    /// Deletes a pod, and waits until it is gone from the API server; its mounts may go a moment later.
    ///
    /// # Panics
    /// It stays.
    pub fn remove(&self, pod: &str) {
        let path = format!("api/v1/namespaces/{}/pods/{pod}", self.namespace);
        let (status, why) = self.cluster.ask("DELETE", &path, None);
        assert!(matches!(status, 200 | 202), "{pod}: {status} {}", why["message"]);
        self.cluster.wait_gone(&self.namespace, pod);
    }

    /// Runs a command in the first container of a pod.
    ///
    /// # Errors
    /// What it printed on standard error, and how it ended.
    pub fn exec(&self, pod: &str, words: &[&str]) -> Result<String, String> {
        self.cluster.exec(&self.namespace, pod, None, words)
    }

    /// What the first container of a pod printed.
    #[must_use]
    pub fn logs(&self, pod: &str) -> String {
        self.cluster.logs(&self.namespace, pod, None)
    }

    /// A token of its service account for the store.
    #[must_use]
    pub fn token(&self) -> String {
        self.cluster.token(&self.namespace, ACCOUNT, AUDIENCE)
    }

    /// Waits for an event about a pod; returns its message.
    ///
    /// # Panics
    /// None comes in time.
    pub fn wait_event(&self, pod: &str, text: &str) -> String {
        self.cluster.wait_event(&self.namespace, pod, text)
    }

    /// Waits until kubelet says that the volume `secrets` of a pod was refused with exactly this code and text.
    ///
    /// # Panics
    /// It does not in time.
    pub fn wait_refused(&self, pod: &str, code: &str, text: &str) {
        self.cluster.wait_refused(&self.namespace, pod, "secrets", code, text);
    }

    /// The same of a shell script, which must succeed.
    ///
    /// # Panics
    /// It fails.
    #[must_use]
    pub fn sh(&self, pod: &str, script: &str) -> String {
        self.exec(pod, &["sh", "-c", script]).unwrap_or_else(|why| panic!("{pod}: {script}: {why}"))
    }

    fn delete(&self) -> u16 {
        let path = format!("api/v1/namespaces/{}", self.namespace);
        self.cluster.ask("DELETE", &path, None).0
    }
}

impl Drop for Tenant<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let pods = self.cluster.find(&format!("api/v1/namespaces/{}/pods", self.namespace));
            let events = self.cluster.find(&format!("api/v1/namespaces/{}/events", self.namespace));
            // Shown with the failure.
            #[allow(clippy::print_stderr, reason = "of a test that fails")]
            {
                for pod in pods.iter().flat_map(|list| list["items"].as_array()).flatten() {
                    eprintln!("--- pod {}: {}", pod["metadata"]["name"], pod["status"]);
                }
                for event in events.iter().flat_map(|list| list["items"].as_array()).flatten() {
                    eprintln!(
                        "--- {} {}: {}",
                        event["involvedObject"]["name"], event["reason"], event["message"]
                    );
                }
            }
            self.delete();
            return;
        }
        wait::until_true(&format!("{}: gone", self.namespace), PATIENCE, || {
            let gone = self.delete() == 404;
            wait::pause(std::time::Duration::from_millis(100));
            gone
        });
        self.cluster.leaves_nothing();
    }
}
