//! `kubectl fuse-secrets` as its user meets it: the built program, real shim and agent, a real login and real reads. There is no API
//! server: `kubectl` is a stand-in that answers as the real one prints, and runs the agent's own program for `exec`.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use fuse_tests::kubectl::{Answer, Call, Kubectl};
use fuse_tests::needs;
use fuse_tests::node::cluster::{ACCOUNT, NAMESPACE};
use fuse_tests::node::{Node, Volume};
use serde_json::{Value, json};
use tonic::Code;

use crate::SIBLING;

const STAND_IN: &str = env!("CARGO_BIN_EXE_test-kubectl");
/// A value that must be nowhere but in its file.
const VALUE: &str = "hunter2-and-more";

/// What a call does beyond the usual.
type Twist = Box<dyn Fn(&Call) -> Option<Option<Answer>> + Send + Sync>;

/// One real node, node-1, and what the API server would know of it.
struct World {
    node: Arc<Node>,
    kubectl: Kubectl,
    token: String,
}

struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl World {
    /// With a pod that has this volume. `twist` answers before the stand-in does; `Some(None)`: the call hangs.
    fn new(node: &Arc<Node>, volume: &Volume, twist: Twist) -> Self {
        let token = serde_json::from_str::<Value>(&volume.tokens).unwrap()["vault"]["token"].clone();
        let token = token.as_str().unwrap().to_owned();
        let (pod, issued, place) = (pod(volume), token.clone(), Arc::clone(node));
        let kubectl = Kubectl::answered_by(STAND_IN, move |call| match twist(call) {
            Some(twisted) => twisted,
            None => Some(usual(call, &pod, &issued, &place)),
        });
        Self { node: Arc::clone(node), kubectl, token }
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        let plugin = Path::new(SIBLING).with_file_name("kubectl-fuse_secrets");
        assert!(plugin.exists(), "{} is missing: run `cargo build --workspace`", plugin.display());
        let mut command = self.kubectl.command(&plugin);
        let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ended =
            Ended { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) };
        // Whatever it does: no value, and no token but where it must be.
        for secret in [VALUE, &self.token] {
            assert!(!ended.out.contains(secret) && !ended.err.contains(secret), "a secret is printed");
            let said = |call: &Call| call.arguments.iter().any(|word| word.contains(secret));
            assert!(!self.kubectl.calls().iter().any(said), "a secret is an argument");
        }
        ended
    }
}

fn world(twist: impl Fn(&Call) -> Option<Option<Answer>> + Send + Sync + 'static) -> Option<(World, Volume)> {
    if !needs::kernel() {
        return None;
    }
    let node = Arc::new(Node::start(SIBLING));
    node.cluster.store.put("app", &json!({ "password": VALUE }));
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    let settings = format!(
        "classes: {}\naddress: {}\nauthMethod: jwt\nallowLocalAddresses: true\n\
         allow: [{{namespaces: [\"*\"], addresses: [\"*\"]}}]\n",
        node.path().join("classes").display(),
        node.cluster.store.address()
    );
    std::fs::write(node.path().join("agent.yaml"), settings).unwrap();
    let volume = node.volume("web-0", "app");
    Some((World::new(&node, &volume, Box::new(twist)), volume))
}

fn pod(volume: &Volume) -> Value {
    json!({
        "kind": "Pod",
        "metadata": {"name": volume.pod, "namespace": NAMESPACE, "uid": volume.pod_uid},
        "spec": {
            "nodeName": "node-1", "serviceAccountName": ACCOUNT,
            "containers": [{"name": "web", "image": "web:1"}],
            "volumes": [
                {"name": "secrets", "csi": {
                    "driver": "fuse-secrets", "readOnly": true, "volumeAttributes": volume.attributes,
                }},
                {"name": "kube-api-access", "projected": {"sources": []}},
            ],
        },
        "status": {"phase": "Pending", "containerStatuses": [
            {"name": "web", "ready": false, "state": {"waiting": {"reason": "ContainerCreating"}}},
        ]},
    })
}

fn agent(name: &str, node: &str, runs: bool) -> Value {
    let state =
        if runs { json!({"running": {}}) } else { json!({"waiting": {"reason": "CrashLoopBackOff"}}) };
    json!({
        "metadata": {"name": name, "namespace": "fuse-secrets"},
        "spec": {"nodeName": node, "containers": [{"name": "agent", "image": "registry/fuse-secrets-agent:1"}]},
        "status": {"phase": "Running", "containerStatuses": [{"name": "agent", "ready": runs, "state": state}]},
    })
}

