//! Waiting for conditions, with deadlines.

use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longest wait for what is to come at once.
pub const SOON: Duration = Duration::from_secs(10);

/// Probes until there is an answer.
///
/// # Panics
/// There is none `within` that time.
pub fn until<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < end, "{what}: not within {within:?}");
        pause(Duration::from_millis(5));
    }
}

/// Probes until it holds.
///
/// # Panics
/// It does not `within` that time.
pub fn until_true(what: &str, within: Duration, mut probe: impl FnMut() -> bool) {
    until(what, within, || probe().then_some(()));
}

/// The time between two probes, or two events of a scripted load: never a way to wait for something.
pub fn pause(time: Duration) {
    let (_nobody_sends, nothing) = mpsc::channel::<()>();
    let _ = nothing.recv_timeout(time);
}
