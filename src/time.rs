//! Time as it is passed in. State machines here never ask a clock: their driver does, and hands them a `Moment`.

use std::time::{Duration, Instant, SystemTime};

/// One moment on both clocks: the monotonic one for intervals and deadlines, the wall clock for what people and
/// `stat(2)` see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For differences; never goes backwards.
    pub monotonic: Instant,
    /// For display and for `mtime`; may jump.
    pub wall: SystemTime,
}

impl Moment {
    /// The present, read from the system's clocks.
    #[must_use]
    pub fn now() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }

    /// Time gone by since `earlier`; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.monotonic.saturating_duration_since(earlier.monotonic)
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self { monotonic: self.monotonic + by, wall: self.wall + by }
    }
}
