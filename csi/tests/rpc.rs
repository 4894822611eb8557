//! The services as kubelet calls them: over a unix socket, with a keeper that does what a test says.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuse_secrets_csi::identity::Identity;
use fuse_secrets_csi::node::{Node, Publish, Refusal, VolumeStats, Volumes};
use fuse_secrets_csi::proto::csi;
use fuse_secrets_csi::proto::csi::identity_client::IdentityClient;
use fuse_secrets_csi::proto::csi::node_client::NodeClient;
use fuse_secrets_csi::proto::csi::volume_capability::{AccessType, Block, Mount};
use fuse_secrets_csi::proto::registration;
use fuse_secrets_csi::proto::registration::registration_client::RegistrationClient;
use fuse_secrets_csi::registration::Plugin;
use fuse_secrets_csi::rpc;
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Written where a token stands, and searched for where none may.
const CANARY: &str = "canary-4c8e1f";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Default)]
struct Script(Arc<Inner>);

#[derive(Default)]
struct Inner {
    published: Mutex<Vec<Publish>>,
    unpublished: Mutex<Vec<(String, PathBuf)>>,
    /// What the next calls answer.
    refusal: Mutex<Option<Refusal>>,
    silent: bool,
    without_agent: bool,
}

impl Script {
    fn refuse(&self) -> Result<(), Refusal> {
        self.0.refusal.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl Volumes for Script {
    async fn publish(&self, publish: Publish) -> Result<Vec<String>, Refusal> {
        self.0.published.lock().unwrap().push(publish);
        self.refuse().map(|()| vec!["secretObjects are not synced".to_owned()])
    }

    async fn unpublish(&self, volume: &str, target: &Path) -> Result<(), Refusal> {
        self.0.unpublished.lock().unwrap().push((volume.to_owned(), target.to_owned()));
        self.refuse()
    }

    async fn stats(&self, volume: &str, target: &Path) -> Result<VolumeStats, Refusal> {
        if self.0.silent {
            std::future::pending::<()>().await;
        }
        self.refuse()?;
        assert_eq!((volume, target), ("v", Path::new("/t")));
        Ok(VolumeStats { bytes: 300, files: 3, fault: Some("the store does not answer".to_owned()) })
    }

    fn ready(&self) -> Result<(), String> {
        if self.0.without_agent { Err("no agent is attached".to_owned()) } else { Ok(()) }
    }
}

struct Server {
    directory: tempfile::TempDir,
    script: Script,
    stop: oneshot::Sender<()>,
    ended: tokio::task::JoinHandle<()>,
}

impl Server {
    fn start(script: Script) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = rpc::listen(&directory.path().join("csi.sock")).unwrap();
        let services = Routes::new(Identity::server("fuse-secrets".to_owned(), script.clone()))
            .add_service(Node::server("node-1".to_owned(), script.clone()));
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(async move {
            rpc::serve(listener, services, async { stopped.await.unwrap_or(()) }).await.unwrap();
        });
        Self { directory, script, stop, ended }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("csi.sock")
    }

    async fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(connect(&self.path()).await.unwrap())
    }

    async fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(connect(&self.path()).await.unwrap())
    }

    /// The publish that reached the keeper.
    async fn published(&self, request: csi::NodePublishVolumeRequest) -> Publish {
        self.node().await.node_publish_volume(request).await.unwrap();
        self.script.0.published.lock().unwrap().pop().unwrap()
    }

    /// The refusal of one that must not reach it.
    async fn invalid(&self, request: csi::NodePublishVolumeRequest) -> String {
        let status = self.node().await.node_publish_volume(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
        assert!(self.script.0.published.lock().unwrap().is_empty());
        assert!(!status.message().contains(CANARY), "a value is repeated");
        status.message().to_owned()
    }
}

async fn connect(path: &Path) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(format!("unix://{}", path.display())).unwrap().connect().await
}

fn request() -> csi::NodePublishVolumeRequest {
    let context = [
        ("secretProviderClass", "app"),
        ("csi.storage.k8s.io/ephemeral", "true"),
        ("csi.storage.k8s.io/pod.name", "web-0"),
        ("csi.storage.k8s.io/pod.namespace", "shop"),
    ];
    csi::NodePublishVolumeRequest {
        volume_id: "csi-0a1b".to_owned(),
        target_path: "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/secrets/mount".to_owned(),
        volume_capability: mount("2000"),
        secrets: BTreeMap::new(),
        volume_context: context.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
    }
}

