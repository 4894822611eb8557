//! Pods that read, under whatever a test does to the cluster.

use std::path::Path;

use fuse_secrets_csi::wire::handover;
use fuse_secrets_csi::wire::message::Handover;
use fuse_tests::cluster::shared::Alone;
use fuse_tests::cluster::stamped::STAMPED;
use fuse_tests::cluster::{Cluster, PATIENCE, Tenant, alone};
use fuse_tests::readers::{Readers, Seen};
use fuse_tests::{stamp, wait};
use rustix::io::Errno;

/// Pods that read.
pub(crate) const PODS: usize = 5;

/// The cluster with the driver on it.
pub(crate) fn cluster() -> Option<Alone> {
    let cluster = alone()?;
    cluster.wait_whole_driver();
    Some(cluster)
}

/// Pods whose volumes hold the stamped secret.
pub(crate) struct Stage<'a> {
    cluster: &'a Cluster,
    pub(crate) tenant: Tenant<'a>,
    pub(crate) pods: Vec<String>,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(cluster: &'a Cluster, name: &str, pods: usize) -> Self {
        let tenant = cluster.tenant(name);
        tenant.stamped_class();
        let pods: Vec<String> = (0..pods).map(|n| format!("reader-{n}")).collect();
        pods.iter().for_each(|pod| tenant.create(&tenant.reader(pod, STAMPED)));
        pods.iter().for_each(|pod| drop(cluster.wait_ready(&tenant.namespace, pod)));
        Self { cluster, tenant, pods }
    }

    pub(crate) fn readers(&self) -> Readers {
        let readers = self.cluster.readers(&self.tenant, &self.pods);
        readers.go_on();
        readers
    }

    /// Writes a version, and waits until each pod shows it.
    pub(crate) fn rotate(&self, version: u32) {
        self.tenant.stamp(version);
        for pod in &self.pods {
            wait_version(&self.cluster.stamped(&self.tenant, pod), version);
        }
    }

    /// Another pod starts, and reads.
    pub(crate) fn another(&self) {
        self.tenant.run(&self.tenant.reader("another", STAMPED));
        stamp::check(&std::fs::read(self.cluster.stamped(&self.tenant, "another")).unwrap()).unwrap();
    }

    /// Processes of all containers, so that one that was started again is seen.
    pub(crate) fn containers(&self) -> Vec<Vec<u32>> {
        self.pods.iter().map(|pod| self.cluster.processes(&self.tenant.namespace, pod, "app")).collect()
    }
}

pub(crate) fn wait_version(path: &Path, version: u32) {
    wait::until_true(&format!("version {version}"), PATIENCE, || {
        stamp::check(&std::fs::read(path).unwrap()).unwrap() == version
    });
}

pub(crate) fn assert_unharmed(seen: &Seen) {
    assert!(seen.failed.is_empty(), "{seen:?}");
}

/// No read failed; where this kernel's requests are not sent again, at most one per reader, which the agent had in flight.
pub(crate) fn assert_unharmed_by_a_kill(mut seen: Seen) {
    if handover::suits(&rustix::system::uname().release().to_string_lossy()) == Handover::Clone {
        let aborted = seen.failed.remove(&Errno::CONNABORTED.raw_os_error()).unwrap_or(0);
        assert!(aborted <= PODS as u64, "{aborted} aborted, {seen:?}");
    }
    assert_unharmed(&seen);
}

/// The version in a file, or the number of the error.
pub(crate) fn read(path: &Path) -> Result<u32, i32> {
    let value = std::fs::read(path).map_err(|error| error.raw_os_error().unwrap_or(0))?;
    Ok(stamp::check(&value).unwrap())
}
