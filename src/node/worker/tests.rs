use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Mutex;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fuse_secrets_csi::wire::Secret;
use fuse_secrets_csi::wire::link::End;
use fuse_secrets_csi::wire::message::{Abort, Hello, Refused};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::*;
use crate::class::{Class, FindError, Kind};
use crate::config::Layer;

/// An agent that notes what is asked of it.
#[derive(Clone, Default)]
struct Scripted {
    log: Arc<Mutex<Vec<String>>>,
    unwell: Arc<AtomicBool>,
    served: Arc<Mutex<Vec<String>>>,
    trusts: Arc<Mutex<Vec<Trust>>>,
}

impl Scripted {
    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn serves(&self, id: &VolumeId) -> bool {
        self.served.lock().unwrap().contains(&id.0)
    }
}

/// Which file a descriptor is of.
fn inode(fd: &OwnedFd) -> u64 {
    std::fs::File::from(fd.try_clone().unwrap()).metadata().unwrap().ino()
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

impl Volumes for Scripted {
    async fn lend(&self, order: Order, _deadline: Instant) -> Result<(), ServeError> {
        if order.id.0 == "unservable" {
            return Err(ServeError::Twice(order.id.0));
        }
        self.note(format!(
            "lend {} {} {:?} {}",
            order.id.0,
            order.spec.class,
            order.group,
            inode(&order.fuse)
        ));
        self.trusts.lock().unwrap().push(order.trust);
        self.served.lock().unwrap().push(order.id.0);
        Ok(())
    }

    async fn adopt(&self, estate: Estate) -> Result<(), ServeError> {
        let parts: Vec<_> = estate.parts.iter().map(|(part, file)| (*part, inode(file))).collect();
        let Estate { id, suspect, resend, fuse, .. } = estate;
        self.note(format!("adopt {} suspect={suspect} resend={resend} {} {parts:?}", id.0, inode(&fuse)));
        Ok(())
    }

    async fn drain(&self, id: &VolumeId) -> io::Result<()> {
        self.note(format!("drain {}", id.0));
        self.served.lock().unwrap().retain(|served| *served != id.0);
        Ok(())
    }

    async fn end(&self, id: &VolumeId) {
        self.note(format!("end {}", id.0));
        self.served.lock().unwrap().retain(|served| *served != id.0);
    }

    async fn renew(&self, id: &VolumeId, token: Token) -> bool {
        self.note(format!("renew {} {}", id.0, token.expose()));
        true
    }

    fn blank(&self, id: &VolumeId) -> Option<OwnedFd> {
        (id.0 == "blank").then(file)
    }

    fn estates(&self) -> Vec<Estate> {
        let served = self.served.lock().unwrap();
        let estate = |id: &String| Estate {
            id: VolumeId(id.clone()),
            target: format!("/pods/{id}"),
            pod: "app/web".to_owned(),
            fuse: file(),
            parts: vec![(Part::Record, file())],
            suspect: false,
            resend: false,
        };
        served.iter().map(estate).collect()
    }

    fn served(&self) -> Vec<VolumeId> {
        self.served.lock().unwrap().iter().cloned().map(VolumeId).collect()
    }

    fn holder(&self, id: &VolumeId) -> Option<Holder> {
        let (name, namespace, account) = ("web-0".to_owned(), "app".to_owned(), "web".to_owned());
        let pod = Pod { name, namespace, service_account: account, uid: "pod-1".to_owned() };
        let (audience, account_uid) = (Some("vault".to_owned()), "account-1".to_owned());
        self.serves(id).then_some(Holder { audience, pod, account_uid })
    }

    fn size(&self, id: &VolumeId) -> Option<(u64, u64)> {
        self.serves(id).then_some((100, 3))
    }

    async fn alive(&self) -> bool {
        !self.unwell.load(Ordering::Relaxed)
    }
}

/// One class, in every namespace.
struct OneClass;

impl Classes for OneClass {
    fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<Class>, FindError> {
        let text = format!(
            "apiVersion: deckhouse.io/v1alpha1\nkind: SecretsStoreImport\nmetadata: {{name: db, namespace: {namespace}}}\n\
             spec:\n  type: CSI\n  role: web\n  files: [{{name: a, source: {{path: secret/data/a, key: k}}}}]\n"
        );
        let mut classes = crate::class::parse(&text)?.into_iter();
        Ok(classes.find(|class| class.kind == kind && class.name == name))
    }

    fn names(&self, _namespace: &str) -> Result<Vec<(Kind, String)>, FindError> {
        Ok(vec![(Kind::SecretsStoreImport, "db".to_owned())])
    }
}

/// A worker, and a shim that the test plays.
struct World {
    volumes: Scripted,
    worker: Arc<Worker<Scripted>>,
    listener: UnixListener,
    metrics: Arc<Metrics>,
    running: tokio::task::JoinHandle<()>,
    _directory: tempfile::TempDir,
}

/// The shim's end of a connection.
struct Shim {
    link: Link,
    asked: mpsc::Receiver<Asked>,
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("shim.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let text = format!("classes: /c\naddress: http://vault:8200\nnodeSocket: {}", socket.display());
        let file = Layer::from_yaml(&text).unwrap();
        let config = AgentConfig::resolve(Layer::default(), Layer::default(), file).unwrap();
        let (volumes, metrics) = (Scripted::default(), Arc::new(Metrics::default()));
        let attachment = Attachment::new(Arc::clone(&metrics));
        let worker = Worker::new(volumes.clone(), Arc::new(OneClass), None, config, attachment);
        let running = tokio::spawn(Arc::clone(&worker).run());
        Self { volumes, worker, listener, metrics, running, _directory: directory }
    }

    /// Takes the worker's connection and its hello.
    async fn accept(&self, handover: Handover) -> Shim {
        let (socket, _): (UnixStream, _) = self.listener.accept().await.unwrap();
        let (link, mut asked) = Link::start(socket, End::Accepted);
        let hello = asked.recv().await.unwrap();
        let Message::Hello(Hello { role: Role::Worker, .. }) = &hello.message else { panic!("no hello") };
        hello.answer(Message::Hello(Hello { role: Role::Shim, handover, agent: 1, ..Hello::default() }));
        Shim { link, asked }
    }

    async fn settled(&self) {
        let mut state = self.worker.attachment.state.subscribe();
        state.wait_for(|state| matches!(state, State::Attached(_))).await.unwrap();
    }
}

impl Shim {
    async fn ask(&self, message: Message, descriptors: Vec<OwnedFd>) -> Message {
        self.link.ask(&message, descriptors, soon()).await.unwrap()
    }

    async fn done(&self, message: Message, descriptors: Vec<OwnedFd>) -> Vec<String> {
        match self.ask(message, descriptors).await {
            Message::Done(done) => done.warnings,
            Message::Refused(refused) => panic!("refused: {}", refused.text),
            _ => panic!("neither done nor refused"),
        }
    }

    async fn refused(&self, message: Message, descriptors: Vec<OwnedFd>) -> Refused {
        let Message::Refused(refused) = self.ask(message, descriptors).await else { panic!("not refused") };
        refused
    }
}

fn publish(volume: &str, class: &str) -> Message {
    publish_with(volume, class, &token("web-0", "account-1"))
}

/// Of a pod of that name, and an account of that uid.
fn token(pod: &str, account: &str) -> String {
    let claims = serde_json::json!({"kubernetes.io": {
        "namespace": "app", "serviceaccount": {"name": "web", "uid": account}, "pod": {"name": pod, "uid": "pod-1"},
    }});
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
}

fn publish_with(volume: &str, class: &str, token: &str) -> Message {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    Message::Publish(Publish {
        volume: volume.to_owned(),
        target: format!("/pods/{volume}"),
        pod: map(&[
            ("csi.storage.k8s.io/pod.name", "web-0"),
            ("csi.storage.k8s.io/pod.namespace", "app"),
            ("csi.storage.k8s.io/pod.uid", "pod-1"),
            ("csi.storage.k8s.io/serviceAccount.name", "web"),
        ]),
        attributes: map(&[("secretsStoreImport", class)]),
        group: Some(7),
        tokens: BTreeMap::from([("vault".to_owned(), Secret::new(token.to_owned()))]),
        ..Publish::default()
    })
}

fn named(volume: &str) -> String {
    volume.to_owned()
}

#[tokio::test]
async fn a_publish_is_lent_a_republish_only_renews_and_an_unpublish_ends() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    let fuse = file();
    let number = inode(&fuse);
    assert!(shim.done(publish("v", "db"), vec![fuse]).await.is_empty());
    assert_eq!(world.volumes.log(), [format!("lend v app/db Some(7) {number}")]);
    shim.done(publish("v", "db"), Vec::new()).await;
    let renewed = world.volumes.log();
    assert!(renewed.len() == 1 && renewed[0].starts_with("renew v e30."), "{renewed:?}");
    let stats = shim.ask(Message::Stats(Stats { volume: named("v"), ..Stats::default() }), Vec::new()).await;
    let Message::Stats(stats) = stats else { panic!("no stats") };
    assert_eq!((stats.counters["bytes"], stats.counters["files"]), (100, 3));
    shim.done(publish("blank", "db"), Vec::new()).await;
    assert!(world.volumes.log()[0].starts_with("lend blank "), "it is told anew what it is");
    shim.done(Message::Unpublish(Unpublish { volume: named("v") }), Vec::new()).await;
    assert_eq!(world.volumes.log(), ["end v"]);
    assert_eq!(shim.refused(publish("v", "db"), Vec::new()).await.code, 5);
    assert_eq!((world.metrics.node_publishes.value(), world.metrics.node_attached.value()), (2, 1));
}

