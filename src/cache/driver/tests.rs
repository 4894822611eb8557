//! The driver under a stopped clock, over a store that does what a scenario says.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::cache::State;
use crate::reference::{Method, Request};
use crate::secret::pages::SecretMemory;
use crate::store::scripted::{Scenario, Scripted, identity, token};

#[derive(Default)]
struct Listener {
    changed: AtomicUsize,
    states: AtomicUsize,
}

impl Subscriber for Listener {
    fn changed(&self, keys: &[Key]) {
        self.changed.fetch_add(keys.len(), Ordering::Relaxed);
    }

    fn state_changed(&self, keys: &[Key]) {
        self.states.fetch_add(keys.len(), Ordering::Relaxed);
    }
}

fn keys(paths: &[&str]) -> Vec<Key> {
    let identity = identity();
    let request =
        |path: &&str| Request { method: Method::Get, path: (*path).into(), query: None, args: None };
    paths
        .iter()
        .map(|path| Key { identity: Arc::clone(&identity), request: request(path), volume: None })
        .collect()
}

fn jwt(text: &str) -> Arc<Credential> {
    Arc::new(Credential::Jwt(token(text)))
}

struct Bench {
    store: Arc<Scripted>,
    memory: Arc<SecretMemory>,
    metrics: Arc<Metrics>,
    cache: Cache,
}

fn bench(limits: Limits) -> Bench {
    let (store, memory, metrics) = (Scripted::new(), SecretMemory::new().unwrap(), Arc::default());
    let arena = Arena::new(Arc::clone(&memory));
    let cache = Cache::new(Arc::clone(&store), arena, limits, Arc::clone(&metrics));
    Bench { store, memory, metrics, cache }
}

