//! `/healthz`, `/readyz` and `/metrics` on one port, for kubelet's probes and for Prometheus.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Most connections at a time; more wait in the listener's queue.
const AT_ONCE: usize = 16;
/// Longest life of a connection: one question, one answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Pause after a connection that could not be accepted, which is for want of descriptors.
const WANT: Duration = Duration::from_millis(100);

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
pub async fn serve(listener: TcpListener, health: Arc<dyn Health>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < AT_ONCE => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(timeout(DEADLINE, converse(stream, Arc::clone(&health))));
                }
                Err(error) => {
                    tracing::warn!(%error, "a probe's connection was not accepted");
                    sleep(WANT).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(stream: TcpStream, health: Arc<dyn Health>) {
    let respond = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &*health))));
    // A client that goes away or talks nonsense harms only itself.
    let _ = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), respond).await;
}

fn answer(request: &Request<Incoming>, health: &dyn Health) -> Response<Full<Bytes>> {
    let verdict = |verdict: Result<(), String>| match verdict {
        Ok(()) => (StatusCode::OK, "ok".to_owned()),
        Err(text) => (StatusCode::SERVICE_UNAVAILABLE, text),
    };
    let mut kind = "text/plain; charset=utf-8";
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => verdict(health.healthy()),
        (&Method::GET, "/readyz") => verdict(health.ready()),
        (&Method::GET, "/metrics") => {
            kind = "text/plain; version=0.0.4";
            (StatusCode::OK, health.metrics())
        }
        _ => (StatusCode::NOT_FOUND, String::new()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
