//! What goes back: the API's envelope, and refusals in the API's words.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde::Serialize;
use serde_json::{Map, Value};

use super::random;

/// An answer that is ready to be sent. Its body may hold secrets, so it has no `Debug`.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Vec<u8>,
    /// Seconds of a `Retry-After` header.
    pub(super) retry_after: Option<u32>,
}

/// A refusal: a status and texts for `errors`. Texts never hold a value or a token.
#[derive(Debug, thiserror::Error)]
#[error("{} {}", status.as_u16(), errors.join(", "))]
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// What stands in `errors`; a plain 404 has none.
    pub errors: Vec<String>,
}

/// What every handler gives.
pub(super) type Outcome = Result<Reply, Refusal>;

/// The `auth` part of an answer to a login or a renewal.
#[derive(Serialize)]
pub(super) struct AuthBlock<'a> {
    pub(super) client_token: &'a str,
    pub(super) accessor: &'a str,
    pub(super) policies: &'a [String],
    pub(super) token_policies: &'a [String],
    pub(super) metadata: &'a Option<Map<String, Value>>,
    pub(super) lease_duration: u64,
    pub(super) renewable: bool,
    pub(super) entity_id: &'static str,
    pub(super) token_type: &'static str,
    pub(super) orphan: bool,
    pub(super) mfa_requirement: Option<()>,
    pub(super) num_uses: u32,
}

#[derive(Serialize)]
struct Envelope<'a, D> {
    request_id: String,
    lease_id: &'static str,
    renewable: bool,
    lease_duration: u64,
    data: Option<D>,
    wrap_info: Option<()>,
    warnings: Option<Vec<String>>,
    auth: Option<&'a AuthBlock<'a>>,
    mount_type: &'a str,
}

impl Reply {
    /// 200 with `data`.
    pub(super) fn data(mount_type: &str, data: impl Serialize) -> Outcome {
        Self::leased(mount_type, data, 0)
    }

    /// 200 with `data` and a lease duration in seconds: KV v1 names its refresh interval so.
    pub(super) fn leased(mount_type: &str, data: impl Serialize, seconds: u64) -> Outcome {
        Self::envelope(StatusCode::OK, mount_type, Some(data), seconds, None, None)
    }

    /// 404 with `data`: a version that is deleted or destroyed still has metadata.
    pub(super) fn gone(data: impl Serialize) -> Outcome {
        Self::envelope(StatusCode::NOT_FOUND, "", Some(data), 0, None, None)
    }

    /// Without data, with a warning.
    pub(super) fn warning(status: StatusCode, mount_type: &str, warning: String) -> Outcome {
        Self::envelope(status, mount_type, None::<()>, 0, Some(vec![warning]), None)
    }

    /// 200 with `auth`.
    pub(super) fn auth(mount_type: &str, auth: &AuthBlock<'_>, warnings: Option<Vec<String>>) -> Outcome {
        Self::envelope(StatusCode::OK, mount_type, None::<()>, 0, warnings, Some(auth))
    }

    /// 200 with `data`, and the same members beside the envelope's own, as older `sys` paths have them.
    pub(super) fn flat(data: Map<String, Value>) -> Outcome {
        let mut whole = data.clone();
        whole.extend([
            ("request_id".into(), random::uuid().into()),
            ("lease_id".into(), "".into()),
            ("renewable".into(), false.into()),
            ("lease_duration".into(), 0.into()),
            ("data".into(), data.into()),
            ("wrap_info".into(), Value::Null),
            ("warnings".into(), Value::Null),
            ("auth".into(), Value::Null),
            ("mount_type".into(), "system".into()),
        ]);
        Self::bare(StatusCode::OK, &whole)
    }

    /// JSON without the envelope.
    pub(super) fn bare(status: StatusCode, body: &impl Serialize) -> Outcome {
        let mut body = serde_json::to_vec(body).map_err(|error| Refusal::internal(&error.to_string()))?;
        body.push(b'\n');
        Ok(Self { status, body, retry_after: None })
    }

    /// 204.
    pub(super) fn no_content() -> Outcome {
        Ok(Self { status: StatusCode::NO_CONTENT, body: Vec::new(), retry_after: None })
    }

    fn envelope<D: Serialize>(
        status: StatusCode,
        mount_type: &str,
        data: Option<D>,
        lease_duration: u64,
        warnings: Option<Vec<String>>,
        auth: Option<&AuthBlock<'_>>,
    ) -> Outcome {
        let envelope = Envelope {
            request_id: random::uuid(),
            lease_id: "",
            renewable: false,
            lease_duration,
            data,
            wrap_info: None,
            warnings,
            auth,
            mount_type,
        };
        Self::bare(status, &envelope)
    }

    /// As HTTP.
    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl Refusal {
    /// With one text.
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, errors: vec![error.into()] }
    }

    /// 400.
    pub(super) fn bad(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    /// 404 without a text: there is nothing here.
    pub(super) fn missing() -> Self {
        Self { status: StatusCode::NOT_FOUND, errors: Vec::new() }
    }

    /// 403 as for a request without a token.
    pub(super) fn denied() -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission denied")
    }

    /// 403 for a token that is unknown, revoked or expired.
    pub(super) fn invalid_token() -> Self {
        Self::new(StatusCode::FORBIDDEN, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")
    }

    /// 403 of a good token whose policies do not reach.
    pub(super) fn forbidden() -> Self {
        Self::new(StatusCode::FORBIDDEN, "1 error occurred:\n\t* permission denied\n\n")
    }

    /// 404 of a path that no mount has.
    pub(super) fn no_route(path: &str) -> Self {
        let text = format!("no handler for route \"{path}\". route entry not found.");
        Self::new(StatusCode::NOT_FOUND, text)
    }

    /// 404 of a path that its mount does not have.
    pub(super) fn unsupported_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, "1 error occurred:\n\t* unsupported path\n\n")
    }

    /// 405.
    pub(super) fn unsupported_operation() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "1 error occurred:\n\t* unsupported operation\n\n")
    }

    /// 500.
    pub(super) fn internal(error: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error)
    }

    /// 500 when one of the bounded tables is full.
    pub(super) fn full(what: &str, limit: usize) -> Self {
        Self::internal(&format!("the embedded store is full: it keeps at most {limit} {what}"))
    }

    /// As an answer.
    pub(super) fn into_reply(self) -> Reply {
        let body = serde_json::json!({ "errors": self.errors }).to_string().into_bytes();
        Reply { status: self.status, body, retry_after: None }
    }
}
