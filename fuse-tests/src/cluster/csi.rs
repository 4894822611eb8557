//! The driver's own socket, called as root of the node calls it: what kubelet never sends can be sent here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fuse_secrets_csi::proto::csi::node_client::NodeClient;
use fuse_secrets_csi::proto::csi::volume_capability::{AccessType, Mount};
use fuse_secrets_csi::proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability};
use serde_json::json;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::Cluster;
use super::pods::DRIVER;
use super::store::AUDIENCE;

/// How long kubelet waits for an answer.
const DEADLINE: Duration = Duration::from_secs(120);

/// A volume as somebody on the node asks for it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Its name on the node.
    pub volume: String,
    /// In whose directory it is to be mounted: a pod's uid.
    pub place: String,
    /// Whose it is said to be: namespace, name, uid, service account.
    pub pod: [String; 4],
    /// The SecretProviderClass.
    pub class: String,
    /// What is sent as kubelet's token for the store.
    pub token: String,
}

impl Asked {
    /// The target, as the node names it.
    #[must_use]
    pub fn target(&self) -> String {
        format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi/{}/mount", self.place, self.volume)
    }

    fn request(&self) -> NodePublishVolumeRequest {
        let [namespace, name, uid, account] = self.pod.clone();
        let tokens = json!({AUDIENCE: {"token": self.token, "expirationTimestamp": "2999-01-01T00:00:00Z"}});
        let of_kubernetes = |key: &str| format!("csi.storage.k8s.io/{key}");
        NodePublishVolumeRequest {
            volume_id: self.volume.clone(),
            target_path: self.target(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(Mount::default())),
            }),
            secrets: BTreeMap::new(),
            volume_context: BTreeMap::from([
                ("secretProviderClass".to_owned(), self.class.clone()),
                (of_kubernetes("ephemeral"), "true".to_owned()),
                (of_kubernetes("pod.namespace"), namespace),
                (of_kubernetes("pod.name"), name),
                (of_kubernetes("pod.uid"), uid),
                (of_kubernetes("serviceAccount.name"), account),
                (of_kubernetes("serviceAccount.tokens"), tokens.to_string()),
            ]),
        }
    }
}

impl Cluster {
    /// `NodePublishVolume`, with the directory around the target made as kubelet makes it.
    ///
    /// # Errors
    /// The driver's refusal.
    ///
    /// # Panics
    /// The directory cannot be made.
    pub fn publish(&self, asked: &Asked) -> Result<(), Status> {
        std::fs::create_dir_all(self.outside(asked).parent().unwrap()).unwrap();
        let request = asked.request();
        self.call(|mut driver| async move { driver.node_publish_volume(request).await.map(drop) })
    }

    /// `NodeUnpublishVolume`, and the end of the directory around the target.
    ///
    /// # Errors
    /// The driver's refusal.
    ///
    /// # Panics
    /// Something is left in the directory.
    pub fn unpublish(&self, asked: &Asked) -> Result<(), Status> {
        let request =
            NodeUnpublishVolumeRequest { volume_id: asked.volume.clone(), target_path: asked.target() };
        self.call(|mut driver| async move { driver.node_unpublish_volume(request).await.map(drop) })?;
        std::fs::remove_dir(self.outside(asked).parent().unwrap()).unwrap();
        Ok(())
    }

    /// The target in the cluster's own directory, where the node's mounts are not seen.
    fn outside(&self, asked: &Asked) -> PathBuf {
        let target = asked.target();
        self.directory().join(target.strip_prefix("/var/lib/").unwrap())
    }

    fn call<F: Future<Output = Result<(), Status>>>(
        &self,
        body: impl FnOnce(NodeClient<Channel>) -> F,
    ) -> Result<(), Status> {
        let socket = self.directory().join("kubelet/plugins").join(DRIVER).join("csi.sock");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { body(NodeClient::new(endpoint.timeout(DEADLINE).connect_lazy())).await })
    }
}