fn list(items: &[Value]) -> Answer {
    Answer::of(&json!({"kind": "List", "items": items}))
}

/// What the API server of a cluster with one node would answer.
fn usual(call: &Call, pod: &Value, token: &str, node: &Node) -> Answer {
    let event = |time: &str, text: &str| json!({"message": text, "lastTimestamp": time, "count": 2});
    if call.has(&["exec"]) {
        assert!(
            call.has(&["-n", "fuse-secrets", "agent-1", "-c", "agent", "--", "/fuse-secrets"]),
            "{call:?}"
        );
        return exec(call, node);
    }
    if call.has(&["create", "token", ACCOUNT, "-n", NAMESPACE]) {
        assert!(call.has(&["--bound-object-kind", "Pod", "--bound-object-name", "web-0"]), "{call:?}");
        assert!(call.has(&["--audience", "vault"]), "{call:?}");
        return Answer { out: format!("{token}\n"), ..Answer::default() };
    }
    assert!(call.has(&["-o", "json"]), "{call:?}");
    if call.has(&["get", "pods", "-n", "fuse-secrets"]) {
        list(&[agent("agent-1", "node-1", true)])
    } else if call.has(&["get", "pods", "-n", "fuse-secrets-csi"]) {
        list(&[agent("shim-1", "node-1", true)])
    } else if call.has(&["get", "pod", "-n", NAMESPACE, "web-0"]) {
        Answer::of(pod)
    } else if call.has(&["get", "csidriver", "fuse-secrets"]) {
        Answer::of(&json!({"spec": {
            "attachRequired": false, "podInfoOnMount": true, "requiresRepublish": true, "fsGroupPolicy": "None",
            "volumeLifecycleModes": ["Ephemeral"], "tokenRequests": [{"audience": "vault"}],
        }}))
    } else if call.has(&["get", "csinode", "node-1"]) {
        Answer::of(&json!({"metadata": {"name": "node-1"}, "spec": {"drivers": [{"name": "fuse-secrets"}]}}))
    } else if call.has(&["get", "csinode"]) {
        list(&[json!({"metadata": {"name": "node-1"}, "spec": {"drivers": [{"name": "fuse-secrets"}]}})])
    } else if call.has(&["get", "customresourcedefinition"]) {
        Answer::of(&json!({"spec": {"versions": [{"name": "v1", "served": true}]}}))
    } else if call.has(&["get", "daemonset"]) {
        Answer::of(&json!({"status": {"desiredNumberScheduled": 1, "numberReady": 1}}))
    } else if call.has(&["get", "events", "-n", NAMESPACE]) {
        list(&[event("2026-01-01T00:00:00Z", "an old one"), event("2026-01-01T00:01:00Z", "the newest one")])
    } else {
        panic!("nobody answers {call:?}")
    }
}

