//! A volume's life: published, read, republished, handed over, unpublished.

use fuse_tests::node::Node;

use crate::SIBLING;

#[test]
fn a_published_volume_is_read_survives_its_worker_and_goes_when_it_is_unpublished() {
    let node = Node::start(SIBLING);
    node.cluster.store.put("app", &serde_json::json!({"password": "first"}));
    node.cluster.class("app", &[("db-password", "secret/data/app", Some("password"))], &[]);
    let volume = node.volume("pod-1", "app");
    node.publish(&volume).unwrap();
    let before = node.holdings();
    assert_eq!(std::fs::read_to_string(volume.join("db-password")).unwrap(), "first");
    node.publish(&volume).unwrap();
    node.kill_worker();
    assert_eq!(std::fs::read_to_string(volume.join("db-password")).unwrap(), "first");
    assert_eq!(node.holdings().mounts, before.mounts);
    node.unpublish(&volume).unwrap();
    node.unpublish(&volume).unwrap();
    assert_eq!((node.holdings().mounts, node.holdings().targets.len()), (0, 0));
}
