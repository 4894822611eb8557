//! What came back instead of a secret: what was asked of which address, what was answered, what to change. Never a value
//! or a token.

use std::time::Duration;

/// The classes of failure that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No connection: refused, unreachable, name not found.
    Unreachable,
    /// The TLS handshake failed: whose certificate, and why.
    Certificate,
    /// 403 or 401.
    Denied,
    /// 404, also of a deleted version.
    Missing,
    /// 400 and what else is the question's fault.
    Refused,
    /// 429.
    RateLimited,
    /// 5xx, 412, sealed, standby without a leader.
    Unavailable,
    /// The answer is not what the API promises, or is too large.
    Malformed,
    /// A local credential or certificate file cannot be used.
    Local,
    /// The caller's deadline passed.
    Deadline,
}

/// One failed call. Its text is one line: `asked: came back; remedy`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{asked}: {answered}{}", remedy.as_ref().map(|text| format!("; {text}")).unwrap_or_default())]
pub struct StoreError {
    /// The class.
    pub kind: ErrorKind,
    /// What was asked of which address: `GET https://vault:8200/v1/secret/data/app`.
    pub asked: String,
    /// What came back: `404`, `connection refused`, `503 (sealed)`.
    pub answered: String,
    /// What to change; `None` where nothing better than the answer can be said.
    pub remedy: Option<String>,
    /// `Retry-After` of the answer.
    pub retry_after: Option<Duration>,
}

impl StoreError {
    /// Whether a new login may help.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.kind == ErrorKind::Denied
    }

    /// Whether the same question may be answered later without anybody changing anything.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::Unreachable | ErrorKind::RateLimited | ErrorKind::Unavailable | ErrorKind::Deadline
        )
    }
}
