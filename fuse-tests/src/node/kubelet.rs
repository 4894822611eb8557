//! kubelet's calls, and its directory of pods.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fuse_secrets_csi::proto::csi::node_client::NodeClient;
use fuse_secrets_csi::proto::csi::volume_capability::{AccessType, Mount};
use fuse_secrets_csi::proto::csi::{
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, VolumeCapability,
};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::cluster::{ACCOUNT, NAMESPACE};

/// How long kubelet waits for an answer.
const DEADLINE: Duration = Duration::from_secs(120);

/// A pod's inline volume.
#[derive(Clone)]
pub struct Volume {
    /// Its name on this node.
    pub id: String,
    /// Where it is to be mounted.
    pub target: PathBuf,
    /// The pod's name.
    pub pod: String,
    /// The pod's uid.
    pub pod_uid: String,
    /// The pod's `fsGroup`.
    pub group: Option<u32>,
    /// `volumeAttributes` of the pod's spec.
    pub attributes: BTreeMap<String, String>,
    /// What kubelet writes into `serviceAccount.tokens`; empty: nothing.
    pub tokens: String,
}

impl Volume {
    /// Of a fresh pod; kubelet's own directory for it is made, the target not.
    pub(super) fn new(root: &Path, pod: &str, class: &str) -> Self {
        let pod_uid = format!("{:032x}", rand::random::<u128>());
        let volume = root.join(format!("pods/{pod_uid}/volumes/kubernetes.io~csi/secrets"));
        std::fs::create_dir_all(&volume).unwrap();
        Self {
            id: format!("csi-{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>()),
            target: volume.join("mount"),
            pod: pod.to_owned(),
            pod_uid,
            group: None,
            attributes: BTreeMap::from([("secretProviderClass".to_owned(), class.to_owned())]),
            tokens: String::new(),
        }
    }

    /// A path in the mount.
    #[must_use]
    pub fn join(&self, file: &str) -> PathBuf {
        self.target.join(file)
    }

    /// The request as kubelet makes it.
    #[must_use]
    pub fn request(&self) -> NodePublishVolumeRequest {
        let mut context = self.attributes.clone();
        let said = [
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", &self.pod),
            ("csi.storage.k8s.io/pod.namespace", NAMESPACE),
            ("csi.storage.k8s.io/pod.uid", &self.pod_uid),
            ("csi.storage.k8s.io/serviceAccount.name", ACCOUNT),
            ("csi.storage.k8s.io/serviceAccount.tokens", &self.tokens),
        ];
        let said = said.into_iter().filter(|(_, value)| !value.is_empty());
        context.extend(said.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let group = self.group.map_or_else(String::new, |group| group.to_string());
        let mount = AccessType::Mount(Mount { volume_mount_group: group });
        NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            target_path: self.target.display().to_string(),
            volume_capability: Some(VolumeCapability { access_type: Some(mount) }),
            secrets: BTreeMap::new(),
            volume_context: context,
        }
    }
}

/// Calls the shim. A clone shares the connection, which is made at the first call and again after the shim's end.
#[derive(Clone)]
pub struct Kubelet {
    channel: Channel,
}

impl Kubelet {
    /// On this socket, from within a runtime.
    pub(super) fn new(socket: &Path) -> Self {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        Self { channel: endpoint.timeout(DEADLINE).connect_lazy() }
    }

    /// `NodePublishVolume`.
    ///
    /// # Errors
    /// The shim's refusal.
    pub async fn publish(&self, volume: &Volume) -> Result<(), Status> {
        self.client().node_publish_volume(volume.request()).await.map(drop)
    }

    /// `NodeUnpublishVolume`, after which kubelet removes its own directory of the volume.
    ///
    /// # Errors
    /// The shim's refusal.
    pub async fn unpublish(&self, volume: &Volume) -> Result<(), Status> {
        let target_path = volume.target.display().to_string();
        let request = NodeUnpublishVolumeRequest { volume_id: volume.id.clone(), target_path };
        self.client().node_unpublish_volume(request).await.map(drop)
    }

    /// `NodeGetVolumeStats`.
    ///
    /// # Errors
    /// The shim's refusal.
    pub async fn stats(&self, volume: &Volume) -> Result<NodeGetVolumeStatsResponse, Status> {
        let volume_path = volume.target.display().to_string();
        let request = NodeGetVolumeStatsRequest { volume_id: volume.id.clone(), volume_path };
        self.client().node_get_volume_stats(request).await.map(tonic::Response::into_inner)
    }

    /// For any other call.
    #[must_use]
    pub fn client(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }
}

/// Mount points at and below a directory, the oldest first.
pub(super) fn mounts(root: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(root)).collect()
}

/// Targets that exist. None of them is touched: their names stand in their parents.
pub(super) fn targets(root: &Path) -> Vec<PathBuf> {
    let mut targets = Vec::new();
    for pod in std::fs::read_dir(root.join("pods")).unwrap() {
        let volumes = pod.unwrap().path().join("volumes/kubernetes.io~csi");
        for volume in std::fs::read_dir(volumes).into_iter().flatten() {
            let inside = std::fs::read_dir(volume.unwrap().path()).unwrap();
            targets.extend(inside.map(|entry| entry.unwrap().path()));
        }
    }
    targets.sort();
    targets
}
