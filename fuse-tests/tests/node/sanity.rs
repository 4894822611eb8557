//! The conformance tests of the Container Storage Interface, and kubelet's own client, against shim and agent.

use std::collections::BTreeMap;
use std::process::Command;

use fuse_tests::needs;
use fuse_tests::node::Node;
use fuse_tests::wait::until_true;
use serde_json::{Value, json};

use crate::{PATIENCE, SIBLING};

const SANITY: &str = "FUSE_SECRETS_TEST_CSI_SANITY";
const DIAL: &str = "FUSE_SECRETS_TEST_DIAL";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// What csi-sanity leaves out of Identity and Node, by the words of its reason, and why that is right.
const LEFT_OUT: [(&str, &str); 6] = [
    ("NodeStageVolume not supported", "a volume belongs to one pod: there is nothing to share in a stage"),
    ("NodeUnstageVolume not supported", "as above"),
    ("NodeExpandVolume not supported", "a volume has no size of its own"),
    ("NodeGetVolumeHealth not supported", "alpha in 1.13; statistics carry the condition of 1.11"),
    ("NodeGetStorageHealth not supported", "alpha in 1.13; there is no storage on the node"),
    ("single node multi writer capability", "nobody writes"),
];

#[test]
fn csi_sanity_passes_and_leaves_out_only_what_this_plugin_has_not() {
    let Some(program) = needs::server(SANITY, true) else { return };
    if !needs::kernel() {
        return;
    }
    let node = Node::start(SIBLING);
    node.cluster.store.write("secret/data/app", &json!({"data": {"password": "p"}}));
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    let volume = node.volume("web-0", "app");
    let mut context = volume.request().volume_context;
    // As a cluster does whose CSIDriver says serviceAccountTokenInSecrets.
    let secrets = json!({"NodePublishVolumeSecret": {TOKENS: context.remove(TOKENS)}});
    let file = |name: &str, content: String| {
        let path = node.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    // JSON is YAML.
    let parameters = file("parameters.yaml", json!(context).to_string());
    let secrets = file("secrets.yaml", secrets.to_string());
    let report = node.path().join("report.json");
    let mut sanity = Command::new(program);
    sanity.args(["-ginkgo.no-color", "-ginkgo.focus=Identity Service|Node Service"]);
    for (flag, value) in [
        ("ginkgo.json-report", report.display().to_string()),
        ("csi.endpoint", node.path().join("kubelet/plugins/fuse-secrets/csi.sock").display().to_string()),
        ("csi.mountdir", node.path().join("kubelet/pods/sanity").display().to_string()),
        ("csi.stagingdir", node.path().join("stage").display().to_string()),
        ("csi.testvolumeparameters", parameters),
        ("csi.secrets", secrets),
    ] {
        sanity.arg(format!("-{flag}={value}"));
    }
    let said = sanity.output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));

    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    let mut specs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for spec in report[0]["SpecReports"].as_array().unwrap() {
        let group = spec["ContainerHierarchyTexts"][0].as_str().unwrap_or_default();
        if ["Identity Service", "Node Service"].iter().any(|service| group.starts_with(service)) {
            let why = spec["Failure"]["Message"].as_str().unwrap_or_default();
            specs.entry(spec["State"].as_str().unwrap().to_owned()).or_default().push(why.to_owned());
        }
    }
    assert_eq!(specs["passed"].len(), 17, "of csi-sanity v5.6.0: {specs:?}");
    for why in &specs["skipped"] {
        assert!(
            LEFT_OUT.iter().any(|(words, _)| why.contains(words)),
            "left out without a reason of ours: {why}"
        );
    }
}

#[test]
fn kubelets_own_client_registers_the_shim_and_finds_it_again_after_its_directory_was_emptied() {
    let Some(program) = needs::server(DIAL, true) else { return };
    if !needs::kernel() {
        return;
    }
    let mut node = Node::new(SIBLING);
    node.start_shim(&[]);
    let socket = node.path().join("kubelet/plugins_registry/reg@fuse-secrets.sock");
    let dial = || {
        let said = Command::new(&program).arg(&socket).output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8(said.stdout).unwrap()
    };
    let endpoint = node.path().join("kubelet/plugins/fuse-secrets/csi.sock");
    let expected =
        format!("type CSIPlugin\nname fuse-secrets\nendpoint {}\nversions 1.0.0\n", endpoint.display());
    until_true("the first socket", PATIENCE, || socket.exists());
    assert_eq!(dial(), expected);
    // As a kubelet does that starts.
    std::fs::remove_file(&socket).unwrap();
    until_true("a new socket", PATIENCE, || socket.exists());
    assert_eq!(dial(), expected);
    let registered = || node.logs().matches("registered with kubelet").count();
    assert_eq!(registered(), 2);
}
