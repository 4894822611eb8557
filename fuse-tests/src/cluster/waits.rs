//! Waiting for what the API server says. What did not come is described with everything that it says of the pod.

use std::time::Instant;

use serde_json::Value;

use super::api::condition;
use super::{Cluster, PATIENCE};
use crate::wait;

impl Cluster {
    /// A pod, if there is one.
    #[must_use]
    pub fn pod(&self, namespace: &str, pod: &str) -> Option<Value> {
        self.find(&format!("api/v1/namespaces/{namespace}/pods/{pod}"))
    }

    /// Waits until there is an answer about an object; `what` is for the error.
    ///
    /// # Panics
    /// There is none in time.
    pub fn wait_for<T>(&self, path: &str, what: &str, mut probe: impl FnMut(&Value) -> Option<T>) -> T {
        wait::until(&format!("{path}: {what}"), PATIENCE, || {
            let object = self.find(path);
            object.and_then(|object| probe(&object)).or_else(|| {
                wait::pause(std::time::Duration::from_millis(20));
                None
            })
        })
    }

    /// The same of a pod.
    ///
    /// # Panics
    /// There is none in time: says what the pod's state and events are.
    pub fn wait_pod<T>(
        &self,
        namespace: &str,
        pod: &str,
        what: &str,
        mut probe: impl FnMut(&Value) -> Option<T>,
    ) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            let found = self.pod(namespace, pod);
            if let Some(answer) = found.as_ref().and_then(&mut probe) {
                return answer;
            }
            if Instant::now() > end {
                let status = found.map_or(Value::Null, |pod| pod["status"].clone());
                panic!(
                    "{namespace}/{pod}: {what}: not within {PATIENCE:?}: {status:#}\n{:#?}",
                    self.events(namespace, pod)
                );
            }
            wait::pause(std::time::Duration::from_millis(25));
        }
    }

    /// Waits until a pod is ready; returns its uid.
    ///
    /// # Panics
    /// It is not in time.
    pub fn wait_ready(&self, namespace: &str, pod: &str) -> String {
        self.wait_pod(namespace, pod, "ready", |found| {
            condition(found, "Ready").then(|| found["metadata"]["uid"].as_str().unwrap().to_owned())
        })
    }

    /// Waits until a pod has ended; returns `Succeeded` or `Failed`.
    ///
    /// # Panics
    /// It does not in time.
    pub fn wait_ended(&self, namespace: &str, pod: &str) -> String {
        self.wait_pod(namespace, pod, "ended", |found| {
            let phase = found["status"]["phase"].as_str()?;
            matches!(phase, "Succeeded" | "Failed").then(|| phase.to_owned())
        })
    }

    /// Waits until there is no such pod any more.
    ///
    /// # Panics
    /// It stays.
    pub fn wait_gone(&self, namespace: &str, pod: &str) {
        wait::until_true(&format!("{namespace}/{pod}: gone"), PATIENCE, || {
            let (status, _) = self.ask("GET", &format!("api/v1/namespaces/{namespace}/pods/{pod}"), None);
            wait::pause(std::time::Duration::from_millis(25));
            status == 404
        });
    }

    /// Events about a pod, or any other object of this name: reason and message, the oldest first.
    #[must_use]
    pub fn events(&self, namespace: &str, name: &str) -> Vec<(String, String)> {
        let mut events = self
            .list(&format!("api/v1/namespaces/{namespace}/events?fieldSelector=involvedObject.name={name}"));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        events.sort_by_key(|event| text(&event["lastTimestamp"]));
        events.iter().map(|event| (text(&event["reason"]), text(&event["message"]))).collect()
    }

    /// Waits until an event about an object has a text in its message; returns the whole message.
    ///
    /// # Panics
    /// None has in time: says which there are.
    pub fn wait_event(&self, namespace: &str, name: &str, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let events = self.events(namespace, name);
            if let Some((_, message)) = events.iter().find(|(_, message)| message.contains(text)) {
                return message.clone();
            }
            assert!(Instant::now() < end, "{namespace}/{name}: no event says {text:?}: {events:#?}");
            wait::pause(std::time::Duration::from_millis(50));
        }
    }

    /// Waits until a deployment has rolled out.
    ///
    /// # Panics
    /// It does not in time.
    pub fn wait_rolled_out(&self, namespace: &str, deployment: &str) {
        let path = format!("apis/apps/v1/namespaces/{namespace}/deployments/{deployment}");
        self.wait_for(&path, "rolled out", |found| {
            let status = &found["status"];
            let wanted = &found["spec"]["replicas"];
            let all =
                ["replicas", "updatedReplicas", "readyReplicas"].iter().all(|name| status[name] == *wanted);
            (all && status["observedGeneration"] == found["metadata"]["generation"]).then_some(())
        });
    }

    /// Waits until the pod of a daemon set is ready on the node; if the daemon set updates its pods by itself, the pod of its present
    /// template and no other.
    ///
    /// # Panics
    /// It is not in time: says what its pods' state is.
    pub fn wait_daemon(&self, namespace: &str, name: &str) {
        let path = format!("apis/apps/v1/namespaces/{namespace}/daemonsets/{name}");
        let end = Instant::now() + PATIENCE;
        loop {
            let found = self.find(&path).unwrap_or_default();
            let status = &found["status"];
            let by_itself = found["spec"]["updateStrategy"]["type"] == "RollingUpdate";
            let is_new = !by_itself || status["updatedNumberScheduled"] == 1;
            let is_known = status["observedGeneration"] == found["metadata"]["generation"];
            let pods = self.list(&format!("api/v1/namespaces/{namespace}/pods"));
            if is_new && is_known && status["numberReady"] == 1 && pods.len() == 1 {
                return;
            }
            if Instant::now() > end {
                let mut why = String::new();
                for pod in &pods {
                    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
                    let log = self.try_kubectl(&["logs", "--namespace", namespace, pod_name]);
                    let events = self.events(namespace, pod_name);
                    why = format!("{why}\n{pod_name}: {}\n{events:#?}\n{log:?}", pod["status"]);
                }
                panic!("{namespace}/{name}: no ready pod within {PATIENCE:?}: {status}{why}");
            }
            wait::pause(std::time::Duration::from_millis(50));
        }
    }
}
