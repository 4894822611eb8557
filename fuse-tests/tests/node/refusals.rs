//! Every text of docs/errors.md, "A pod's volume", as a pod's owner meets it: said by shim and agent together. Nothing stays of
//! what was refused, and when its cause is gone the same call succeeds.

use std::time::Instant;

use fuse_tests::needs;
use fuse_tests::node::{Holdings, Node, Volume};
use fuse_tests::wait;
use serde_json::json;
use tonic::{Code, Status};

use crate::{PATIENCE, SIBLING, settled};

const DOCUMENT: &str = include_str!("../../../docs/errors.md");

/// A node, and what it held when it had no volume.
struct World {
    node: Node,
    empty: Holdings,
}

impl World {
    fn new(agent: &[&str]) -> Option<Self> {
        if !needs::kernel() {
            return None;
        }
        let node = Node::start_with(SIBLING, &[], agent);
        node.cluster.store.put("app", &json!({"password": "p"}));
        // kubelet's connection is there from its first call on.
        node.unpublish(&node.volume("none", "none")).unwrap();
        let empty = settled(&node);
        Some(Self { node, empty })
    }

    fn class(&self, name: &str, further: &[(&str, &str)]) {
        self.node.cluster.class(name, &[("password", "secret/data/app", Some("password"))], further);
    }

    /// It is refused with this code and all of these words, those of the document that stand there; and nothing is left of it.
    fn refuses(&self, volume: &Volume, code: Code, words: &[&str], documented: &[&str]) {
        self.refused(volume, &self.node.publish(volume).unwrap_err(), code, words, documented);
    }

    fn refused(&self, volume: &Volume, no: &Status, code: Code, words: &[&str], documented: &[&str]) {
        assert_eq!(no.code(), code, "{}", no.message());
        for word in words.iter().chain(documented) {
            assert!(no.message().contains(word), "{word:?} is missing in: {}", no.message());
        }
        for word in documented {
            assert!(DOCUMENT.contains(word), "docs/errors.md lacks: {word}");
        }
        assert!(no.message().len() < 1024, "too long for an event");
        self.node.wait_settled(&self.empty);
        assert!(!volume.target.exists());
        assert_eq!(self.node.observe().0, []);
    }

    /// The same call, as often as kubelet makes it, now succeeds; then the volume goes.
    fn heals(&self, volume: &Volume, file: &str, content: &str) {
        let end = Instant::now() + PATIENCE;
        while let Err(no) = self.node.publish(volume) {
            assert!(Instant::now() < end, "still refused: {no}");
            wait::pause(std::time::Duration::from_millis(100));
        }
        assert_eq!(std::fs::read_to_string(volume.join(file)).unwrap(), content);
        self.node.unpublish(volume).unwrap();
        self.node.wait_settled(&self.empty);
    }
}