fn mount(group: &str) -> Option<csi::VolumeCapability> {
    let mount = Mount { volume_mount_group: group.to_owned() };
    Some(csi::VolumeCapability { access_type: Some(AccessType::Mount(mount)) })
}

fn issued(token: &str) -> String {
    format!(
        r#"{{"vault":{{"token":"{token}","expirationTimestamp":"2030-01-01T00:00:00Z"}},"":{{"token":"second"}}}}"#
    )
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("not within the patience of a test")
}

#[tokio::test]
async fn kubelet_learns_who_it_speaks_to_and_what_that_can() {
    let server = Server::start(Script::default());
    let mut identity = server.identity().await;
    let info = identity.get_plugin_info(csi::GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (info.name.as_str(), info.vendor_version.as_str()),
        ("fuse-secrets", env!("CARGO_PKG_VERSION"))
    );
    identity.get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {}).await.unwrap();
    assert_eq!(identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));

    let mut node = server.node().await;
    let info = node.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.node_id, "node-1");
    let can = node.node_get_capabilities(csi::NodeGetCapabilitiesRequest {}).await.unwrap().into_inner();
    let numbers: Vec<i32> = can
        .capabilities
        .into_iter()
        .map(|can| match can.r#type.unwrap() {
            csi::node_service_capability::Type::Rpc(rpc) => rpc.r#type,
        })
        .collect();
    assert_eq!(numbers, [2, 6], "GET_VOLUME_STATS and VOLUME_MOUNT_GROUP of the specification");
}

#[tokio::test]
async fn without_an_agent_the_probe_says_not_ready() {
    let server = Server::start(Script(Arc::new(Inner { without_agent: true, ..Inner::default() })));
    let probe = server.identity().await.probe(csi::ProbeRequest {}).await.unwrap().into_inner();
    assert_eq!(probe.ready, Some(false));
}

#[tokio::test]
async fn a_publish_parts_attributes_pod_and_tokens() {
    let server = Server::start(Script::default());
    let mut request = request();
    request.volume_context.insert(TOKENS.to_owned(), issued(CANARY));
    let publish = server.published(request).await;
    assert_eq!(publish.volume, "csi-0a1b");
    assert_eq!(publish.target, Path::new("/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/secrets/mount"));
    assert_eq!(publish.group, Some(2000));
    assert_eq!(publish.attributes, BTreeMap::from([("secretProviderClass".to_owned(), "app".to_owned())]));
    let keys: Vec<&str> = publish.pod.keys().map(String::as_str).collect();
    let expected =
        ["csi.storage.k8s.io/ephemeral", "csi.storage.k8s.io/pod.name", "csi.storage.k8s.io/pod.namespace"];
    assert_eq!(keys, expected, "no token is among what is passed on");
    let tokens: Vec<_> =
        publish.tokens.iter().map(|(audience, token)| (audience.as_str(), token.expose())).collect();
    assert_eq!(tokens, [("", "second"), ("vault", CANARY)]);
}

#[tokio::test]
async fn tokens_in_secrets_win_and_other_secrets_are_dropped() {
    let server = Server::start(Script::default());
    let mut request = request();
    request.volume_context.insert(TOKENS.to_owned(), issued("of-the-context"));
    request.secrets =
        [(TOKENS.to_owned(), issued("of-the-secrets")), ("password".to_owned(), CANARY.to_owned())].into();
    let publish = server.published(request).await;
    assert_eq!(publish.tokens["vault"].expose(), "of-the-secrets");
    assert!(!publish.attributes.contains_key("password") && !publish.pod.contains_key(TOKENS));
    assert!(publish.secret_ref, "the agent tells the pod's owner");
}

#[tokio::test]
async fn a_pod_without_group_and_tokens_is_published_without() {
    let server = Server::start(Script::default());
    let mut request = request();
    request.volume_capability = mount("");
    let publish = server.published(request).await;
    assert_eq!(publish.group, None);
    assert!(publish.tokens.is_empty());
}

