//! Read 1: the store. `Store` is what the cache asks; `vault::Vault` speaks the HashiCorp Vault HTTP API to any server
//! that has it.
//!
//! Every call gets the moment by which its caller needs an answer. Inside it a store may retry as it sees fit;
//! past it, it answers `ErrorKind::Deadline`. Calls are safe to repeat.

/// The answer's JSON: which kind of secret it is, which key, which encoding.
pub mod answer;
/// What came back instead, in words that say what to change.
pub mod error;
/// One connection pool per [`crate::reference::Connection`]: TLS, deadlines, redirects, size cap.
mod http;
/// Which request a login is, per method.
mod login;
/// What to change, for what came back.
mod remedy;
/// When to ask again, and how long to wait before.
mod retry;
/// The Vault API.
pub mod vault;

/// A scripted server for the tests of this module.
#[cfg(test)]
mod testing;

/// A store that does what a scenario says.
#[cfg(test)]
pub(crate) mod scripted;

pub use error::{ErrorKind, StoreError};
pub use http::reach::Reach;

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use crate::reference::{Identity, Request};
use crate::secret::{SecretBytes, Token};

/// The secret half of a login: never part of a key, never printed.
pub enum Credential {
    /// A service account's or other JWT.
    Jwt(Token),
    /// A file with a JWT, read at each login.
    JwtFile(PathBuf),
    /// AppRole: a file with the secret id, read at each login; `None` for roles that bind none.
    SecretIdFile(Option<PathBuf>),
    /// A store token.
    Token(Token),
    /// A file with a store token, read at each login, so that a rewritten file is picked up.
    TokenFile(PathBuf),
}

/// What a login gives.
pub struct Login {
    /// The store's token.
    pub token: Token,
    /// Whether [`Store::renew`] may prolong it.
    pub renewable: bool,
    /// How long it lives from now; `None`: for ever.
    pub ttl: Option<Duration>,
}

/// The lease of an answer: part of every value from the first day, even where it is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// The lease's id; `None` for values that are not leased (KV).
    pub id: Option<String>,
    /// How long the value is good, from when it was read; `None`: the store does not say.
    pub duration: Option<Duration>,
    /// Whether it may be renewed.
    pub renewable: bool,
}

/// One secret as the store gave it.
pub struct Answer {
    /// The response's JSON text, whole. See [`answer::extract`].
    pub body: SecretBytes,
    /// Its lease.
    pub lease: Lease,
    /// KV v2: the version.
    pub version: Option<u64>,
    /// KV v2: when that version was written.
    pub created: Option<SystemTime>,
}

/// A store. The cache is its only caller: one call in flight per identity's login and per key.
pub trait Store: Send + Sync + 'static {
    /// Trades a credential for a token.
    fn login(
        &self,
        identity: &Identity,
        credential: &Credential,
        deadline: Instant,
    ) -> impl Future<Output = Result<Login, StoreError>> + Send;

    /// Prolongs a token that is renewable. Called before its end.
    fn renew(
        &self,
        identity: &Identity,
        token: &Token,
        deadline: Instant,
    ) -> impl Future<Output = Result<Login, StoreError>> + Send;

    /// Reads one secret. A 403 is answered at once ([`StoreError::is_denied`]): the caller logs in again and asks once more.
    fn read(
        &self,
        identity: &Identity,
        token: &Token,
        request: &Request,
        deadline: Instant,
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send;

    /// Gives a token back that a login of ours made. Best effort. Never called for a [`Credential::Token`] or
    /// [`Credential::TokenFile`]: that token is somebody else's, and its holder goes on using it.
    fn revoke(
        &self,
        identity: &Identity,
        token: &Token,
        deadline: Instant,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;
}
