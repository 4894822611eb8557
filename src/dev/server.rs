//! HTTP: a request becomes an [`Ask`], meets the faults, and is answered from the [`State`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::body::{Body, to_bytes};
use axum::extract::{self, Request};
use axum::http::{HeaderMap, Response, StatusCode};
use percent_encoding::percent_decode_str;
use tokio::sync::watch;

use super::ask::{Ask, Operation};
use super::counts::Counts;
use super::faults::{Encounter, Fault, Faults};
use super::reply::{Outcome, Refusal, Reply};
use super::state::State;
use crate::secret::{SecretBytes, Token};

/// Largest body of a request in bytes; the real server's default.
const MAX_BODY: usize = 32 << 20;

/// What all connections share. Each lock is held for the time of one request's arithmetic, never across an await.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) faults: Mutex<Faults>,
    pub(super) counts: Mutex<Counts>,
    /// How far the store's clock is ahead of the system's.
    pub(super) ahead: Mutex<Duration>,
    /// Turns true when the server stops.
    pub(super) stop: watch::Sender<bool>,
}

impl Shared {
    /// The store's time.
    pub(super) fn now(&self) -> SystemTime {
        SystemTime::now() + *lock(&self.ahead)
    }
}

/// A lock; a panic of another holder changes nothing, as every table is whole between two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers every request, of whatever method and path.
pub(super) async fn handle(
    extract::State(shared): extract::State<Arc<Shared>>,
    request: Request,
) -> Response<Body> {
    let outcome = answer(&shared, request).await;
    outcome.unwrap_or_else(Refusal::into_reply).into_response()
}

async fn answer(shared: &Shared, request: Request) -> Outcome {
    let (head, body) = request.into_parts();
    let path = head.uri.path().strip_prefix("/v1/").ok_or_else(Refusal::missing)?;
    let path = percent_decode_str(path).decode_utf8().map_err(|_| Refusal::bad("the path is not UTF-8"))?;
    let query: Vec<(String, String)> =
        url::form_urlencoded::parse(head.uri.query().unwrap_or("").as_bytes()).into_owned().collect();
    let operation = Ask::operation(&head.method, &query)?;
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    const MERGE_PATCH: &str = "application/merge-patch+json";
    let content_type = header("content-type").unwrap_or_default();
    if operation == Operation::Patch && content_type != MERGE_PATCH {
        let text = format!("PATCH requires Content-Type of {MERGE_PATCH}, provided {content_type}");
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
    }
    let controls = path.strip_prefix("sys/embedded/");
    if controls.is_none() {
        let namespace = header("x-vault-namespace").filter(|name| !name.is_empty());
        lock(&shared.counts).count(operation, &path, namespace);
        let encounter = lock(&shared.faults).meet(&path);
        match encounter {
            None => {}
            Some(Encounter::Answer(reply)) => return Ok(reply),
            Some(Encounter::Wait(barrier)) => {
                let mut stop = shared.stop.subscribe();
                tokio::select! {
                    () = barrier.passed() => {}
                    _ = stop.wait_for(|stopped| *stopped) => {
                        return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"));
                    }
                }
            }
        }
    }
    let body = to_bytes(body, MAX_BODY).await;
    let body =
        body.map_err(|_| Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "http: request body too large"))?;
    let ask = Ask {
        operation,
        query,
        // The bytes are the connection's alone by now, so this takes them over without a copy.
        body: SecretBytes::new(body.into()),
        token: token(&head.headers)?,
        now: shared.now(),
        path: path.clone().into_owned(),
    };
    match controls {
        Some(control) => self::control(shared, &ask, control),
        None => lock(&shared.state).answer(&ask),
    }
}

/// `X-Vault-Token`, or a bearer.
fn token(headers: &HeaderMap) -> Result<Option<Token>, Refusal> {
    let bearer = |value: &str| value.strip_prefix("Bearer ").map(str::to_owned);
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let given = text("x-vault-token").map(str::to_owned).or_else(|| text("authorization").and_then(bearer));
    given
        .filter(|text| !text.is_empty())
        .map(|text| Token::new(text).map_err(|_| Refusal::invalid_token()))
        .transpose()
}

/// `sys/embedded/…`, for root tokens only.
fn control(shared: &Shared, ask: &Ask, path: &str) -> Outcome {
    let caller = ask.token.as_ref().ok_or_else(Refusal::denied)?;
    let is_root = lock(&shared.state).tokens.holder(caller.expose(), ask.now).is_some_and(|h| h.is_root());
    if !is_root {
        return Err(Refusal::forbidden());
    }
    if path == "counts" && ask.operation == Operation::Read {
        let counts = lock(&shared.counts).clone();
        return Reply::data("embedded", counts);
    }
    if ask.operation != Operation::Write {
        return Err(Refusal::unsupported_operation());
    }
    let fields = ask.fields()?;
    let number = |name: &str| -> Result<Option<u32>, Refusal> {
        let number = fields.number(name)?.map(u32::try_from).transpose();
        number.map_err(|_| Refusal::bad(format!("{name} is too large")))
    };
    let below = fields.text("path").unwrap_or_default();
    let times = number("times")?;
    let inject = |fault: Fault| lock(&shared.faults).inject(fault.below(below).times(times.unwrap_or(1)));
    match path {
        "fail" => {
            let status = fields.number("status")?.map_or(Ok(500), u16::try_from).ok();
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            inject(Fault::status(status.ok_or_else(|| Refusal::bad("status is no HTTP status"))?))?;
        }
        "rate-limit" => inject(Fault::rate_limit(number("retry_after")?.unwrap_or(1)))?,
        "garbage" => inject(Fault::garbage())?,
        "hang" => lock(&shared.faults).hang(below, times)?,
        "release" => lock(&shared.faults).release(),
        "seal" => lock(&shared.state).sealed = true,
        "unseal" => lock(&shared.state).sealed = false,
        _ => return Err(Refusal::unsupported_path()),
    }
    Reply::no_content()
}