#[tokio::test]
async fn a_republish_with_a_token_that_is_not_the_pods_is_answered_and_changes_nothing() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    shim.done(publish("v", "db"), vec![file()]).await;
    world.volumes.log();
    let foreign = [token("web-1", "account-1"), token("web-0", "account-2"), "no.token.atall".to_owned()];
    for token in &foreign {
        assert!(shim.done(publish_with("v", "db", token), Vec::new()).await.is_empty());
    }
    let Message::Publish(mut without) = publish("v", "db") else { panic!("no publish") };
    without.tokens.clear();
    shim.done(Message::Publish(without), Vec::new()).await;
    assert!(world.volumes.log().is_empty(), "the volume keeps its token");
    assert_eq!(world.metrics.tokens_refused_renewal.value(), 4);
    shim.done(publish("v", "db"), Vec::new()).await;
    assert_eq!(world.volumes.log().len(), 1);
}

#[tokio::test]
async fn without_keys_every_new_volume_proves_itself_by_a_login() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    shim.done(publish("v", "db"), vec![file()]).await;
    assert_eq!(*world.volumes.trusts.lock().unwrap(), [Trust::Login]);
    assert_eq!((world.metrics.tokens_login.value(), world.metrics.tokens_signed.value()), (1, 0));
}

#[tokio::test]
async fn a_refusal_is_told_with_code_and_text_and_counted() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    let missing = shim.refused(publish("v", "dbb"), vec![file()]).await;
    assert_eq!(missing.code, 5);
    assert_eq!(missing.text, "there is no SecretsStoreImport app/dbb; did you mean db? there are db");
    assert_eq!(shim.refused(publish("unservable", "db"), vec![file()]).await.code, 13);
    let metrics = &world.metrics;
    assert_eq!((metrics.node_refused_not_found.value(), metrics.node_refused_internal.value()), (1, 1));
}

