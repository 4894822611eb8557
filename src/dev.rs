//! The embedded store: a server of the HashiCorp Vault HTTP API that keeps everything in this process's memory and
//! forgets it at the end. It is there so that `fuse-secrets dev` needs nothing else, and for tests. It listens on loopback
//! only, speaks plain HTTP, and is no place for secrets that matter.
//!
//! What it has: KV version 1 (`kv/`) and 2 (`secret/`), and more such mounts; the auth methods token, approle, jwt and
//! kubernetes (the latter two with given public keys; it never connects to anything); ACL policies (paths and capabilities);
//! `sys/health`, seal, mounts, auth methods and policies. What it answers is worded and shaped as Vault 1.21 answers, so
//! that the `vault` command line works with it and one test body can run against both. What it does not have is answered
//! with an error, never with something else. `examples/embedded-store.rs` starts one to try.
//!
//! Three differences from a real server are on purpose: any key unseals, the namespace header is only counted (a server
//! without namespaces ignores it too), and of a role's fields it knows policies, `ttl`, `max_ttl`, what is bound to whom, and
//! ignores the rest, such as address ranges.
//!
//! Values rest as [`crate::secret::SecretBytes`], tokens as [`crate::secret::Token`]. On their way through JSON and HTTP there are copies,
//! which only the process allocator wipes.
//!
//! A request's way: `server` (HTTP, faults, counts) → `state` (seal, token, policy) → `sys`, `auth` or `kv`.
//!
//! # Faults
//! In Rust through `Embedded::inject` and `Embedded::hold`; over HTTP by POST with a root token, all members optional:
//!
//! | path below `/v1/sys/embedded/` | body | what happens |
//! |---|---|---|
//! | `fail` | `status` (500), `times` (1), `path` (all) | the next requests below `path` get that status |
//! | `rate-limit` | `retry_after` (1 s), `times`, `path` | … get 429 with `Retry-After` |
//! | `garbage` | `times`, `path` | … get 200 with a body that is no JSON |
//! | `hang` | `times` (all), `path` | … wait until `release`, and are then answered |
//! | `release` | | lets go of what hangs and forgets faults that nobody met |
//! | `seal`, `unseal` | | as `sys/seal` and `sys/unseal`, without a key |
//! | `counts` (GET) | | answers `Counts` |

mod ask;
mod auth;
mod clock;
mod counts;
mod faults;
mod kv;
mod mount;
mod policy;
mod random;
mod reply;
mod server;
mod state;
mod sys;
#[cfg(test)]
mod tests;

pub use counts::Counts;
pub use faults::{Fault, Gate};
pub use reply::Refusal;

/// The status of an HTTP answer, for [`Fault::status`] and [`Refusal`].
pub use axum::http::StatusCode;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::serve::ListenerExt as _;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::reference::Address;
use crate::secret::{SecretBytes, Token};
use ask::{Ask, Operation};
use server::{Shared, lock};

/// How long [`Embedded::shutdown`] waits for requests that are being answered.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Where and how it starts.
pub struct Options {
    /// A loopback address; port 0 takes a free one. Default `127.0.0.1:0`.
    pub listen: SocketAddr,
    /// The root token. Default: a random one.
    pub root_token: Option<Token>,
}

impl Default for Options {
    fn default() -> Self {
        Self { listen: (Ipv4Addr::LOCALHOST, 0).into(), root_token: None }
    }
}

