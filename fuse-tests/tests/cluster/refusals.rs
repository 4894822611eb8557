//! Why a pod does not start: kubelet's event on the pod, word for word as docs/errors.md has it; and that it starts by itself once the
//! cause is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuse_tests::cluster::tenant::ACCOUNT;
use fuse_tests::cluster::world::NODE_IP;
use fuse_tests::cluster::{Cluster, PATIENCE, Tenant, shared};
use fuse_tests::wait;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

const VALUE: &str = "value-of-a-test";

/// A tenant's secret `app` with one key.
fn write_secret(tenant: &Tenant<'_>) {
    tenant.put("app", &json!({"password": VALUE}));
}

/// A pod that was refused is ready without anybody's help, and reads.
fn starts(cluster: &Cluster, tenant: &Tenant<'_>, pod: &str) {
    cluster.wait_ready(&tenant.namespace, pod);
    assert_eq!(tenant.sh(pod, "cat /mnt/secrets/password"), VALUE);
}

/// Not one request of the tenant's came to its store.
fn asked_nobody(cluster: &Cluster, tenant: &Tenant<'_>) {
    let store = cluster.store();
    assert_eq!(store.logins_at("kubernetes", &tenant.role), 0);
    assert_eq!(store.counts().reads.get(&tenant.path("app")), None);
}

#[test]
fn a_wrong_service_account_is_told_role_namespace_audience_and_path() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("stranger");
    let (namespace, role) = (&tenant.namespace, &tenant.role);
    write_secret(&tenant);
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    tenant.account("stranger");
    let mut pod = tenant.reader("waits", "app");
    pod["spec"]["serviceAccountName"] = json!("stranger");
    tenant.create(&pod);
    let url = cluster.store_url();
    let text = format!(
        "password: POST {url}/v1/auth/kubernetes/login: 403 (service account name not authorized); check that \
         auth/kubernetes is mounted, and that its role {role:?} exists and is bound to service account {namespace}/stranger \
         and audience \"vault\""
    );
    tenant.wait_refused("waits", "PermissionDenied", &text);

    // The right account, and a role whose policy says nothing of this path.
    tenant.class(
        "elsewhere",
        &[],
        &json!({"objects": json!([
        {"objectName": "password", "secretPath": "secret/data/of-nobody/app", "secretKey": "password"},
    ]).to_string()}),
    );
    tenant.create(&tenant.reader("reads-elsewhere", "elsewhere"));
    let text = format!(
        "password: GET {url}/v1/secret/data/of-nobody/app: 403 (permission denied); a policy of role {role:?} at \
         auth/kubernetes (service account {namespace}/{ACCOUNT}, audience \"vault\") needs read on \
         \"secret/data/of-nobody/app\""
    );
    tenant.wait_refused("reads-elsewhere", "PermissionDenied", &text);
}

#[test]
fn a_class_of_another_namespace_is_told_where_it_is() {
    let Some(cluster) = shared() else { return };
    let (tenant, other) = (cluster.tenant("borrows"), cluster.tenant("lends"));
    // No other test has a class of this name.
    let class = format!("class-of-{}", other.namespace);
    other.class(&class, &[("password", "app", "password")], &json!({}));
    tenant.create(&tenant.reader("waits", &class));
    let (namespace, there) = (&tenant.namespace, &other.namespace);
    let text = format!(
        "there is no SecretProviderClass {namespace}/{class}; {class} is in namespace {there}, but a pod may only use classes \
         of its own namespace {namespace}: create it there"
    );
    tenant.wait_refused("waits", "NotFound", &text);
    asked_nobody(&cluster, &tenant);
}

#[test]
fn a_missing_class_is_told_with_close_names_and_the_pod_starts_once_it_is_there() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("missing");
    write_secret(&tenant);
    for class in ["database", "mail"] {
        tenant.class(class, &[("password", "app", "password")], &json!({}));
    }
    tenant.create(&tenant.reader("waits", "databse"));
    let text = format!(
        "there is no SecretProviderClass {}/databse; did you mean database? there are database, mail",
        tenant.namespace
    );
    tenant.wait_refused("waits", "NotFound", &text);
    asked_nobody(&cluster, &tenant);
    tenant.class("databse", &[("password", "app", "password")], &json!({}));
    starts(&cluster, &tenant, "waits");
}

