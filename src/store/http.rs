//! One connection pool per `Connection`: TLS, deadlines, redirects, size cap.
//!
//! `Http::ask` gives one question to a cluster: it tries the members in order, the one that answered last first, pauses
//! and tries again as `super::retry` says, all inside the caller's deadline. What comes back is an answer that stands
//! (2xx, or a 4xx that no repetition changes) or a [`StoreError`] in people's words.
//!
//! Pooled connections close at most 5 s after their last use, because TLS keeps plaintext in the buffers of an idle
//! connection. A proxy is used only if the connection names one; the environment's proxy variables are not read.

/// Bodies both ways without copies that outlive them.
mod body;
/// Transport errors in people's words.
mod failure;
/// The cluster's members, and where a redirect may lead.
mod member;
/// Which addresses and files are out of reach.
pub(super) mod reach;
/// Whose certificate a server shows.
mod shown;
/// Whom a connection trusts and how it shows itself.
mod tls;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use dashmap::DashMap;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::time::timeout_at;

use self::member::Member;
use self::reach::Reach;
use super::error::{Unusable, came_back};
use super::retry::{self, Failure, Next};
use super::{ErrorKind, StoreError};
use crate::metrics::Metrics;
use crate::reference::Connection;
use crate::secret::{SecretBytes, Token};

/// A member that does not shake hands within this time is taken for gone, so that the next one gets its turn.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// One request, body included. Dynamic engines (a new database user) take seconds; kubelet gives a mount two minutes.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// An unused connection is closed between one and two of these later: the pool looks at its connections this often.
const IDLE_TIMEOUT: Duration = Duration::from_millis(2500);

/// Connections with a pool; beyond it the one unused for longest is closed. A node talks to a handful of stores.
const MOST_POOLS: usize = 256;

/// A question to a store.
pub(super) struct Ask<'a> {
    pub(super) connection: &'a Connection,
    pub(super) method: Method,
    /// Below `/v1/`.
    pub(super) path: &'a str,
    pub(super) query: Option<&'a str>,
    pub(super) token: Option<&'a Token>,
    /// JSON.
    pub(super) body: Option<SecretBytes>,
    /// Further secrets that no error may quote.
    pub(super) hidden: &'a [&'a str],
    /// Whether asking twice is the same as asking once.
    pub(super) repeatable: bool,
    /// How often the cluster is asked at most ([`retry::ROUNDS`]).
    pub(super) rounds: u32,
    pub(super) deadline: Instant,
}

/// An answer that stands.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: SecretBytes,
    /// `GET https://vault:8200/v1/secret/data/app`.
    pub(super) asked: String,
}

/// The pools.
pub(super) struct Http {
    pools: DashMap<Connection, Arc<Pool>>,
    uses: AtomicU64,
    metrics: Arc<Metrics>,
    reach: Reach,
}

/// One cluster.
struct Pool {
    members: Vec<Member>,
    /// Index of the member that answered last.
    preferred: AtomicUsize,
    stamp: tls::Stamp,
    /// When it was used last, counted in uses of all pools.
    used: AtomicU64,
    /// Since when nobody answers: the first question after the last answer that got none.
    silent: Mutex<Option<SystemTime>>,
}

impl Http {
    pub(super) fn new(metrics: Arc<Metrics>, reach: Reach) -> Self {
        Self { pools: DashMap::new(), uses: AtomicU64::new(0), metrics, reach }
    }

    /// Asks the cluster.
    pub(super) async fn ask(&self, mut ask: Ask<'_>) -> Result<Reply, StoreError> {
        let body = ask.body.take().map(body::outgoing);
        let headers = headers(&ask)?;
        let pool = self.pool(&ask).await?;
        let mut sent = false;
        let mut round = 0;
        loop {
            let mut failures = Vec::new();
            let mut next = Next::Member;
            for (index, member) in pool.order() {
                if std::mem::replace(&mut sent, true) {
                    self.metrics.store_retries.increment();
                }
                match member.exchange(&ask, &headers, body.as_ref()).await {
                    Ok(reply) => {
                        pool.preferred.store(index, Ordering::Relaxed);
                        pool.answered();
                        return Ok(reply);
                    }
                    Err(failure) => {
                        next = retry::next(&failure, ask.repeatable);
                        failures.push(failure.error);
                    }
                }
                if next != Next::Member {
                    break;
                }
            }
            let error = together(failures, &next, &ask);
            round += 1;
            let resume = Instant::now() + retry::pause(round - 1, error.retry_after);
            if next == Next::Stop || !error.is_retryable() || round >= ask.rounds || resume >= ask.deadline {
                return Err(pool.silent(error));
            }
            tokio::time::sleep_until(resume.into()).await;
        }
    }

