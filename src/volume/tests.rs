//! Volumes on a real cache and a scripted store, under a stopped clock.

use std::time::Duration;

use super::*;
use crate::cache::Limits;
use crate::reference::{Encoding, FilePath, Freshness, Ownership, Request};
use crate::secret::arena::Arena;
use crate::secret::pages::Sharing;
use crate::store::scripted::{Scenario, Scripted, identity, token};

pub(super) struct Bench {
    pub(super) store: Arc<Scripted>,
    pub(super) cache: Cache,
    pub(super) memory: Arc<SecretMemory>,
    metrics: Arc<Metrics>,
}

impl Bench {
    pub(super) fn new() -> Self {
        let (store, memory, metrics) =
            (Scripted::new(), SecretMemory::new().unwrap(), Arc::<Metrics>::default());
        let arena = Arena::new(Arc::clone(&memory));
        let cache = Cache::new(Arc::clone(&store), arena, Limits::default(), Arc::clone(&metrics));
        Self { store, cache, memory, metrics }
    }

    pub(super) fn spec(files: &[(&str, &str)], freshness: Freshness) -> VolumeSpec {
        let file = |&(path, key): &(&str, &str)| FileSpec {
            path: FilePath::parse(path).unwrap(),
            request: Request { method: Method::Get, path: "app".into(), query: None, args: None },
            key: Some(key.into()),
            encoding: Encoding::Utf8,
            ownership: Ownership::default(),
        };
        VolumeSpec {
            class: "test".into(),
            identity: identity(),
            files: files.iter().map(file).collect(),
            freshness,
            ownership: Ownership::default(),
        }
    }

    pub(super) fn surroundings(&self) -> Surroundings {
        Surroundings {
            memory: Arc::clone(&self.memory),
            metrics: Arc::clone(&self.metrics),
            default_owner: (0, 0),
        }
    }

    fn volume(&self, files: &[(&str, &str)], freshness: Freshness) -> Arc<Volume> {
        Volume::new(VolumeId("v".into()), Self::spec(files, freshness), None, self.surroundings())
    }

    pub(super) async fn publish(&self, volume: &Arc<Volume>) -> Result<(), PublishError> {
        let deadline = now().monotonic + Duration::from_secs(5);
        let credential = Arc::new(Credential::Jwt(token("jwt")));
        volume.publish(&self.cache, credential, Trust::Proven, deadline).await
    }
}

pub(super) fn now() -> Moment {
    Moment { monotonic: tokio::time::Instant::now().into_std(), wall: SystemTime::now() }
}

pub(super) async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