#[tokio::test]
async fn what_is_adopted_gets_its_descriptors_in_their_order() {
    let world = World::new();
    let shim = world.accept(Handover::Resend).await;
    let files = [file(), file(), file()];
    let [fuse, record, generation] = [&files[0], &files[1], &files[2]].map(inode);
    let parts = vec![Part::Record, Part::Generation(3)];
    let adopt =
        |parts, attempts| Message::Adopt(Adopt { volume: named("v"), parts, attempts, ..Adopt::default() });
    shim.done(adopt(parts, 1), files.into()).await;
    let expected = format!(
        "adopt v suspect=true resend=true {fuse} [(Record, {record}), (Generation(3), {generation})]"
    );
    assert_eq!(world.volumes.log(), [expected]);
    for (parts, files) in [(vec![Part::Record], vec![file()]), (vec![], vec![])] {
        assert_eq!(shim.refused(adopt(parts, 0), files).await.code, 3);
    }
    assert!(world.volumes.log().is_empty());
    assert_eq!(world.metrics.node_adoptions.value(), 1);
}

#[tokio::test]
async fn a_shim_that_restarted_is_offered_everything_and_what_it_refuses_is_served_on() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    shim.done(publish("kept", "db"), vec![file()]).await;
    shim.done(publish("refused", "db"), vec![file()]).await;
    shim.link.close();
    drop(shim);
    world.volumes.log();
    let mut shim = world.accept(Handover::Clone).await;
    for _ in 0..2 {
        let asked = shim.asked.recv().await.unwrap();
        let Message::Adopt(adopt) = &asked.message else { panic!("no adopt") };
        assert_eq!((asked.descriptors.len(), &adopt.parts[..]), (2, &[Part::Record][..]));
        let refused = adopt.volume == "refused";
        asked.answer(if refused {
            Refusal::new(Code::FailedPrecondition, "no such mount").into()
        } else {
            Message::Done(Done::default())
        });
    }
    world.settled().await;
    assert!(world.volumes.log().is_empty());
    assert_eq!(world.volumes.served(), ["kept", "refused"].map(|id| VolumeId(named(id))));
}