#[tokio::test]
async fn each_broken_field_is_named_with_its_rule_and_never_with_its_value() {
    type Break = fn(&mut csi::NodePublishVolumeRequest);
    let broken: [(&str, &str, Break); 14] = [
        ("volume_id: ", "1 to 128", |request| request.volume_id.clear()),
        ("volume_id: ", "1 to 128", |request| request.volume_id = CANARY.repeat(10)),
        ("volume_id: ", "letters", |request| request.volume_id = format!("../{CANARY}")),
        ("volume_id: ", "letters", |request| request.volume_id = format!("{CANARY}\n")),
        ("target_path: ", "1 to 4096", |request| request.target_path.clear()),
        ("target_path: ", "1 to 4096", |request| request.target_path = format!("/{}", CANARY.repeat(400))),
        ("volume_capability: ", "ask for mount", |request| request.volume_capability = None),
        ("volume_capability: ", "ask for mount", |request| {
            request.volume_capability = Some(csi::VolumeCapability { access_type: None });
        }),
        ("volume_capability.block: ", "ask for mount", |request| {
            request.volume_capability =
                Some(csi::VolumeCapability { access_type: Some(AccessType::Block(Block {})) });
        }),
        ("volume_capability.mount.volume_mount_group: ", "fsGroup", |request| {
            request.volume_capability = mount(CANARY);
        }),
        ("csi.storage.k8s.io/ephemeral: ", "without a PersistentVolume", |request| {
            request.volume_context.remove("csi.storage.k8s.io/ephemeral");
        }),
        ("volume_context: ", "256 KiB", |request| {
            request.volume_context.insert("note".to_owned(), CANARY.repeat(100_000));
        }),
        (TOKENS, "tokenRequests", |request| {
            request.volume_context.insert(TOKENS.to_owned(), format!("{{\"vault\":{CANARY}"));
        }),
        (TOKENS, "tokenRequests", |request| {
            request.secrets.insert(TOKENS.to_owned(), format!(r#"{{"vault":"{CANARY}"}}"#));
        }),
    ];
    let server = Server::start(Script::default());
    for (field, rule, spoil) in broken {
        let mut request = request();
        spoil(&mut request);
        let text = server.invalid(request).await;
        assert!(text.starts_with(field) && text.contains(rule), "{text}");
    }
}

#[tokio::test]
async fn a_group_is_a_number_that_the_kernel_takes() {
    let server = Server::start(Script::default());
    for (text, group) in [("0", Some(0)), ("4294967294", Some(4_294_967_294)), ("007", Some(7))] {
        let mut request = request();
        request.volume_capability = mount(text);
        assert_eq!(server.published(request).await.group, group);
    }
    for text in ["4294967295", "4294967296", "-1", "+1", " 1", "0x10", "staff"] {
        let mut request = request();
        request.volume_capability = mount(text);
        server.invalid(request).await;
    }
}

#[tokio::test]
async fn the_keepers_refusal_is_what_kubelet_reads() {
    let server = Server::start(Script::default());
    let refuse = |code, text: &str| {
        *server.script.0.refusal.lock().unwrap() = Some(Refusal::new(code, text));
    };
    let mut node = server.node().await;
    refuse(14, "no agent is attached; see its pod");
    let status = node.node_publish_volume(request()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "no agent is attached; see its pod"));

    refuse(0, "a refusal that says OK");
    assert_eq!(node.node_publish_volume(request()).await.unwrap_err().code(), Code::Unknown);
    refuse(9, &"x".repeat(100_000));
    let status = node.node_publish_volume(request()).await.unwrap_err();
    assert_eq!((status.code(), status.message().len()), (Code::FailedPrecondition, 2048));
}

#[tokio::test]
async fn an_unpublish_names_volume_and_path() {
    let server = Server::start(Script::default());
    let mut node = server.node().await;
    let ask = |volume: &str, path: &str| csi::NodeUnpublishVolumeRequest {
        volume_id: volume.to_owned(),
        target_path: path.to_owned(),
    };
    for (request, field) in [(ask("", "/t"), "volume_id: "), (ask("v", ""), "target_path: ")] {
        let status = node.node_unpublish_volume(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    assert!(server.script.0.unpublished.lock().unwrap().is_empty());
    node.node_unpublish_volume(ask("csi-0a1b", "/t")).await.unwrap();
    assert_eq!(*server.script.0.unpublished.lock().unwrap(), [("csi-0a1b".to_owned(), PathBuf::from("/t"))]);
}

#[tokio::test]
async fn statistics_are_bytes_files_and_what_is_wrong() {
    let server = Server::start(Script::default());
    let mut node = server.node().await;
    let ask = |volume: &str, path: &str| csi::NodeGetVolumeStatsRequest {
        volume_id: volume.to_owned(),
        volume_path: path.to_owned(),
    };
    let stats = node.node_get_volume_stats(ask("v", "/t")).await.unwrap().into_inner();
    let usage: Vec<_> = stats.usage.iter().map(|of| (of.unit, of.total, of.used, of.available)).collect();
    assert_eq!(usage, [(1, 300, 300, 0), (2, 3, 3, 0)], "bytes, then inodes");
    let condition = stats.volume_condition.unwrap();
    assert!(condition.abnormal);
    assert_eq!(condition.message, "the store does not answer");

    for request in [ask("", "/t"), ask("v", "")] {
        assert_eq!(node.node_get_volume_stats(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    *server.script.0.refusal.lock().unwrap() = Some(Refusal::new(5, "no such volume"));
    assert_eq!(node.node_get_volume_stats(ask("v", "/t")).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn statistics_of_a_silent_agent_end_with_a_deadline() {
    let server = Server::start(Script(Arc::new(Inner { silent: true, ..Inner::default() })));
    let request = csi::NodeGetVolumeStatsRequest { volume_id: "v".to_owned(), volume_path: "/t".to_owned() };
    let status = within(server.node().await.node_get_volume_stats(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_request_of_more_than_four_mebibytes_is_refused() {
    let server = Server::start(Script::default());
    let mut request = request();
    request.volume_context.insert("note".to_owned(), "x".repeat(4 << 20));
    let status = server.node().await.node_publish_volume(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{}", status.message());
}

#[tokio::test]
async fn calls_of_other_services_and_stages_are_unimplemented() {
    let server = Server::start(Script::default());
    let mut raw = tonic::client::Grpc::new(connect(&server.path()).await.unwrap());
    raw.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<csi::ProbeRequest, csi::ProbeResponse>::default();
    for path in ["/csi.v1.Node/NodeStageVolume", "/csi.v1.Controller/CreateVolume"] {
        let path = path.parse().unwrap();
        let status: Status =
            raw.unary(tonic::Request::new(csi::ProbeRequest {}), path, codec.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        raw.ready().await.unwrap();
    }
}

#[tokio::test]
async fn the_socket_is_roots_and_replaces_a_stale_one() {
    let server = Server::start(Script::default());
    let (path, kept) = (server.path(), server.directory);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    server.stop.send(()).unwrap();
    within(server.ended).await.unwrap();
    assert!(connect(&path).await.is_err());
    assert!(std::fs::metadata(&path).unwrap().file_type().is_socket(), "stale");
    let listener = rpc::listen(&path).unwrap();
    let services = Routes::new(Identity::server("fuse-secrets".to_owned(), Script::default()));
    let serving = tokio::spawn(rpc::serve(listener, services, std::future::pending()));
    IdentityClient::new(connect(&path).await.unwrap()).probe(csi::ProbeRequest {}).await.unwrap();
    let names: Vec<_> =
        std::fs::read_dir(kept.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["csi.sock"]);
    serving.abort();
}

/// The same test is the caller: started again as another user, with the socket's path in the environment.
#[tokio::test]
async fn a_caller_that_is_not_root_is_refused() {
    const SOCKET: &str = "FUSE_SECRETS_TEST_SOCKET";
    const NAME: &str = "a_caller_that_is_not_root_is_refused";
    if let Some(path) = std::env::var_os(SOCKET) {
        let mut socket = std::os::unix::net::UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        // A server that takes a caller sends its settings first.
        let closed = matches!(socket.read(&mut [0]), Ok(0) | Err(_));
        #[allow(clippy::exit, reason = "this process is the caller, and says so what it saw")]
        std::process::exit(if closed { 3 } else { 4 });
    }
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "skipped: {NAME}: only root can be another user");
        return;
    }
    let server = Server::start(Script::default());
    // The mode would keep the caller out before the server sees it.
    std::fs::set_permissions(server.path(), PermissionsExt::from_mode(0o666)).unwrap();
    std::fs::set_permissions(server.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    // A copy: the way to the original may be closed to others.
    let program = server.directory.path().join("caller");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let call = |uid: u32| {
        let (program, path) = (program.clone(), server.path());
        tokio::task::spawn_blocking(move || {
            let mut caller = std::process::Command::new(program);
            caller.args([NAME, "--exact"]).env(SOCKET, path).uid(uid);
            caller.status().unwrap().code()
        })
    };
    assert_eq!(within(call(65_534)).await.unwrap(), Some(3), "closed without a word");
    assert_eq!(within(call(0)).await.unwrap(), Some(4), "served");
}

#[tokio::test]
async fn kubelet_finds_the_plugin_and_says_what_it_thinks_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let plugin = Plugin::new("fuse-secrets", "/var/lib/kubelet/plugins/fuse-secrets/csi.sock");
    let (serving, path) = register(&plugin, directory.path()).await;
    let mut kubelet = RegistrationClient::new(connect(&path).await.unwrap());
    let info = kubelet.get_info(registration::InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "fuse-secrets"));
    assert_eq!(info.endpoint, "/var/lib/kubelet/plugins/fuse-secrets/csi.sock");
    assert_eq!(info.supported_versions, ["1.0.0"]);

    assert_eq!(plugin.ready(), Ok(()));
    let status =
        registration::RegistrationStatus { plugin_registered: false, error: "name is taken".to_owned() };
    kubelet.notify_registration_status(status).await.unwrap();
    assert!(plugin.ready().unwrap_err().contains("name is taken"));
    let status = registration::RegistrationStatus { plugin_registered: true, error: String::new() };
    kubelet.notify_registration_status(status).await.unwrap();
    assert_eq!(plugin.ready(), Ok(()));
    serving.abort();
}

#[tokio::test]
async fn a_registration_socket_that_vanished_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let (serving, path) = register(&Plugin::new("fuse-secrets", "/csi.sock"), directory.path()).await;
    std::fs::remove_file(&path).unwrap();
    within(appears(&path)).await;
    let mut kubelet = RegistrationClient::new(connect(&path).await.unwrap());
    kubelet.get_info(registration::InfoRequest {}).await.unwrap();
    serving.abort();
}

#[tokio::test]
async fn a_plugin_that_leaves_takes_its_registration_socket_along() {
    let directory = tempfile::tempdir().unwrap();
    let (serving, path) = register(&Plugin::new("fuse-secrets", "/csi.sock"), directory.path()).await;
    serving.abort();
    assert!(within(serving).await.unwrap_err().is_cancelled());
    assert!(!path.exists());
}

/// It makes an authority of the socket's path, which tonic's client does not.
#[tokio::test]
async fn kubelets_own_client_reaches_the_registration_socket() {
    const DIAL: &str = "FUSE_SECRETS_TEST_DIAL";
    let Some(program) = std::env::var_os(DIAL) else {
        let _ = writeln!(std::io::stderr(), "skipped: kubelet's own client: {DIAL} names no program");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let plugin = Plugin::new("fuse-secrets", "/plugins/csi.sock");
    let (serving, path) = register(&plugin, directory.path()).await;
    let dial = |arguments: &[&str]| {
        let mut dial = std::process::Command::new(&program);
        dial.arg(&path).args(arguments);
        tokio::task::spawn_blocking(move || dial.output().unwrap())
    };
    let said = within(dial(&[])).await.unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let expected = "type CSIPlugin\nname fuse-secrets\nendpoint /plugins/csi.sock\nversions 1.0.0\n";
    assert_eq!(String::from_utf8_lossy(&said.stdout), expected);
    assert_eq!(plugin.ready(), Ok(()));
    assert!(within(dial(&["no", "such", "handler"])).await.unwrap().status.success());
    assert!(plugin.ready().unwrap_err().contains("no such handler"));
    serving.abort();
}

async fn register(plugin: &Plugin, directory: &Path) -> (tokio::task::JoinHandle<()>, PathBuf) {
    let path = directory.join("reg@fuse-secrets.sock");
    let (plugin, directory) = (plugin.clone(), directory.to_owned());
    let serving = tokio::spawn(async move {
        let Err(error) = plugin.register(&directory).await;
        panic!("registration ended: {error}");
    });
    within(appears(&path)).await;
    (serving, path)
}

async fn appears(path: &Path) {
    let mut look = tokio::time::interval(Duration::from_millis(5));
    while !path.exists() {
        look.tick().await;
    }
}