pub(super) fn content(volume: &Volume, file: usize) -> Option<String> {
    let current = volume.generations().current().unwrap();
    current.snapshot.value(file).map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_rotation_makes_a_generation_and_an_unchanged_refresh_none() {
    let bench = Bench::new();
    bench.store.hold("app", r#"{"user":"app","password":"one"}"#);
    let volume = bench.volume(&[("user", "user"), ("password", "password")], Freshness::default());
    bench.publish(&volume).await.unwrap();
    pass(200).await;
    assert_eq!(volume.generations().numbers(), [1]);
    bench.store.hold("app", r#"{"user":"app","password":"two"}"#);
    pass(70).await;
    assert_eq!((content(&volume, 0).unwrap(), content(&volume, 1).unwrap()), ("app".into(), "two".into()));
    let current = volume.generations().current().unwrap();
    assert_eq!((current.number(), current.since(0), current.since(1)), (2, 1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_missing_key_refuses_the_volume_and_names_the_keys_there_are() {
    let bench = Bench::new();
    bench.store.hold("app", r#"{"username":"a","password":"b"}"#);
    let volume = bench.volume(&[("a", "user"), ("b", "pass"), ("c", "password")], Freshness::default());
    let error = bench.publish(&volume).await.unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 2, "one line per file that is missing: {error}");
    assert!(lines[0].starts_with("a: ") && lines[0].contains("username"), "{error}");
    assert!(lines[1].starts_with("b: ") && lines[1].contains("password"), "{error}");
    drop(volume);
    pass(1).await;
    assert_eq!(bench.metrics.cache_entries.value(), 0, "nothing of a refused volume stays");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_vanishes_later_leaves_the_old_generation_and_is_told() {
    let bench = Bench::new();
    bench.store.rotate("app", "one");
    let volume = bench.volume(&[("password", "password")], Freshness::default());
    bench.publish(&volume).await.unwrap();
    bench.store.hold("app", r#"{"other":"x"}"#);
    pass(70).await;
    assert_eq!(content(&volume, 0).unwrap(), "one");
    let told = volume.report().last_error.unwrap();
    assert!(told.contains("password") && told.contains("other"), "{told}");
    assert_eq!(bench.metrics.generations_failed.value(), 1);
    bench.store.rotate("app", "two");
    pass(70).await;
    assert_eq!((content(&volume, 0).unwrap(), volume.report().last_error), ("two".into(), None));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_takes_nothing_away_without_a_grace() {
    let bench = Bench::new();
    bench.store.rotate("app", "one");
    let volume = bench.volume(&[("password", "password")], Freshness::default());
    bench.publish(&volume).await.unwrap();
    bench.store.play(Scenario::Sealed);
    pass(100_000).await;
    assert_eq!(content(&volume, 0).unwrap(), "one");
    assert_eq!(volume.standing(0, now()), Standing::LastKnown);
    assert!(volume.report().stale_since.is_some());
    bench.store.play(Scenario::Healthy);
    pass(130).await;
    assert_eq!(volume.standing(0, now()), Standing::Fresh);
    assert_eq!(volume.report().stale_since, None);
}

#[tokio::test(start_paused = true)]
async fn an_old_value_is_asked_for_unless_the_store_is_known_to_fail() {
    let bench = Bench::new();
    let volume = bench.volume(&[("password", "password")], Freshness::default());
    bench.publish(&volume).await.unwrap();
    bench.store.play(Scenario::Hanging);
    pass(59).await;
    assert_eq!(volume.standing(0, now()), Standing::Fresh);
    pass(5).await;
    assert_eq!(volume.standing(0, now()), Standing::Old, "a refresh is under way, and may bring it");
    pass(60).await;
    assert_eq!(volume.standing(0, now()), Standing::LastKnown);
}

#[tokio::test(start_paused = true)]
async fn after_its_grace_a_volume_serves_nothing_until_the_store_answers() {
    let bench = Bench::new();
    bench.store.rotate("app", "one");
    let grace =
        |seconds| Freshness { stale_grace: Some(Duration::from_secs(seconds)), ..Freshness::default() };
    let (short, long) =
        (bench.volume(&[("p", "password")], grace(10)), bench.volume(&[("p", "password")], grace(10_000)));
    bench.publish(&short).await.unwrap();
    bench.publish(&long).await.unwrap();
    bench.store.play(Scenario::Sealed);
    pass(200).await;
    assert_eq!(short.standing(0, now()), Standing::Gone);
    assert_eq!(content(&short, 0), None, "nor from an older generation: {:?}", short.generations().numbers());
    assert_eq!(short.generations().numbers().len(), 1);
    assert_eq!((long.standing(0, now()), content(&long, 0).unwrap()), (Standing::LastKnown, "one".into()));
    pass(20_000).await;
    assert_eq!((long.standing(0, now()), content(&long, 0)), (Standing::Gone, None));
    bench.store.play(Scenario::Healthy);
    pass(130).await;
    for volume in [short, long] {
        assert_eq!(
            (volume.standing(0, now()), content(&volume, 0).unwrap()),
            (Standing::Fresh, "one".into())
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_was_waited_for_is_installed_when_it_is_done() {
    let bench = Bench::new();
    bench.store.rotate("app", "one");
    let eager = Freshness { max_age: Duration::from_secs(1), ..Freshness::default() };
    let volume = bench.volume(&[("password", "password")], eager);
    bench.publish(&volume).await.unwrap();
    bench.store.rotate("app", "two");
    pass(10).await;
    let (done, called) = tokio::sync::oneshot::channel();
    let seen = Arc::clone(&volume);
    volume.refresh(0, Box::new(move || drop(done.send(content(&seen, 0)))));
    assert_eq!(called.await.unwrap().unwrap(), "two");
}

#[tokio::test(start_paused = true)]
async fn a_hundred_volumes_of_one_identity_cost_one_login_and_one_read() {
    let bench = Bench::new();
    bench.store.rotate("app", "one");
    let volumes: Vec<_> =
        (0..100).map(|_| bench.volume(&[("password", "password")], Freshness::default())).collect();
    for volume in &volumes {
        bench.publish(volume).await.unwrap();
    }
    assert_eq!(bench.store.counts(), (1, 1));
    assert_eq!(bench.metrics.volumes.value(), 100);
    bench.store.rotate("app", "two");
    pass(60).await;
    assert!(volumes.iter().all(|volume| content(volume, 0).unwrap() == "two"));
    assert_eq!(bench.store.counts(), (1, 2));
    let held = bench.memory.used();
    drop(volumes);
    pass(1).await;
    assert!(
        bench.memory.used() == 0,
        "{held} bytes of secret pages were held, {} are left",
        bench.memory.used()
    );
}

#[tokio::test(start_paused = true)]
async fn a_generation_for_which_there_was_no_room_is_built_when_there_is() {
    let mut bench = Bench::new();
    bench.memory = SecretMemory::with_limit(3 * crate::sys::page_size()).unwrap();
    bench.store.rotate("app", "one");
    let volume = bench.volume(&[("password", "password")], Freshness::default());
    bench.publish(&volume).await.unwrap();
    let hoard = bench.memory.allocate(2 * crate::sys::page_size(), Sharing::Own).unwrap();
    bench.store.rotate("app", "two");
    pass(70).await;
    assert_eq!(content(&volume, 0).unwrap(), "one");
    let told = volume.report().last_error.unwrap();
    assert!(told.contains("secret memory is full"), "{told}");
    assert!(bench.metrics.memory_refused.value() > 0);
    drop(hoard);
    pass(10).await;
    assert_eq!((content(&volume, 0).unwrap(), volume.report().last_error), ("two".into(), None));
}
