//! The Vault API: `Store` over HTTP. What is asked stands here, how it travels in `super::http`, what the answer
//! means in `super::answer` and `super::login`, and what people read when it fails in `super::remedy`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method as Verb, StatusCode};

use super::answer::{self, ParseError};
use super::error::{Unusable, came_back, one_line};
use super::http::{Ask, Http, Reply};
use super::login::{self, Question};
use super::remedy::{self, Mount};
use super::{Answer, Credential, ErrorKind, Login, Reach, Store, StoreError, retry};
use crate::metrics::Metrics;
use crate::reference::{Identity, Method, Request};
use crate::secret::{SecretBytes, Token};

/// How long the mount of a 404 is asked for: it only improves the wording.
const WORDING_TIME: Duration = Duration::from_secs(2);

/// A store that speaks the HashiCorp Vault HTTP API: Vault, OpenBao, Stronghold. One per agent; holds the connection
/// pools and no secret.
pub struct Vault {
    http: Http,
    metrics: Arc<Metrics>,
}

impl Vault {
    /// A client without connections; they are made when they are first needed.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self::within(metrics, Reach::anywhere())
    }

    /// The same for whoever asks on behalf of others.
    #[must_use]
    pub fn within(metrics: Arc<Metrics>, reach: Reach) -> Self {
        Self { http: Http::new(Arc::clone(&metrics), reach), metrics }
    }

    async fn missing(
        &self,
        identity: &Identity,
        token: &Token,
        request: &Request,
        deadline: Instant,
        reply: Reply,
    ) -> StoreError {
        if let Some(obituary) = answer::obituary(reply.body.expose()) {
            let remedy =
                "write a new version, undelete this one, or ask for another with ?version=N".to_owned();
            let error = fault(&reply, ErrorKind::Missing, &[token.expose()], Some(remedy));
            return StoreError { answered: format!("404 ({obituary})"), ..error };
        }
        let path = format!("sys/internal/ui/mounts/{}", request.path);
        let ask = Ask {
            rounds: 1,
            deadline: deadline.min(Instant::now() + WORDING_TIME),
            ..ask(identity, Verb::GET, &path, Some(token), deadline)
        };
        let mount = match self.http.ask(ask).await {
            Ok(reply) if reply.status.is_success() => Mount::parse(reply.body.expose()),
            // The answer stays a 404 either way; the text then says that the mount is not to be seen.
            Ok(_) | Err(_) => None,
        };
        fault(&reply, ErrorKind::Missing, &[token.expose()], Some(remedy::missing(request, mount.as_ref())))
    }
}

impl Store for Vault {
    async fn login(
        &self,
        identity: &Identity,
        credential: &Credential,
        deadline: Instant,
    ) -> Result<Login, StoreError> {
        self.metrics.store_logins.increment();
        let local = |fault: Unusable| StoreError {
            kind: ErrorKind::Local,
            asked: format!("log in at {}", addresses(identity)),
            answered: fault.what,
            remedy: Some(fault.remedy.to_owned()),
            retry_after: None,
        };
        let limit =
            tokio::time::timeout_at(deadline.into(), login::question(&identity.auth, credential)).await;
        let question = limit.unwrap_or(Err(Unusable {
            what: "reading the credential file took too long".to_owned(),
            remedy: "check the file system that it is on",
        }));
        match question.map_err(local)? {
            Question::Login { path, body, credential } => {
                let hidden: Vec<_> = credential.iter().map(Token::expose).collect();
                let ask = Ask {
                    body: Some(body),
                    hidden: &hidden,
                    ..ask(identity, Verb::POST, &path, None, deadline)
                };
                let reply = self.http.ask(ask).await?;
                accepted(&reply, &hidden, || Some(remedy::login(identity, reply.status.as_u16())))?;
                login::granted(reply.body.expose()).ok_or_else(|| tokenless(&reply, &hidden))
            }
            Question::Lookup { token } => {
                let ask = ask(identity, Verb::GET, "auth/token/lookup-self", Some(&token), deadline);
                let reply = self.http.ask(ask).await?;
                let remedy = || Some(remedy::login(identity, reply.status.as_u16()));
                accepted(&reply, &[token.expose()], remedy)?;
                login::looked_up(reply.body.expose(), token).ok_or_else(|| tokenless(&reply, &[]))
            }
        }
    }

    async fn renew(
        &self,
        identity: &Identity,
        token: &Token,
        deadline: Instant,
    ) -> Result<Login, StoreError> {
        self.metrics.store_renewals.increment();
        let ask = Ask {
            body: Some(SecretBytes::new(b"{}".to_vec())),
            ..ask(identity, Verb::POST, "auth/token/renew-self", Some(token), deadline)
        };
        let reply = self.http.ask(ask).await?;
        accepted(&reply, &[token.expose()], || None)?;
        login::granted(reply.body.expose()).ok_or_else(|| tokenless(&reply, &[token.expose()]))
    }

