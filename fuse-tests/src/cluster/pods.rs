//! Pods on the node: what they are made of, and what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Cluster, PATIENCE};
use crate::wait;

/// The image of pods: a shell and its commands.
pub const TOOLS: &str = "localhost/tools:1";
/// Where a pod's secrets are in its container.
pub const SECRETS: &str = "/mnt/secrets";
/// The driver's name.
pub const DRIVER: &str = "fuse-secrets";

/// A pod with one container `app` that does nothing for a day. To be changed as a test wants: it is plain JSON.
#[must_use]
pub fn pod(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "app", "image": TOOLS, "imagePullPolicy": "Never", "command": ["sleep", "86400"],
                "volumeMounts": [],
            }],
            "volumes": [],
        },
    })
}

/// Gives a pod a volume with these attributes, and mounts it in all of its containers.
///
/// # Panics
/// It is no pod of [`pod`].
pub fn add_volume(pod: &mut Value, volume: &str, path: &str, attributes: &Value) {
    let spec = &mut pod["spec"];
    let csi = json!({"driver": DRIVER, "readOnly": true, "volumeAttributes": attributes});
    spec["volumes"].as_array_mut().unwrap().push(json!({"name": volume, "csi": csi}));
    for container in spec["containers"].as_array_mut().unwrap() {
        let mount = json!({"name": volume, "mountPath": path, "readOnly": true});
        container["volumeMounts"].as_array_mut().unwrap().push(mount);
    }
}

/// What is left on the node of pods that the API server does not know any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    /// Mount points.
    pub mounts: Vec<String>,
    /// Directories below kubelet's `pods`.
    pub directories: Vec<String>,
    /// Processes, with their command line.
    pub processes: Vec<String>,
}

impl Cluster {
    /// Processes of a pod's container, in the numbers of the test; its first one is the first.
    ///
    /// # Panics
    /// The pod has no such container that runs.
    #[must_use]
    pub fn processes(&self, namespace: &str, pod: &str, container: &str) -> Vec<u32> {
        let found = self.pod(namespace, pod).unwrap_or_else(|| panic!("{namespace}/{pod}: no such pod"));
        let statuses = ["containerStatuses", "initContainerStatuses"];
        let mut statuses =
            statuses.iter().flat_map(|key| found["status"][key].as_array().into_iter().flatten());
        let id = statuses.find(|status| status["name"] == container).map(|status| &status["containerID"]);
        let id = id.and_then(|id| id.as_str()?.strip_prefix("containerd://"));
        let id = id.unwrap_or_else(|| panic!("{namespace}/{pod} has no container {container}"));
        processes_in(id)
    }

    /// Waits until nothing is left of any pod that is not in the API server any more: call it after the deletion.
    ///
    /// # Panics
    /// Something stays: says what.
    pub fn leaves_nothing(&self) {
        let end = Instant::now() + PATIENCE;
        loop {
            let remains = self.remains();
            if remains == Remains::default() {
                return;
            }
            assert!(Instant::now() < end, "left of pods that are gone: {remains:#?}");
            wait::pause(Duration::from_millis(100));
        }
    }

    /// What is left now.
    ///
    /// # Panics
    /// The node has ended.
    #[must_use]
    pub fn remains(&self) -> Remains {
        let directories: Vec<String> = fs::read_dir(self.directory().join("kubelet/pods"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let mounts = self.mountinfo();
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let mounts: Vec<&str> = mounts.filter(|point| point.contains("/pods/")).collect();
        let processes = processes_in(&format!("/{}/", self.name()));
        // Read last: what was made meanwhile is then known.
        let pods = self.list("api/v1/pods");
        let known: BTreeSet<&str> = pods.iter().filter_map(|pod| pod["metadata"]["uid"].as_str()).collect();
        let of_known = |text: &str| known.iter().any(|uid| text.contains(uid));
        let mut remains = Remains {
            mounts: mounts.into_iter().filter(|point| !of_known(point)).map(ToOwned::to_owned).collect(),
            directories: directories.into_iter().filter(|uid| !of_known(uid)).collect(),
            processes: Vec::new(),
        };
        for pid in processes {
            // One that has ended meanwhile is not left.
            let Ok(cgroup) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { continue };
            if cgroup.contains("/pod") && !of_known(&cgroup) {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                remains
                    .processes
                    .push(format!("{pid} {}", String::from_utf8_lossy(&line).replace('\0', " ")));
            }
        }
        remains
    }

    /// The name of the cluster's directory and cgroups.
    fn name(&self) -> String {
        self.directory().file_name().unwrap().to_string_lossy().into_owned()
    }
}

/// Processes with a text in the names of their cgroups, in the order of their numbers.
fn processes_in(cgroup: &str) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut pids: Vec<u32> = pids
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(cgroup))
        })
        .collect();
    pids.sort_unstable();
    pids
}