    /// The pool of a connection, made anew if its certificate files have changed. Two callers may both make one; the
    /// later stays.
    async fn pool(&self, ask: &Ask<'_>) -> Result<Arc<Pool>, StoreError> {
        let used = self.uses.fetch_add(1, Ordering::Relaxed);
        let known = self.pools.get(ask.connection).map(|pool| Arc::clone(&pool));
        if let Some(pool) = known.as_ref().filter(|_| !tls::has_files(ask.connection)) {
            pool.used.store(used, Ordering::Relaxed);
            return Ok(Arc::clone(pool));
        }
        let (connection, reach) = (ask.connection.clone(), self.reach.clone());
        let made = tokio::task::spawn_blocking(move || {
            let stamp = tls::stamp(&connection);
            if let Some(pool) = known.as_ref().filter(|pool| pool.stamp == stamp) {
                return Ok((Arc::clone(pool), false));
            }
            match (Pool::new(&connection, &reach, stamp), known) {
                (Ok(pool), _) => Ok((Arc::new(pool), true)),
                // Files that are being replaced, or were damaged: what was trusted a moment ago still is.
                (Err(fault), Some(pool)) => {
                    tracing::warn!(
                        "certificate files cannot be used, the last good ones stay in use: {}",
                        fault.what
                    );
                    Ok((pool, false))
                }
                (Err(fault), None) => Err(fault),
            }
        });
        let (pool, new) = match timeout_at(ask.deadline.into(), made).await {
            Ok(Ok(made)) => {
                made.map_err(|fault| unasked(ask, ErrorKind::Local, &fault.what, Some(fault.remedy)))?
            }
            Ok(Err(_)) => {
                return Err(unasked(ask, ErrorKind::Local, "no connection pool could be made", None));
            }
            Err(_) => {
                let answered = "reading the certificate files took too long";
                return Err(unasked(ask, ErrorKind::Deadline, answered, None));
            }
        };
        pool.used.store(used, Ordering::Relaxed);
        if new {
            self.make_room(ask.connection);
            self.pools.insert(ask.connection.clone(), Arc::clone(&pool));
        }
        Ok(pool)
    }

    fn make_room(&self, newcomer: &Connection) {
        if self.pools.len() < MOST_POOLS || self.pools.contains_key(newcomer) {
            return;
        }
        let oldest = self
            .pools
            .iter()
            .min_by_key(|entry| entry.value().used.load(Ordering::Relaxed))
            .map(|entry| entry.key().clone());
        if let Some(oldest) = oldest {
            self.pools.remove(&oldest);
        }
    }
}

impl Pool {
    /// Blocks.
    fn new(connection: &Connection, reach: &Reach, stamp: tls::Stamp) -> Result<Self, Unusable> {
        Ok(Self {
            members: Member::all(connection, reach)?,
            preferred: AtomicUsize::new(0),
            stamp,
            used: AtomicU64::new(0),
            silent: Mutex::default(),
        })
    }