    async fn read(
        &self,
        identity: &Identity,
        token: &Token,
        request: &Request,
        deadline: Instant,
    ) -> Result<Answer, StoreError> {
        self.metrics.store_reads.increment();
        let verb = match request.method {
            Method::Get => Verb::GET,
            Method::Post => Verb::POST,
            Method::Put => Verb::PUT,
        };
        let args = request.args.as_deref().unwrap_or("{}");
        let ask = Ask {
            query: request.query.as_deref(),
            body: (verb != Verb::GET).then(|| SecretBytes::new(args.as_bytes().to_vec())),
            repeatable: verb == Verb::GET,
            ..ask(identity, verb, &request.path, Some(token), deadline)
        };
        let reply = self.http.ask(ask).await?;
        let hidden = [token.expose()];
        match reply.status {
            status if status.is_success() => {
                let Reply { asked, status, body } = reply;
                answer::parse(body).map_err(|error| unusable(asked, status, &error))
            }
            StatusCode::NOT_FOUND => Err(self.missing(identity, token, request, deadline, reply).await),
            StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => {
                Err(fault(&reply, ErrorKind::Denied, &hidden, Some(remedy::denied(identity, request))))
            }
            _ => Err(fault(&reply, ErrorKind::Refused, &hidden, None)),
        }
    }

    async fn revoke(&self, identity: &Identity, token: &Token, deadline: Instant) -> Result<(), StoreError> {
        let ask = Ask {
            body: Some(SecretBytes::new(b"{}".to_vec())),
            ..ask(identity, Verb::POST, "auth/token/revoke-self", Some(token), deadline)
        };
        let reply = self.http.ask(ask).await?;
        accepted(&reply, &[token.expose()], || None)
    }
}

/// A question as most are: repeatable, without query and body.
fn ask<'a>(
    identity: &'a Identity,
    method: Verb,
    path: &'a str,
    token: Option<&'a Token>,
    deadline: Instant,
) -> Ask<'a> {
    Ask {
        connection: &identity.connection,
        method,
        path,
        query: None,
        token,
        body: None,
        hidden: &[],
        repeatable: true,
        rounds: retry::ROUNDS,
        deadline,
    }
}

/// Whether a login, renewal or revocation was accepted.
fn accepted(
    reply: &Reply,
    hidden: &[&str],
    remedy: impl FnOnce() -> Option<String>,
) -> Result<(), StoreError> {
    let kind = match reply.status {
        status if status.is_success() => return Ok(()),
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => ErrorKind::Denied,
        StatusCode::NOT_FOUND => ErrorKind::Missing,
        _ => ErrorKind::Refused,
    };
    Err(fault(reply, kind, hidden, remedy()))
}

/// The error of a login that was accepted and gave no token.
fn tokenless(reply: &Reply, hidden: &[&str]) -> StoreError {
    let remedy = "check that this is a store of the Vault API and that the login asks for no second factor";
    let error = fault(reply, ErrorKind::Malformed, hidden, Some(remedy.to_owned()));
    StoreError { answered: format!("{} without a token", error.answered), ..error }
}

/// The error of an answer that stands.
fn fault(reply: &Reply, kind: ErrorKind, hidden: &[&str], remedy: Option<String>) -> StoreError {
    let speaks_tls = reply.body.expose().starts_with(b"Client sent an HTTP request to an HTTPS server");
    let remedy =
        if speaks_tls { Some("the store speaks TLS there: write https://".to_owned()) } else { remedy };
    StoreError {
        kind,
        asked: reply.asked.clone(),
        answered: came_back(reply.status.as_u16(), reply.body.expose(), hidden),
        remedy: remedy.map(|text| one_line(&text)),
        retry_after: None,
    }
}

fn unusable(asked: String, status: StatusCode, error: &ParseError) -> StoreError {
    let (kind, remedy) = match error {
        ParseError::NotJson => (
            ErrorKind::Malformed,
            "check that the address is that of a store of the Vault API, and that the path gives a secret",
        ),
        ParseError::Empty | ParseError::NoData { .. } => {
            (ErrorKind::Missing, "check that this path gives a secret when it is asked in this way")
        }
    };
    let answered = format!("{} with {error}", status.as_u16());
    StoreError { kind, asked, answered, remedy: Some(remedy.to_owned()), retry_after: None }
}

fn addresses(identity: &Identity) -> String {
    identity.connection.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
