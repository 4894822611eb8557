//! What the debug commands show of a volume: names, times, counts; never a value. Shared by the socket's server and the
//! command line, as JSON.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Agent, Served};

/// One mount, one row of `fuse-secrets mounts`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountStatus {
    /// Where it is mounted.
    pub path: String,
    /// Process id of the agent that serves it.
    pub agent: u32,
    /// Its class.
    pub class: String,
    /// The pod, where there is one.
    pub pod: Option<String>,
    /// The pod's namespace.
    pub namespace: Option<String>,
    /// The pod's service account.
    pub service_account: Option<String>,
    /// The store's first address.
    pub store: String,
    /// Number of files.
    pub files: usize,
    /// Number of the newest generation.
    pub generation: u32,
    /// `fresh`, `stale` or `gone`.
    pub state: String,
    /// Since when refreshes fail.
    pub stale_since: Option<String>,
    /// When it was mounted.
    pub mounted: String,
    /// When the store last answered for the file that waits longest.
    pub refreshed: Option<String>,
    /// Opens of its files.
    pub opens: u64,
    /// Read requests.
    pub reads: u64,
    /// The last failure.
    pub last_error: Option<String>,
}

/// One file of a mount, one row of `fuse-secrets mounts PATH`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileStatus {
    /// Its path in the volume.
    pub path: String,
    /// What is asked of the store.
    pub request: String,
    /// Which key of the answer.
    pub key: Option<String>,
    /// The store's version of the secret.
    pub version: Option<u64>,
    /// Bytes; absent if the value is no longer served.
    pub size: Option<usize>,
    /// Permission bits.
    pub mode: u16,
    /// When this version was written.
    pub modified: String,
    /// When it ends.
    pub expires: Option<String>,
}

/// A mount with its files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountDetail {
    /// The mount.
    pub mount: MountStatus,
    /// Its files in the order of the class.
    pub files: Vec<FileStatus>,
}

/// All mounts of an agent.
#[must_use]
pub fn mounts(agent: &Agent) -> Vec<MountStatus> {
    agent.served().iter().map(|served| mount(served)).collect()
}

/// One mount of an agent, by its path.
#[must_use]
pub fn detail(agent: &Agent, path: &str) -> Option<MountDetail> {
    let served = agent.served().into_iter().find(|served| served.path() == std::path::Path::new(path))?;
    Some(MountDetail { mount: mount(&served), files: files(&served) })
}

fn mount(served: &Served) -> MountStatus {
    let volume = served.volume();
    let (spec, report) = (volume.spec(), volume.report());
    let state = match (report.gone, report.stale_since) {
        (1.., _) => "gone",
        (0, Some(_)) => "stale",
        (0, None) => "fresh",
    };
    MountStatus {
        path: served.path().display().to_string(),
        agent: std::process::id(),
        class: spec.class.clone(),
        pod: volume.pod().map(|pod| pod.name.clone()),
        namespace: volume.pod().map(|pod| pod.namespace.clone()),
        service_account: volume.pod().map(|pod| pod.service_account.clone()),
        store: spec.identity.connection.addresses.first().map(ToString::to_string).unwrap_or_default(),
        files: spec.files.len(),
        generation: volume.generations().current().map_or(0, |current| current.number()),
        state: state.to_owned(),
        stale_since: report.stale_since.map(time),
        mounted: time(report.since),
        refreshed: report.refreshed.map(time),
        opens: report.opens,
        reads: report.reads,
        last_error: report.last_error,
    }
}

fn files(served: &Served) -> Vec<FileStatus> {
    let volume = served.volume();
    let Some(current) = volume.generations().current() else { return Vec::new() };
    let mode = |index: usize| {
        let ownership = volume.spec().files[index].ownership.or(volume.spec().ownership);
        crate::fs::attr::mode(ownership)
    };
    (volume.spec().files.iter().zip(current.snapshot.files()).enumerate())
        .map(|(index, (spec, record))| FileStatus {
            path: record.path.clone(),
            request: spec.request.to_string(),
            key: spec.key.clone(),
            version: record.version,
            size: record.size(),
            mode: mode(index),
            modified: time(record.mtime),
            expires: record.expires.map(time),
        })
        .collect()
}

/// RFC 3339 in UTC, to the second.
fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
