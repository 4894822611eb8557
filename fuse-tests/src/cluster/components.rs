//! What runs on the node, with which arguments: etcd, containerd, the control plane, kubelet. All of them have certificates and real
//! authorization, as in a cluster of one's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::certificates::{Certificates, NODE};
use super::world::{NODE_IP, SERVICE_IP};

/// The API server. On the port that pods find in `KUBERNETES_SERVICE_PORT`, so that its service needs no kube-proxy.
pub const SERVER: &str = "https://10.88.0.1:443";
/// Who issues the tokens of service accounts.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

const ETCD: &str = "http://127.0.0.1:22379";
const ETCD_PEERS: &str = "http://127.0.0.1:22380";
pub(super) const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Command lines by name. Files that they read are written into `directory`.
pub(super) fn all(
    directory: &Path,
    programs: &Path,
    certificates: &Certificates,
    kubelet: &Value,
) -> BTreeMap<String, Vec<String>> {
    let file = |name: &str| directory.join(name).display().to_string();
    let program = |name: &str| programs.join(name).display().to_string();
    let snapshots = snapshotter(directory);
    fs::write(file("containerd.toml"), containerd(&file("containerd"), &program("runc"), snapshots)).unwrap();
    fs::write(file("kubelet.yaml"), kubelet.to_string()).unwrap();
    fs::write(file("audit.yaml"), audit_policy().to_string()).unwrap();
    let pki = |name: &str| certificates.text(name);
    let words = |line: &str| -> Vec<String> { line.split_whitespace().map(ToOwned::to_owned).collect() };
    let hyperkube = program("hyperkube");
    let etcd = format!(
        "{} --name tests --data-dir {} --unsafe-no-fsync --log-level warn
         --listen-client-urls {ETCD} --advertise-client-urls {ETCD}
         --listen-peer-urls {ETCD_PEERS} --initial-advertise-peer-urls {ETCD_PEERS} --initial-cluster tests={ETCD_PEERS}",
        program("etcd"),
        file("etcd"),
    );
    let apiserver = format!(
        "{hyperkube} kube-apiserver --etcd-servers={ETCD} --bind-address=0.0.0.0 --secure-port=443
         --advertise-address={NODE_IP} --service-cluster-ip-range={SERVICE_IP}/16 --endpoint-reconciler-type=none
         --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --anonymous-auth=false
         --allow-privileged=true --profiling=false
         --client-ca-file={} --tls-cert-file={} --tls-private-key-file={}
         --service-account-issuer={ISSUER} --service-account-key-file={} --service-account-signing-key-file={}
         --kubelet-client-certificate={} --kubelet-client-key={} --kubelet-preferred-address-types=InternalIP
         --audit-policy-file={} --audit-log-path={}",
        pki("ca.crt"),
        pki("apiserver.crt"),
        pki("apiserver.key"),
        pki("sa.pub"),
        pki("sa.key"),
        pki("admin.crt"),
        pki("admin.key"),
        file("audit.yaml"),
        file("audit.log"),
    );
    // The default limits of requests make a fresh cluster's accounts slowly.
    let manager = format!(
        "{hyperkube} kube-controller-manager --kubeconfig={kubeconfig} --authentication-kubeconfig={kubeconfig}
         --authorization-kubeconfig={kubeconfig} --service-account-private-key-file={} --root-ca-file={}
         --use-service-account-credentials --kube-api-qps=500 --kube-api-burst=500 --leader-elect=false
         --bind-address=127.0.0.1",
        pki("sa.key"),
        pki("ca.crt"),
        kubeconfig = pki("controller-manager.kubeconfig"),
    );
    let scheduler = format!(
        "{hyperkube} kube-scheduler --kubeconfig={kubeconfig} --authentication-kubeconfig={kubeconfig}
         --authorization-kubeconfig={kubeconfig} --leader-elect=false --bind-address=127.0.0.1",
        kubeconfig = pki("scheduler.kubeconfig"),
    );
    let kubelet = format!(
        "{hyperkube} kubelet --config={} --kubeconfig={} --hostname-override={NODE} --node-ip={NODE_IP} --v=2",
        file("kubelet.yaml"),
        pki("kubelet.kubeconfig"),
    );
    let containerd = format!("{} -c {}", program("containerd"), file("containerd.toml"));
    [
        ("etcd", etcd),
        ("containerd", containerd),
        ("kube-apiserver", apiserver),
        ("kube-controller-manager", manager),
        ("kube-scheduler", scheduler),
        ("kubelet", kubelet),
    ]
    .into_iter()
    .map(|(name, line)| (name.to_owned(), words(&line)))
    .collect()
}

/// kubelet's own configuration. `sync` is its `syncFrequency`: a volume is published again every 1.2 to 1.6 times that.
pub(super) fn kubelet(certificates: &Certificates, sync: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": certificates.text("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD}"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": "/",
        "failCgroupV1": false,
        "failSwapOn": false,
        "resolvConf": "",
        // Nothing answers there; without one each pod has a warning event.
        "clusterDNS": [NODE_IP],
        "syncFrequency": sync,
        "evictionHard": {
            "memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%",
        },
        // The default is outside of what the node has for itself.
        "volumePluginDir": "/var/lib/kubelet/plugins-exec",
    })
}

/// Every request, once, when it was answered.
fn audit_policy() -> Value {
    json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata"}],
    })
}

/// Without `CAP_SYS_RESOURCE`, as in many containers, a score for the OOM killer cannot be lowered, and runc would then refuse every
/// pod.
fn containerd(root: &str, runc: &str, snapshotter: &str) -> String {
    format!(
        r#"version = 3
root = "{root}"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD}"
[plugins.'io.containerd.internal.v1.opt']
  path = "{root}/opt"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{snapshotter}"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "localhost/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "/run/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "{runc}"
  SystemdCgroup = false
[plugins.'io.containerd.nri.v1.nri']
  disable = false
  socket_path = "/run/nri/nri.sock"
  plugin_path = "{root}/nri/plugins"
  plugin_config_path = "{root}/nri/conf.d"
"#
    )
}

/// In a container the scratch directory is often on an overlay, which cannot be the upper side of another one.
fn snapshotter(directory: &Path) -> &'static str {
    const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;
    let kind = rustix::fs::statfs(directory).unwrap().f_type;
    if kind == OVERLAYFS_SUPER_MAGIC { "native" } else { "overlayfs" }
}

/// The pods' network: one bridge, no address translation.
pub(super) fn network() -> Value {
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {
            "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": false, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "dataDir": "/run/cni-addresses",
                "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]})
}

/// What connects the pods.
pub(super) const BRIDGE: &str = "cni0";
