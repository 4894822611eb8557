//! For how long a thread has been at one thing: two atomic stores per thing, and a load for whoever wants to know that it moves.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Since when, in milliseconds of the process's own clock; 0: at nothing.
#[derive(Default)]
pub(super) struct Busy(AtomicU64);

impl Busy {
    /// Does one thing.
    pub(super) fn while_in<R>(&self, work: impl FnOnce() -> R) -> R {
        self.0.store(now() + 1, Ordering::Relaxed);
        let result = work();
        self.0.store(0, Ordering::Relaxed);
        result
    }

    /// How long it has been at the present thing.
    #[must_use]
    pub(super) fn lasts(&self) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_millis((now() + 1).saturating_sub(since)),
        }
    }
}

fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_goes_on_lasts() {
        let busy = Busy::default();
        busy.while_in(|| {
            let start = Instant::now();
            while busy.lasts() < Duration::from_millis(2) {
                assert!(start.elapsed() < Duration::from_secs(5));
            }
        });
        assert_eq!(busy.lasts(), Duration::ZERO);
    }
}
