//! An API server as far as the agent asks one: lists in pages, watches, the issuer's documents, events. Over real HTTP; what it holds
//! and how it fails is up to the test.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode};
use fuse_secrets::class::Kind;
use fuse_secrets::kubernetes::api::Api;
use fuse_secrets::metrics::Metrics;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Longest wait for what comes by itself, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What it holds.
#[derive(Default)]
pub(crate) struct World {
    objects: BTreeMap<(Plural, String, String), Value>,
    /// Version, kind, type and object of each change.
    changes: Vec<(u64, Plural, &'static str, Value)>,
    version: u64,
    /// Watches from before this version are too old.
    pub(crate) oldest: u64,
    /// Kinds that it does not know.
    pub(crate) absent: HashSet<Plural>,
    /// The issuer's two documents; `None`: 404.
    pub(crate) issuer: Option<(Value, Value)>,
    /// Whatever is asked is answered with this.
    pub(crate) broken: Option<StatusCode>,
    /// Method and path of what was asked.
    pub(crate) asked: Vec<String>,
    /// Events that were made.
    pub(crate) events: Vec<Value>,
}

type Plural = &'static str;

/// The server; ends when it is dropped.
pub(crate) struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    task: Option<tokio::task::JoinHandle<()>>,
}

struct Shared {
    world: Mutex<World>,
    changed: watch::Sender<u64>,
    stop: watch::Sender<bool>,
}