/// Runs the agent's program, as in its container.
fn exec(call: &Call, node: &Node) -> Answer {
    use std::io::Write as _;
    let config = node.path().join("agent.yaml").display().to_string();
    // The agent is the first process of its namespace, and not of this one.
    let agent = node.agent_pid().to_string();
    let program = call.program();
    let arguments = program.iter().enumerate().skip(1).map(|(at, word)| match word.as_str() {
        "/etc/fuse-secrets/agent.yaml" => config.as_str(),
        "1" if program[at - 1] == "--agent-pid" => agent.as_str(),
        word => word,
    });
    let mut command = node.beside_the_agent();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(call.input.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

fn forbidden(what: &str) -> Answer {
    Answer::failure(&format!(
        "Error from server (Forbidden): {what} is forbidden: User \"dev\" cannot do that"
    ))
}

#[test]
fn mounts_of_all_nodes_are_listed_and_nodes_that_do_not_answer_are_named() {
    let three = |call: &Call| {
        if call.has(&["get", "pods", "-n", "fuse-secrets"]) {
            let agents =
                [("agent-3", "node-3", false), ("agent-1", "node-1", true), ("agent-2", "node-2", true)];
            return Some(Some(list(&agents.map(|(name, node, runs)| agent(name, node, runs)))));
        }
        // It hangs.
        (call.has(&["exec"]) && call.has(&["agent-2"])).then_some(None)
    };
    let Some((world, volume)) = world(three) else { return };
    world.node.publish(&volume).unwrap();
    let all = world.run(&["mounts", "--timeout", "2s"]);
    assert_eq!(all.code, 1, "{}", all.err);
    for word in ["NODE", "node-1", "shop/web-0", "app", "fresh", "1 mount, 0 stale, 0 gone"] {
        assert!(all.out.contains(word), "{word}: {}", all.out);
    }
    assert!(all.out.lines().all(|line| line.chars().count() <= 80), "{}", all.out);
    assert!(all.err.contains("node node-2 did not answer: agent agent-2"), "{}", all.err);
    assert!(all.err.contains("no answer within 2 s"), "{}", all.err);
    assert!(
        all.err.contains("node node-3 did not answer") && all.err.contains("CrashLoopBackOff"),
        "{}",
        all.err
    );
    let one = world.run(&["mounts", "--node", "node-1", "-o", "json"]);
    assert_eq!((one.code, one.err.as_str()), (0, ""));
    let mounts: Value = serde_json::from_str(&one.out).unwrap();
    assert_eq!((&mounts[0]["node"], &mounts[0]["pod"]), (&json!("node-1"), &json!("web-0")));
    let other = world.run(&["mounts", "--node", "node-1", "-n", "payments"]);
    assert_eq!((other.code, other.out.as_str()), (0, "nothing is mounted\n"));
    let wide = world.run(&["mounts", "--node", "node-1", "-o", "wide"]);
    assert!(wide.out.contains(&volume.target.display().to_string()), "{}", wide.out);
    let none = world.run(&["mounts", "--node", "node-9"]);
    assert_eq!(none.code, 65, "{}", none.err);
    assert!(none.err.contains("on node node-9"), "{}", none.err);
    let wrong = world.run(&["mounts", "--node", "node-1", "-A"]);
    assert_eq!(wrong.code, 64, "{}", wrong.err);
    world.node.unpublish(&volume).unwrap();
}

#[test]
fn context_and_kubeconfig_are_those_of_kubectl() {
    let Some((world, _)) = world(|_| None) else { return };
    let mounts = world.run(&["mounts", "--context", "prod", "--kubeconfig", "/k"]);
    assert_eq!(mounts.code, 0, "{}", mounts.err);
    let calls = world.kubectl.calls();
    assert!(
        calls.len() == 2 && calls.iter().all(|call| call.has(&["--context=prod", "--kubeconfig=/k"])),
        "{calls:?}"
    );
}

#[test]
fn what_kubectl_may_not_do_is_named_with_the_right_that_is_missing() {
    let refuse = |call: &Call| call.has(&["get", "pods"]).then(|| Some(forbidden("pods")));
    let Some((world, _)) = world(refuse) else { return };
    let mounts = world.run(&["mounts"]);
    assert_eq!((mounts.code, mounts.out.as_str()), (77, ""));
    assert!(mounts.err.contains("you may not list pods in namespace fuse-secrets: "), "{}", mounts.err);
    // What needs no agent is told all the same.
    let doctor = world.run(&["doctor"]);
    assert_eq!(doctor.code, 1);
    assert!(doctor.out.contains("CSIDriver       good fuse-secrets, tokens"), "{}", doctor.out);
    let gone = world
        .kubectl
        .command(&Path::new(SIBLING).with_file_name("kubectl-fuse_secrets"))
        .env("PATH", "/nowhere")
        .arg("mounts")
        .output()
        .unwrap();
    assert_eq!(gone.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&gone.stderr).contains("cannot run kubectl"));
}

#[test]
fn a_check_of_a_pod_reads_every_file_and_tells_lengths_and_no_value() {
    let Some((world, _)) = world(|_| None) else { return };
    let check = world.run(&["check", "--pod", "shop/web-0"]);
    assert_eq!(check.code, 0, "{}{}", check.out, check.err);
    for line in [
        "  ✓ pod          shop/web-0, on node node-1, Pending, ContainerCreating",
        "  ✓ CSIDriver    fuse-secrets, tokens for \"vault\"",
        "  ✓ registered   on node-1",
        "  ✓ agent        agent-1 on node-1",
        "volume secrets",
        "  ✓ attributes   SecretProviderClass app",
        "  ✓ class        1 file",
        "  ✓ policy       the operator allows it to namespace shop",
        "  ✓ token        for audience \"vault\"",
        "  ✓ account      shop/app, uid account-1",
        "  ✓ login        at auth/jwt with role app",
        "  ✓ read         every file",
        "  password  16     1        answered",
        "2 events FailedMount, the newest at 2026-01-01T00:01:00Z",
    ] {
        assert!(check.out.lines().any(|there| there == line), "{line:?} is missing in\n{}", check.out);
    }
    assert!(check.out.find("the newest one") < check.out.find("an old one"), "{}", check.out);
    assert!(check.out.lines().all(|line| line.chars().count() <= 80), "{}", check.out);
    // Nothing stays: no mount was made, and none is served.
    assert_eq!(world.node.observe().0, []);
    let json = world.run(&["check", "--pod", "shop/web-0", "-o", "json"]);
    let found: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(
        found["volumes"][0]["files"],
        json!([{"path": "password", "bytes": 16, "version": 1, "refused": null}])
    );
}

/// A text without the moment since when nobody answers, which each process knows for itself.
fn timeless(text: &str) -> String {
    let mut parts = text.split(", since ");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str(part.find(';').map_or("", |end| &part[end..]));
    }
    kept
}

