//! What root does by hand, and volumes that go while somebody uses them.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use fuse_tests::node::process::as_in_a_container;
use fuse_tests::node::{Node, Volume};
use fuse_tests::product;
use fuse_tests::wait::until_true;
use serde_json::Value;

use crate::SIBLING;

const PATIENCE: Duration = Duration::from_secs(30);

fn node() -> Node {
    let node = Node::start(SIBLING);
    node.cluster.store.put("app", &serde_json::json!({"password": "value"}));
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    node
}

fn published(node: &Node, pod: &str) -> Volume {
    let volume = node.volume(pod, "app");
    node.publish(&volume).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "value");
    volume
}

/// Runs the program with the node's socket.
fn run(node: &Node, mut program: Command, arguments: &[&str]) -> (Option<i32>, String, String) {
    let command = program.env_clear().args(arguments).arg("--node-socket").arg(node.node_socket());
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

fn root(node: &Node, arguments: &[&str]) -> (Option<i32>, String, String) {
    run(node, Command::new(product::program(SIBLING)), arguments)
}

/// A read in a thread of its own; what came of it.
fn reading(path: PathBuf) -> Receiver<std::io::Result<String>> {
    let (tell, told) = channel();
    std::thread::spawn(move || drop(tell.send(std::fs::read_to_string(path))));
    told
}

/// Ends every agent, and waits until a reader waits for the next one.
fn without_agent(node: &mut Node, volume: &Volume) -> Receiver<std::io::Result<String>> {
    node.agents().clear();
    let told = reading(volume.join("password"));
    until_true("a reader waits", PATIENCE, || node.status(volume).is_some_and(|status| status.waiting));
    told
}

#[test]
fn an_abort_ends_readers_and_one_volume_and_its_next_publish_works() {
    let mut node = node();
    let (volume, other) = (published(&node, "pod-1"), published(&node, "pod-2"));
    let told = without_agent(&mut node, &volume);
    let (code, out, err) = root(&node, &["abort", &volume.id]);
    assert_eq!((code, out.as_str(), err.as_str()), (Some(0), "", ""));
    let error = told.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(103 | 107)), "ECONNABORTED or ENOTCONN: {error}");
    assert!(node.status(&volume).is_none() && node.status(&other).is_some());
    assert_eq!(node.holdings().mounts, 2, "the dead one stays, for the next publish to find");
    let (code, _, err) = root(&node, &["abort", &volume.id]);
    assert_eq!(code, Some(1));
    assert!(err.contains(&format!("the shim refused: no volume {}", volume.id)), "{err}");

    node.start_agent(&[]);
    node.wait_served();
    assert_eq!(std::fs::read_to_string(other.join("password")).unwrap(), "value");
    node.publish(&volume).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "value");
    // With an agent, too.
    assert_eq!(root(&node, &["abort", &other.id]).0, Some(0));
    assert!(node.status(&other).is_none() && node.status(&volume).is_some());
    for volume in [&volume, &other] {
        node.unpublish(volume).unwrap();
    }
    assert_eq!((node.holdings().mounts, node.holdings().targets.len()), (0, 0));
}

#[test]
fn root_sees_what_the_shim_keeps_with_and_without_an_agent() {
    let mut node = node();
    let volume = published(&node, "pod-1");
    let table = |node: &Node| {
        let (code, out, err) = root(node, &["mounts", "--from-shim"]);
        assert_eq!((code, err.as_str()), (Some(0), ""));
        assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
        out
    };
    let json = |node: &Node| -> Value {
        let (code, out, err) = root(node, &["mounts", "--from-shim", "-o", "json"]);
        assert_eq!((code, err.as_str()), (Some(0), ""));
        serde_json::from_str(&out).unwrap()
    };
    assert!(table(&node).contains("shop/pod-1") && table(&node).contains("serving"));
    let kept = json(&node);
    let [one] = kept["volumes"].as_array().unwrap().as_slice() else { panic!("{kept}") };
    assert_eq!(one["volume"], volume.id);
    assert_eq!(one["target"], volume.target.display().to_string());
    assert_eq!((&one["state"], &one["generation"]), (&Value::from("serving"), &Value::from(1)));
    assert_eq!(kept["agents"][0]["state"], "serving");

    let told = without_agent(&mut node, &volume);
    let text = table(&node);
    assert!(text.contains("waiting") && text.contains("yes"), "{text}");
    let kept = json(&node);
    assert_eq!(
        (&kept["volumes"][0]["state"], &kept["volumes"][0]["waiting"]),
        (&"waiting".into(), &true.into())
    );
    let agent = &kept["agents"][0];
    assert!(agent["pid"] == 0 && agent["state"] != "serving", "{agent}");

    let (code, _, err) = run(&node, as_in_a_container(&program_for_all(&node)), &["mounts", "--from-shim"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("only root observes") || err.contains("may not ask the shim"), "{err}");
    let (code, _, err) = run(&node, as_in_a_container(&program_for_all(&node)), &["abort", &volume.id]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("only root observes") || err.contains("may not ask the shim"), "{err}");
    assert!(node.status(&volume).is_some());

    node.unpublish(&volume).unwrap();
    told.recv_timeout(PATIENCE).unwrap().unwrap_err();
    node.shim().kill();
    for arguments in [&["mounts", "--from-shim"][..], &["abort", "csi-1"]] {
        let (code, _, err) = root(&node, arguments);
        assert_eq!(code, Some(1));
        let text = format!("no shim answers at {}", node.node_socket().display());
        assert!(err.contains(&text), "{err}");
    }
}

/// The program where every user reaches it.
fn program_for_all(node: &Node) -> PathBuf {
    let copy = node.path().join("bin/fuse-secrets");
    if copy.exists() { copy } else { product::program(SIBLING) }
}

#[test]
fn a_volume_that_is_used_is_unpublished_in_time_and_leaves_nothing() {
    let mut node = node();
    let volume = published(&node, "pod-1");
    let mut open = std::fs::File::open(volume.join("password")).unwrap();
    let mut inside = Command::new("sleep").arg("1000").current_dir(&volume.target).spawn().unwrap();
    node.unpublish(&volume).unwrap();
    assert_eq!((node.holdings().mounts, node.holdings().targets.len()), (0, 0));
    // What was opened is gone as well: nobody has its values any more.
    assert!(open.read_to_string(&mut String::new()).is_err());
    inside.kill().unwrap();
    inside.wait().unwrap();

    let volume = published(&node, "pod-2");
    let told = without_agent(&mut node, &volume);
    node.unpublish(&volume).unwrap();
    told.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert_eq!((node.holdings().mounts, node.holdings().targets.len()), (0, 0));
    assert!(node.observe().0.is_empty());
}
