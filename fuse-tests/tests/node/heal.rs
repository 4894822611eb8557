//! All of our processes die at once: mounts are dead, and every pod gets its volume back with kubelet's next publish.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuse_tests::mounted::mounts_below;
use fuse_tests::node::{Node, Volume};
use fuse_tests::wait::{pause, until, until_true};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::process::Signal;

use crate::SIBLING;
use crate::pod::{PRIVATE, Pod, SLAVE};

/// Generous: the machine has other work.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a process on the host saw that read one file again and again.
#[derive(Debug, Default)]
struct Tally {
    right: u64,
    wrong: u64,
    /// By error number.
    failed: BTreeMap<i32, u64>,
}

struct Reader {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Tally>,
}

impl Reader {
    /// Every value is one of those that begin with `value`.
    fn start(path: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut tally = Tally::default();
            while !stopped.load(Ordering::Acquire) {
                match std::fs::read_to_string(&path) {
                    Ok(text) if text.starts_with("value-") => tally.right += 1,
                    Ok(_) => tally.wrong += 1,
                    Err(error) => *tally.failed.entry(error.raw_os_error().unwrap_or(0)).or_default() += 1,
                }
                pause(Duration::from_millis(2));
            }
            tally
        });
        Self { stop, thread }
    }

    fn finish(self) -> Tally {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

fn put(node: &Node, value: &str) {
    node.cluster.store.put("app", &serde_json::json!({ "password": value }));
}

/// A node with a class of two files, whose kubelet directory hands its mounts on, as on every machine with systemd.
fn node() -> Node {
    let mut node = Node::new(SIBLING);
    let kubelet = node.path().join("kubelet");
    mount_bind(&kubelet, &kubelet).unwrap();
    mount_change(&kubelet, MountPropagationFlags::SHARED).unwrap();
    put(&node, "value-0");
    let file = |name| (name, "secret/data/app", Some("password"));
    node.cluster.class("app", &[file("password"), file("nested/deep/password")], &[]);
    node.start_shim(&[]);
    start_agent(&mut node);
    node
}

/// An agent that serves.
fn start_agent(node: &mut Node) {
    node.start_agent(&[]);
    node.wait_served();
}

fn kill_everything(node: &mut Node) {
    node.shim().kill();
    for mut agent in node.agents().drain(..) {
        agent.process.kill();
    }
}

/// kubelet's next publishes, each with a new token, at once.
fn republish(node: &Node, volumes: &[&Volume]) {
    let calls = volumes.iter().map(|volume| {
        let (kubelet, volume) = (node.kubelet(), node.cluster.renew((*volume).clone()));
        async move { kubelet.publish(&volume).await }
    });
    let calls: Vec<_> = calls.collect();
    node.block_on(async {
        let mut running = tokio::task::JoinSet::new();
        calls.into_iter().for_each(|call| drop(running.spawn(call)));
        while let Some(outcome) = running.join_next().await {
            outcome.unwrap().unwrap();
        }
    });
}

fn is_dead(path: &Path) -> bool {
    std::fs::read(path).unwrap_err().raw_os_error() == Some(Errno::NOTCONN.raw_os_error())
}

fn metric(node: &Node, name: &str) -> Option<String> {
    let text = node.block_on(async {
        let url = format!("http://{}/metrics", node.shim_health);
        reqwest::get(url).await.unwrap().text().await.unwrap()
    });
    text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")).map(str::to_owned))
}

/// A figure for people.
#[allow(clippy::print_stderr, reason = "shown with --nocapture")]
fn report(what: &str) {
    eprintln!("{what}");
}

#[test]
fn when_all_processes_were_killed_the_next_publish_heals_every_pod_again_and_again() {
    let mut node = node();
    assert!(node.shim().log().contains("looked for dead mounts of before"));
    let (a, b) = (node.volume("pod-a", "app"), node.volume("pod-b", "app"));
    republish(&node, &[&a, &b]);
    let points = node.path().join("points");
    let [directory, mapped, file] = ["directory", "mapped", "file"].map(|name| points.join(name));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::create_dir(&mapped).unwrap();
    std::fs::write(&file, "").unwrap();
    // A subPath as kubelet prepares it, on the host.
    let prepared = a.target.ancestors().nth(4).unwrap().join("volume-subpaths/secrets/app/0");
    std::fs::create_dir_all(prepared.parent().unwrap()).unwrap();
    std::fs::write(&prepared, "").unwrap();
    mount_bind(a.join("password"), &prepared).unwrap();

    let only_parts = format!(
        "mount --bind {at}/password {file}\nmount --bind {at}/nested/deep {directory}\numount -l {at}",
        at = a.target.display(),
        file = file.display(),
        directory = directory.display()
    );
    let whole = || vec![a.join("password"), b.join("nested/deep/password")];
    let mut pods = [
        ("private", Pod::start(PRIVATE, ""), whole()),
        ("slave", Pod::start(SLAVE, ""), whole()),
        ("subPath", Pod::start(PRIVATE, &only_parts), vec![file.clone(), directory.join("password")]),
        ("hostUsers: false", Pod::mapped(&a.target, &mapped), vec![mapped.join("password")]),
    ];
    let host = [a.join("password"), b.join("nested/deep/password"), prepared.clone()];
    for (name, pod, paths) in &mut pods {
        for path in paths {
            assert_eq!(pod.read(path).unwrap(), "value-0", "{name}: {}", path.display());
        }
    }
    let readers: Vec<_> = host.iter().cloned().map(Reader::start).collect();

    for round in 1..=2 {
        let mut refused = 0;
        kill_everything(&mut node);
        let mut count = |pods: &mut [(&str, Pod, Vec<PathBuf>)]| {
            for (name, pod, paths) in pods {
                for path in paths {
                    let error = pod.read(path).unwrap_err();
                    assert!(error.contains("not connected"), "{name}: {}: {error}", path.display());
                    refused += 1;
                }
            }
            assert!(host.iter().all(|path| is_dead(path)));
        };
        count(&mut pods);
        node.start_shim(&[]);
        start_agent(&mut node);
        // Nothing heals before a token comes.
        count(&mut pods);
        for volume in [&a, &b] {
            until_true("the shim knows", PATIENCE, || {
                node.status(volume).is_some_and(|now| now.state == "dead")
            });
        }
        until_true("the metric", PATIENCE, || {
            metric(&node, "fuse_secrets_csi_dead_mounts").as_deref() == Some("2")
        });
        assert!(node.shim().log().contains("its mount is dead; its next publish replaces it"));

        let value = format!("value-{round}");
        put(&node, &value);
        let begun = Instant::now();
        republish(&node, &[&a, &b]);
        report(&format!(
            "round {round}: both published after {:?}; {refused} reads got ENOTCONN",
            begun.elapsed()
        ));
        for (name, pod, paths) in &mut pods {
            for path in paths {
                until("a pod is healed", PATIENCE, || pod.read(path).ok().filter(|read| *read == value));
            }
            report(&format!("round {round}: {name}: healed after {:?}", begun.elapsed()));
        }
        for path in &host {
            until_true("the host is healed", PATIENCE, || {
                std::fs::read_to_string(path).ok() == Some(value.clone())
            });
        }
        assert!(!node.shim().log().contains("cannot be replaced"));
    }

    for reader in readers {
        let tally = reader.finish();
        report(&format!("a reader on the host: {tally:?}"));
        assert!(tally.right > 0 && tally.wrong == 0);
        // What was being answered at the moment of death ends with ECONNABORTED.
        let known = [Errno::NOTCONN, Errno::CONNABORTED].map(Errno::raw_os_error);
        assert!(tally.failed.keys().all(|error| known.contains(error)), "{tally:?}");
        assert!(tally.failed.get(&known[1]).is_none_or(|count| *count <= 2), "{tally:?}");
    }
    for took in node.logs().lines().filter(|line| line.contains("dead mounts were replaced")) {
        report(took);
    }
    // kubelet takes its own binds away first, until none is left.
    while unmount(&prepared, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
    for volume in [&a, &b] {
        node.unpublish(volume).unwrap();
    }
    assert_eq!((node.holdings().mounts, node.holdings().targets.len()), (1, 0), "kubelet's own is left");
}

#[test]
fn a_pod_that_cannot_be_healed_is_named_and_its_publish_succeeds() {
    let mut node = node();
    assert_eq!(metric(&node, "fuse_secrets_csi_dead_mounts").as_deref(), Some("0"));
    let volume = node.volume("pod-1", "app");
    node.publish(&volume).unwrap();
    let point = node.path().join("bound");
    std::fs::write(&point, "").unwrap();
    let bind = format!("mount --bind {} {}", volume.join("nested/deep/password").display(), point.display());
    let mut pod = Pod::start(PRIVATE, &bind);
    assert_eq!(pod.read(&point).unwrap(), "value-0");
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    kill_everything(&mut node);
    node.start_shim(&[]);
    start_agent(&mut node);
    republish(&node, &[&volume]);
    until("its other mount is healed", PATIENCE, || pod.read(&volume.join("password")).ok());
    assert!(pod.read(&point).unwrap_err().contains("not connected"));
    let named = |line: &str| {
        ["WARN", "shop/pod-1", "/bound", "/nested/deep/password any more", &pod.pid().to_string()]
            .iter()
            .all(|part| line.contains(part))
    };
    until_true("the warning", PATIENCE, || node.shim().log().lines().any(named));
    node.unpublish(&volume).unwrap();
}

#[test]
fn a_shim_that_is_told_to_end_leaves_everything_with_the_agent() {
    let mut node = node();
    let volume = node.volume("pod-1", "app");
    node.publish(&volume).unwrap();
    let reader = Reader::start(volume.join("password"));
    for _ in 0..2 {
        assert_eq!(node.shim().stop().code(), Some(0));
        assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "value-0");
        node.start_shim(&[]);
        until_true("it is given back", PATIENCE, || {
            node.status(&volume).is_some_and(|status| status.state == "serving")
        });
    }
    node.kill_worker();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "value-0");
    let tally = reader.finish();
    report(&format!("over two restarts of the shim and a worker's death: {tally:?}"));
    assert!(tally.right > 0 && tally.wrong == 0 && tally.failed.is_empty(), "{tally:?}");
    node.unpublish(&volume).unwrap();
    assert_eq!(node.holdings().targets.len(), 0);
}

