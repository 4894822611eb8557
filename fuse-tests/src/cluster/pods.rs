//! Pods on the node: what they are made of, and what is left of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Cluster, PATIENCE, count};
use crate::wait;

/// The image of pods: a shell and its commands.
pub const TOOLS: &str = "localhost/tools:1";
/// Where a pod's secrets are in its container.
pub const SECRETS: &str = "/mnt/secrets";
/// Where kubelet has everything of its pods, as the node sees it: mounts of others, which a fresh node inherits, are elsewhere.
const PODS: &str = "/var/lib/kubelet/pods/";
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

impl Cluster {
    /// Processes of a pod's container, in the numbers of the test; the first one of its pid namespace is the first.
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

    /// Waits until nothing is left of the pods that are not in the API server any more: call it after the deletion. What other tests
    /// leave meanwhile is theirs to wait for.
    ///
    /// # Panics
    /// Something stays: says what.
    pub fn leaves_nothing(&self) {
        let end = Instant::now() + PATIENCE;
        let mut left = self.remains();
        while !left.is_empty() {
            assert!(Instant::now() < end, "left of pods that are gone: {left:#?}");
            wait::pause(Duration::from_millis(100));
            left = &left & &self.remains();
        }
    }

    /// How often a volume of the driver is mounted for a pod: once for each that it has, and once more for each `subPath`.
    #[must_use]
    pub fn mounts_of(&self, uid: &str) -> usize {
        served(&self.mountinfo()).iter().filter(|(_, point)| point.contains(uid)).count()
    }

    /// What is left on the node now of pods that the API server does not know any more: mount points, directories below kubelet's
    /// `pods`, processes, descriptors of FUSE whose mount is gone, and what the shim keeps beyond what is mounted.
    ///
    /// # Panics
    /// The node has ended.
    #[must_use]
    pub fn remains(&self) -> BTreeSet<String> {
        let directories = fs::read_dir(self.directory().join("kubelet/pods")).into_iter().flatten();
        let directories: Vec<String> =
            directories.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let processes = processes_in(&format!("/{}/", self.name()));
        // Before the mounts: what was mounted meanwhile is then known.
        let held: Vec<(u32, String)> = processes
            .iter()
            .flat_map(|pid| connections(*pid).into_iter().map(|number| (*pid, number)))
            .collect();
        let kept = self.kept();
        let mountinfo = self.mountinfo();
        let served = served(&mountinfo);
        let mounts = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
        // Read last: what was made meanwhile is then known.
        let pods = self.list("api/v1/pods");
        let known: BTreeSet<&str> = pods.iter().filter_map(|pod| pod["metadata"]["uid"].as_str()).collect();
        let of_known = |text: &str| known.iter().any(|uid| text.contains(uid));
        let mut remains = BTreeSet::new();
        remains.extend(
            mounts
                .filter(|point| point.starts_with(PODS) && !of_known(point))
                .map(|point| format!("mount {point}")),
        );
        remains.extend(
            directories.iter().filter(|uid| !of_known(uid)).map(|uid| format!("directory pods/{uid}")),
        );
        for pid in processes {
            // One that has ended meanwhile is not left.
            let Ok(cgroup) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { continue };
            if cgroup.contains("/pod") && !of_known(&cgroup) {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                remains.insert(format!("process {pid} {line}"));
            }
        }
        for (pid, number) in held {
            if !served.iter().any(|(mounted, _)| *mounted == number) {
                remains.insert(format!("descriptor of process {pid} for connection {number}"));
            }
        }
        let targets: BTreeSet<&str> =
            served.iter().map(|(_, point)| *point).filter(|point| point.ends_with("/mount")).collect();
        if kept.is_some_and(|kept| kept > targets.len()) {
            remains.insert("volumes of the shim that are not mounted".to_owned());
        }
        remains
    }

    /// How many volumes the shim keeps, as it says itself; `None`: there is no shim that answers.
    fn kept(&self) -> Option<usize> {
        let pods = self.list("api/v1/namespaces/fuse-secrets-csi/pods");
        let address = pods.first()?["status"]["podIP"].as_str()?;
        let metrics = self.page(&format!("http://{address}:9809/metrics"))?;
        let line = metrics.lines().find_map(|line| line.strip_prefix("fuse_secrets_csi_volumes "))?;
        line.parse().ok()
    }

    /// The name of the cluster's directory and cgroups.
    fn name(&self) -> String {
        self.directory().file_name().unwrap().to_string_lossy().into_owned()
    }
}

/// Open descriptors of a process: how many of each kind.
///
/// # Panics
/// It has ended.
#[must_use]
pub fn descriptors(pid: u32) -> BTreeMap<String, u64> {
    // One that was closed meanwhile is not open.
    let open =
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().map(|entry| fs::read_link(entry.path()));
    count(open.flatten().map(|path| {
        let path = path.display().to_string();
        path.split_once(":[").map_or(path.clone(), |(kind, _)| kind.to_owned())
    }))
}

/// The number that a process has in its own pid namespace.
fn own_number(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

/// Mounts of FUSE below kubelet's `pods`: the kernel's number of the connection, and the mount point.
fn served(mountinfo: &str) -> Vec<(&str, &str)> {
    let fuse = mountinfo.lines().filter(|line| line.contains(" - fuse"));
    let words = fuse.map(|line| line.split(' ').collect::<Vec<_>>());
    let points = words.filter_map(|words| Some((words[2].strip_prefix("0:")?, words[4])));
    points.filter(|(_, point)| point.starts_with(PODS)).collect()
}

/// The FUSE connections of which a process has a descriptor, as far as the kernel tells (6.18 does).
fn connections(pid: u32) -> Vec<String> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let fuse = descriptors
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == "/dev/fuse"));
    let numbers = fuse.filter_map(|entry| {
        // One that was closed meanwhile is not held.
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_str()?)).ok()?;
        Some(info.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?.trim().to_owned())
    });
    numbers.collect()
}

/// Processes with a text in the names of their cgroups, in the order of the numbers that they have in their own pid namespace.
fn processes_in(cgroup: &str) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut pids: Vec<u32> = pids
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(cgroup))
        })
        .collect();
    // Asked once of each: one may end meanwhile.
    pids.sort_by_cached_key(|pid| own_number(*pid));
    pids
}
