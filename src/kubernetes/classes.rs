//! Classes of all namespaces, watched: a publish asks memory, never the API server.
//!
//! ```text
//!            ┌────────────────────── too old a version ◀───────────────┐
//!            ▼                                                         │
//!   ──▶ list, page by page ──▶ known ──▶ watch from there ──change──▶ kept or dropped
//!            │   ▲                          │   ▲
//!       404  │   │ later            error   │   │ after a pause, from where it was
//!            ▼   │                          ▼   │
//!         no such kind (known: there is none)  behind: what is known is served, and its age told
//! ```
//! Of each object only the text is kept that `class::Class::read` looks at, without what tools note there; it is parsed when it is
//! asked for. `docs/measures.md` says what 5,000 classes take.

/// What is kept of classes.
mod shelf;

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use kube::api::ListParams;
use kube::core::WatchEvent;
use rand::RngExt as _;
use serde::Deserialize;
use tokio::time::Instant;

use super::api::{Api, ApiError};
use crate::class::{Class, Classes, FindError, Kind};
use crate::metrics::Metrics;
use crate::sys::alloc;
use shelf::{Object, Shelf};

/// Objects of one answer: a page is held whole while it is read.
const PAGE: u32 = 100;
/// A watch that is silent for longer than this may be dead: the API server sends a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(150);
/// Between the end of one watch and the next.
const BREATH: Duration = Duration::from_millis(500);
/// First and longest pause after a failure.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How often is looked again for a kind that the cluster does not have.
const ABSENT: Duration = Duration::from_secs(30);

/// The classes of a cluster. The watches end when this is dropped.
pub struct Watched {
    shelves: [Arc<Shelf>; 2],
    watches: [tokio::task::JoinHandle<()>; 2],
}

impl Watched {
    /// Starts to watch; must be called inside a tokio runtime.
    #[must_use]
    pub fn start(api: Api, metrics: Arc<Metrics>) -> Arc<Self> {
        let kinds = [Kind::SecretProviderClass, Kind::SecretsStoreImport];
        let shelves = kinds.map(|kind| Arc::new(Shelf::new(kind, Arc::clone(&metrics))));
        let watches = shelves.each_ref().map(|shelf| tokio::spawn(follow(api.clone(), Arc::clone(shelf))));
        Arc::new(Self { shelves, watches })
    }

    fn shelf(&self, kind: Kind) -> &Shelf {
        match kind {
            Kind::SecretProviderClass => &self.shelves[0],
            Kind::SecretsStoreImport => &self.shelves[1],
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watches.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Classes for Watched {
    fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<Class>, FindError> {
        self.shelf(kind).find(namespace, name)
    }

    fn names(&self, namespace: &str) -> Result<Vec<(Kind, String)>, FindError> {
        let mut names: Vec<_> = self.shelves.iter().flat_map(|shelf| shelf.names(namespace)).collect();
        names.sort_by(|a, b| a.1.cmp(&b.1));
        Ok(names)
    }

    fn elsewhere(&self, kind: Kind, namespace: &str, name: &str) -> Vec<String> {
        self.shelf(kind).elsewhere(namespace, name)
    }

    fn known(&self, kind: Kind) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.shelf(kind).known())
    }
}

/// Where the API server has them.
fn path(kind: Kind) -> &'static str {
    match kind {
        Kind::SecretProviderClass => "/apis/secrets-store.csi.x-k8s.io/v1/secretproviderclasses",
        Kind::SecretsStoreImport => "/apis/deckhouse.io/v1alpha1/secretsstoreimports",
    }
}

/// Lists and watches one kind, for ever.
async fn follow(api: Api, shelf: Arc<Shelf>) {
    let mut pause = PAUSES.0;
    // From where to watch; none: it must be listed.
    let mut version: Option<String> = None;
    loop {
        let begun = Instant::now();
        let step = match &mut version {
            None => list(&api, &shelf).await.map(|at| {
                version = Some(at);
                Ended::Quietly
            }),
            Some(at) => watch(&api, &shelf, at).await,
        };
        // What has worked for a while did not fail just before.
        if begun.elapsed() > PAUSES.1 {
            pause = PAUSES.0;
        }
        match step {
            Ok(Ended::Quietly) => continue,
            Ok(Ended::TooOld) => version = None,
            Err(error) if error.status == Some(404) => {
                version = None;
                shelf.absent();
                tokio::time::sleep(jittered(ABSENT)).await;
                continue;
            }
            Err(error) => shelf.fell_behind(&error),
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Reads all objects, page by page; answers with the version that they are of. Pages that are read are served at once.
async fn list(api: &Api, shelf: &Shelf) -> Result<String, ApiError> {
    #[derive(Deserialize)]
    struct Page {
        metadata: Of,
        items: Vec<Object>,
    }
    #[derive(Deserialize)]
    struct Of {
        #[serde(rename = "resourceVersion")]
        version: String,
        #[serde(rename = "continue", default)]
        next: String,
    }
    let round = shelf.begin();
    let mut parameters = ListParams { limit: Some(PAGE), ..ListParams::default() };
    loop {
        let text = api.list(path(shelf.kind()), &parameters).await?;
        // The parser's own errors quote what they read.
        let page: Page =
            serde_json::from_str(&text).map_err(|_| api.nonsense("the list of classes cannot be read"))?;
        for object in page.items {
            shelf.put(object, round);
        }
        if page.metadata.next.is_empty() {
            shelf.complete(round);
            // What reading left of pages; nobody waits for it. An error means that the runtime ends.
            let _ = tokio::task::spawn_blocking(alloc::trim).await;
            return Ok(page.metadata.version);
        }
        parameters.continue_token = Some(page.metadata.next);
    }
}

/// How a watch ended that did not fail.
enum Ended {
    /// As the API server ends each after some minutes, or because it has been silent.
    Quietly,
    /// What happened since is not known any more.
    TooOld,
}

/// Follows the changes from a version on, and moves it along.
async fn watch(api: &Api, shelf: &Shelf, version: &mut String) -> Result<Ended, ApiError> {
    let begun = Instant::now();
    let too_old = |status: Option<u16>| status == Some(410);
    let events = match api.watch::<Object>(path(shelf.kind()), version).await {
        Err(error) if too_old(error.status) => return Ok(Ended::TooOld),
        events => events?,
    };
    shelf.in_step();
    let mut events = pin!(events);
    // Silence is looked into by a new watch, which fails where nobody answers.
    while let Ok(event) = tokio::time::timeout(SILENCE, events.try_next()).await {
        match event.map_err(|error| api.error(&error)) {
            Ok(None) => break,
            Ok(Some(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                version.clone_from(&object.metadata.version);
                shelf.put(object, shelf.round());
            }
            Ok(Some(WatchEvent::Deleted(object))) => {
                version.clone_from(&object.metadata.version);
                shelf.remove(&object.metadata);
            }
            Ok(Some(WatchEvent::Bookmark(bookmark))) => {
                version.clone_from(&bookmark.metadata.resource_version);
            }
            Ok(Some(WatchEvent::Error(status))) if status.code == 410 => return Ok(Ended::TooOld),
            Ok(Some(WatchEvent::Error(status))) => return Err(api.error(&kube::Error::Api(status))),
            Err(error) if too_old(error.status) => return Ok(Ended::TooOld),
            Err(error) => return Err(error),
        }
    }
    // One that ends at once must not become a flood.
    tokio::time::sleep_until(begun + jittered(BREATH)).await;
    Ok(Ended::Quietly)
}

/// So that the agents of a cluster do not ask all at once.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.7..1.3))
}
