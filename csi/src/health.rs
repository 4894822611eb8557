//! `/healthz`, `/readyz` and `/metrics` on one port, for kubelet's probes and for Prometheus.

use std::sync::Arc;

use tokio::net::TcpListener;

/// What is told.
pub trait Health: Send + Sync + 'static {
    /// Whether this process works; not whether others do. `Err`: why not.
    ///
    /// # Errors
    /// What is wrong.
    fn healthy(&self) -> Result<(), String>;
    /// Whether it can do its work now.
    ///
    /// # Errors
    /// What is missing.
    fn ready(&self) -> Result<(), String>;
    /// The counters, in the text format of Prometheus.
    fn metrics(&self) -> String;
}

/// Answers until it is dropped.
pub async fn serve(_listener: TcpListener, _health: Arc<dyn Health>) {
    todo!()
}
