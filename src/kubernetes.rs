//! The agent's side of the API server: classes by watches, proof of a pod's identity by the issuer's keys, and events for what
//! kubelet cannot say.
//!
//! ```text
//!                 list, watch ──▶ classes ──find──▶ node::publish      from memory: no request on the way of a mount
//!   API server    keys ─────────▶ issuer ──verify─▶ node::worker       the same, unless a key is new
//!                 create ◀─────── events ◀────────── warnings, failures
//! ```
//! It may do nothing else there: get, list and watch of two kinds, two documents of the issuer, create of events. A lost API server
//! costs news, never a mount that can be had without it.

/// The connection.
pub mod api;
/// Classes, watched.
pub mod classes;
/// Events.
pub mod events;
/// The service-account issuer: its keys, and whose tokens they have signed.
pub mod issuer;
/// What a pod's token claims.
pub mod token;

use std::sync::Arc;

use crate::metrics::Metrics;
use api::Api;
use classes::Watched;
use events::Events;
use issuer::Issuer;

/// All of it, running.
pub struct Cluster {
    /// Classes of all namespaces.
    pub classes: Arc<Watched>,
    /// Whose tokens are good.
    pub issuer: Arc<Issuer>,
    /// What pods' owners are told.
    pub events: Events,
}

impl Cluster {
    /// Starts watching; must be called inside a tokio runtime.
    #[must_use]
    pub fn start(api: &Api, metrics: &Arc<Metrics>) -> Self {
        Self {
            classes: Watched::start(api.clone(), Arc::clone(metrics)),
            issuer: Issuer::start(api.clone(), Arc::clone(metrics)),
            events: Events::start(api.clone(), Arc::clone(metrics)),
        }
    }
}
