//! What is kept of the classes of one kind: for each the JSON text of what the parser reads, and for all together how recent they
//! are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::ApiError;
use crate::class::{Class, FindError, Kind};
use crate::metrics::{Metric, Metrics};

/// Classes that are kept of one kind; ten times what is measured. What is beyond is not known, and told as such.
const MOST: usize = 50_000;
/// Annotations that the parser reads. Others may be longer than the class, such as what kubectl applied last.
const ANNOTATIONS: &str = "fuse-secrets/";
/// Labels that it reads.
const LABELS: [&str; 1] = ["app.kubernetes.io/managed-by"];

/// A class as the API server sends it, without what nobody reads.
#[derive(Clone, Deserialize)]
pub(super) struct Object {
    pub(super) metadata: Metadata,
    #[serde(default)]
    spec: Value,
}

/// See [`Object`].
#[derive(Clone, Deserialize)]
pub(super) struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(rename = "resourceVersion", default)]
    pub(super) version: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// One kind's classes.
pub(super) struct Shelf {
    kind: Kind,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    /// Whether they were ever complete.
    known: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    texts: BTreeMap<Name, Text>,
    /// Number of the list that was begun last.
    round: u32,
    behind: Option<Behind>,
    absent: bool,
    full: bool,
}

/// Namespace and name.
type Name = (Box<str>, Box<str>);

struct Text {
    json: Box<str>,
    /// The list that it was seen in, or after.
    round: u32,
}

struct Behind {
    since: SystemTime,
    error: String,
}

