//! A token and a value that occur nowhere else: where they are after the pod has gone. Nowhere.

use std::process::Command;
use std::time::Instant;

use fuse_secrets_csi::proto::csi::NodePublishVolumeRequest;
use fuse_secrets_csi::proto::csi::node_client::NodeClient;
use fuse_tests::memory::{self, Found};
use fuse_tests::needs;
use fuse_tests::node::{Node, Process, Volume};
use fuse_tests::wait::until_true;
use serde_json::{Value, json};
use tonic::Status;
use tonic::transport::Endpoint;

use crate::{PATIENCE, SIBLING};

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Several pieces of a secret, so that a half-wiped copy is found too.
fn pieces(name: &str, secret: &str) -> Vec<(String, Vec<u8>)> {
    let bytes = secret.as_bytes();
    let middle = bytes.len() / 2;
    [("beginning", 0), ("middle", middle), ("end", bytes.len() - 24)]
        .map(|(what, at)| (format!("{what} of {name}"), bytes[at..at + 24].to_vec()))
        .into()
}

#[test]
fn after_unpublish_neither_token_nor_value_is_in_any_memory_log_or_argument_list() {
    if !needs::kernel() {
        return;
    }
    let mut node = Node::start(SIBLING);
    let value: String = (0..8).map(|_| format!("{:032x}", rand::random::<u128>())).collect();
    node.cluster.store.put("app", &json!({"password": value}));
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    let volumes: Vec<Volume> = (0..5).map(|number| node.volume(&format!("web-{number}"), "app")).collect();
    let renewed: Vec<Volume> = volumes.iter().map(|volume| node.cluster.renew(volume.clone())).collect();
    let mut searched = pieces("value", &value);
    for (number, volume) in volumes.iter().chain(&renewed).enumerate() {
        // All tokens of one service account begin alike: the payload's end and the signature are each one's own.
        let issued: Value = serde_json::from_str(&volume.tokens).unwrap();
        let token = issued["vault"]["token"].as_str().unwrap().to_owned();
        let signature = token.rsplit('.').next().unwrap();
        searched.extend(pieces(&format!("signature {number}"), signature));
        let payload = token.split('.').nth(1).unwrap();
        searched.push((format!("payload {number}"), payload.as_bytes()[payload.len() / 2..][..32].to_vec()));
    }
    let needles: Vec<(&str, &[u8])> =
        searched.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    let (worker, supervisor) = (node.wait_served().pid, node.agents()[0].process.pid());
    let shim = node.shim().pid();
    assert_ne!(worker, supervisor);

    for volume in &volumes {
        publish(&node, volume.request()).unwrap();
        assert!(std::fs::read_to_string(volume.join("password")).unwrap() == value);
    }
    // The control: a record that is held for a successor has a mount's target, which both processes know.
    let target = volumes[0].target.display().to_string();
    for pid in [shim, worker] {
        let look = memory::search(pid, &[("control", target.as_bytes())]).unwrap();
        assert!(!look.found.is_empty(), "the search finds nothing at all in {pid}");
    }
    for (volume, renewed) in volumes.iter().zip(&renewed) {
        // A newer token, in the other field; two calls that are refused.
        let mut request = renewed.request();
        let tokens = request.volume_context.remove(TOKENS).unwrap();
        request.secrets.insert(TOKENS.to_owned(), tokens);
        publish(&node, request).unwrap();
        let mut wrong = volume.request();
        wrong.volume_capability = None;
        publish(&node, wrong).unwrap_err();
        let mut broken = volume.request();
        let tokens = broken.volume_context.get_mut(TOKENS).unwrap();
        tokens.truncate(tokens.len() - 1);
        let no = publish(&node, broken).unwrap_err();
        assert_eq!(holds(no.message(), &needles), [""; 0]);
    }
    // While they are in use they stand in no argument list and no environment.
    let control = planted(&node, &volumes[0].tokens);
    let place = format!("/proc/{}/environ", control.pid());
    let found = memory::search_arguments(&needles).unwrap();
    assert!(
        found.iter().any(|found| found.ends_with(&place)),
        "the search of arguments finds nothing at all"
    );
    let other: Vec<&String> = found.iter().filter(|found| !found.ends_with(&place)).collect();
    assert!(other.is_empty(), "{other:?}");
    drop(control);

    for volume in &volumes {
        node.unpublish(volume).unwrap();
    }
    until_true("an idle pool", PATIENCE, || {
        memory::connections(worker, node.cluster.store.port()).unwrap() == 0
    });
    let names = [(shim, "shim"), (supervisor, "supervisor"), (worker, "worker")];
    let search = |(pid, name)| {
        let found = memory::search(pid, &needles).unwrap().found;
        found.into_iter().map(move |found| (name, found)).collect::<Vec<(&str, Found)>>()
    };
    // A connection's end reaches the shim a moment later.
    let end = Instant::now() + PATIENCE;
    loop {
        let found: Vec<_> = names.into_iter().flat_map(search).collect();
        if found.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "{found:#?}");
    }

    let logs = node.logs();
    let complete = ["NodePublishVolume: done", "DEBUG FUSE negotiated"].map(|line| logs.contains(line));
    assert_eq!(complete, [true, true], "the logs are not complete");
    assert_eq!(holds(&logs, &needles), [""; 0], "in the logs");
}

/// On a connection of its own, as kubelet does it.
fn publish(node: &Node, request: NodePublishVolumeRequest) -> Result<(), Status> {
    let socket = node.path().join("kubelet/plugins/fuse-secrets/csi.sock");
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    node.block_on(async {
        let mut client = NodeClient::new(endpoint.connect().await.unwrap());
        client.node_publish_volume(request).await.map(drop)
    })
}

/// A process with a token in its environment.
fn planted(node: &Node, tokens: &str) -> Process {
    let mut command = Command::new("/bin/sleep");
    command.arg("1000").env("PLANTED", tokens);
    let process = Process::spawn(command, node.path().join("planted"));
    // Its environment is that of the program that it becomes.
    until_true("the planted token", PATIENCE, || {
        std::fs::read(format!("/proc/{}/environ", process.pid()))
            .is_ok_and(|bytes| bytes.windows(8).any(|name| name == b"PLANTED="))
    });
    process
}

/// The names of those that stand in a text.
fn holds<'a>(text: &str, needles: &[(&'a str, &[u8])]) -> Vec<&'a str> {
    let stands = |(_, bytes): &&(&str, &[u8])| text.contains(std::str::from_utf8(bytes).unwrap());
    needles.iter().filter(stands).map(|(name, _)| *name).collect()
}
