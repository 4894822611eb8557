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
    /// There is no room for the answer on this side.
    Full,
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

/// Something on this side that cannot be used (a file, a certificate, a setting), and what to change.
pub(super) struct Unusable {
    pub(super) what: String,
    pub(super) remedy: &'static str,
}

/// Longest text of a store's that is repeated: enough for every sentence of Vault's, short enough for one event.
const LONGEST_QUOTE: usize = 300;

/// What came back, for people: `403 (permission denied)`. Only the API's `errors` are quoted, which its makers promise to
/// keep free of secrets; should one of `hidden` stand in them all the same, it is replaced.
pub(super) fn came_back(status: u16, body: &[u8], hidden: &[&str]) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        #[serde(default)]
        errors: Vec<String>,
    }
    let errors = serde_json::from_slice::<Errors>(body).map(|body| body.errors).unwrap_or_default();
    let mut quote = errors.iter().map(|error| one_line(error)).collect::<Vec<_>>().join(", ");
    for secret in hidden.iter().filter(|secret| !secret.is_empty()) {
        quote = quote.replace(secret, "[hidden]");
    }
    if let Some((end, _)) = quote.char_indices().nth(LONGEST_QUOTE) {
        quote.truncate(end);
        quote.push('…');
    }
    if quote.is_empty() { status.to_string() } else { format!("{status} ({quote})") }
}

/// A text on one line: blanks and control characters become one space, and the bullets of Vault's error lists commas.
pub(super) fn one_line(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.split_once(" occurred: * ") {
        Some((count, errors)) if count.ends_with("error") || count.ends_with("errors") => {
            errors.replace(" * ", ", ")
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_errors_become_one_line() {
        let body =
            br#"{"errors":["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n","more"]}"#;
        assert_eq!(came_back(403, body, &[]), "403 (permission denied, invalid token, more)");
    }

    #[test]
    fn a_secret_in_an_error_is_hidden_and_long_errors_are_cut() {
        let body = br#"{"errors":["token hvs.abc is bad"]}"#;
        assert_eq!(came_back(400, body, &["", "hvs.abc"]), "400 (token [hidden] is bad)");
        let long = format!(r#"{{"errors":["{}"]}}"#, "é".repeat(1000));
        assert_eq!(came_back(500, long.as_bytes(), &[]), format!("500 ({}…)", "é".repeat(300)));
    }

    #[test]
    fn what_is_not_the_apis_json_is_not_quoted() {
        assert_eq!(came_back(502, b"<html>s3cret</html>", &[]), "502");
        assert_eq!(came_back(404, br#"{"errors":[]}"#, &[]), "404");
    }
}
