//! Volumes come and go, four thousand calls long, and the node holds what it held before.

use std::time::{Duration, Instant};

use fuse_tests::needs;
use fuse_tests::node::{Node, Volume};
use fuse_tests::wait;
use serde_json::json;
use tokio::task::JoinSet;
use tonic::Status;

use crate::{PATIENCE, SIBLING, settled};

/// At once.
const VOLUMES: usize = 100;
const ROUNDS: usize = 20;
/// An allocator gives back in steps, and a store's answers come in buffers of their own: KiB.
const SLACK: u64 = 8 << 10;
/// A pool of connections or of threads for blocking calls is smaller at one time than at another.
const FEW: usize = 16;

/// What a process has.
#[derive(Debug)]
struct Has {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    /// Anonymous memory, KiB.
    resident: u64,
}

/// Anonymous memory of a process in KiB: without its program, of which it has the more the more of it ran.
pub(crate) fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn has(pid: u32) -> Has {
    let count = |of: &str| std::fs::read_dir(format!("/proc/{pid}/{of}")).unwrap().count();
    Has {
        descriptors: count("fd"),
        threads: count("task"),
        mappings: std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count(),
        resident: resident(pid),
    }
}

fn all(node: &Node, volumes: &[Volume], publish: bool) {
    let failed = node.block_on(async {
        let mut calls = JoinSet::new();
        for volume in volumes {
            let (kubelet, volume) = (node.kubelet(), volume.clone());
            calls.spawn(async move {
                if publish { kubelet.publish(&volume).await } else { kubelet.unpublish(&volume).await }
            });
        }
        calls.join_all().await.into_iter().filter_map(Result::err).collect::<Vec<Status>>()
    });
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), volumes.len(), failed.first());
}

#[test]
fn four_thousand_calls_end_without_an_error_and_leave_nothing() {
    if !needs::kernel() {
        return;
    }
    let mut node = Node::start(SIBLING);
    node.cluster.store.put("app", &json!({"password": "p", "user": "u", "host": "h"}));
    let files = ["password", "user", "host"].map(|key| (key, "secret/data/app", Some(key)));
    node.cluster.class("app", &files, &[]);
    let volumes: Vec<Volume> =
        (0..VOLUMES).map(|number| node.volume(&format!("web-{number}"), "app")).collect();
    let round = |node: &Node| {
        all(node, &volumes, true);
        assert_eq!(node.holdings().mounts, VOLUMES);
        for volume in volumes.iter().step_by(10) {
            assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
        }
        all(node, &volumes, false);
    };
    // What is made at the first use and kept is there.
    round(&node);
    let (shim, worker) = (node.shim().pid(), node.wait_served().pid);
    let before = (settled(&node), has(shim), has(worker));
    for _ in 0..ROUNDS {
        round(&node);
    }
    node.wait_settled(&before.0);
    assert_eq!(node.observe().0, []);
    assert_eq!(node.wait_served().pid, worker, "the worker did not live through it");
    for (name, pid, before) in [("shim", shim, before.1), ("worker", worker, before.2)] {
        let end = Instant::now() + PATIENCE;
        let settled = |now: &Has| {
            now.descriptors <= before.descriptors + FEW
                && now.threads <= before.threads + FEW
                && now.mappings <= before.mappings + 4 * FEW
                && now.resident <= before.resident + SLACK
        };
        let mut now = has(pid);
        while !settled(&now) {
            assert!(Instant::now() < end, "{name}: {before:?} before, {now:?} now");
            wait::pause(Duration::from_millis(100));
            now = has(pid);
        }
        // For who looks for figures: shown with --nocapture.
        use std::io::Write as _;
        let _ = writeln!(
            std::io::stderr(),
            "{name}: {before:?} before, {now:?} after {} calls",
            ROUNDS * VOLUMES * 2
        );
    }
}