pub(crate) fn plural(kind: Kind) -> Plural {
    match kind {
        Kind::SecretProviderClass => "secretproviderclasses",
        Kind::SecretsStoreImport => "secretsstoreimports",
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        let shared = Shared {
            world: Mutex::default(),
            changed: watch::Sender::new(0),
            stop: watch::Sender::new(false),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut server =
            Self { shared: Arc::new(shared), address: listener.local_addr().unwrap(), task: None };
        server.serve(listener);
        server
    }

    fn serve(&mut self, listener: TcpListener) {
        self.shared.stop.send_replace(false);
        let router = axum::Router::new().fallback(handle).with_state(Arc::clone(&self.shared));
        let mut stop = self.shared.stop.subscribe();
        let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
        let serving = axum::serve(listener, router).with_graceful_shutdown(stopped);
        self.task = Some(tokio::spawn(async move { serving.await.unwrap() }));
    }

    /// Goes away: connections end, and nobody listens any more.
    pub(crate) async fn stop(&mut self) {
        self.shared.stop.send_replace(true);
        if let Some(task) = self.task.take() {
            // A client that keeps its connection idle does not keep the server.
            let _ = tokio::time::timeout(Duration::from_secs(1), task).await;
        }
    }

    /// Comes back, at the same address.
    pub(crate) async fn resume(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => return self.serve(listener),
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn address(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn api(&self) -> Api {
        connect(&self.address())
    }

    /// Makes or changes an object.
    pub(crate) fn put(&self, mut object: Value) {
        let plural = match object["kind"].as_str().unwrap() {
            "SecretProviderClass" => plural(Kind::SecretProviderClass),
            _ => plural(Kind::SecretsStoreImport),
        };
        let name = |field: &str| object["metadata"][field].as_str().unwrap().to_owned();
        let key = (plural, name("namespace"), name("name"));
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let kind = if world.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        world.objects.insert(key, object.clone());
        world.changes.push((version, plural, kind, object));
        drop(world);
        self.shared.changed.send_replace(version);
    }

    pub(crate) fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        let mut object =
            world.objects.remove(&(plural(kind), namespace.to_owned(), name.to_owned())).unwrap();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        world.changes.push((version, plural(kind), "DELETED", object));
        drop(world);
        self.shared.changed.send_replace(version);
    }

    /// How often something was asked whose method and path begin so.
    pub(crate) fn count(&self, what: &str) -> usize {
        self.world().asked.iter().filter(|asked| asked.starts_with(what)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
    }
}

pub(crate) fn connect(address: &str) -> Api {
    Api::connect(kube::Config::new(address.parse().unwrap())).unwrap()
}

pub(crate) fn metrics() -> Arc<Metrics> {
    Arc::default()
}

/// Waits for a condition.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "still waiting for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let query: BTreeMap<String, String> =
        url::form_urlencoded::parse(head.uri.query().unwrap_or("").as_bytes()).into_owned().collect();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let mut world = shared.world.lock().unwrap_or_else(PoisonError::into_inner);
    let watching = if query.contains_key("watch") { " (watch)" } else { "" };
    world.asked.push(format!("{} {path}{watching}", head.method));
    if let Some(status) = world.broken {
        return failure(status);
    }
    let known = [Kind::SecretProviderClass, Kind::SecretsStoreImport].map(plural);
    let plural = path.rsplit('/').next().and_then(|last| known.into_iter().find(|plural| *plural == last));
    match (plural, path.as_str(), head.method.as_str()) {
        (Some(plural), ..) if world.absent.contains(plural) => failure(StatusCode::NOT_FOUND),
        (Some(plural), ..) if query.contains_key("watch") => {
            let from: u64 = query["resourceVersion"].parse().unwrap();
            if from < world.oldest {
                return failure(StatusCode::GONE);
            }
            drop(world);
            changes(shared, plural, from)
        }
        (Some(plural), ..) => answer(&page(&world, plural, &query)),
        (None, "/.well-known/openid-configuration", _) => {
            world.issuer.as_ref().map_or_else(|| failure(StatusCode::NOT_FOUND), |(of, _)| answer(of))
        }
        (None, "/openid/v1/jwks", _) => {
            world.issuer.as_ref().map_or_else(|| failure(StatusCode::NOT_FOUND), |(_, keys)| answer(keys))
        }
        (None, path, "POST") if path.ends_with("/events") => {
            let mut event: Value = serde_json::from_slice(&body).unwrap();
            event["posted"] = json!(path);
            world.events.push(event.clone());
            answer(&event)
        }
        _ => failure(StatusCode::NOT_FOUND),
    }
}

fn page(world: &World, plural: Plural, query: &BTreeMap<String, String>) -> Value {
    let from: usize = query.get("continue").map_or(0, |from| from.parse().unwrap());
    let limit: usize = query["limit"].parse().unwrap();
    let all: Vec<&Value> = world.objects.iter().filter(|(key, _)| key.0 == plural).map(|(_, o)| o).collect();
    let items: Vec<&Value> = all.iter().skip(from).take(limit).copied().collect();
    let more = from + items.len() < all.len();
    let next = if more { (from + items.len()).to_string() } else { String::new() };
    json!({
        "apiVersion": "v1", "kind": "List", "items": items,
        "metadata": { "resourceVersion": world.version.to_string(), "continue": next },
    })
}

/// A watch: each change as a line, until the server stops.
fn changes(shared: Arc<Shared>, plural: Plural, from: u64) -> Response<Body> {
    let (changed, stop) = (shared.changed.subscribe(), shared.stop.subscribe());
    let state = (shared, changed, stop, from);
    let lines = futures_util::stream::unfold(state, move |(shared, mut changed, mut stop, at)| async move {
        loop {
            let next = {
                let world = shared.world.lock().unwrap_or_else(PoisonError::into_inner);
                let mut later =
                    world.changes.iter().filter(|(version, of, ..)| *version > at && *of == plural);
                later.next().map(|(version, _, kind, object)| {
                    (*version, format!("{}\n", json!({ "type": kind, "object": object })))
                })
            };
            if let Some((version, line)) = next {
                return Some((Ok::<_, std::io::Error>(line), (shared, changed, stop, version)));
            }
            tokio::select! {
                seen = changed.changed() => seen.ok()?,
                _ = stop.wait_for(|stop| *stop) => return None,
            }
        }
    });
    Response::new(Body::from_stream(lines))
}

fn answer(body: &Value) -> Response<Body> {
    Response::new(Body::from(body.to_string()))
}

fn failure(status: StatusCode) -> Response<Body> {
    let body = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": status.as_u16(),
        "message": format!("the server says {}", status.as_u16()), "reason": "Scripted",
    });
    Response::builder().status(status).body(Body::from(body.to_string())).unwrap()
}