    fn answered(&self) {
        *self.silent.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Adds since when this is so. The moment and not the time that has passed: an event that is repeated stays one event.
    fn silent(&self, mut error: StoreError) -> StoreError {
        if matches!(error.kind, ErrorKind::Unreachable | ErrorKind::Unavailable | ErrorKind::Deadline) {
            let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
            match *silent {
                Some(since) => {
                    let since = humantime::format_rfc3339_seconds(since);
                    error.answered = format!("{}, since {since}", error.answered);
                }
                None => *silent = Some(SystemTime::now()),
            }
        }
        error
    }

    /// The members with their indices: the one that answered last, then the others as they were named.
    fn order(&self) -> impl Iterator<Item = (usize, &Member)> {
        let preferred = self.preferred.load(Ordering::Relaxed);
        let all = || self.members.iter().enumerate();
        all()
            .filter(move |(index, _)| *index == preferred)
            .chain(all().filter(move |(index, _)| *index != preferred))
    }
}

/// `GET https://vault:8200/v1/secret/data/app?version=3`.
fn asked(ask: &Ask<'_>, address: &crate::reference::Address) -> String {
    let query = ask.query.map(|query| format!("?{query}")).unwrap_or_default();
    super::error::one_line(&format!("{} {address}/v1/{}{query}", ask.method, ask.path))
}

fn headers(ask: &Ask<'_>) -> Result<HeaderMap, StoreError> {
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static("x-vault-request"), HeaderValue::from_static("true"));
    let mut insert = |name, value: &str, secret| {
        let mut value = HeaderValue::from_str(value).map_err(|_| {
            let answered = format!("the value of the header {name} cannot be sent");
            unasked(ask, ErrorKind::Local, &answered, Some("use visible ASCII only"))
        })?;
        // Also keeps it out of the table of the HTTP/2 header compression.
        value.set_sensitive(secret);
        headers.insert(HeaderName::from_static(name), value);
        Ok(())
    };
    if let Some(token) = ask.token {
        insert("x-vault-token", token.expose(), true)?;
    }
    if let Some(namespace) = &ask.connection.namespace {
        insert("x-vault-namespace", namespace, false)?;
    }
    if ask.body.is_some() || !matches!(ask.method, Method::GET) {
        insert("content-type", "application/json", false)?;
    }
    Ok(headers)
}

/// One error of what the members said, the others behind it: the one that stands, or else the first that may pass by
/// itself.
fn together(mut failures: Vec<StoreError>, next: &Next, ask: &Ask<'_>) -> StoreError {
    let stands = failures.pop_if(|last| *next == Next::Stop && !last.is_retryable());
    let first = failures.iter().position(StoreError::is_retryable).unwrap_or(0);
    if let Some(error) = stands {
        failures.insert(first, error);
    }
    if failures.is_empty() {
        return unasked(ask, ErrorKind::Local, "the store has no address", None);
    }
    let mut error = failures.remove(first);
    for other in failures {
        error.answered = format!("{}; also {}: {}", error.answered, other.asked, other.answered);
    }
    error
}

/// The error of a question that was never sent.
fn unasked(ask: &Ask<'_>, kind: ErrorKind, answered: &str, remedy: Option<&str>) -> StoreError {
    StoreError {
        kind,
        asked: match ask.connection.addresses.first() {
            Some(address) => asked(ask, address),
            None => format!("{} {}", ask.method, ask.path),
        },
        answered: answered.to_owned(),
        remedy: remedy.map(str::to_owned),
        retry_after: None,
    }
}

/// Statuses that another member or a later moment may change; anything else stands.
fn verdict(
    status: StatusCode,
    headers: &HeaderMap,
    body: &SecretBytes,
    ask: &Ask<'_>,
    asked: &str,
) -> Option<Failure> {
    let sealed = || {
        let text = String::from_utf8_lossy(body.expose());
        text.contains(" is sealed") || text.contains("active cluster node not found")
    };
    let (kind, may_have_acted) = match status.as_u16() {
        429 => (ErrorKind::RateLimited, false),
        412 => (ErrorKind::Unavailable, false),
        500..=599 => (ErrorKind::Unavailable, !sealed()),
        _ => return None,
    };
    let mut hidden = ask.hidden.to_vec();
    hidden.extend(ask.token.map(Token::expose));
    let answered = came_back(status.as_u16(), body.expose(), &hidden);
    let remedy = if status == StatusCode::SERVICE_UNAVAILABLE && sealed() {
        Some("the store is sealed: its operators must unseal it".to_owned())
    } else {
        None
    };
    let retry_after = headers
        .get(reqwest::header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(Duration::from_secs);
    let error = StoreError { kind, asked: asked.to_owned(), answered, remedy, retry_after };
    Some(Failure { error, may_have_acted })
}

#[cfg(test)]
mod tests;
