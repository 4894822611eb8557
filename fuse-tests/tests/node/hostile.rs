//! Requests that no kubelet sends, and more of them than it would. Each has a clear answer, and leaves nothing behind.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_secrets_csi::proto::csi::volume_capability::{AccessType, Block, Mount};
use fuse_secrets_csi::proto::csi::{
    NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
};
use fuse_tests::needs;
use fuse_tests::node::{Holdings, Node, Volume};
use fuse_tests::wait::until_true;
use prost::Message as _;
use prost::bytes::{Buf as _, BufMut as _, Bytes};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::thread::CapabilitySet;
use serde_json::json;
use tokio::task::JoinSet;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use crate::leaks::resident;
use crate::{PATIENCE, SIBLING, settled};

/// What the shim may have more in memory than before, in KiB: an allocator gives back in steps.
const SLACK: u64 = 8 << 10;

struct World {
    node: Node,
    empty: Holdings,
    resident: u64,
}

impl World {
    fn new(shim: &[&str]) -> Option<Self> {
        if !needs::kernel() {
            return None;
        }
        let mut node = Node::start_with(SIBLING, shim, &[]);
        node.cluster.store.put("app", &json!({"password": "p"}));
        node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
        // What is made at the first use, and kept, is there.
        let first = node.volume("web-0", "app");
        node.publish(&first).unwrap();
        node.unpublish(&first).unwrap();
        let resident = resident(node.shim().pid());
        let empty = settled(&node);
        Some(Self { node, empty, resident })
    }

    fn volume(&self) -> Volume {
        self.node.volume("web-0", "app")
    }

    fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let mut client = self.node.kubelet().client();
        self.node.block_on(client.node_publish_volume(request)).map(drop)
    }

    fn unpublish(&self, volume_id: &str, target_path: &str) -> Result<(), Status> {
        let (volume_id, target_path) = (volume_id.to_owned(), target_path.to_owned());
        let request = NodeUnpublishVolumeRequest { volume_id, target_path };
        let mut client = self.node.kubelet().client();
        self.node.block_on(client.node_unpublish_volume(request)).map(drop)
    }

    /// A publish with one thing changed is invalid, and the words say why.
    fn invalid(&self, words: &str, change: impl FnOnce(&mut NodePublishVolumeRequest)) {
        let mut request = self.volume().request();
        change(&mut request);
        let no = self.publish(request).expect_err(words);
        assert_eq!((no.code(), no.message().contains(words)), (Code::InvalidArgument, true), "{words}: {no}");
        assert!(no.message().len() < 8192 && !no.message().contains('\n'), "{words}: {no}");
    }

    /// Nothing is left, and readers of another volume never noticed.
    fn ends_as_it_began(mut self) {
        let after = self.volume();
        self.node.publish(&after).unwrap();
        assert_eq!(std::fs::read_to_string(after.join("password")).unwrap(), "p");
        self.node.unpublish(&after).unwrap();
        self.node.wait_settled(&self.empty);
        assert_eq!(self.node.observe().0, []);
        let now = resident(self.node.shim().pid());
        assert!(now < self.resident + SLACK, "the shim has {} KiB, {now} KiB now", self.resident);
    }
}

/// Points of mounts of volumes that do not lie below a directory.
fn mounts_outside(root: &Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = table.lines().filter(|line| line.contains(" fuse.fuse-secrets csi-"));
    let points = ours.filter_map(|line| line.split(' ').nth(4));
    // Those of other tests lie below kubelet roots of their own.
    let within = |point: &&str| !Path::new(point).starts_with(root) && !point.contains("/kubelet/pods/");
    points.filter(within).map(str::to_owned).collect()
}

