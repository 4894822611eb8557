//! Lent volumes on a socket that plays the kernel, with a keeper and a store that play theirs.

use super::*;
use crate::cache::Limits;
use crate::fuse::session::tests::{GETATTR, Kernel, ROOT};
use crate::reference::{Encoding, FilePath, FileSpec, Freshness, Method, Ownership, Request};
use crate::store::scripted::{Scripted, identity, token};
use crate::volume::lent::testing::Shelf;

fn start(store: &Arc<Scripted>, shelf: &Arc<Shelf>) -> Arc<Agent> {
    store.rotate("app", "one");
    let setup = Setup { limits: Limits::default(), memory: Some(4 << 20), threads: 1 };
    let keeper = Arc::clone(shelf) as Arc<dyn Keeper>;
    Agent::start_lending(Arc::clone(store), Arc::default(), setup, keeper).unwrap()
}

fn order(fuse: OwnedFd) -> Order {
    let file = FileSpec {
        path: FilePath::parse("a").unwrap(),
        request: Request { method: Method::Get, path: "app".into(), query: None, args: None },
        key: Some("password".into()),
        encoding: Encoding::Utf8,
        ownership: Ownership::default(),
    };
    let spec = VolumeSpec {
        class: "shop/app".into(),
        identity: identity(),
        files: vec![file],
        freshness: Freshness::default(),
        ownership: Ownership::default(),
    };
    let pod = Pod {
        name: "web".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        uid: String::new(),
    };
    let (id, target) = (VolumeId("v".into()), "/var/lib/there".to_owned());
    Order { id, target, spec, pod, group: Some(2000), token: token("first"), trust: Trust::Proven, fuse }
}

fn estate(fuse: OwnedFd, shelf: &Shelf) -> Estate {
    let (id, target, pod) = (VolumeId("v".into()), "/var/lib/there".to_owned(), "shop/web".to_owned());
    Estate { id, target, pod, fuse, parts: shelf.parts(), suspect: false, resend: false }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// A served volume, and the kernel that asks it.
async fn lent(store: &Arc<Scripted>, shelf: &Arc<Shelf>) -> (Arc<Agent>, Kernel, OwnedFd) {
    let agent = start(store, shelf);
    let (kernel, fuse) = Kernel::new();
    rustix::io::write(&kernel.0, &handshake::synthetic_request()).unwrap();
    agent.lend(order(fuse.try_clone().unwrap()), soon()).await.unwrap();
    assert_eq!(kernel.hear(), (1, 0), "INIT is answered");
    (agent, kernel, fuse)
}

/// The answer to a request, whatever the kernel is told before.
fn answer(kernel: &Kernel, unique: u64) -> i32 {
    kernel.ask(GETATTR, unique, ROOT);
    loop {
        if let (heard, error) = kernel.hear()
            && heard == unique
        {
            return error;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lent_volume_is_deposited_served_shown_and_in_the_end_wiped() {
    let (store, shelf) = (Scripted::new(), Arc::<Shelf>::default());
    let (agent, kernel, fuse) = lent(&store, &shelf).await;
    assert_eq!(shelf.names(), [Part::Record, Part::Opens, Part::Generation(1)]);
    assert_eq!(answer(&kernel, 4), 0);
    assert!(agent.alive().await);
    let shown = super::super::status::detail(&agent, "/var/lib/there").unwrap();
    assert_eq!((shown.mount.pod.unwrap(), shown.mount.namespace.unwrap()), ("web".into(), "shop".into()));
    assert_eq!(shown.files[0].mode, 0o440, "the pod's group is the files'");
    let twice = agent.lend(order(fuse), soon()).await.err().unwrap().to_string();
    assert!(twice.contains("already"), "{twice}");
    let id = VolumeId("v".into());
    assert!(agent.renew(&id, token("second")).await);
    agent.end(&id).await;
    assert!(!agent.renew(&id, token("third")).await && agent.served().is_empty());
    let memory = crate::secret::pages::SecretMemory::new().unwrap();
    for (part, file) in shelf.parts() {
        let wiped = |file| memory.adopt(file).unwrap().expose().iter().all(|byte| *byte == 0);
        assert!(part == Part::Opens || wiped(file), "{part:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_volume_is_adopted_by_another_agent_and_given_whole_to_a_new_keeper() {
    let (store, shelf) = (Scripted::new(), Arc::<Shelf>::default());
    let (agent, kernel, fuse) = lent(&store, &shelf).await;
    agent.drain(&VolumeId("v".into())).await.unwrap();
    assert!(agent.served().is_empty());
    let next = start(&store, &shelf);
    let served = next.adopt(estate(fuse, &shelf)).await.unwrap();
    assert_eq!(served.volume().generations().numbers(), [1]);
    assert_eq!(answer(&kernel, 4), 0);
    let estates = next.estates();
    let parts: Vec<Part> = estates[0].parts.iter().map(|(part, _)| *part).collect();
    assert_eq!(parts, [Part::Record, Part::Opens, Part::Generation(1)]);
    assert_eq!((estates.len(), estates[0].pod.as_str()), (1, "shop/web"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_without_a_readable_record_answers_eio_until_it_is_published_again() {
    let (store, shelf) = (Scripted::new(), Arc::<Shelf>::default());
    let (agent, kernel, fuse) = lent(&store, &shelf).await;
    agent.drain(&VolumeId("v".into())).await.unwrap();
    shelf.spoil(Part::Record);
    let next = start(&store, &shelf);
    let blank = next.adopt(estate(fuse, &shelf)).await.unwrap();
    assert!(blank.volume().is_blank());
    assert_eq!(answer(&kernel, 4), -libc::EIO);
    assert!(!next.renew(blank.volume().id(), token("second")).await);
    let served = next.lend(order(blank.fuse().unwrap()), soon()).await.unwrap();
    assert_eq!(served.volume().generations().numbers(), [2], "above what was there");
    assert_eq!(answer(&kernel, 6), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_nobody_takes_parts_of_is_refused() {
    let (store, shelf) = (Scripted::new(), Arc::<Shelf>::default());
    shelf.refuses.store(true, Ordering::Release);
    let agent = start(&store, &shelf);
    let (kernel, fuse) = Kernel::new();
    rustix::io::write(&kernel.0, &handshake::synthetic_request()).unwrap();
    assert!(agent.lend(order(fuse), soon()).await.is_err());
    assert!(agent.served().is_empty());
}