impl Bench {
    async fn register(&self, paths: &[&str]) -> (Registration, Arc<Listener>) {
        let listener = Arc::new(Listener::default());
        let subscriber = Arc::clone(&listener) as Arc<dyn Subscriber>;
        let registration =
            self.cache.register(keys(paths), jwt("first"), Freshness::default(), subscriber).await.unwrap();
        (registration, listener)
    }
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

fn within(seconds: u64) -> Instant {
    (tokio::time::Instant::now() + Duration::from_secs(seconds)).into_std()
}

fn text(registration: &Registration, path: &str) -> Option<String> {
    let value = registration.slot(&keys(&[path])[0])?.value()?;
    Some(String::from_utf8(value.body.expose().to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_hundred_concurrent_volumes_cost_one_login_and_one_read_per_path() {
    let bench = bench(Limits::default());
    let all: Vec<_> = (0..100)
        .map(|n| {
            let cache = bench.cache.clone();
            tokio::spawn(async move {
                let listener = Arc::new(Listener::default());
                let held = keys(&["one", "two", "three"]);
                let subscriber = Arc::clone(&listener) as Arc<dyn Subscriber>;
                // Each pod has a token of its own; the service account is the same.
                let credential = jwt(&format!("pod-{n}"));
                let registration =
                    cache.register(held, credential, Freshness::default(), subscriber).await.unwrap();
                registration.ready(within(10)).await.unwrap();
                (registration, listener)
            })
        })
        .collect();
    let mut held = Vec::new();
    for one in all {
        held.push(one.await.unwrap());
    }
    assert_eq!(bench.store.counts(), (1, 3));
    bench.store.rotate("one", "new");
    pass(58).await;
    assert_eq!(bench.store.counts(), (1, 6), "a rotation costs one read per path");
    for (registration, listener) in &held {
        assert!(text(registration, "one").unwrap().contains("new"));
        assert_eq!(listener.changed.load(Ordering::Relaxed), 4, "three first answers and one new one");
    }
}

#[tokio::test(start_paused = true)]
async fn a_fresh_value_is_served_to_a_new_volume_without_a_request() {
    let bench = bench(Limits::default());
    let (first, _) = bench.register(&["one"]).await;
    first.ready(within(5)).await.unwrap();
    let (second, _) = bench.register(&["one"]).await;
    second.ready(within(0)).await.unwrap();
    assert_eq!(bench.store.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_unchanged_answer_tells_nobody_and_keeps_the_value() {
    let bench = bench(Limits::default());
    let (registration, listener) = bench.register(&["one", "bare"]).await;
    registration.ready(within(5)).await.unwrap();
    let before = registration.slot(&keys(&["one"])[0]).unwrap().value().unwrap();
    pass(600).await;
    let after = registration.slot(&keys(&["one"])[0]).unwrap().value().unwrap();
    assert!(Arc::ptr_eq(&before, &after));
    assert!(bench.metrics.cache_refreshes.value() > 9);
    assert_eq!(listener.changed.load(Ordering::Relaxed), 2);
    assert_eq!(listener.states.load(Ordering::Relaxed), 2, "Empty to Fresh, once each");
}

#[tokio::test(start_paused = true)]
async fn the_last_volume_wipes_the_values_and_gives_the_token_back() {
    let bench = bench(Limits::default());
    let empty = bench.memory.used();
    let (first, _) = bench.register(&["one", "two"]).await;
    let (second, _) = bench.register(&["one"]).await;
    first.ready(within(5)).await.unwrap();
    let slot = first.slot(&keys(&["one"])[0]).unwrap();
    assert!(bench.metrics.cache_bytes.value() > 0);
    drop(first);
    pass(1).await;
    assert!(slot.value().is_some());
    assert_eq!(bench.metrics.cache_entries.value(), 1);
    drop(second);
    pass(1).await;
    assert!(slot.value().is_none());
    assert_eq!((bench.metrics.cache_bytes.value(), bench.metrics.cache_entries.value()), (0, 0));
    assert_eq!(bench.memory.used(), empty);
    assert_eq!(bench.store.revoked.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_somebody_else_made_is_not_revoked() {
    let bench = bench(Limits::default());
    let credential = Arc::new(Credential::Token(token("given")));
    let subscriber = Arc::new(Listener::default());
    let registration =
        bench.cache.register(keys(&["one"]), credential, Freshness::default(), subscriber).await.unwrap();
    registration.ready(within(5)).await.unwrap();
    drop(registration);
    pass(1).await;
    assert_eq!(bench.store.revoked.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_login_that_ends_after_its_volume_is_given_back() {
    let bench = bench(Limits::default());
    let (registration, _) = bench.register(&["one"]).await;
    drop(registration);
    pass(1).await;
    assert_eq!(bench.store.counts(), (1, 0));
    assert_eq!(bench.store.revoked.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_registration_that_is_given_up_half_way_leaves_nothing_behind() {
    let bench = bench(Limits::default());
    let subscriber = Arc::new(Listener::default());
    let mut registering =
        Box::pin(bench.cache.register(keys(&["one"]), jwt("first"), Freshness::default(), subscriber));
    // Its command is sent, its answer not looked at.
    let poll_once = std::future::poll_fn(|context| {
        std::task::Poll::Ready(std::future::Future::poll(registering.as_mut(), context).is_pending())
    });
    assert!(poll_once.await);
    pass(1).await;
    assert_eq!(bench.metrics.cache_entries.value(), 1);
    drop(registering);
    pass(1).await;
    assert_eq!(bench.metrics.cache_entries.value(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_new_credential_logs_in_again_after_a_refusal() {
    let bench = bench(Limits::default());
    bench.store.play(Scenario::RoleWithoutPod);
    let (registration, _) = bench.register(&["one"]).await;
    let errors = registration.ready(within(10)).await.unwrap_err();
    assert!(errors[0].1.is_denied());
    registration.set_credential(jwt("first")).await;
    pass(10).await;
    assert_eq!(bench.store.counts(), (1, 0), "the same credential changes nothing");
    registration.set_credential(jwt("second")).await;
    pass(6).await;
    registration.ready(within(0)).await.unwrap();
    assert_eq!(bench.store.counts(), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_missing_secret_refuses_at_once_and_names_the_key() {
    let bench = bench(Limits::default());
    bench.store.play(Scenario::Empty);
    let started = tokio::time::Instant::now();
    let (registration, _) = bench.register(&["one"]).await;
    let errors = registration.ready(within(60)).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(errors.len(), 1);
    assert_eq!((errors[0].0.request.path.as_str(), errors[0].1.kind), ("one", ErrorKind::Missing));
}

#[tokio::test(start_paused = true)]
async fn a_sealed_store_is_waited_for_until_the_deadline() {
    let bench = bench(Limits::default());
    bench.store.play(Scenario::Sealed);
    let (registration, _) = bench.register(&["one"]).await;
    let errors = registration.ready(within(10)).await.unwrap_err();
    assert_eq!(errors[0].1.kind, ErrorKind::Unavailable);
    bench.store.play(Scenario::Healthy);
    registration.ready(within(90)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_outage_leaves_the_value_and_reports_it_stale() {
    let bench = bench(Limits::default());
    let (registration, listener) = bench.register(&["one"]).await;
    registration.ready(within(5)).await.unwrap();
    bench.store.play(Scenario::Hanging);
    pass(200).await;
    let slot = registration.slot(&keys(&["one"])[0]).unwrap();
    assert_eq!(slot.state(), State::Stale);
    assert!(slot.value().is_some() && slot.report().failing_since.is_some());
    assert_eq!(listener.states.load(Ordering::Relaxed), 2);
    bench.store.play(Scenario::Healthy);
    pass(120).await;
    assert_eq!(slot.state(), State::Fresh);
    assert!(slot.report().failing_since.is_none() && slot.report().last_error.is_some());
    assert_eq!(listener.changed.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reader_of_an_old_value_is_called_when_the_new_one_is_there() {
    let bench = bench(Limits::default());
    let subscriber = Arc::new(Listener::default());
    let freshness = Freshness { max_age: Duration::from_secs(1), ..Freshness::default() };
    let registration =
        bench.cache.register(keys(&["one"]), jwt("first"), freshness, subscriber).await.unwrap();
    registration.ready(within(5)).await.unwrap();
    bench.store.rotate("one", "new");
    pass(10).await;
    let (done, called) = oneshot::channel();
    let done = Box::new(move || done.send(()).unwrap());
    registration.refresh(&keys(&["one"]), Duration::from_secs(2), done);
    called.await.unwrap();
    assert!(text(&registration, "one").unwrap().contains("new"));
    assert_eq!(bench.store.counts(), (1, 2));
    assert_eq!(bench.metrics.cache_misses.value(), 1, "the first answer was waited for");
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_called_when_its_patience_ends() {
    let bench = bench(Limits::default());
    let (registration, _) = bench.register(&["one"]).await;
    registration.ready(within(5)).await.unwrap();
    bench.store.play(Scenario::Hanging);
    pass(70).await;
    let started = tokio::time::Instant::now();
    let (done, called) = oneshot::channel::<()>();
    registration.refresh(&keys(&["one"]), Duration::from_secs(2), Box::new(move || drop(done)));
    assert!(called.await.is_err());
    assert!(started.elapsed() <= Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_called_at_once_when_the_queue_is_full_or_the_cache_has_stopped() {
    let bench = bench(Limits::default());
    let (registration, _) = bench.register(&["one"]).await;
    registration.ready(within(5)).await.unwrap();
    let called = Arc::new(AtomicUsize::new(0));
    let ask = || {
        let called = Arc::clone(&called);
        let done = Box::new(move || {
            called.fetch_add(1, Ordering::Relaxed);
        });
        registration.refresh(&keys(&["one"]), Duration::from_secs(2), done);
    };
    // The task cannot run in between: this test never awaits here.
    (0..COMMANDS + 3).for_each(|_| ask());
    assert_eq!(called.load(Ordering::Relaxed), 3);
    pass(3).await;
    assert_eq!(called.load(Ordering::Relaxed), COMMANDS + 3);
    bench.cache.stop(within(5)).await;
    ask();
    assert_eq!(called.load(Ordering::Relaxed), COMMANDS + 4);
}

#[tokio::test(start_paused = true)]
async fn stopping_wipes_everything_and_gives_tokens_back_before_it_returns() {
    let bench = bench(Limits::default());
    let (registration, _) = bench.register(&["one"]).await;
    registration.ready(within(5)).await.unwrap();
    bench.cache.stop(within(5)).await;
    assert_eq!(bench.store.revoked.load(Ordering::Relaxed), 1);
    assert!(text(&registration, "one").is_none());
    let refused = bench
        .cache
        .register(keys(&["one"]), jwt("first"), Freshness::default(), Arc::new(Listener::default()))
        .await;
    assert!(matches!(refused.err(), Some(CacheError::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn an_answer_beyond_the_limit_of_bytes_is_refused_with_the_limit() {
    let bench = bench(Limits { bytes: 100, ..Limits::default() });
    bench.store.rotate("big", &"x".repeat(200));
    let (registration, _) = bench.register(&["small", "big"]).await;
    let errors = registration.ready(within(5)).await.unwrap_err();
    assert_eq!(errors.len(), 1);
    let told = errors[0].1.to_string();
    assert!(
        told.contains("of 100 bytes in use") && told.contains("raise the cache's limit of bytes"),
        "{told}"
    );
    assert!(!told.contains("xxx"));
}

#[tokio::test(start_paused = true)]
async fn a_panicking_subscriber_does_not_stop_the_cache() {
    struct Faulty;
    impl Subscriber for Faulty {
        fn changed(&self, _: &[Key]) {
            panic!("a fault of a volume");
        }
        fn state_changed(&self, _: &[Key]) {}
    }
    let bench = bench(Limits::default());
    let registration = bench
        .cache
        .register(keys(&["one"]), jwt("first"), Freshness::default(), Arc::new(Faulty))
        .await
        .unwrap();
    registration.ready(within(5)).await.unwrap();
    let (other, _) = bench.register(&["two"]).await;
    other.ready(within(5)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_panicking_store_client_costs_a_delay_and_not_the_entry() {
    let bench = bench(Limits { in_flight: 1, ..Limits::default() });
    let (registration, _) = bench.register(&["one"]).await;
    registration.ready(within(5)).await.unwrap();
    bench.store.play(Scenario::Panicking);
    pass(60).await;
    bench.store.play(Scenario::Healthy);
    pass(120).await;
    assert_eq!(registration.slot(&keys(&["one"])[0]).unwrap().state(), State::Fresh);
}

impl Bench {
    async fn prove(&self, credential: Arc<Credential>) -> Result<Registration, CacheError> {
        let (listener, freshness) = (Arc::new(Listener::default()), Freshness::default());
        self.cache.prove_and_register(keys(&["one"]), credential, freshness, listener, within(10)).await
    }
}

#[tokio::test(start_paused = true)]
async fn the_login_that_proves_the_first_volume_is_its_identitys_and_that_of_the_next_is_given_back() {
    let bench = bench(Limits::default());
    bench.store.rotate("one", "v1");
    let first = bench.prove(jwt("first")).await.unwrap();
    first.ready(within(10)).await.unwrap();
    assert_eq!((bench.store.counts(), bench.store.revoked.load(Ordering::Relaxed)), ((1, 1), 0));
    let second = bench.prove(jwt("second")).await.unwrap();
    second.ready(within(10)).await.unwrap();
    assert_eq!(bench.store.counts(), (2, 1), "a login of its own, and the value that is there");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(bench.store.revoked.load(Ordering::Relaxed), 1);
    drop((first, second));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(bench.store.revoked.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn no_cached_value_is_given_for_a_credential_that_the_store_refuses() {
    let bench = bench(Limits::default());
    bench.store.rotate("one", "v1");
    bench.store.play(Scenario::RoleWithoutPod);
    let good = bench.prove(jwt("second")).await.unwrap();
    good.ready(within(10)).await.unwrap();
    let refused = bench.prove(jwt("forged")).await.err().unwrap();
    let CacheError::Unproven(error) = refused else { panic!("{refused}") };
    assert!(!error.is_retryable(), "{error}");
    // Nor does it stand in for the good one when the token must be got again.
    bench.store.rotate("one", "v2");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let slot = good.slots().next().map(|(_, slot)| Arc::clone(slot)).unwrap();
    assert!(!slot.is_failing() && slot.value().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_proof_waits_for_a_store_that_does_not_answer_until_its_deadline() {
    let bench = bench(Limits::default());
    bench.store.play(Scenario::Sealed);
    let begun = tokio::time::Instant::now();
    let CacheError::Unproven(error) = bench.prove(jwt("first")).await.err().unwrap() else {
        panic!("another")
    };
    assert!(error.is_retryable() && begun.elapsed() <= Duration::from_secs(11), "{error}");
    assert!(bench.store.counts().0 > 2);
    bench.store.play(Scenario::Healthy);
    bench.store.rotate("one", "v1");
    let registration = bench.prove(jwt("first")).await.unwrap();
    registration.ready(within(10)).await.unwrap();
}
