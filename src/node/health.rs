//! What the health port tells. `/healthz` asks nothing of the store or the shim: an agent that is restarted because one of them
//! is away would only come back without what it knew.

use std::sync::Arc;

use fuse_secrets_csi::health::Health;

use super::worker::Attachment;
use crate::metrics::Metrics;

/// Of a supervisor whose worker is not there yet.
pub struct Waiting;

impl Health for Waiting {
    fn healthy(&self) -> Result<(), String> {
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        Err("no worker yet: the shim did not answer so far".to_owned())
    }

    fn metrics(&self) -> String {
        Metrics::default().render()
    }
}

/// Of a worker.
pub struct Serving {
    /// Whether the shim is there.
    pub attachment: Arc<Attachment>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Health for Serving {
    fn healthy(&self) -> Result<(), String> {
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        if self.attachment.is_attached() { Ok(()) } else { Err("not attached to the shim".to_owned()) }
    }

    fn metrics(&self) -> String {
        self.metrics.render()
    }
}