#[test]
fn targets_that_are_not_below_kubelets_directory_are_refused() {
    let Some(world) = World::new(&[]) else { return };
    let root = world.node.path().join("kubelet");
    let elsewhere = tempfile::tempdir().unwrap();
    symlink(elsewhere.path(), root.join("pods/link")).unwrap();
    symlink(elsewhere.path(), root.join("pods/leaf")).unwrap();
    std::fs::create_dir_all(root.join("pods/plain")).unwrap();
    let at = |path: &str| root.join(path).display().to_string();
    let long = at(&format!("pods/plain/{}", "a/".repeat(2_500)));
    let cases: [(String, &str); 13] = [
        (elsewhere.path().join("mount").display().to_string(), "is not below the kubelet root"),
        ("/".to_owned(), "is not below the kubelet root"),
        ("/etc".to_owned(), "is not below the kubelet root"),
        (at(""), "is not below the kubelet root"),
        (at("pods/../../../etc/mount"), "has a component . or .."),
        (at("pods/./plain/mount"), "has a component . or .."),
        ("kubelet/pods/plain/mount".to_owned(), "is not absolute"),
        (String::new(), "must be a path"),
        (long, "must be a path"),
        (at("pods/pl\0ain/mount"), "must be a path"),
        (at("pods/plain/mo\0unt"), "must be a path"),
        (at("pods/link/mount"), "leads through a symbolic link"),
        (at("pods/nowhere/mount"), "parent directory does not exist"),
    ];
    for (target, words) in &cases {
        world.invalid(words, |request| request.target_path.clone_from(target));
        // What can be no target has nothing mounted on it, but a missing parent is no reason to ask again for ever.
        let gone = world.unpublish(&world.volume().id, target);
        let code = gone.err().map_or(Code::Ok, |no| no.code());
        let expected = if words.contains("does not exist") { Code::Ok } else { Code::InvalidArgument };
        assert_eq!(code, expected, "{target:?}");
    }
    // The last component is a link, or has no room in a directory; found when the directory is made.
    for target in [at("pods/leaf"), at(&format!("pods/plain/{}", "m".repeat(256)))] {
        let mut request = world.volume().request();
        request.target_path = target;
        let no = world.publish(request).unwrap_err();
        assert!(matches!(no.code(), Code::Internal | Code::InvalidArgument), "{no}");
    }
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(root.join("pods/plain")).unwrap().count(), 0);
    std::fs::remove_file(root.join("pods/link")).unwrap();
    std::fs::remove_file(root.join("pods/leaf")).unwrap();
    world.ends_as_it_began();
}

#[test]
fn what_a_request_lacks_or_has_too_much_is_named_by_its_field() {
    let Some(world) = World::new(&[]) else { return };
    for id in ["", "a/b", "../../etc", "a\nb", "a b", "csi-\u{e9}", "a\0", &"v".repeat(129)] {
        world.invalid("volume_id", |request| request.volume_id = id.to_owned());
        assert_eq!(world.unpublish(id, "/t").unwrap_err().code(), Code::InvalidArgument);
    }
    let mount = |group: &str| {
        let mount = Mount { volume_mount_group: group.to_owned() };
        Some(VolumeCapability { access_type: Some(AccessType::Mount(mount)) })
    };
    for group in ["x", "-1", "+5", "4294967295", "99999999999999999999", " 5", "0x10"] {
        world.invalid("volume_mount_group", |request| request.volume_capability = mount(group));
    }
    world.invalid("volume_capability", |request| request.volume_capability = None);
    world.invalid("volume_capability", |request| {
        request.volume_capability = Some(VolumeCapability { access_type: None });
    });
    world.invalid("volume_capability.block", |request| {
        let block = AccessType::Block(Block {});
        request.volume_capability = Some(VolumeCapability { access_type: Some(block) });
    });
    world.invalid("ephemeral", |request| request.volume_context.clear());
    world.invalid("serviceAccount.tokens", |request| {
        let tokens = "csi.storage.k8s.io/serviceAccount.tokens".to_owned();
        request.volume_context.insert(tokens, "[".repeat(100_000));
    });
    world.invalid("is longer than 256 KiB", |request| {
        request.volume_context.insert("large".to_owned(), "x".repeat(1 << 20));
    });
    world.invalid("is longer than 256 KiB", |request| {
        let many = (0..20_000).map(|number| (format!("attribute-{number}"), "x".repeat(40)));
        request.volume_context.extend(many);
    });
    let mut request = world.volume().request();
    request.secrets = BTreeMap::from([("large".to_owned(), "x".repeat(5 << 20))]);
    assert_eq!(world.publish(request).unwrap_err().code(), Code::OutOfRange);
    // 64 KiB of attributes fit the protocol; the agent judges them.
    let mut request = world.volume().request();
    request
        .volume_context
        .extend((0..1_000).map(|number| (format!("attribute-{number:04}"), "x".repeat(50))));
    let no = world.publish(request).unwrap_err();
    assert_eq!(no.code(), Code::InvalidArgument);
    assert!(no.message().contains("attribute-0000"), "{no}");
    let stats = NodeGetVolumeStatsRequest { volume_id: "none".to_owned(), volume_path: "/none".to_owned() };
    let mut client = world.node.kubelet().client();
    let no = world.node.block_on(client.node_get_volume_stats(stats)).unwrap_err();
    assert_eq!(no.code(), Code::NotFound);
    world.ends_as_it_began();
}

/// Bytes as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