#[test]
fn a_check_tells_word_for_word_what_kubelet_is_told() {
    let Some((world, _)) = world(|_| None) else { return };
    let cluster = &world.node.cluster;
    cluster.class("no-key", &[("password", "secret/data/app", Some("pasword"))], &[]);
    cluster.class(
        "no-secret",
        &[("password", "secret/data/nope", None), ("app", "secret/data/app", None)],
        &[],
    );
    cluster.class("no-data", &[("password", "secret/app", None)], &[]);
    cluster.class("no-right", &[("password", "other/data/app", None)], &[]);
    cluster.class("no-audience", &[("password", "secret/data/app", None)], &[("audience", "team")]);
    cluster.class("kept", &[("password", "secret/data/app", None)], &[("vaultAuthMountPath", "nope")]);
    cluster.class("faulty", &[("../password", "secret/data/app", None)], &[("roleNam", "x")]);
    cluster.class(
        "nowhere",
        &[("password", "secret/data/app", None)],
        &[("vaultAddress", "http://127.0.0.1:1")],
    );
    let mut told = 0;
    for (class, step) in [
        ("ap", "class"),
        ("faulty", "class"),
        ("kept", "policy"),
        ("no-audience", "token"),
        ("no-right", "read"),
        ("no-secret", "read"),
        ("no-data", "read"),
        ("no-key", "read"),
        ("nowhere", "login"),
    ] {
        let volume = world.node.volume("web-0", class);
        let no = world.node.publish(&volume).expect_err(class);
        let one = World::new(&world.node, &volume, Box::new(|_| None));
        let check = one.run(&["check", "--pod", "shop/web-0", "-o", "json"]);
        let found: Value = serde_json::from_str(&check.out).unwrap();
        let found = &found["volumes"][0];
        let text = found["refused"]["text"].as_str().unwrap();
        assert_eq!(timeless(text), timeless(no.message()), "{class}");
        assert_eq!(found["refused"]["code"], format!("{:?}", no.code()), "{class}");
        let last = found["steps"].as_array().unwrap().last().unwrap();
        assert_eq!((&last["step"], &last["verdict"]), (&json!(step), &json!("refused")), "{class}: {found}");
        let exit = match no.code() {
            Code::NotFound | Code::FailedPrecondition => 65,
            Code::PermissionDenied => 77,
            Code::Unavailable => 69,
            other => panic!("{class}: {other:?}"),
        };
        assert_eq!(check.code, exit, "{class}: {}", no.message());
        let text = one.run(&["check", "--pod", "shop/web-0"]).out;
        assert!(text.contains(&format!("  ✗ {step}")), "{text}");
        let first = timeless(no.message().lines().next().unwrap());
        assert!(
            timeless(&text).contains(&format!("rpc error: code = {:?} desc = {first}", no.code())),
            "{text}"
        );
        told += 1;
    }
    assert_eq!(told, 9);
    // Of two files the one that is refused is told apart.
    let volume = world.node.volume("web-0", "no-secret");
    let one = World::new(&world.node, &volume, Box::new(|_| None));
    let text = one.run(&["check", "--pod", "shop/web-0"]).out;
    assert!(text.contains("  password  -      -        refused"), "{text}");
    assert!(text.contains("  app       -      -        answered"), "{text}");
}

#[test]
fn without_the_right_to_make_tokens_a_check_goes_as_far_as_it_can() {
    let refuse =
        |call: &Call| call.has(&["create", "token"]).then(|| Some(forbidden("serviceaccounts \"app\"")));
    let Some((world, _)) = world(refuse) else { return };
    let check = world.run(&["check", "--pod", "shop/web-0"]);
    assert_eq!(check.code, 1, "{}{}", check.out, check.err);
    let text = check.out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        text.contains("- token you may not create serviceaccounts/token for app in namespace shop"),
        "{text}"
    );
    for step in ["✓ class", "✓ policy", "✓ settings", "- login, read"] {
        assert!(check.out.contains(step), "{step}: {}", check.out);
    }
    // A fault of the class is told without a token too, with its code.
    let volume = world.node.volume("web-0", "none");
    let one = World::new(&world.node, &volume, Box::new(refuse));
    let check = one.run(&["check", "--pod", "shop/web-0"]);
    assert_eq!(check.code, 65, "{}", check.out);
    assert!(check.out.contains("✗ class") && check.out.contains("code = NotFound"), "{}", check.out);
}

