//! CSI Node. Each call is checked, handed to the keeper and logged in one line, without its body.
//!
//! A pod's `volumeAttributes` arrive mixed with what kubelet knows of the pod and with its tokens; here they part. Tokens leave
//! as `Secret`s, and what is refused is named by field and rule, never repeated: a token may stand in any of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tonic::{Request, Response, Status, async_trait};
use zeroize::Zeroizing;

use crate::proto::csi;
use crate::proto::csi::node_server::NodeServer;
use crate::proto::csi::node_service_capability::rpc;
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::volume_usage::Unit;
use crate::rpc::{Answer, refused};
use crate::wire::Secret;

/// Longest name of a volume in bytes; kubelet's are 68.
const LONGEST_VOLUME: usize = 128;
/// Longest path in bytes: `PATH_MAX`.
const LONGEST_PATH: usize = 4096;
/// Most bytes of keys, values and tokens together: a quarter of what a message to the agent holds.
const MOST_CONTEXT: usize = 256 << 10;
/// How long statistics may take; kubelet asks for those of one volume after the other.
const STATS: Duration = Duration::from_secs(5);

/// What kubelet adds begins with this.
const KUBELET: &str = "csi.storage.k8s.io/";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

const NOT_OF_A_POD: &str = "is not true; mount the driver as a csi volume of the pod itself, without a PersistentVolume, \
                            and set podInfoOnMount in the CSIDriver";

/// A volume that is to be there.
pub struct Publish {
    /// Its name on this node.
    pub volume: String,
    /// Where.
    pub target: PathBuf,
    /// What kubelet says of the pod, with kubelet's keys.
    pub pod: BTreeMap<String, String>,
    /// `volumeAttributes` of the pod's spec.
    pub attributes: BTreeMap<String, String>,
    /// The pod's group.
    pub group: Option<u32>,
    /// Service-account tokens by audience.
    pub tokens: BTreeMap<String, Secret>,
    /// Whether `nodePublishSecretRef` named anything, which is dropped.
    pub secret_ref: bool,
}

/// No, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The gRPC code.
    pub code: u32,
    /// What to change.
    pub text: String,
}

impl Refusal {
    /// With a text of the caller's.
    pub fn new(code: u32, text: impl ToString) -> Self {
        Self { code, text: text.to_string() }
    }
}

/// What a volume holds.
#[derive(Clone, Debug)]
pub struct VolumeStats {
    /// Of all values.
    pub bytes: u64,
    /// How many.
    pub files: u64,
    /// What is wrong with it.
    pub fault: Option<String>,
}

/// Who has the volumes: the keeper. Calls for one volume may come in any order and at once. Each has a deadline, and one whose
/// future is dropped, because kubelet gave up, runs to its end all the same.
pub trait Volumes: Send + Sync + 'static {
    /// Makes a volume be there, or gives a volume that is there its newer tokens. Answers with what the pod's owner should
    /// know all the same.
    fn publish(&self, publish: Publish) -> impl Future<Output = Result<Vec<String>, Refusal>> + Send;
    /// Makes it be gone. One that never was is gone.
    fn unpublish(&self, volume: &str, target: &Path) -> impl Future<Output = Result<(), Refusal>> + Send;
    /// Asks whoever serves it, never the mount. One that is not there, or not at this path, is `NOT_FOUND`.
    fn stats(&self, volume: &str, target: &Path)
    -> impl Future<Output = Result<VolumeStats, Refusal>> + Send;
    /// Whether an agent is attached.
    ///
    /// # Errors
    /// What is missing.
    fn ready(&self) -> Result<(), String>;
}

/// The service.
pub struct Node<V> {
    id: String,
    volumes: V,
}

impl<V: Volumes> Node<V> {
    /// On the node with this name.
    pub fn server(id: String, volumes: V) -> NodeServer<Self> {
        NodeServer::new(Self { id, volumes })
    }
}