#[test]
fn fields_and_enums_of_a_newer_kubelet_are_skipped_and_bytes_that_are_no_message_are_refused() {
    let Some(world) = World::new(&[]) else { return };
    let call = |bytes: Vec<u8>| {
        let socket = world.node.path().join("kubelet/plugins/fuse-secrets/csi.sock");
        world.node.block_on(async {
            let channel = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
            let mut grpc = tonic::client::Grpc::new(channel.connect().await.unwrap());
            grpc.ready().await.unwrap();
            let path = "/csi.v1.Node/NodePublishVolume".parse().unwrap();
            grpc.unary(tonic::Request::new(bytes), path, Raw).await.map(drop)
        })
    };
    let volume = world.volume();
    let plain = volume.request().encode_to_vec();
    // volume_capability once more, which a reader merges: access_mode with an unknown mode, and a field 100 of text.
    let mut newer = vec![0x2a, 0x0b, 0x1a, 0x02, 0x08, 99, 0xa2, 0x06, 0x04, b'm', b'o', b'r', b'e'];
    // A number in field 200 of the request.
    newer.extend([0xc0, 0x0c, 0x07]);
    call([plain.clone(), newer].concat()).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
    world.node.unpublish(&volume).unwrap();
    for garbage in
        [&plain[..plain.len() - 3], &[0xff; 64], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], b"\x0a\x02\xff\xfe"]
    {
        let no = call(garbage.to_vec()).unwrap_err();
        assert!(matches!(no.code(), Code::Internal | Code::InvalidArgument), "{no:?}");
    }
    world.ends_as_it_began();
}