#[test]
fn a_pod_that_names_its_class_wrongly_is_told_what_to_write() {
    let Some(world) = World::new(&[]) else { return };
    let missing = world.node.volume("web-0", "databse");
    let text = "nor any other in this namespace; create it, or correct the name or namespace";
    world.refuses(&missing, Code::NotFound, &["there is no SecretProviderClass shop/databse"], &[text]);
    for name in ["cache", "database", "mail", "queue", "search", "users", "web"] {
        world.class(name, &[]);
    }
    let text = "did you mean database? there are cache, database, mail, queue, search and 2 more";
    world.refuses(&missing, Code::NotFound, &["there is no SecretProviderClass shop/databse; "], &[text]);
    world.class("databse", &[]);
    world.heals(&missing, "password", "p");

    let mut other = world.node.volume("web-0", "database");
    let class = other.attributes.remove("secretProviderClass").unwrap();
    let documented = [
        "volumeAttributes name no class; add secretProviderClass or secretsStoreImport with the class's name",
    ];
    world.refuses(&other, Code::InvalidArgument, &[], &documented);
    other.attributes.insert("secretsStoreImport".to_owned(), class.clone());
    let text = "shop/database is a SecretProviderClass, not a SecretsStoreImport; write `secretProviderClass: database`";
    world.refuses(&other, Code::NotFound, &[text], &["in volumeAttributes"]);
    let import = json!({
        "apiVersion": "deckhouse.io/v1alpha1", "kind": "SecretsStoreImport",
        "metadata": {"name": "database", "namespace": "shop"},
        "spec": {"type": "CSI", "rolle": "app", "role": "app", "files": [
            {"name": "password", "source": {"path": "secret/data/app", "key": "password"}},
        ]},
    });
    world.node.cluster.write_class("database", &import.to_string());
    let text = "spec.rolle: is unknown; did you mean role?";
    world.refuses(&other, Code::FailedPrecondition, &["SecretsStoreImport"], &[text]);
    world.node.cluster.write_class("database", &import.to_string().replace(r#""rolle":"app","#, ""));
    world.heals(&other, "password", "p");

    other.attributes.insert("secretProviderClass".to_owned(), class);
    let documented =
        ["volumeAttributes name two classes; keep one of secretProviderClass and secretsStoreImport"];
    world.refuses(&other, Code::InvalidArgument, &[], &documented);
    other.attributes = [("secretProvderClass".to_owned(), "cache".to_owned())].into();
    let documented = ["volumeAttributes.secretProvderClass: is unknown; did you mean secretProviderClass?"];
    world.refuses(&other, Code::InvalidArgument, &[], &documented);
    other.attributes = [("secretProviderClass".to_owned(), "cache".to_owned())].into();
    world.heals(&other, "password", "p");
}

#[test]
fn what_the_store_refuses_is_told_and_served_as_soon_as_it_is_repaired() {
    let Some(mut world) = World::new(&["--publish-deadline", "5s"]) else { return };
    let file = |path, key| [("password", path, key)];
    world.node.cluster.class("key", &file("secret/data/app", Some("pasword")), &[]);
    let key = world.node.volume("web-0", "key");
    let text = r#"password: the secret has no key "pasword"; it has "password""#;
    world.refuses(&key, Code::NotFound, &[], &[text]);
    world.node.cluster.store.put("app", &json!({"password": "p", "pasword": "q"}));
    world.heals(&key, "password", "q");

    world.node.cluster.class("path", &file("secret/data/new", Some("password")), &[]);
    let path = world.node.volume("web-0", "path");
    let text = r#"secret/ is a KV v2 mount, but "new" does not exist in it"#;
    world.refuses(&path, Code::NotFound, &["password: GET http://", "/v1/secret/data/new: 404", text], &[]);
    world.node.cluster.store.put("new", &json!({"password": "n"}));
    world.heals(&path, "password", "n");

    world.class("role", &[]);
    world.node.cluster.write_class(
        "role",
        &std::fs::read_to_string(world.node.path().join("classes/shop/role.yaml"))
            .unwrap()
            .replace(r#""roleName":"app""#, r#""roleName":"web""#),
    );
    let role = world.node.volume("web-0", "role");
    let words =
        ["400 (role \"web\" could not be found)", "its role \"web\" exists", "service account shop/app"];
    world.refuses(&role, Code::FailedPrecondition, &words, &[]);
    let bind = |subject: &str| {
        let body = json!({
            "role_type": "jwt", "bound_audiences": ["vault"], "user_claim": "sub", "token_policies": "app",
            "bound_subject": format!("system:serviceaccount:shop:{subject}"),
        });
        world.node.cluster.store.write("auth/jwt/role/web", &body);
    };
    bind("other");
    let words = ["is bound to service account shop/app and audience \"vault\""];
    world.refuses(&role, Code::FailedPrecondition, &words, &[]);
    bind("app");
    world.heals(&role, "password", "p");

    let policy = |capability: &str| {
        let rules = format!(
            r#"path "secret/*" {{ capabilities = ["read"] }} path "secret/data/shut" {{ capabilities = ["{capability}"] }}"#
        );
        world.node.cluster.store.write("sys/policies/acl/app", &json!({ "policy": rules }));
    };
    policy("deny");
    world.node.cluster.store.put("shut", &json!({"password": "s"}));
    world.node.cluster.class("policy", &file("secret/data/shut", Some("password")), &[]);
    let denied = world.node.volume("web-0", "policy");
    let words =
        ["403 (permission denied)", r#"role "app" at auth/jwt"#, r#"needs read on "secret/data/shut""#];
    world.refuses(&denied, Code::PermissionDenied, &words, &[]);
    policy("read");
    world.heals(&denied, "password", "s");

    world.class("late", &[]);
    let late = world.node.volume("web-0", "late");
    let gate = world.node.cluster.store.embedded().hold("secret/data/app").unwrap();
    world.refuses(&late, Code::DeadlineExceeded, &["no answer"], &[]);
    gate.open();
    world.heals(&late, "password", "p");

    world.node.cluster.store.stop();
    world.refuses(&late, Code::Unavailable, &["127.0.0.1"], &["connection refused"]);
    world.node.cluster.store.resume();
    world.node.cluster.introduce();
    world.node.cluster.store.put("app", &json!({"password": "after"}));
    world.heals(&late, "password", "after");

    let address = world.node.cluster.store.address().replace("http://", "https://");
    world.class("tls", &[("vaultAddress", &address)]);
    let tls = world.node.volume("web-0", "tls");
    world.refuses(&tls, Code::FailedPrecondition, &[], &["what listens there does not speak TLS"]);
    world.class("tls", &[]);
    world.heals(&tls, "password", "after");
}

#[test]
fn what_the_driver_does_not_send_is_named_with_the_line_that_it_lacks() {
    let Some(world) = World::new(&[]) else { return };
    world.class("team", &[("audience", "team")]);
    let mut volume = world.node.volume("web-0", "team");
    let tokens = |volume: &Volume, audiences: &[&str]| {
        let token = world.node.cluster.token(volume, PATIENCE * 100);
        let of =
            |audience: &&str| ((*audience).to_owned(), json!({"token": token, "expirationTimestamp": ""}));
        serde_json::Value::Object(audiences.iter().map(of).collect()).to_string()
    };
    volume.tokens = tokens(&volume, &["vault", "other"]);
    let text = r#"kubelet sent no service-account token for audience "team", but only "other", "vault"; add the line `- audience: team` to spec.tokenRequests of the CSIDriver"#;
    world.refuses(&volume, Code::FailedPrecondition, &[], &[text]);
    volume.tokens.clear();
    world.refuses(&volume, Code::FailedPrecondition, &["none at all"], &["add the line `- audience: team`"]);
    volume.tokens = tokens(&volume, &["team"]);
    world.heals(&volume, "password", "p");

    world.class("none", &[]);
    let mut volume = world.node.volume("web-0", "none");
    volume.tokens = tokens(&volume, &["a", "b"]);
    let text = r#"the class names no audience, and kubelet sent tokens for "a", "b"; set audience in the class to one of them"#;
    world.refuses(&volume, Code::FailedPrecondition, &[], &[text]);
    world.class("none", &[("audience", "b")]);
    world.heals(&volume, "password", "p");

    let mut request = volume.request();
    request.volume_context.remove("csi.storage.k8s.io/pod.name");
    let mut client = world.node.kubelet().client();
    let no = world.node.block_on(client.node_publish_volume(request)).unwrap_err();
    let text = "kubelet did not send csi.storage.k8s.io/pod.name; set podInfoOnMount: true in the CSIDriver";
    world.refused(&volume, &no, Code::FailedPrecondition, &[], &[text]);
    world.heals(&volume, "password", "p");
}

#[test]
fn a_limit_is_told_with_what_is_used_and_a_larger_one_heals() {
    let Some(mut world) = World::new(&["--cache-entries", "2"]) else { return };
    for name in ["a", "b", "c"] {
        world.node.cluster.store.put(name, &json!({"password": name}));
    }
    let files = [
        ("a", "secret/data/a", None),
        ("b", "secret/data/b", None),
        ("c", "secret/data/c", Some("password")),
    ];
    world.node.cluster.class("wide", &files, &[]);
    let wide = world.node.volume("web-0", "wide");
    world.refuses(
        &wide,
        Code::ResourceExhausted,
        &["of 2 entries in use", "more wanted"],
        &["the cache is full: "],
    );
    // A second agent takes over.
    let first = world.node.wait_served().agent;
    world.node.start_agent(&["--cache-entries", "20", "--memory-limit", "2MiB"]);
    wait::until_true("the second agent", PATIENCE, || world.node.wait_served().agent > first);
    world.node.agents()[0].process.stop();
    world.empty = settled(&world.node);
    world.heals(&wide, "c", "c");

    let large = "x".repeat(700_000);
    world.node.cluster.store.put("large", &json!({ "one": large, "two": large, "three": large }));
    let file = |name| (name, "secret/data/large", Some(name));
    world.node.cluster.class("large", &[file("one"), file("two"), file("three")], &[]);
    let volume = world.node.volume("web-0", "large");
    let words = ["more wanted; ", "serve fewer volumes"];
    world.refuses(&volume, Code::ResourceExhausted, &words, &["secret memory is full: "]);
    world.node.cluster.store.put("large", &json!({ "one": "1", "two": "2", "three": "3" }));
    world.heals(&volume, "three", "3");

    world.node.agents()[1].process.stop();
    wait::until_true("no agent", PATIENCE, || world.node.serving().is_none());
    world.empty = settled(&world.node);
    let no = world.node.publish(&volume).unwrap_err();
    world.refused(
        &volume,
        &no,
        Code::Unavailable,
        &["no agent is attached; see the agent's pod on this node"],
        &[],
    );
    world.node.start_agent(&[]);
    world.node.wait_served();
    world.empty = settled(&world.node);
    world.heals(&volume, "three", "3");
}

#[test]
fn a_volume_that_is_there_is_never_refused_again() {
    let Some(mut world) = World::new(&[]) else { return };
    world.class("app", &[]);
    let volume = world.node.volume("web-0", "app");
    world.node.publish(&volume).unwrap();
    let again = |world: &World, why: &str| {
        let newer = world.node.cluster.renew(volume.clone());
        world.node.publish(&newer).unwrap_or_else(|no| panic!("{why}: {no}"));
        assert_eq!(world.node.holdings().mounts, 1, "{why}");
    };
    std::fs::remove_file(world.node.path().join("classes/shop/app.yaml")).unwrap();
    again(&world, "its class is gone");
    let mut other = volume.clone();
    other.tokens.clear();
    world.node.publish(&other).unwrap();
    other.attributes = [("nonsense".to_owned(), "x".to_owned())].into();
    world.node.publish(&other).unwrap();
    world.node.cluster.store.stop();
    again(&world, "the store is gone");
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
    world.node.agents()[0].process.kill();
    wait::until_true("no agent", PATIENCE, || world.node.serving().is_none());
    again(&world, "the agent is gone");
    world.node.start_agent(&[]);
    world.node.wait_served();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
    again(&world, "the agent is new");
    world.node.unpublish(&volume).unwrap();
    assert_eq!((world.node.holdings().mounts, world.node.holdings().targets.len()), (0, 0));
}

#[test]
fn a_class_that_names_another_store_is_refused_and_nobody_there_hears_of_it() {
    let Some(world) = World::new(&["--allow", "[{namespaces: [other], addresses: ['*']}]"]) else { return };
    let stranger = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    stranger.set_nonblocking(true).unwrap();
    let address = format!("http://{}", stranger.local_addr().unwrap());
    world.class("elsewhere", &[("vaultAddress", &address), ("vaultNamespace", "team-a")]);
    let volume = world.node.volume("web-0", "elsewhere");
    let words = [
        "SecretProviderClass shop/elsewhere: spec.parameters.vaultAddress: is not an address that namespace shop may use",
        "spec.parameters.vaultNamespace: is not a namespace of the store that namespace shop may use",
    ];
    let text = "; ask the operator to add it to `addresses` below `allow` in the agent's configuration, or remove it";
    world.refuses(&volume, Code::PermissionDenied, &words, &[text]);
    assert_eq!(stranger.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let own = world.node.cluster.store.address();
    world.class("elsewhere", &[("vaultAddress", &own), ("vaultAuthMountPath", "jwt")]);
    world.heals(&volume, "password", "p");
}

#[test]
fn a_store_on_the_node_itself_is_asked_only_by_an_agent_that_is_told_to() {
    let Some(mut world) = World::new(&["--allow-local-addresses=false"]) else { return };
    world.class("app", &[]);
    let volume = world.node.volume("web-0", "app");
    let text = "not asked: it is a loopback, link-local or metadata address";
    let words = ["set allowLocalAddresses: true for the agent"];
    world.refuses(&volume, Code::FailedPrecondition, &words, &[text]);
    let first = world.node.wait_served().agent;
    world.node.start_agent(&[]);
    wait::until_true("the second agent", PATIENCE, || world.node.wait_served().agent > first);
    world.node.agents()[0].process.stop();
    world.empty = settled(&world.node);
    world.heals(&volume, "password", "p");
}

#[test]
fn secrets_that_a_pod_names_for_the_driver_are_dropped_with_a_warning() {
    const CANARY: &str = "cAnArY-7f3a";
    let Some(world) = World::new(&[]) else { return };
    world.class("app", &[]);
    let volume = world.node.volume("web-0", "app");
    let mut request = volume.request();
    request.secrets.insert("password".to_owned(), CANARY.to_owned());
    let mut client = world.node.kubelet().client();
    world.node.block_on(client.node_publish_volume(request)).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
    let logs = world.node.logs();
    assert!(
        logs.contains(
            "nodePublishSecretRef: has no effect, the Secret is not read; remove it from the pod's spec"
        ),
        "{logs}"
    );
    assert!(!logs.contains(CANARY));
    world.node.unpublish(&volume).unwrap();
    world.node.wait_settled(&world.empty);
}