#[test]
fn a_missing_key_is_told_with_those_that_exist_and_the_pod_starts_once_it_is_there() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("key");
    tenant.put("app", &json!({"pasword": VALUE, "user": "shop"}));
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    tenant.create(&tenant.reader("waits", "app"));
    let text = r#"password: the secret has no key "password"; it has "pasword", "user""#;
    tenant.wait_refused("waits", "NotFound", text);
    tenant.put("app", &json!({"password": VALUE, "user": "shop"}));
    starts(&cluster, &tenant, "waits");
}

#[test]
fn faults_of_a_class_are_told_all_at_once() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("faults");
    let objects = json!([
        {"objectName": "password", "secretPath": "secret//app", "secretKey": "password"},
        {"objectName": "user", "secretPath": "secret/data/app", "secretKey": "user", "encoding": "rot13"},
    ]);
    let parameters = json!({"vaultAdress": "https://vault:8200", "objects": objects.to_string()});
    tenant.class("faults", &[], &parameters);
    tenant.create(&tenant.reader("waits", "faults"));
    let of = format!("SecretProviderClass {}/faults: spec.parameters", tenant.namespace);
    let text = format!(
        "{of}.objects[0].secretPath: has an empty part or a part . or ..; write the API path as the store's policies spell \
         it, such as secret/data/app\n{of}.objects[1].encoding: is unknown; choose one of utf-8, base64, hex\n\
         {of}.vaultAdress: is unknown; did you mean vaultAddress?"
    );
    tenant.wait_refused("waits", "FailedPrecondition", &text);
    asked_nobody(&cluster, &tenant);
}

#[test]
fn a_kv_v2_path_without_data_is_told() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("kv");
    write_secret(&tenant);
    let path = format!("secret/{}/app", tenant.namespace);
    let object = |path: &str| {
        let object = json!([{"objectName": "password", "secretPath": path, "secretKey": "password"}]);
        json!({"objects": object.to_string()})
    };
    tenant.class("kv", &[], &object(&path));
    tenant.create(&tenant.reader("waits", "kv"));
    let text = format!(
        "password: GET {}/v1/{path}: 403 (permission denied); a policy of role {role:?} at auth/kubernetes (service account \
         {namespace}/{ACCOUNT}, audience \"vault\") needs read on {path:?}; if secret/ is a KV v2 mount, the path is \
         secret/data/{namespace}/app",
        cluster.store_url(),
        role = tenant.role,
        namespace = tenant.namespace,
    );
    tenant.wait_refused("waits", "PermissionDenied", &text);
    tenant.class("kv", &[], &object(&tenant.path("app")));
    starts(&cluster, &tenant, "waits");
}

#[test]
fn an_audience_that_kubelet_does_not_send_is_told_with_the_line_to_add() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("audience");
    write_secret(&tenant);
    tenant.class("app", &[("password", "app", "password")], &json!({"audience": "team"}));
    tenant.create(&tenant.reader("waits", "app"));
    let text = "kubelet sent no service-account token for audience \"team\", but only \"vault\"; add the line `- audience: \
                team` to spec.tokenRequests of the CSIDriver";
    tenant.wait_refused("waits", "FailedPrecondition", text);
    asked_nobody(&cluster, &tenant);
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    starts(&cluster, &tenant, "waits");
}

#[test]
fn an_unknown_attribute_is_refused() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("unknown");
    write_secret(&tenant);
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    let attributes = json!({
        "secretProviderClass": "app", "secretProvderClass": "app", "roleName": "another",
    });
    let mut pod = tenant.reader("waits", "app");
    pod["spec"]["volumes"][0]["csi"]["volumeAttributes"] = attributes;
    tenant.create(&pod);
    let text = "volumeAttributes.roleName: is a parameter of the class, and a pod overrides nothing of it; write it into the \
                class, or remove it\nvolumeAttributes.secretProvderClass: is unknown; did you mean secretProviderClass?";
    tenant.wait_refused("waits", "InvalidArgument", text);
    asked_nobody(&cluster, &tenant);

    let mut pod = tenant.reader("names-nothing", "app");
    pod["spec"]["volumes"][0]["csi"].as_object_mut().unwrap().remove("volumeAttributes").unwrap();
    tenant.create(&pod);
    let text =
        "volumeAttributes name no class; add secretProviderClass or secretsStoreImport with the class's name";
    tenant.wait_refused("names-nothing", "InvalidArgument", text);
}

