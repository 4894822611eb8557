//! Events of pods, for what kubelet cannot say: warnings of a volume that is served all the same, refreshes that fail, mounts that
//! stay dead.
//!
//! ```text
//!   tell ──▶ told in the last 10 minutes? dropped ──▶ queue, bounded ──▶ one at a time ──▶ create
//! ```
//! Events are made, never changed: the agent has no right to. A text is made of names and of what stores answered in our words;
//! no value and no token is near.

/// Refreshes that fail for long.
pub mod refresh;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;

use super::api::Api;
use crate::metrics::Metrics;
use crate::volume::Pod;

/// Events that wait; a pod that starts has one at most.
const QUEUE: usize = 128;
/// The same is told of a volume no more often than this.
const AGAIN: Duration = Duration::from_secs(600);
/// What was told that is remembered: several reasons for each volume of a full node.
const REMEMBERED: usize = 2_000;
/// Between two events of this node, so that an outage of a store does not become one of the API server.
const PACE: Duration = Duration::from_millis(200);
/// Longest text that an API server takes.
const LONGEST: usize = 1_024;
/// Who says it.
const COMPONENT: &str = "fuse-secrets";

/// What is told, in one word each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The volume is served, but not all of the class or of the pod's spec is in force.
    VolumeWarning,
    /// A value cannot be refreshed; the last known one is served.
    RefreshFailed,
    /// It can again.
    RefreshRecovered,
    /// A running container holds a mount that is dead for good.
    DeadMount,
}

impl Reason {
    fn word(self) -> &'static str {
        match self {
            Self::VolumeWarning => "SecretVolumeWarning",
            Self::RefreshFailed => "SecretRefreshFailed",
            Self::RefreshRecovered => "SecretRefreshRecovered",
            Self::DeadMount => "SecretMountDead",
        }
    }

    fn kind(self) -> &'static str {
        if self == Self::RefreshRecovered { "Normal" } else { "Warning" }
    }
}

/// Takes events. A clone is another way into the same queue.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Event>,
    told: Arc<Mutex<HashMap<(String, Reason), Instant>>>,
    metrics: Arc<Metrics>,
}

impl Events {
    /// Starts to send; must be called inside a tokio runtime. Ends when the last clone is dropped.
    #[must_use]
    pub fn start(api: Api, metrics: Arc<Metrics>) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        tokio::spawn(send(api, waiting, Arc::clone(&metrics)));
        Self { queue, told: Arc::default(), metrics }
    }

    /// Tells the owner of a volume's pod, unless the same was told lately. Never waits: what does not fit is dropped and counted.
    pub fn tell(&self, volume: &str, pod: &Pod, reason: Reason, text: &str) {
        // Of a pod without a name, nobody would see it.
        if pod.name.is_empty() || pod.namespace.is_empty() || !self.is_news(volume, reason) {
            return;
        }
        if self.queue.try_send(event(pod, reason, text, SystemTime::now())).is_err() {
            self.metrics.events_dropped.increment();
        }
    }

    fn is_news(&self, volume: &str, reason: Reason) -> bool {
        let (now, key) = (Instant::now(), (volume.to_owned(), reason));
        let recent = |at: &Instant| now.saturating_duration_since(*at) < AGAIN;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.get(&key).is_some_and(recent) {
            return false;
        }
        if told.len() >= REMEMBERED {
            told.retain(|_, at| recent(at));
        }
        if told.len() >= REMEMBERED {
            self.metrics.events_dropped.increment();
            return false;
        }
        told.insert(key, now);
        true
    }
}

/// Sends what waits, one after the other.
async fn send(api: Api, mut waiting: mpsc::Receiver<Event>, metrics: Arc<Metrics>) {
    let mut told = String::new();
    while let Some(event) = waiting.recv().await {
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let body = serde_json::to_vec(&event).unwrap_or_default();
        match api.create(&format!("/api/v1/namespaces/{namespace}/events"), body).await {
            Ok(()) => {
                metrics.events_created.increment();
                told.clear();
            }
            Err(error) => {
                metrics.events_dropped.increment();
                // Once for each cause: a lost API server takes many.
                if error.text != told {
                    tracing::warn!(%error, "an event of a pod was not taken");
                    told = error.text;
                }
            }
        }
        tokio::time::sleep(PACE).await;
    }
}

fn event(pod: &Pod, reason: Reason, text: &str, now: SystemTime) -> Event {
    // Unique by chance, as all clients name theirs; a pod's name may be as long as an event's.
    let name: String = pod.name.chars().take(200).collect();
    let name = format!("{}.{:016x}", name.trim_end_matches(['.', '-']), rand::random::<u64>());
    let at = Timestamp::try_from(now).ok().map(Time);
    let mut message: String = text.chars().take(LONGEST).collect();
    while message.len() > LONGEST {
        message.pop();
    }
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            uid: Some(pod.uid.clone()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        },
        reason: Some(reason.word().to_owned()),
        type_: Some(reason.kind().to_owned()),
        message: Some(message),
        source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: None }),
        reporting_component: Some(COMPONENT.to_owned()),
        first_timestamp: at.clone(),
        last_timestamp: at,
        count: Some(1),
        ..Event::default()
    }
}