#[test]
fn both_told_to_end_at_once_do_and_the_next_publish_makes_the_volume_work() {
    let mut node = node();
    let volume = node.volume("pod-1", "app");
    node.publish(&volume).unwrap();
    let begun = Instant::now();
    node.shim().signal(Signal::TERM);
    node.agents()[0].process.signal(Signal::TERM);
    let agent = until("the agent ends", PATIENCE, || node.agents()[0].process.ended());
    let took = begun.elapsed();
    // It may see the agent's leaving first, and then waits 25 s for the next one.
    let shim = until("the shim ends", 2 * PATIENCE, || node.shim().ended());
    report(&format!(
        "the agent ended after {took:?} with {agent}, the shim after {:?} with {shim}",
        begun.elapsed()
    ));
    assert_eq!((agent.code(), shim.code()), (Some(0), Some(0)));
    node.agents().clear();
    node.start_shim(&[]);
    start_agent(&mut node);
    republish(&node, &[&volume]);
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "value-0");
    node.unpublish(&volume).unwrap();
    assert_eq!((node.holdings().mounts, node.holdings().targets.len()), (1, 0));
}

#[test]
fn a_shim_that_is_killed_in_the_middle_of_publishes_leaves_nothing_behind() {
    let mut node = node();
    let first = node.volume("first", "app");
    node.publish(&first).unwrap();
    node.unpublish(&first).unwrap();
    let before = (node.holdings(), agents_volumes(&mut node));
    let mut outcomes = BTreeMap::new();
    for round in 0_u64..20 {
        let volume = node.volume("pod-1", "app");
        let kubelet = node.kubelet();
        let begun = {
            let (kubelet, volume) = (kubelet.clone(), volume.clone());
            node.spawn(async move { kubelet.publish(&volume).await })
        };
        // Spread over what a publish takes.
        pause(Duration::from_micros(round * 600));
        node.shim().kill();
        let outcome = node.block_on(begun).unwrap();
        let mounted = mounts_below(&node.path().join("kubelet")) > before.0.mounts;
        *outcomes.entry((outcome.is_ok(), mounted)).or_insert(0) += 1;
        node.start_shim(&[]);
        node.wait_served();
        republish(&node, &[&volume]);
        assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "value-0", "round {round}");
        node.unpublish(&volume).unwrap();
        assert_eq!(node.holdings().mounts, before.0.mounts, "round {round}");
        assert!(node.holdings().targets.is_empty(), "round {round}");
    }
    report(&format!("(answered, mounted) when the shim was killed: {outcomes:?}"));
    until_true("the agent holds nothing", PATIENCE, || agents_volumes(&mut node) == before.1);
    assert!(node.observe().0.is_empty());
}

/// Volumes at the agent by its own count, and its descriptors of /dev/fuse.
fn agents_volumes(node: &mut Node) -> (Option<String>, usize) {
    let (health, worker) = (node.agents()[0].health, node.wait_served().pid);
    let text = node.block_on(async {
        reqwest::get(format!("http://{health}/metrics")).await.unwrap().text().await.unwrap()
    });
    let volumes = text.lines().find_map(|line| line.strip_prefix("fuse_secrets_volumes ").map(str::to_owned));
    let descriptors = std::fs::read_dir(format!("/proc/{worker}/fd")).unwrap();
    let fuse = descriptors.filter(|entry| {
        let link = entry.as_ref().map(|entry| std::fs::read_link(entry.path()));
        matches!(link, Ok(Ok(path)) if path == Path::new("/dev/fuse"))
    });
    (volumes, fuse.count())
}