#[async_trait]
impl<V: Volumes> csi::node_server::Node for Node<V> {
    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        let call = Call { name: "NodePublishVolume", volume: String::new(), pod: String::new() };
        let publish = match read(request.into_inner()) {
            Ok(publish) => publish,
            Err(status) => return call.ends(Err(status)),
        };
        let call = Call { volume: publish.volume.clone(), pod: pod(&publish.pod), ..call };
        let done = self.volumes.publish(publish).await;
        done.iter().flatten().for_each(|warning| call.warns(warning));
        call.ends(done.map(|_| csi::NodePublishVolumeResponse {}).map_err(status))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let csi::NodeUnpublishVolumeRequest { volume_id, target_path } = request.into_inner();
        let call = Call { name: "NodeUnpublishVolume", volume: String::new(), pod: String::new() };
        if let Err(status) = check(&volume_id, "target_path", &target_path) {
            return call.ends(Err(status));
        }
        let done = self.volumes.unpublish(&volume_id, Path::new(&target_path)).await;
        let call = Call { volume: volume_id, ..call };
        call.ends(done.map(|()| csi::NodeUnpublishVolumeResponse {}).map_err(status))
    }

    /// Bytes and files, both all used: nobody can add any.
    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Answer<csi::NodeGetVolumeStatsResponse> {
        let csi::NodeGetVolumeStatsRequest { volume_id, volume_path } = request.into_inner();
        check(&volume_id, "volume_path", &volume_path)?;
        let asked = self.volumes.stats(&volume_id, Path::new(&volume_path));
        let late = |_| Status::deadline_exceeded("the agent does not say what the volume holds; see its log");
        let stats = tokio::time::timeout(STATS, asked).await.map_err(late)?.map_err(status)?;
        let usage = [(stats.bytes, Unit::Bytes), (stats.files, Unit::Inodes)].map(|(count, unit)| {
            let used = i64::try_from(count).unwrap_or(i64::MAX);
            csi::VolumeUsage { available: 0, total: used, used, unit: unit.into() }
        });
        tracing::debug!(volume = volume_id, fault = stats.fault, "NodeGetVolumeStats: done");
        let abnormal = stats.fault.is_some();
        let condition = csi::VolumeCondition { abnormal, message: stats.fault.unwrap_or_default() };
        let volume_condition = Some(condition);
        Ok(Response::new(csi::NodeGetVolumeStatsResponse { usage: usage.into(), volume_condition }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Answer<csi::NodeGetCapabilitiesResponse> {
        let capabilities = [rpc::Type::GetVolumeStats, rpc::Type::VolumeMountGroup].map(|rpc| {
            let rpc = csi::node_service_capability::Rpc { r#type: rpc.into() };
            csi::NodeServiceCapability { r#type: Some(csi::node_service_capability::Type::Rpc(rpc)) }
        });
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn node_get_info(&self, _: Request<csi::NodeGetInfoRequest>) -> Answer<csi::NodeGetInfoResponse> {
        Ok(Response::new(csi::NodeGetInfoResponse { node_id: self.id.clone() }))
    }
}

/// Takes a request apart; secrets of the pod's own are dropped.
fn read(request: csi::NodePublishVolumeRequest) -> Result<Publish, Status> {
    let csi::NodePublishVolumeRequest { volume_id, target_path, volume_capability, .. } = request;
    let (mut secrets, mut context) = (request.secrets, request.volume_context);
    let [first, second] = [&mut secrets, &mut context].map(|map| map.remove(TOKENS).map(Zeroizing::new));
    check(&volume_id, "target_path", &target_path)?;
    let group = match volume_capability.and_then(|capability| capability.access_type) {
        Some(AccessType::Mount(mount)) => group(&mount.volume_mount_group)?,
        Some(AccessType::Block(_)) => {
            return Err(invalid("volume_capability.block", "secrets are files, not a device; ask for mount"));
        }
        None => {
            return Err(invalid("volume_capability", "is missing or names no access type; ask for mount"));
        }
    };
    let tokens = first.or(second).unwrap_or_default();
    let bytes = tokens.len() + context.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    if bytes > MOST_CONTEXT {
        return Err(invalid("volume_context", "is longer than 256 KiB in all; shorten the volumeAttributes"));
    }
    let (pod, attributes): (BTreeMap<_, _>, _) =
        context.into_iter().partition(|(key, _)| key.starts_with(KUBELET));
    if pod.get(EPHEMERAL).is_none_or(|word| word != "true") {
        return Err(invalid(EPHEMERAL, NOT_OF_A_POD));
    }
    let tokens = self::tokens(&tokens)?;
    let (target, secret_ref) = (target_path.into(), !secrets.is_empty());
    Ok(Publish { volume: volume_id, target, pod, attributes, group, tokens, secret_ref })
}

/// What both calls for a volume must have. The name becomes a mount's source, and stands in logs.
fn check(volume: &str, field: &str, path: &str) -> Result<(), Status> {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if volume.is_empty() || volume.len() > LONGEST_VOLUME || !volume.bytes().all(safe) {
        return Err(invalid("volume_id", "must be 1 to 128 letters, digits and -_.; kubelet gives it"));
    }
    if path.is_empty() || path.len() > LONGEST_PATH || path.contains('\0') {
        return Err(invalid(field, "must be a path of 1 to 4096 bytes without NUL; kubelet gives it"));
    }
    Ok(())
}

fn group(text: &str) -> Result<Option<u32>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    // The largest number means "none" to the kernel.
    match text.parse() {
        Ok(group) if digits && group < u32::MAX => Ok(Some(group)),
        _ => {
            let rule = "must be a group's number, 0 to 4294967294; correct the pod's securityContext.fsGroup";
            Err(invalid("volume_capability.mount.volume_mount_group", rule))
        }
    }
}

/// `{"audience": {"token": "...", ...}}`. The parser's own errors quote what they read: none leaves this function.
fn tokens(json: &str) -> Result<BTreeMap<String, Secret>, Status> {
    #[derive(Deserialize)]
    struct Issued {
        token: Secret,
    }
    if json.is_empty() {
        return Ok(BTreeMap::new());
    }
    let issued: Result<BTreeMap<String, Issued>, _> = serde_json::from_str(json);
    let issued = issued.map_err(|_| {
        invalid(
            TOKENS,
            "must be a JSON object of tokens by audience; kubelet gives it, by the CSIDriver's tokenRequests",
        )
    })?;
    Ok(issued.into_iter().map(|(audience, issued)| (audience, issued.token)).collect())
}

fn invalid(field: &str, rule: &str) -> Status {
    Status::invalid_argument(format!("{field}: {rule}"))
}

fn status(refusal: Refusal) -> Status {
    refused(refusal.code, &refusal.text)
}

/// `namespace/name`.
fn pod(pod: &BTreeMap<String, String>) -> String {
    let part = |key: &str| pod.get(&format!("{KUBELET}pod.{key}")).map_or("", String::as_str);
    format!("{}/{}", part("namespace"), part("name"))
}

/// What a line of the log is about; empty what could not be read.
struct Call {
    name: &'static str,
    volume: String,
    pod: String,
}

impl Call {
    fn warns(&self, text: &str) {
        tracing::warn!(volume = self.volume, pod = self.pod, "{}: {text}", self.name);
    }

    fn ends<T>(&self, done: Result<T, Status>) -> Answer<T> {
        let Self { name, volume, pod } = self;
        match &done {
            Ok(_) => tracing::info!(volume, pod, "{name}: done"),
            Err(no) => tracing::warn!(volume, pod, code = ?no.code(), "{name}: {}", no.message()),
        }
        done.map(Response::new)
    }
}