#[test]
fn a_check_says_what_it_took_in_place_of_what_it_may_not_read() {
    let refuse = |call: &Call| {
        let cluster = call.has(&["get", "csidriver"]) || call.has(&["get", "csinode"]);
        (cluster || call.has(&["get", "events"])).then(|| Some(forbidden("that")))
    };
    let Some((world, _)) = world(refuse) else { return };
    let check = world.run(&["check", "--pod", "shop/web-0"]);
    assert_eq!(check.code, 0, "{}{}", check.out, check.err);
    let text = check.out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        text.contains("! CSIDriver taken to ask for a token for \"vault\": you may not get csidrivers"),
        "{text}"
    );
    assert!(text.contains("- registered you may not get csinodes"), "{text}");
    assert!(check.err.contains("you may not list events in namespace shop"), "{}", check.err);
}

#[test]
fn a_pod_without_a_node_or_a_volume_of_the_driver_is_told_so() {
    let Some((world, volume)) = world(|_| None) else { return };
    for (change, words, code) in [
        (json!({"nodeName": ""}), "since the pod has no node yet", 0),
        (json!({"nodeName": "node-7"}), "the pod waits for that", 69),
        (json!({"volumes": []}), "no volume of the driver fuse-secrets", 65),
    ] {
        let mut pod = pod(&volume);
        for (key, value) in change.as_object().unwrap() {
            pod["spec"][key] = value.clone();
        }
        let twist = move |call: &Call| {
            let unregistered = json!({"metadata": {"name": "node-7"}, "spec": {"drivers": null}});
            if call.has(&["csinode", "node-7"]) {
                return Some(Some(Answer::of(&unregistered)));
            }
            call.has(&["get", "pod"]).then(|| Some(Answer::of(&pod)))
        };
        let one = World::new(&world.node, &volume, Box::new(twist));
        let check = one.run(&["check", "--pod", "shop/web-0"]);
        assert_eq!(check.code, code, "{}{}", check.out, check.err);
        let text = check.out.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(words), "{words}: {text}");
    }
    let missing = |call: &Call| {
        call.has(&["get", "pod"])
            .then(|| Some(Answer::failure("Error from server (NotFound): pods \"web-0\" not found")))
    };
    let one = World::new(&world.node, &volume, Box::new(missing));
    let check = one.run(&["check", "--pod", "shop/web-0"]);
    assert_eq!(check.code, 65);
    assert!(check.err.contains("pods \"web-0\" not found"), "{}", check.err);
}

#[test]
fn doctor_judges_the_cluster_and_every_agent() {
    let Some((world, _)) = world(|_| None) else { return };
    let doctor = world.run(&["doctor", "--node", "node-1"]);
    for word in [
        "the cluster\n",
        "CSIDriver",
        "1 of 1 ready",
        "on 1 of 1 nodes",
        "node node-1, agent agent-1\n",
        "kernel",
    ] {
        assert!(doctor.out.contains(word), "{word}: {}{}", doctor.out, doctor.err);
    }
    // The shim mounts, and has given the agent its limit.
    assert!(!doctor.out.contains("fusermount") && !doctor.out.contains("few volumes fit"), "{}", doctor.out);
    assert!(doctor.out.lines().all(|line| line.chars().count() <= 80), "{}", doctor.out);
    let json = world.run(&["doctor", "-o", "json"]);
    let found: Value = serde_json::from_str(&json.out).unwrap();
    let kernel = &found["nodes"][0]["checks"][0];
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(kernel["found"], release.trim());
    let missing = |call: &Call| {
        call.has(&["get", "csidriver"]).then(|| {
            Some(Answer::failure(
                "Error from server (NotFound): csidrivers.storage.k8s.io \"fuse-secrets\" not found",
            ))
        })
    };
    let volume = world.node.volume("web-0", "app");
    let one = World::new(&world.node, &volume, Box::new(missing));
    let doctor = one.run(&["doctor"]);
    assert_eq!(doctor.code, 1);
    assert!(doctor.out.contains("no CSIDriver"), "{}", doctor.out);
}