#[test]
fn secret_objects_are_a_warning_on_the_pod() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("synced");
    write_secret(&tenant);
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    let class = format!(
        "apis/secrets-store.csi.x-k8s.io/v1/namespaces/{}/secretproviderclasses/app",
        tenant.namespace
    );
    let synced = json!([{
        "secretName": "synced", "type": "Opaque", "data": [{"objectName": "password", "key": "password"}],
    }]);
    let (status, why) = cluster.ask("PATCH", &class, Some(&json!({"spec": {"secretObjects": synced}})));
    assert_eq!(status, 200, "{why}");
    tenant.run(&tenant.reader("reads", "app"));
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), VALUE);
    let text = format!(
        "SecretProviderClass {}/app: spec.secretObjects: not synced yet: the volume works, but no Kubernetes Secret is made",
        tenant.namespace
    );
    warned(&cluster, &tenant, "reads", &text);
    assert_eq!(cluster.list(&format!("api/v1/namespaces/{}/secrets", tenant.namespace)), Vec::<Value>::new());
}

#[test]
fn node_publish_secret_ref_is_a_warning() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("ref");
    write_secret(&tenant);
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    let secret = json!({"metadata": {"name": "credentials"}, "stringData": {"key": "nobody-reads-this"}});
    cluster.create(&format!("api/v1/namespaces/{}/secrets", tenant.namespace), &secret);
    let mut pod = tenant.reader("reads", "app");
    pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": "credentials"});
    tenant.run(&pod);
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), VALUE);
    warned(
        &cluster,
        &tenant,
        "reads",
        "nodePublishSecretRef: has no effect, the Secret is not read; remove it from the pod's spec",
    );
}

/// The driver's own event on a pod, once.
fn warned(cluster: &Cluster, tenant: &Tenant<'_>, pod: &str, text: &str) {
    assert_eq!(tenant.wait_event(pod, text), text);
    let events = cluster.events(&tenant.namespace, pod);
    let ours: Vec<_> = events.iter().filter(|(reason, _)| reason.starts_with("Secret")).collect();
    assert_eq!(ours, [&("SecretVolumeWarning".to_owned(), text.to_owned())]);
}

#[test]
fn a_store_outside_the_allow_list_is_refused_before_a_token_leaves() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("elsewhere");
    write_secret(&tenant);
    let spy = Spy::new(&cluster);
    let address = json!({"vaultAddress": format!("http://{}", spy.address)});
    tenant.class("elsewhere", &[("password", "app", "password")], &address);
    tenant.create(&tenant.reader("waits", "elsewhere"));
    let namespace = &tenant.namespace;
    let text = format!(
        "SecretProviderClass {namespace}/elsewhere: spec.parameters.vaultAddress: is not an address that namespace {namespace} \
         may use; ask the operator to add it to `addresses` below `allow` in the agent's configuration, or remove it"
    );
    tenant.wait_refused("waits", "PermissionDenied", &text);
    assert_eq!(spy.callers(), 0, "nobody was even connected to");
    asked_nobody(&cluster, &tenant);
    // It does count, and is reached from where pods are.
    tenant.run(&tenant.pod("calls"));
    let port = spy.address.rsplit(':').next().unwrap();
    // However its program ends: that it was called is what the spy counts.
    let _ = tenant.exec("calls", &["sh", "-c", &format!("nc -w 5 {NODE_IP} {port} < /dev/null")]);
    wait::until_true("the call", PATIENCE, || spy.callers() == 1);
}

/// Listens where no store is, and counts who comes.
struct Spy {
    address: String,
    callers: Arc<AtomicUsize>,
    _runtime: tokio::runtime::Runtime,
}

impl Spy {
    fn new(cluster: &Cluster) -> Self {
        let runtime = cluster.world().runtime();
        let listener = runtime.block_on(runtime.spawn(TcpListener::bind((NODE_IP, 0)))).unwrap().unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let callers = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&callers);
        runtime.spawn(async move {
            let mut held: Vec<TcpStream> = Vec::new();
            while let Ok((caller, _)) = listener.accept().await {
                held.push(caller);
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { address, callers, _runtime: runtime }
    }

    fn callers(&self) -> usize {
        self.callers.load(Ordering::SeqCst)
    }
}
