//! Two drivers that have one name, one after the other: what a move from another driver looks like on a node, and the way back.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::pods::DRIVER;
use fuse_tests::cluster::{Cluster, PATIENCE, Tenant, alone};
use fuse_tests::wait;
use serde_json::json;

/// A driver that mounts a tmpfs with a file `password`. It goes when this is dropped; its volumes stay.
struct StandIn(Child);

impl StandIn {
    fn start(cluster: &Cluster) -> Self {
        let mut command = cluster.in_node(&[env!("CARGO_BIN_EXE_test-driver"), DRIVER, "theirs"]);
        Self(command.stdin(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// What a pod reads, through its own mounts.
fn password(cluster: &Cluster, tenant: &Tenant<'_>, pod: &str) -> String {
    let path: PathBuf = cluster.path_in(&tenant.namespace, pod, "app", "/mnt/secrets/password");
    std::fs::read_to_string(path).unwrap()
}

/// Makes a pod and tells what it reads.
fn start(cluster: &Cluster, tenant: &Tenant<'_>, pod: &str) -> String {
    tenant.run(&tenant.reader(pod, "app"));
    let inside = tenant.exec(pod, &["cat", "/mnt/secrets/password"]).unwrap();
    assert_eq!(inside, password(cluster, tenant, pod), "{pod}");
    inside
}

/// The file system of a pod's volume.
fn kind(cluster: &Cluster, tenant: &Tenant<'_>, pod: &str) -> String {
    let pid = cluster.processes(&tenant.namespace, pod, "app")[0];
    let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let line = table.lines().find(|line| line.contains(" /mnt/secrets ")).unwrap();
    line.split_once(" - ").unwrap().1.split(' ').next().unwrap().to_owned()
}

#[test]
fn a_stand_in_driver_gives_its_name_and_takes_it_back() {
    let Some(cluster) = alone() else { return };
    cluster.wait_whole_driver();
    let tenant = cluster.tenant("takeover");
    tenant.put("app", &json!({"password": "ours"}));
    tenant.class("app", &[("password", "app", "password")], &json!({"refreshInterval": "2s"}));
    // The other driver has the name.
    Part::ALL.into_iter().for_each(|part| cluster.take_away(part));
    let stand_in = StandIn::start(&cluster);
    assert_eq!(start(&cluster, &tenant, "old"), "theirs");
    assert_eq!(start(&cluster, &tenant, "older"), "theirs");
    let pids = |pod: &str| cluster.processes(&tenant.namespace, pod, "app");
    let (old, older) = (pids("old"), pids("older"));

    // Ours takes it. kubelet soon asks it for the volumes of the other's pods too, which it leaves as they are.
    drop(stand_in);
    Part::ALL.into_iter().for_each(|part| cluster.put_back(part));
    let shim = cluster.wait_driver(Part::Shim);
    cluster.wait_driver(Part::Agent);
    assert_eq!(start(&cluster, &tenant, "new"), "ours");
    let called = format!("\"{}/old\"", tenant.namespace);
    wait::until_true("a publish of the other's volume", PATIENCE, || {
        let log = cluster.logs(Part::Shim.namespace(), &shim, None);
        wait::pause(std::time::Duration::from_millis(200));
        log.lines().any(|line| line.contains("NodePublishVolume") && line.contains(&called))
    });
    assert_eq!(
        (password(&cluster, &tenant, "old"), kind(&cluster, &tenant, "old")),
        ("theirs".into(), "tmpfs".into())
    );
    assert_eq!(
        (password(&cluster, &tenant, "new"), kind(&cluster, &tenant, "new")),
        ("ours".into(), "fuse.fuse-secrets".into())
    );
    // One of the other's pods goes while ours has the name.
    tenant.remove("older");
    cluster.leaves_nothing();
    assert!(older.iter().all(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()));

    // And back: the other has the name, and the agent serves the pods that have ours.
    cluster.take_away(Part::Shim);
    let stand_in = StandIn::start(&cluster);
    assert_eq!(start(&cluster, &tenant, "newest"), "theirs");
    let new = pids("new");
    tenant.put("app", &json!({"password": "rotated"}));
    wait::until_true("a rotation without a shim", PATIENCE, || {
        password(&cluster, &tenant, "new") == "rotated"
    });
    tenant.remove("newest");
    assert_eq!(start(&cluster, &tenant, "last"), "theirs");
    assert_eq!(pids("new"), new);
    // One of ours goes while the other has the name.
    tenant.remove("new");
    cluster.leaves_nothing();

    // Ours again, for good.
    drop(stand_in);
    cluster.put_back(Part::Shim);
    cluster.wait_whole_driver();
    assert_eq!(start(&cluster, &tenant, "again"), "rotated");
    assert_eq!((password(&cluster, &tenant, "old"), pids("old")), ("theirs".to_owned(), old));
    assert_eq!(password(&cluster, &tenant, "last"), "theirs");
}