impl Shelf {
    pub(super) fn new(kind: Kind, metrics: Arc<Metrics>) -> Self {
        Self { kind, metrics, state: Mutex::default(), known: watch::Sender::new(false) }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns when they are complete for the first time.
    pub(super) async fn known(&self) {
        // The sender lives as long as this.
        let _ = self.known.subscribe().wait_for(|known| *known).await;
    }

    pub(super) fn find(&self, namespace: &str, name: &str) -> Result<Option<Class>, FindError> {
        let (kind, state) = (self.kind, self.state());
        let key: Name = (namespace.into(), name.into());
        let Some(text) = state.texts.get(&key) else {
            return match self.doubt(&state) {
                Some(why) => Err(FindError::Unknown { class: format!("{kind} {namespace}/{name}"), why }),
                None => Ok(None),
            };
        };
        let json = text.json.clone();
        drop(state);
        Class::read(&document(kind, namespace, name, &json), 1).map(Some).map_err(FindError::from)
    }

    pub(super) fn names(&self, namespace: &str) -> Vec<(Kind, String)> {
        let first: Name = (namespace.into(), "".into());
        let state = self.state();
        let named = state.texts.range(first..).map(|(name, _)| name);
        let own = named.take_while(|(of, _)| **of == *namespace);
        own.map(|(_, name)| (self.kind, name.to_string())).collect()
    }

    pub(super) fn elsewhere(&self, namespace: &str, name: &str) -> Vec<String> {
        let state = self.state();
        let others = state.texts.keys().filter(|(of, named)| **named == *name && **of != *namespace);
        others.map(|(of, _)| of.to_string()).collect()
    }

    /// A list begins; what neither it nor a later change names is gone when it is complete.
    pub(super) fn begin(&self) -> u32 {
        let mut state = self.state();
        state.round = state.round.wrapping_add(1);
        state.full = false;
        state.round
    }

    pub(super) fn round(&self) -> u32 {
        self.state().round
    }

    pub(super) fn put(&self, object: Object, round: u32) {
        let (name, json) = compact(object);
        let mut state = self.state();
        if state.texts.len() >= MOST && !state.texts.contains_key(&name) {
            if !std::mem::replace(&mut state.full, true) {
                tracing::error!(kind = %self.kind, most = MOST, "more classes than are kept: some will be missing");
            }
            return;
        }
        let text = state.texts.entry(name).or_insert_with(|| Text { json: "".into(), round });
        text.round = round;
        if *text.json != *json {
            text.json = json.into_boxed_str();
        }
        self.count(&state);
    }

    pub(super) fn remove(&self, metadata: &Metadata) {
        let mut state = self.state();
        let name: Name = (metadata.namespace.as_str().into(), metadata.name.as_str().into());
        state.texts.remove(&name);
        self.count(&state);
    }

    /// A list is complete.
    pub(super) fn complete(&self, round: u32) {
        let mut state = self.state();
        state.texts.retain(|_, text| text.round == round);
        state.absent = false;
        self.count(&state);
        self.step(&mut state);
        tracing::debug!(kind = %self.kind, classes = state.texts.len(), "classes are known");
    }

    /// The cluster does not know the kind.
    pub(super) fn absent(&self) {
        let mut state = self.state();
        state.texts.clear();
        self.count(&state);
        self.step(&mut state);
        if !std::mem::replace(&mut state.absent, true) {
            tracing::info!(kind = %self.kind, "this cluster has no such resource; looked at again from time to time");
        }
    }

    /// The API server answers.
    pub(super) fn in_step(&self) {
        self.step(&mut self.state());
    }

    /// It does not.
    pub(super) fn fell_behind(&self, error: &ApiError) {
        let mut state = self.state();
        let since = state.behind.as_ref().map_or_else(SystemTime::now, |behind| behind.since);
        if state.behind.as_ref().is_none_or(|behind| behind.error != error.text) {
            tracing::warn!(kind = %self.kind, %error, "classes cannot be watched; those that are known are served");
        }
        state.behind = Some(Behind { since, error: error.text.clone() });
        let seconds = since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.behind_metric().set(seconds);
    }

    fn step(&self, state: &mut State) {
        if let Some(Behind { since, .. }) = state.behind.take() {
            let outage = since.elapsed().unwrap_or_default().as_secs();
            tracing::info!(kind = %self.kind, seconds = outage, "classes are watched again");
        }
        self.behind_metric().set(0);
        self.known.send_replace(true);
    }

    /// Why a class that is not here may be there.
    fn doubt(&self, state: &State) -> Option<String> {
        let since = |since: &SystemTime| humantime::format_rfc3339_seconds(*since);
        match (&state.behind, *self.known.borrow()) {
            (Some(behind), _) => {
                let Behind { error, since: at } = behind;
                Some(format!(
                    "{error}, since {}; classes known before are served, and kubelet asks again by itself",
                    since(at)
                ))
            }
            (None, false) => {
                Some("the API server has not told all yet; kubelet asks again by itself".to_owned())
            }
            (None, true) if state.full => {
                Some(format!("this agent keeps {MOST} of a kind, and there are more; have fewer"))
            }
            (None, true) => None,
        }
    }

    fn count(&self, state: &State) {
        let metric = match self.kind {
            Kind::SecretProviderClass => &self.metrics.classes_provider,
            Kind::SecretsStoreImport => &self.metrics.classes_import,
        };
        metric.set(state.texts.len() as u64);
    }

    fn behind_metric(&self) -> &Metric {
        match self.kind {
            Kind::SecretProviderClass => &self.metrics.classes_behind_provider,
            Kind::SecretsStoreImport => &self.metrics.classes_behind_import,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is kept of an object, under its name.
fn compact(object: Object) -> (Name, String) {
    let Object { metadata: Metadata { name, namespace, mut labels, mut annotations, .. }, spec } = object;
    labels.retain(|label, _| LABELS.contains(&label.as_str()));
    annotations.retain(|annotation, _| annotation.starts_with(ANNOTATIONS));
    let json = json!({ "labels": labels, "annotations": annotations, "spec": spec }).to_string();
    ((namespace.into(), name.into()), json)
}

/// The object again, as far as it was kept.
fn document(kind: Kind, namespace: &str, name: &str, json: &str) -> Value {
    let mut kept: Map<String, Value> = serde_json::from_str(json).unwrap_or_default();
    let mut part = |name: &str| kept.remove(name).unwrap_or_default();
    let version = match kind {
        Kind::SecretProviderClass => "secrets-store.csi.x-k8s.io/v1",
        Kind::SecretsStoreImport => "deckhouse.io/v1alpha1",
    };
    let (labels, annotations, spec) = (part("labels"), part("annotations"), part("spec"));
    json!({
        "apiVersion": version,
        "kind": kind.to_string(),
        "metadata": { "name": name, "namespace": namespace, "labels": labels, "annotations": annotations },
        "spec": spec,
    })
}
