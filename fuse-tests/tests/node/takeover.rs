//! Targets on which something else lies.

use fuse_tests::mounted::mounts_below;
use fuse_tests::node::Node;
use rustix::mount::{MountFlags, mount};
use tonic::Code;

use crate::SIBLING;

fn line_of(point: &std::path::Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = format!(" {} ", point.display());
    table.lines().filter(|line| line.contains(&point)).map(str::to_owned).collect()
}

fn node() -> Node {
    let node = Node::start(SIBLING);
    node.cluster.store.put("app", &serde_json::json!({"password": "ours"}));
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    node
}

#[test]
fn a_volume_of_another_driver_is_left_alone_until_it_is_unpublished() {
    let mut node = node();
    let volume = node.volume("pod-1", "app");
    std::fs::create_dir(&volume.target).unwrap();
    mount("tmpfs", &volume.target, "tmpfs", MountFlags::empty(), None).unwrap();
    std::fs::write(volume.join("password"), "theirs").unwrap();
    let before = line_of(&volume.target);
    assert_eq!(before.len(), 1);
    for _ in 0..2 {
        node.publish(&volume).unwrap();
        assert_eq!(line_of(&volume.target), before, "the same mount");
        assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "theirs");
        node.restart_shim(&[]);
    }
    assert!(node.observe().0.is_empty(), "the shim keeps nothing of it");
    node.unpublish(&volume).unwrap();
    node.unpublish(&volume).unwrap();
    assert_eq!((line_of(&volume.target).len(), volume.target.exists()), (0, false));
}

#[test]
fn files_at_a_target_are_neither_hidden_nor_lost() {
    let node = node();
    let volume = node.volume("pod-1", "app");
    std::fs::create_dir(&volume.target).unwrap();
    std::fs::write(volume.join("precious"), "theirs").unwrap();
    let refused = node.publish(&volume).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("holds files, which a mount would hide; move them away"), "{refused}");
    let kept = node.unpublish(&volume).unwrap_err();
    assert!(kept.message().contains("not empty"), "{kept}");
    assert_eq!(std::fs::read_to_string(volume.join("precious")).unwrap(), "theirs");
    assert_eq!(mounts_below(&volume.target), 0);
    // Moved away, it works: the directory itself may be there.
    std::fs::remove_file(volume.join("precious")).unwrap();
    node.publish(&volume).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "ours");
    node.unpublish(&volume).unwrap();
    assert!(!volume.target.exists());
}