#[tokio::test]
async fn an_agent_that_is_unwell_does_not_answer_and_one_that_is_well_does() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    let heartbeat = || Message::Stats(Stats::default());
    assert!(matches!(shim.ask(heartbeat(), Vec::new()).await, Message::Stats(_)));
    world.volumes.unwell.store(true, Ordering::Relaxed);
    let asking = shim.link.clone();
    let answer = tokio::spawn(async move { asking.ask(&heartbeat(), Vec::new(), soon()).await });
    // Another question is answered all the while, so this one had its chance.
    shim.done(Message::Unpublish(Unpublish { volume: named("v") }), Vec::new()).await;
    assert!(!answer.is_finished());
    world.volumes.unwell.store(false, Ordering::Relaxed);
    assert!(matches!(answer.await.unwrap(), Ok(Message::Stats(_))));
}

#[tokio::test]
async fn deposits_go_through_the_connection_and_fail_without_one() {
    let world = World::new();
    let attachment = Arc::clone(&world.worker.attachment);
    let mut shim = world.accept(Handover::Clone).await;
    world.settled().await;
    let id = VolumeId(named("v"));
    let kept = file();
    let number = inode(&kept);
    let depositing =
        tokio::spawn(async move { attachment.deposit(&id, Part::Generation(2), kept, vec![1]).await });
    let asked = shim.asked.recv().await.unwrap();
    let Message::Deposit(deposit) = &asked.message else { panic!("no deposit") };
    assert_eq!(
        (deposit.volume.as_str(), deposit.part, &deposit.gone[..]),
        ("v", Part::Generation(2), &[1][..])
    );
    assert_eq!(inode(&asked.descriptors[0]), number);
    asked.answer(Message::Done(Done::default()));
    depositing.await.unwrap().unwrap();
    let alone = Attachment::new(Arc::new(Metrics::default()));
    let failed = alone.deposit(&VolumeId(named("v")), Part::Record, file(), Vec::new()).await;
    assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotConnected);
    assert_eq!(alone.metrics.node_deposits_failed.value(), 1);
}

#[tokio::test]
async fn a_worker_that_leaves_drains_everything_takes_nothing_new_and_ends_the_connection() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    shim.done(publish("a", "db"), vec![file()]).await;
    shim.done(Message::Drain(Drain { volume: named("other") }), Vec::new()).await;
    world.settled().await;
    world.volumes.log();
    world.worker.leave().await;
    assert_eq!(world.volumes.log(), ["drain a"]);
    shim.link.closed().await;
    world.running.abort();
}

#[tokio::test]
async fn questions_of_newer_programs_are_answered_as_unsupported() {
    let world = World::new();
    let shim = world.accept(Handover::Clone).await;
    let answer = shim.ask(Message::Abort(Abort::default()), Vec::new()).await;
    assert!(matches!(answer, Message::Unsupported(Unsupported { kind: 13 })));
}
