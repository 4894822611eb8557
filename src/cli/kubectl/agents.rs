//! Agents by node: who they are, and asking all of them at once, so that one node that hangs costs its own answer and no other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use zeroize::Zeroizing;

use super::call::{CallError, Kubectl, Said};
use super::complain;

/// Nodes that are asked at a time: each is a process here and a stream through the API server.
const AT_ONCE: usize = 8;
/// What the DaemonSet of `deploy/` puts on its pods.
const LABEL: &str = "app.kubernetes.io/name=fuse-secrets-agent";
const CONTAINER: &str = "agent";
/// In the image.
const PROGRAM: &str = "/fuse-secrets";

/// A list as the API server gives it.
#[derive(Deserialize)]
pub(super) struct List<T> {
    pub(super) items: Vec<T>,
}

/// What is read of a pod.
#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Pod {
    pub(super) metadata: Metadata,
    pub(super) spec: PodSpec,
    pub(super) status: PodStatus,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) uid: String,
    pub(super) deletion_timestamp: Option<String>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub(super) node_name: String,
    pub(super) service_account_name: String,
    pub(super) containers: Vec<Container>,
    pub(super) volumes: Vec<PodVolume>,
    pub(super) security_context: SecurityContext,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Container {
    pub(super) image: String,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct SecurityContext {
    pub(super) fs_group: Option<u32>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodVolume {
    pub(super) name: String,
    pub(super) csi: Option<Csi>,
}

/// A volume of a CSI driver, inline in the pod.
#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Csi {
    pub(super) driver: String,
    pub(super) read_only: Option<bool>,
    pub(super) volume_attributes: std::collections::BTreeMap<String, String>,
    pub(super) node_publish_secret_ref: Option<serde::de::IgnoredAny>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodStatus {
    pub(super) phase: String,
    pub(super) container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ContainerStatus {
    pub(super) ready: bool,
    pub(super) state: ContainerState,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ContainerState {
    pub(super) running: Option<serde::de::IgnoredAny>,
    pub(super) waiting: Option<Reason>,
    pub(super) terminated: Option<Reason>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Reason {
    pub(super) reason: String,
}

impl Pod {
    /// Whether its first container runs, so that something can be run in it.
    pub(super) fn runs(&self) -> bool {
        self.status.container_statuses.first().is_some_and(|status| status.state.running.is_some())
    }

    /// Whether kubelet's probe of `/readyz` succeeds.
    pub(super) fn is_ready(&self) -> bool {
        self.metadata.deletion_timestamp.is_none()
            && !self.status.container_statuses.is_empty()
            && self.status.container_statuses.iter().all(|status| status.ready)
    }

    /// Why it does not run, in the API server's words.
    pub(super) fn state(&self) -> String {
        let state = self.status.container_statuses.first().map(|status| &status.state);
        let reason = state.and_then(|state| state.waiting.as_ref().or(state.terminated.as_ref()));
        let phase = if self.status.phase.is_empty() { "unknown" } else { &self.status.phase };
        match reason {
            Some(Reason { reason }) if !reason.is_empty() => format!("{phase}, {reason}"),
            _ if self.runs() && !self.is_ready() => "running, not ready".to_owned(),
            _ => phase.to_owned(),
        }
    }

    /// `namespace/name`.
    pub(super) fn full_name(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }
}

/// Agents, sorted by node.
pub(super) struct Agents(Vec<Pod>);

/// What one agent said.
pub(super) struct Answer<T> {
    pub(super) node: String,
    pub(super) pod: String,
    pub(super) said: Result<T, String>,
}

impl Agents {
    /// Those of all nodes, or of one.
    ///
    /// # Errors
    /// [`CallError`]; [`CallError::NotFound`] where there is none.
    pub(super) fn find(kubectl: &Kubectl, namespace: &str, node: Option<&str>) -> Result<Self, CallError> {
        let what = format!("list pods in namespace {namespace}");
        let found: List<Pod> = kubectl.get(&what, &["get", "pods", "-n", namespace, "-l", LABEL])?;
        let mut agents = found.items;
        agents.retain(|pod| {
            !pod.spec.node_name.is_empty() && node.is_none_or(|node| pod.spec.node_name == node)
        });
        if agents.is_empty() {
            let place = node.map(|node| format!(" on node {node}")).unwrap_or_default();
            let said = format!(
                "no pod with the label {LABEL} runs in namespace {namespace}{place}; is the driver installed there, or \
                 --driver-namespace another one?"
            );
            return Err(CallError::NotFound { what: "find an agent".to_owned(), said });
        }
        agents.sort_by(|a, b| {
            (&a.spec.node_name, &a.metadata.name).cmp(&(&b.spec.node_name, &b.metadata.name))
        });
        Ok(Self(agents))
    }

    /// The pods.
    pub(super) fn pods(&self) -> &[Pod] {
        &self.0
    }

    /// One to ask for a pod of this node: the node's, if a ready one is there, else any that is.
    pub(super) fn one(&self, node: &str) -> Option<&Pod> {
        let ready = || self.0.iter().filter(|pod| pod.is_ready());
        ready().find(|pod| pod.spec.node_name == node).or_else(|| ready().next())
    }

    /// Runs `fuse-secrets` with these arguments in each, so many at a time, and reads what it printed. In the order of the nodes.
    pub(super) fn ask<T: Send>(
        &self,
        kubectl: &Kubectl,
        arguments: &[&str],
        read: impl Fn(&Said) -> Option<T> + Sync,
    ) -> Vec<Answer<T>> {
        let (next, answers) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(self.0.len()) {
                scope.spawn(|| {
                    while let Some((at, pod)) =
                        self.0.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let said = ask_one(kubectl, pod, arguments, &read);
                        let answer =
                            Answer { node: pod.spec.node_name.clone(), pod: pod.metadata.name.clone(), said };
                        answers.lock().unwrap_or_else(PoisonError::into_inner).push((at, answer));
                    }
                });
            }
        });
        let mut answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
        answers.sort_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }
}

/// Runs `fuse-secrets` in an agent's container.
pub(super) fn exec(
    kubectl: &Kubectl,
    pod: &Pod,
    arguments: &[&str],
    input: Option<Zeroizing<Vec<u8>>>,
    timeout: Option<Duration>,
) -> Result<Said, CallError> {
    let Metadata { name, namespace, .. } = &pod.metadata;
    let place = ["-n", namespace, name, "-c", CONTAINER];
    // The program's log is for its own standard error; here only what failed is of interest.
    let program = [&[PROGRAM, "--log", "error"], arguments].concat();
    kubectl.exec(&place, &program, input, timeout)
}

fn ask_one<T>(
    kubectl: &Kubectl,
    pod: &Pod,
    arguments: &[&str],
    read: impl Fn(&Said) -> Option<T>,
) -> Result<T, String> {
    if !pod.runs() {
        return Err(format!("the agent does not run: {}", pod.state()));
    }
    let said = exec(kubectl, pod, arguments, None, None).map_err(|error| error.to_string())?;
    let answer = read(&said);
    if answer.is_some() && said.code != Some(0) && !said.last_words().is_empty() {
        complain(&format!("{}: {}", pod.spec.node_name, said.last_words()));
    }
    answer.ok_or_else(|| super::call::failure("run a program in the agent's container", &said).to_string())
}

/// Names those that did not answer; whether there are any.
pub(super) fn name_silent<T>(answers: &[Answer<T>]) -> bool {
    let mut silent = false;
    for Answer { node, pod, said } in answers {
        if let Err(why) = said {
            complain(&format!("node {node} did not answer: agent {pod}: {why}"));
            silent = true;
        }
    }
    silent
}