/// Why it does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Others could reach it.
    #[error("embedded store refuses to listen on {0}: it is for this machine only, use 127.0.0.1 or [::1]")]
    NotLoopback(SocketAddr),
    /// The port is taken, or may not be used.
    #[error("embedded store cannot listen on {address}, choose another port or 0 for a free one")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its first content cannot be made.
    #[error("embedded store cannot be set up")]
    SetUp(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A running embedded store. Dropping it stops it as [`Embedded::shutdown`] does, without waiting.
pub struct Embedded {
    shared: Arc<Shared>,
    address: Address,
    root_token: Token,
    server: JoinHandle<()>,
}

impl Embedded {
    /// Starts one on the current tokio runtime. When this returns it answers.
    ///
    /// # Errors
    /// [`StartError`]: the address is not a loopback address, or cannot be listened on.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let address = options.listen;
        if !address.ip().is_loopback() {
            return Err(StartError::NotLoopback(address));
        }
        let set_up = |error: &dyn std::fmt::Display| StartError::SetUp(error.to_string().into());
        let root_token = options.root_token.map_or_else(random::token, Ok).map_err(|e| set_up(&e))?;
        let own = Token::new(root_token.expose().to_owned()).map_err(|e| set_up(&e))?;
        let mut state = state::State::new().map_err(|e| set_up(&e))?;
        let listen = |source| StartError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        state.tokens.add_root(own, std::time::SystemTime::now());
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            faults: Mutex::default(),
            counts: Mutex::default(),
            ahead: Mutex::default(),
            stop: watch::Sender::new(false),
        });
        let listener = listener.tap_io(|connection| {
            // Each answer is waited for. A connection that refuses the option is slower and no worse.
            let _ = connection.set_nodelay(true);
        });
        let router = axum::Router::new().fallback(server::handle).with_state(shared.clone());
        let mut stop = shared.stop.subscribe();
        let server = axum::serve(listener, router).with_graceful_shutdown(async move {
            // The sender lives in what this very server shares, so the wait ends with `true` only.
            let _ = stop.wait_for(|stopped| *stopped).await;
        });
        let server = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::warn!(%error, "embedded store stopped");
            }
        });
        let address = Address::parse(&format!("http://{bound}")).map_err(|e| set_up(&e))?;
        Ok(Self { shared, address, root_token, server })
    }

    /// Where it listens: `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// A token that may do everything and never expires.
    #[must_use]
    pub fn root_token(&self) -> &Token {
        &self.root_token
    }

    /// What to tell people who start one. Names neither token nor secret.
    #[must_use]
    pub fn banner(&self) -> String {
        format!(
            "Embedded store at {}: for development and tests.\n\
             It keeps secrets in this process's memory only and loses them when it ends;\n\
             it speaks plain HTTP to this machine only. It is not a secret store to rely on.",
            self.address
        )
    }

    /// Writes a secret by the path that people use, `secret/app`: a further version in a KV v2 mount, its new content in
    /// a KV v1 mount. `data` is a JSON object.
    ///
    /// # Errors
    /// [`Refusal`] as over HTTP.
    pub fn put(&self, path: &str, data: &Value) -> Result<(), Refusal> {
        let (path, versioned) = self.api_path(path)?;
        let body = if versioned { serde_json::json!({ "data": data }) } else { data.clone() };
        self.write(&path, &body).map(drop)
    }

    /// Deletes a secret by the path that people use: in a KV v2 mount its latest version.
    ///
    /// # Errors
    /// [`Refusal`] as over HTTP.
    pub fn delete(&self, path: &str) -> Result<(), Refusal> {
        let (path, _) = self.api_path(path)?;
        self.ask(Operation::Delete, &path, Vec::new()).map(drop)
    }

    /// Writes to any path of the API with the root token, without HTTP, faults or counts: policies, auth methods, roles.
    /// Answers the response's JSON; null where it has none.
    ///
    /// # Errors
    /// [`Refusal`] as over HTTP.
    pub fn write(&self, path: &str, body: &Value) -> Result<Value, Refusal> {
        let answer = self.ask(Operation::Write, path, body.to_string().into_bytes())?;
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(answer.expose()).map_err(|error| Refusal::internal(&error.to_string()))
    }

    /// Lets something go wrong.
    ///
    /// # Errors
    /// [`Refusal`]: a thousand faults wait already.
    pub fn inject(&self, fault: Fault) -> Result<(), Refusal> {
        lock(&self.shared.faults).inject(fault)
    }

    /// Shuts a gate: requests to paths that begin with `below` wait until it is opened.
    ///
    /// # Errors
    /// [`Refusal`]: a thousand faults wait already.
    pub fn hold(&self, below: &str) -> Result<Gate, Refusal> {
        let (fault, gate) = Fault::wait();
        self.inject(fault.below(below))?;
        Ok(gate)
    }

    /// Answers 503 to everything but health and seal status.
    pub fn seal(&self) {
        lock(&self.shared.state).sealed = true;
    }

    /// Ends [`Embedded::seal`].
    pub fn unseal(&self) {
        lock(&self.shared.state).sealed = false;
    }

    /// Puts the store's clock forward, for tokens and versions that expire.
    pub fn advance(&self, by: Duration) {
        *lock(&self.shared.ahead) += by;
    }

    /// Requests so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        lock(&self.shared.counts).clone()
    }

    /// Stops: connections that are idle end at once, those that are being answered within two seconds.
    pub async fn shutdown(mut self) {
        self.shared.stop.send_replace(true);
        if tokio::time::timeout(SHUTDOWN, &mut self.server).await.is_err() {
            self.server.abort();
            tracing::warn!("embedded store left requests unanswered");
        }
    }

    fn api_path(&self, path: &str) -> Result<(String, bool), Refusal> {
        let state = lock(&self.shared.state);
        let (mount, engine, name) = state.engines.find(path).ok_or_else(|| Refusal::no_route(path))?;
        Ok(match engine.inner {
            kv::Engine::V1(_) => (path.to_owned(), false),
            kv::Engine::V2(_) => (format!("{mount}data/{name}"), true),
        })
    }

    fn ask(&self, operation: Operation, path: &str, body: Vec<u8>) -> Result<SecretBytes, Refusal> {
        let token = Token::new(self.root_token.expose().to_owned());
        let ask = Ask {
            operation,
            path: path.to_owned(),
            query: Vec::new(),
            body: SecretBytes::new(body),
            token: Some(token.map_err(|error| Refusal::internal(&error.to_string()))?),
            now: self.shared.now(),
        };
        let reply = lock(&self.shared.state).answer(&ask)?;
        let body = SecretBytes::new(reply.body);
        if reply.status.is_success() { Ok(body) } else { Err(Refusal::new(reply.status, "no such path")) }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
    }
}
