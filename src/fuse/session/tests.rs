//! Sessions on a socket that plays the kernel.

use super::*;
use crate::cache::{Cache, Limits};
use crate::metrics::Metrics;
use crate::reference::{
    Encoding, FilePath, FileSpec, Freshness, Method, Ownership, Request, VolumeId, VolumeSpec,
};
use crate::secret::arena::Arena;
use crate::secret::pages::SecretMemory;
use crate::store::Credential;
use crate::store::scripted::{Scenario, Scripted, identity, token};
use crate::volume::{Surroundings, Volume};

pub(crate) const GETATTR: u32 = 3;
const OPEN: u32 = 14;
pub(crate) const ROOT: u64 = 1;
const FILE: u64 = 2;

/// The kernel's end: what it sends are requests, what it hears are replies and notifications.
pub(crate) struct Kernel(pub(crate) OwnedFd);

impl Kernel {
    pub(crate) fn new() -> (Self, OwnedFd) {
        let (ours, fuse) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::sockopt::set_socket_timeout(
            &ours,
            rustix::net::sockopt::Timeout::Recv,
            Some(Duration::from_secs(20)),
        )
        .unwrap();
        (Self(ours), fuse)
    }

    pub(crate) fn ask(&self, opcode: u32, unique: u64, inode: u64) {
        let mut request = Vec::new();
        for word in [56, opcode] {
            request.extend(u32::to_le_bytes(word));
        }
        request.extend(unique.to_le_bytes());
        request.extend(inode.to_le_bytes());
        request.resize(56, 0);
        rustix::io::write(&self.0, &request).unwrap();
    }

    /// Unique number and error, or 0 and the code of a notification.
    pub(crate) fn hear(&self) -> (u64, i32) {
        let mut reply = [0; 4096];
        let length = rustix::io::read(&self.0, &mut reply).unwrap();
        assert!(length >= 16);
        let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
        (u64::from_le_bytes(reply[8..16].try_into().unwrap()), error)
    }
}

struct World {
    store: Arc<Scripted>,
    pool: Arc<Pool>,
    invalidator: Invalidator,
    fs: Arc<Fs>,
}

impl World {
    /// A file that is always too old: each open waits for the store.
    async fn new(open_deadline: Duration) -> Self {
        let (store, metrics) = (Scripted::new(), Arc::<Metrics>::default());
        let memory = SecretMemory::with_limit(1 << 20).unwrap();
        let arena = Arena::new(Arc::clone(&memory));
        let cache = Cache::new(Arc::clone(&store), arena, Limits::default(), Arc::clone(&metrics));
        let file = FileSpec {
            path: FilePath::parse("a").unwrap(),
            request: Request { method: Method::Get, path: "app".into(), query: None, args: None },
            key: Some("password".into()),
            encoding: Encoding::Utf8,
            ownership: Ownership::default(),
        };
        let freshness = Freshness { max_age: Duration::ZERO, open_deadline, ..Freshness::default() };
        let (class, identity, ownership) = ("test".into(), identity(), Ownership::default());
        let spec = VolumeSpec { class, identity, files: vec![file], freshness, ownership };
        let pool = Pool::new(&memory, 4096, 2).unwrap();
        let surroundings = Surroundings { memory, metrics, default_owner: (0, 0) };
        let volume = Volume::new(VolumeId("v".into()), spec, None, surroundings);
        store.rotate("app", "one");
        let deadline = Instant::now() + Duration::from_secs(10);
        let credential = Arc::new(Credential::Jwt(token("jwt")));
        volume.publish(&cache, credential, crate::volume::Trust::Proven, deadline).await.unwrap();
        let invalidator = Invalidator::start().unwrap();
        Self { store, pool, invalidator, fs: Fs::new(volume) }
    }

    fn serve(&self, fuse: OwnedFd, threads: usize, resend: bool) -> Session {
        let parts = Parts { pool: &self.pool, invalidator: &self.invalidator, threads };
        Session::start(fuse, &self.fs, &parts, resend).unwrap()
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_session_answers_what_it_had_read_and_leaves_the_rest_to_its_successor() {
    for threads in [1, 3] {
        let world = World::new(Duration::from_millis(300)).await;
        let (kernel, fuse) = Kernel::new();
        let next = fuse.try_clone().unwrap();
        let session = world.serve(fuse, threads, false);
        kernel.ask(GETATTR, 2, ROOT);
        assert_eq!(kernel.hear(), (2, 0));
        world.store.play(Scenario::Hanging);
        kernel.ask(OPEN, 4, FILE);
        // The store answers nobody: only time ends this wait, so the open is outstanding while it is drained.
        while world.fs.volume().metrics().cache_misses.value() < 2 {
            tokio::task::yield_now().await;
        }
        session.drain(soon()).await.unwrap();
        assert_eq!(kernel.hear(), (4, 0));
        assert_eq!(session.ended().await, End::Drained);
        kernel.ask(GETATTR, 6, ROOT);
        let _successor = world.serve(next, threads, false);
        assert_eq!(kernel.hear(), (6, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_come_and_go_without_losing_one_of_many_requests() {
    let world = World::new(Duration::ZERO).await;
    let (kernel, fuse) = Kernel::new();
    let mut session = world.serve(fuse.try_clone().unwrap(), 1, false);
    let asker = std::thread::spawn(move || {
        for unique in 1..=3_000u64 {
            kernel.ask(GETATTR, 2 * unique, ROOT);
            assert_eq!(kernel.hear(), (2 * unique, 0));
        }
    });
    let mut drained = 0;
    while !asker.is_finished() {
        session.drain(soon()).await.unwrap();
        session = world.serve(fuse.try_clone().unwrap(), 1, false);
        drained += 1;
    }
    asker.join().unwrap();
    assert!(drained > 3, "only {drained} sessions");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_at_its_deadline_and_a_second_one_has_nothing_to_do() {
    let world = World::new(Duration::from_secs(4)).await;
    let (kernel, fuse) = Kernel::new();
    let session = world.serve(fuse, 1, false);
    world.store.play(Scenario::Hanging);
    kernel.ask(OPEN, 4, FILE);
    while world.fs.volume().metrics().cache_misses.value() < 2 {
        tokio::task::yield_now().await;
    }
    let error = session.drain(Instant::now() + Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    session.drain(soon()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_asks_for_lost_requests_first_and_voids_what_the_kernel_believes() {
    let world = World::new(Duration::ZERO).await;
    let (kernel, fuse) = Kernel::new();
    let _session = world.serve(fuse, 1, true);
    assert_eq!(kernel.hear(), (0, 7), "FUSE_NOTIFY_RESEND");
    world.fs.invalidate_all();
    let told: Vec<_> = (0..3).map(|_| kernel.hear()).collect();
    assert_eq!(told, [(0, 2); 3], "FUSE_NOTIFY_INVAL_INODE of the root, the link and the file");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_descriptor_is_given_back_when_a_drained_session_is_dropped() {
    let world = World::new(Duration::ZERO).await;
    let (kernel, fuse) = Kernel::new();
    let session = world.serve(fuse, 1, false);
    session.drain(soon()).await.unwrap();
    drop(session);
    let mut byte = [0; 1];
    assert_eq!(rustix::io::read(&kernel.0, &mut byte), Ok(0), "nobody holds the other end");
}