#[test]
fn directories_that_become_links_during_the_call_never_lead_a_mount_elsewhere() {
    let Some(world) = World::new(&[]) else { return };
    let root = world.node.path().join("kubelet");
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::create_dir(elsewhere.path().join("mount")).unwrap();
    let volume = world.volume();
    let parent = volume.target.parent().unwrap().to_owned();
    let link = parent.with_file_name("link");
    symlink(elsewhere.path(), &link).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swapping = {
        let (stop, parent, link) = (Arc::clone(&stop), parent.clone(), link.clone());
        std::thread::spawn(move || {
            let mut swaps = 0_u64;
            // An even number: in the end all is as it was.
            while !stop.load(Ordering::Acquire) || swaps % 2 == 1 {
                renameat_with(CWD, &parent, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                swaps += 1;
            }
            swaps
        })
    };
    let (mut done, mut refused) = (0, 0);
    for _ in 0..200 {
        match world.node.publish(&volume) {
            Ok(()) => done += 1,
            Err(no) => {
                assert!(matches!(no.code(), Code::InvalidArgument | Code::Internal), "{no}");
                refused += 1;
            }
        }
        assert_eq!(mounts_outside(&root), [] as [String; 0]);
        // Also by a path with links in it: so often until it is a directory for once.
        until_true("unpublished", PATIENCE, || world.node.unpublish(&volume).is_ok());
    }
    stop.store(true, Ordering::Release);
    let swaps = swapping.join().unwrap();
    assert!(done > 0 && refused > 0 && swaps > 1_000, "{done} done, {refused} refused, {swaps} swaps");
    world.node.unpublish(&volume).unwrap();
    std::fs::remove_file(link).unwrap();
    let left: Vec<_> = std::fs::read_dir(elsewhere.path().join("mount")).unwrap().collect();
    assert!(left.is_empty() && elsewhere.path().join("mount").is_dir());
    world.ends_as_it_began();
}

#[test]
fn a_volume_has_one_target_and_a_target_one_volume() {
    let Some(world) = World::new(&[]) else { return };
    let (first, second) = (world.volume(), world.volume());
    world.node.publish(&first).unwrap();
    let mut moved = second.clone();
    moved.id.clone_from(&first.id);
    let no = world.node.publish(&moved).unwrap_err();
    assert_eq!(no.code(), Code::FailedPrecondition, "{no}");
    assert!(no.message().contains(&first.target.display().to_string()), "{no}");
    let mut usurper = second.clone();
    usurper.target.clone_from(&first.target);
    let no = world.node.publish(&usurper).unwrap_err();
    assert_eq!(no.code(), Code::FailedPrecondition, "{no}");
    assert!(no.message().contains(&first.id), "{no}");
    // What is unpublished by mistake is not somebody else's.
    world.node.unpublish(&moved).unwrap();
    world.node.unpublish(&usurper).unwrap_err();
    assert_eq!(std::fs::read_to_string(first.join("password")).unwrap(), "p");
    world.node.publish(&first).unwrap();
    world.node.publish(&second).unwrap();
    assert_eq!(world.node.holdings().mounts, 2);
    for volume in [&first, &second] {
        assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
        world.node.unpublish(volume).unwrap();
    }
    world.ends_as_it_began();
}

#[test]
fn two_drivers_on_one_machine_leave_each_other_alone() {
    let (Some(first), Some(second)) = (World::new(&[]), World::new(&[])) else { return };
    let volume = first.volume();
    first.node.publish(&volume).unwrap();
    let mut second = second;
    second.node.restart_shim(&[]);
    assert_eq!(second.node.observe().0, []);
    second.node.abort(&volume).unwrap_err();
    first.node.unpublish(&volume).unwrap();
    first.ends_as_it_began();
}

#[test]
fn more_volumes_than_a_node_takes_are_refused_with_the_limit_and_its_remedy() {
    // Where the shim cannot raise the agent's limit of locked memory, that holds fewer.
    let raises = rustix::thread::capabilities(None).unwrap().effective.contains(CapabilitySet::SYS_RESOURCE);
    let most = if raises { 1_000 } else { 500 };
    let Some(world) = World::new(&["--max-volumes", &most.to_string()]) else { return };
    let volumes: Vec<Volume> = (0..2 * most).map(|_| world.volume()).collect();
    let all = |publish: bool| {
        let kubelet = world.node.kubelet();
        let volumes = volumes.clone();
        world.node.block_on(async move {
            let (mut calls, mut answers) = (JoinSet::new(), Vec::new());
            for volume in volumes {
                let kubelet = kubelet.clone();
                while calls.len() >= 32 {
                    answers.extend(calls.join_next().await);
                }
                calls.spawn(async move {
                    if publish { kubelet.publish(&volume).await } else { kubelet.unpublish(&volume).await }
                });
            }
            answers.extend(calls.join_all().await.into_iter().map(Ok));
            answers.into_iter().map(Result::unwrap).collect::<Vec<Result<(), Status>>>()
        })
    };
    let refused: Vec<Status> = all(true).into_iter().filter_map(Result::err).collect();
    let other: Vec<&Status> = refused.iter().filter(|no| no.code() != Code::ResourceExhausted).collect();
    assert!(other.is_empty(), "{other:?}");
    assert_eq!((refused.len(), world.node.holdings().mounts), (most, most));
    for no in &refused {
        assert!(
            no.message().contains(&format!("{most} of {most} volumes"))
                && no.message().contains("--max-volumes"),
            "{no}"
        );
    }
    // Those that are there are not disturbed by it.
    let there = volumes.iter().filter(|volume| volume.target.exists()).take(20);
    for volume in there {
        assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
        world.node.publish(volume).unwrap();
    }
    let failed: Vec<Status> = all(false).into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{failed:?}");
    world.ends_as_it_began();
}

#[test]
fn callers_that_contradict_each_other_about_one_volume_all_get_an_answer() {
    let Some(world) = World::new(&[]) else { return };
    let volume = world.volume();
    let answers = world.node.block_on(async {
        let mut callers = JoinSet::new();
        for caller in 0..32 {
            let (kubelet, volume) = (world.node.kubelet(), volume.clone());
            callers.spawn(async move {
                let mut answers = Vec::new();
                for call in 0..20 {
                    answers.push(match (caller + call) % 2 {
                        0 => kubelet.publish(&volume).await,
                        _ => kubelet.unpublish(&volume).await,
                    });
                }
                answers
            });
        }
        callers.join_all().await.concat()
    });
    let failed: Vec<Status> = answers.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{failed:?}");
    world.node.unpublish(&volume).unwrap();
    world.ends_as_it_began();
}

#[test]
fn a_caller_that_gives_up_leaves_a_volume_that_is_whole_or_none() {
    let Some(world) = World::new(&[]) else { return };
    for unpublished_at_once in [false, true] {
        let volume = world.volume();
        // A path that the agent has not in its cache.
        world.node.cluster.store.put("slow", &json!({"password": "s"}));
        world.node.cluster.class("app", &[("password", "secret/data/slow", Some("password"))], &[]);
        let store = &world.node.cluster.store;
        let gate = store.embedded().hold("secret/data/slow").unwrap();
        let (kubelet, given_up) = (world.node.kubelet(), volume.clone());
        world.node.block_on(async {
            let call = tokio::spawn(async move { kubelet.publish(&given_up).await });
            gate.arrived(1, PATIENCE).await.unwrap();
            call.abort();
            assert!(call.await.unwrap_err().is_cancelled());
        });
        assert!(!volume.target.exists(), "mounted without its files");
        gate.open();
        if !unpublished_at_once {
            until_true("the volume", PATIENCE, || world.node.holdings().mounts == 1);
            assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "s");
            world.node.publish(&volume).unwrap();
        }
        world.node.unpublish(&volume).unwrap();
        world.node.wait_settled(&world.empty);
    }
    world.node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    world.ends_as_it_began();
}
