//! A node with volumes whose values can be judged, and readers that do.

use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::message::{AgentStatus, VolumeStatus};
use fuse_tests::needs;
use fuse_tests::node::{Node, Volume};
use fuse_tests::readers::{Readers, Seen};
use fuse_tests::stamp;
use fuse_tests::wait::{pause, until};

use crate::SIBLING;

/// Readers of a stage.
pub(crate) const READERS: usize = 8;
/// As applications do: it makes some thousand reads a second, and leaves the processor to those who serve.
const BETWEEN: Duration = Duration::from_millis(1);
/// Bytes of all volumes together: an agent may lock no more than 8 MiB where the shim may not raise its limit. Each of up to eight
/// values takes a few requests to read.
const LENGTH: usize = 1_600_000;
/// Longest wait for anything, on a machine that has much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A node whose volumes hold version 1.
pub(crate) struct Stage {
    pub(crate) node: Node,
    pub(crate) volumes: Vec<Volume>,
    length: usize,
}

impl Stage {
    /// With so many volumes of one class, whose values are never older than `age`; `None`: this machine cannot mount.
    pub(crate) fn new(shim: &[&str], volumes: usize, age: &str) -> Option<Self> {
        if !needs::kernel() {
            return None;
        }
        let node = Node::start_with(SIBLING, shim, &[]);
        node.cluster.stamped_class("app", age);
        node.cluster.stamp("app", 1, LENGTH / volumes);
        let volumes: Vec<Volume> = (0..volumes).map(|n| node.volume(&format!("pod-{n}"), "app")).collect();
        volumes.iter().for_each(|volume| node.publish(volume).unwrap());
        Some(Self { length: LENGTH / volumes.len(), node, volumes })
    }

    /// Readers of all volumes in turn, of which each second one reads through `..data`.
    pub(crate) fn readers(&self) -> Readers {
        let volumes = self.volumes.iter().cycle().zip(["value", "..data/value"].into_iter().cycle());
        Readers::paced(volumes.take(READERS).map(|(volume, file)| volume.join(file)), BETWEEN)
    }

    /// Waits until the agent that serves has every volume, and the shim everything that its successor needs. Returns that agent.
    pub(crate) fn settled(&self) -> AgentStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            let (volumes, agents) = self.node.observe();
            let serving = agents.iter().find(|agent| agent.state == "serving" && agent.pid != 0);
            if let Some(serving) = serving {
                let whole = |volume: &VolumeStatus| {
                    volume.state == "serving" && volume.agent == serving.agent && volume.parts >= 3
                };
                if volumes.len() == self.volumes.len() && volumes.iter().all(whole) {
                    return serving.clone();
                }
            }
            assert!(Instant::now() < end, "nobody serves everything: {agents:#?} {volumes:#?}");
            pause(Duration::from_millis(5));
        }
    }

    /// Waits until another agent than this one has everything.
    pub(crate) fn succeeded(&self, former: &AgentStatus) -> AgentStatus {
        until("another agent", PATIENCE, || self.node.serving().filter(|now| now.agent != former.agent));
        self.settled()
    }

    /// Puts a version into the store.
    pub(crate) fn put(&self, version: u32) {
        self.node.cluster.stamp("app", version, self.length);
    }

    /// The version that a volume shows; the error number otherwise.
    pub(crate) fn version(volume: &Volume) -> Result<u32, i32> {
        let value = std::fs::read(volume.join("value")).map_err(|error| error.raw_os_error().unwrap())?;
        Ok(stamp::check(&value).unwrap())
    }

    /// The versions that all volumes show.
    pub(crate) fn versions(&self) -> Vec<Result<u32, i32>> {
        self.volumes.iter().map(Self::version).collect()
    }

    /// Waits until all volumes show this version.
    pub(crate) fn wait_version(&self, version: u32) {
        until("this version", PATIENCE, || {
            self.versions().iter().all(|shown| *shown == Ok(version)).then_some(())
        });
    }
}

/// No read failed.
pub(crate) fn assert_unharmed(seen: &Seen) {
    assert!(seen.failed.is_empty(), "{seen:?}");
}

/// No read failed but those that an agent had in flight when it was killed: at most one per reader and kill.
pub(crate) fn assert_aborted(mut seen: Seen, kills: u64) {
    let aborted = seen.failed.remove(&libc::ECONNABORTED).unwrap_or(0);
    assert!(seen.failed.is_empty() && aborted <= kills * READERS as u64, "{aborted} aborted, {seen:?}");
}
