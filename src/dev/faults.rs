//! What goes wrong on purpose. A fault meets the requests below one path, as often as it says; the first that fits counts.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::watch;
use tokio::time::error::Elapsed;

use super::reply::{Refusal, Reply};

/// Most faults that wait for requests.
const MAX_FAULTS: usize = 1_000;

/// One thing that goes wrong, once unless [`Fault::times`] says otherwise, for any path unless [`Fault::below`] does.
///
/// Paths of the store's own controls, `sys/embedded/…`, are never met.
#[derive(Clone)]
pub struct Fault {
    act: Act,
    times: u32,
    below: String,
}

#[derive(Clone)]
enum Act {
    Status(StatusCode),
    RateLimit { retry_after: u32 },
    Garbage,
    Wait(Barrier),
}

/// Requests wait at it until it is opened or dropped, and are then answered as if nothing had been.
#[must_use = "a gate that is dropped is open"]
pub struct Gate {
    /// Its end is what opens the gate.
    _shut: watch::Sender<()>,
    waiting: Arc<watch::Sender<u64>>,
}

/// A gate as its requests see it.
#[derive(Clone)]
pub(super) struct Barrier {
    shut: watch::Receiver<()>,
    waiting: Arc<watch::Sender<u64>>,
}

/// What a request meets.
pub(super) enum Encounter {
    /// Instead of an answer.
    Answer(Reply),
    /// Before an answer.
    Wait(Barrier),
}

impl Fault {
    /// An answer with this status and an error text.
    #[must_use]
    pub fn status(status: StatusCode) -> Self {
        Self::new(Act::Status(status))
    }

    /// 429 with `Retry-After` in seconds.
    #[must_use]
    pub fn rate_limit(retry_after: u32) -> Self {
        Self::new(Act::RateLimit { retry_after })
    }

    /// 200 with a body that is no JSON.
    #[must_use]
    pub fn garbage() -> Self {
        Self::new(Act::Garbage)
    }

    /// For this many requests.
    #[must_use]
    pub fn times(self, times: u32) -> Self {
        Self { times, ..self }
    }

    /// For paths that begin so, counted from below `/v1/`: `secret/data/app`.
    #[must_use]
    pub fn below(self, path: &str) -> Self {
        Self { below: path.to_owned(), ..self }
    }

    /// Requests wait at the gate that comes with it; without [`Fault::times`], all of them.
    pub(super) fn wait() -> (Self, Gate) {
        let (sender, shut) = watch::channel(());
        let waiting = Arc::new(watch::Sender::new(0));
        let barrier = Barrier { shut, waiting: waiting.clone() };
        (Self::new(Act::Wait(barrier)).times(u32::MAX), Gate { _shut: sender, waiting })
    }

    fn new(act: Act) -> Self {
        Self { act, times: 1, below: String::new() }
    }
}

impl Gate {
    /// Waits until this many requests have come to the gate, for as long as `within`.
    ///
    /// # Errors
    /// [`Elapsed`]: fewer came.
    pub async fn arrived(&self, requests: u64, within: Duration) -> Result<(), Elapsed> {
        let mut waiting = self.waiting.subscribe();
        // The sender is this gate's own, so waiting cannot fail.
        tokio::time::timeout(within, waiting.wait_for(|count| *count >= requests)).await.map(drop)
    }

    /// Lets everybody through, now and later.
    pub fn open(self) {
        drop(self);
    }
}

impl Barrier {
    /// Returns when the gate is open.
    pub(super) async fn passed(mut self) {
        self.waiting.send_modify(|count| *count += 1);
        // Nothing is ever sent: the only change is the sender's end.
        while self.shut.changed().await.is_ok() {}
    }

    fn is_open(&self) -> bool {
        self.shut.has_changed().is_err()
    }
}

/// The faults that wait for requests.
#[derive(Default)]
pub(super) struct Faults {
    faults: Vec<Fault>,
    /// Gates that were shut over HTTP.
    held: Vec<Gate>,
}

impl Faults {
    /// Adds one behind those that wait already.
    pub(super) fn inject(&mut self, fault: Fault) -> Result<(), Refusal> {
        self.prune();
        if self.faults.len() >= MAX_FAULTS {
            return Err(Refusal::full("faults", MAX_FAULTS));
        }
        self.faults.push(fault);
        Ok(())
    }

    /// Shuts a gate whose other half stays here, until [`Faults::release`].
    pub(super) fn hang(&mut self, below: &str, times: Option<u32>) -> Result<(), Refusal> {
        if self.held.len() >= MAX_FAULTS {
            return Err(Refusal::full("gates", MAX_FAULTS));
        }
        let (fault, gate) = Fault::wait();
        let times = times.unwrap_or(fault.times);
        self.inject(fault.below(below).times(times))?;
        self.held.push(gate);
        Ok(())
    }

    /// Opens every gate that was shut over HTTP, and forgets the faults that nobody met.
    pub(super) fn release(&mut self) {
        self.held.clear();
        self.faults.retain(|fault| matches!(fault.act, Act::Wait(_)));
        self.prune();
    }

    /// What a request to this path meets.
    pub(super) fn meet(&mut self, path: &str) -> Option<Encounter> {
        self.prune();
        let fault = self.faults.iter_mut().find(|fault| path.starts_with(&fault.below))?;
        fault.times -= 1;
        Some(match &fault.act {
            Act::Wait(barrier) => Encounter::Wait(barrier.clone()),
            Act::Status(status) => Encounter::Answer(Refusal::new(*status, "injected fault").into_reply()),
            Act::RateLimit { retry_after } => {
                let refusal =
                    Refusal::new(StatusCode::TOO_MANY_REQUESTS, "request path: rate limit quota exceeded");
                Encounter::Answer(Reply { retry_after: Some(*retry_after), ..refusal.into_reply() })
            }
            Act::Garbage => Encounter::Answer(Reply {
                status: StatusCode::OK,
                body: b"<html>this is no answer".to_vec(),
                retry_after: None,
            }),
        })
    }

    fn prune(&mut self) {
        self.faults.retain(|fault| {
            let open = matches!(&fault.act, Act::Wait(barrier) if barrier.is_open());
            fault.times > 0 && !open
        });
    }
}
