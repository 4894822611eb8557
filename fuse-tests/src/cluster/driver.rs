//! The driver's two DaemonSets on the node: their pods and processes, and how they go and come back.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::api::condition;
use super::certificates::NODE;
use super::pods::DRIVER;
use super::{Cluster, PATIENCE};
use crate::wait::{until, until_true};

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The privileged one, which kubelet calls.
    Shim,
    /// The one with the secrets.
    Agent,
}

impl Part {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Shim, Self::Agent];

    /// Its namespace.
    #[must_use]
    pub fn namespace(self) -> &'static str {
        match self {
            Self::Shim => "fuse-secrets-csi",
            Self::Agent => "fuse-secrets",
        }
    }

    /// Its DaemonSet, which is its service account's name too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shim => "fuse-secrets-csi",
            Self::Agent => "fuse-secrets-agent",
        }
    }

    /// Its container.
    #[must_use]
    pub fn container(self) -> &'static str {
        match self {
            Self::Shim => "shim",
            Self::Agent => "agent",
        }
    }

    /// Who it is for the API server.
    #[must_use]
    pub fn user(self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace(), self.name())
    }
}

impl Cluster {
    /// Its DaemonSet.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn daemon_set(&self, part: Part) -> Value {
        let path = daemon_set(part);
        self.find(&path).unwrap_or_else(|| panic!("{path}: the driver is not installed"))
    }

    /// Its pods, also those that end or have not started.
    ///
    /// # Panics
    /// The API server does not answer.
    #[must_use]
    pub fn driver_pods(&self, part: Part) -> Vec<Value> {
        self.list(&format!("api/v1/namespaces/{}/pods", part.namespace()))
    }

    /// Waits until it has one pod, which is ready; returns the pod's name.
    ///
    /// # Panics
    /// It is not so in time: says what its pods are.
    pub fn wait_driver(&self, part: Part) -> String {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            let pods = self.driver_pods(part);
            if let [pod] = &pods[..]
                && pod["metadata"]["deletionTimestamp"].is_null()
                && condition(pod, "Ready")
            {
                return pod["metadata"]["name"].as_str().unwrap().to_owned();
            }
            if std::time::Instant::now() > end {
                let statuses: Vec<&Value> = pods.iter().map(|pod| &pod["status"]).collect();
                panic!("{part:?}: no ready pod within {PATIENCE:?}: {statuses:#?}");
            }
            crate::wait::pause(std::time::Duration::from_millis(50));
        }
    }

    /// The same of both.
    ///
    /// # Panics
    /// As [`Cluster::wait_driver`].
    pub fn wait_whole_driver(&self) {
        Part::ALL.into_iter().for_each(|part| drop(self.wait_driver(part)));
    }

    /// The processes of its one pod, the first of the container first: supervisor and worker of the agent.
    ///
    /// # Panics
    /// It has no pod that is ready in time.
    #[must_use]
    pub fn driver_processes(&self, part: Part) -> Vec<u32> {
        self.processes(part.namespace(), &self.wait_driver(part), part.container())
    }

    /// Kills the first process of these containers, one right after the other, and whatever they have started.
    ///
    /// # Panics
    /// One has no pod that is ready in time.
    pub fn kill_driver(&self, parts: &[Part]) {
        let processes: Vec<u32> = parts.iter().flat_map(|part| self.driver_processes(*part)).collect();
        for pid in &processes {
            // The second of a container goes with its first.
            let _ = kill_process(Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap(), Signal::KILL);
        }
        until_true("the end of the processes that were killed", PATIENCE, || {
            processes.iter().all(|pid| is_gone(*pid))
        });
    }

    /// Deletes its pod, as whoever updates it by hand does, and waits until the next one is ready.
    ///
    /// # Panics
    /// It is not in time.
    pub fn restart_driver(&self, part: Part) {
        let former = self.wait_driver(part);
        let path = format!("api/v1/namespaces/{}/pods/{former}", part.namespace());
        let (status, why) = self.ask("DELETE", &path, None);
        assert!(matches!(status, 200 | 202), "{former}: {status} {}", why["message"]);
        self.wait_gone(part.namespace(), &former);
        self.wait_driver(part);
    }

    /// `kubectl rollout VERB` of its DaemonSet; returns when the pod of the present template is ready.
    ///
    /// # Panics
    /// It is not in time.
    pub fn rollout(&self, verb: &str, part: Part) {
        let name = format!("daemonset/{}", part.name());
        self.kubectl(&["rollout", verb, &name, "--namespace", part.namespace()]);
        self.wait_daemon(part.namespace(), part.name());
    }

    /// Takes it from the node: its DaemonSet stays, and wants another node.
    ///
    /// # Panics
    /// A pod of it stays.
    pub fn take_away(&self, part: Part) {
        self.select(part, &json!("another"));
        until_true(&format!("{part:?}: gone"), PATIENCE, || self.driver_pods(part).is_empty());
    }

    /// Lets it come back; [`Cluster::wait_driver`] waits for it.
    ///
    /// # Panics
    /// The API server refuses.
    pub fn put_back(&self, part: Part) {
        self.select(part, &Value::Null);
    }

    fn select(&self, part: Part, node: &Value) {
        let selector = json!({"spec": {"template": {"spec": {"nodeSelector": {"tests/node": node}}}}});
        let (status, why) = self.ask("PATCH", &daemon_set(part), Some(&selector));
        assert_eq!(status, 200, "{part:?}: {}", why["message"]);
    }

    /// Whether kubelet has told the API server that the node has the driver.
    ///
    /// # Panics
    /// The API server does not know the node.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        let drivers =
            self.find(&format!("apis/storage.k8s.io/v1/csinodes/{NODE}")).unwrap()["spec"]["drivers"].take();
        drivers.as_array().into_iter().flatten().any(|driver| driver["name"] == DRIVER)
    }

    /// A path as the first process of a pod's container sees it: through all of the pod's own mounts.
    ///
    /// # Panics
    /// The container does not run.
    #[must_use]
    pub fn path_in(&self, namespace: &str, pod: &str, container: &str, path: &str) -> PathBuf {
        let pid = until("a process of the container", PATIENCE, || {
            self.processes(namespace, pod, container).first().copied()
        });
        Path::new(&format!("/proc/{pid}/root")).join(path.trim_start_matches('/'))
    }

    /// What the runtime wrote of a pod's container, line by line with the moment of each: nothing yet is an empty text. It is read from the
    /// node, without kubelet or the API server.
    #[must_use]
    pub fn container_log(&self, namespace: &str, pod: &str, uid: &str, container: &str) -> String {
        let log = format!("pods/{namespace}_{pod}_{uid}/{container}/0.log");
        fs::read_to_string(self.directory().join(log)).unwrap_or_default()
    }
}

fn daemon_set(part: Part) -> String {
    format!("apis/apps/v1/namespaces/{}/daemonsets/{}", part.namespace(), part.name())
}

/// Whether a process has ended; whoever waits for it may not have yet.
fn is_gone(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}
