//! When what is due: a table of wake-ups that is cheap at any size, and the delays that go into it.
//!
//! Delays are jittered so that what began together does not stay together. A refresh is jittered *downwards*, so that a value
//! never gets older than its interval while the store answers.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::{Duration, Instant};

use rand::{Rng, RngExt as _};

/// A refresh is due after this part of the interval. The rest (5 % at least) is the time that the read itself may take.
const REFRESH: std::ops::Range<f64> = 0.80..0.95;
/// A value or a token that ends is replaced after this part of its life.
const AHEAD: std::ops::Range<f64> = 0.53..0.67;
/// The first retry follows a failure within this time; each further one doubles it.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Retries are never further apart than this, nor than the interval, but for intervals below [`SHORTEST_CAP`].
pub(super) const RETRY_CAP: Duration = Duration::from_secs(60);
/// A short interval does not make an unreachable store be asked more often than this.
const SHORTEST_CAP: Duration = Duration::from_secs(5);
/// `Retry-After` is honoured up to here.
const RETRY_AFTER_CAP: Duration = Duration::from_secs(3600);
/// Nothing repeats faster than this, whatever a store says of leases.
const FLOOR: Duration = Duration::from_millis(500);

/// What is longer is cut to this, so that no sum of moments overflows: ten years.
pub(super) const EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// From an answer to its refresh: ahead of `interval`, and ahead of the end of a `lease`. An answer with `leased` set is
/// refreshed for its lease only: reading it again makes a new secret at the store.
pub(super) fn refresh_after(
    interval: Duration,
    lease: Option<Duration>,
    leased: bool,
    rng: &mut dyn Rng,
) -> Duration {
    let regular = interval.mul_f64(rng.random_range(REFRESH));
    let delay = match lease {
        Some(lease) if leased => ahead_of(lease, rng),
        Some(lease) => regular.min(ahead_of(lease, rng)),
        None => regular,
    };
    delay.clamp(FLOOR, EVER)
}

/// From now to the replacement of what ends after `life`.
pub(super) fn ahead_of(life: Duration, rng: &mut dyn Rng) -> Duration {
    life.mul_f64(rng.random_range(AHEAD)).max(FLOOR)
}

/// From the `failures`-th failure in a row (1 is the first) to the next try of what may heal by itself.
pub(super) fn retry_after(
    failures: u32,
    interval: Duration,
    asked: Option<Duration>,
    rng: &mut dyn Rng,
) -> Duration {
    let cap = interval.clamp(SHORTEST_CAP, RETRY_CAP);
    let delay = FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(cap);
    let delay = delay.mul_f64(rng.random_range(0.5..1.0));
    match asked {
        Some(asked) if asked > delay => asked.min(RETRY_AFTER_CAP).mul_f64(rng.random_range(1.0..1.2)),
        _ => delay,
    }
}

/// From a failure that somebody must change something about to the next try: no faster than the interval.
pub(super) fn recheck_after(interval: Duration, rng: &mut dyn Rng) -> Duration {
    interval.min(EVER).mul_f64(rng.random_range(1.0..1.2)).max(FLOOR)
}

/// Wake-ups by moment, at most one per `T`: setting and taking one costs O(log n).
pub(super) struct Schedule<T> {
    queue: BTreeSet<(Instant, T)>,
    at: HashMap<T, Instant>,
}

impl<T: Copy + Ord + Hash> Schedule<T> {
    /// Nothing to wake for.
    pub(super) fn new() -> Self {
        Self { queue: BTreeSet::new(), at: HashMap::new() }
    }

    /// Sets, moves or (`None`) removes the wake-up of `what`.
    pub(super) fn set(&mut self, what: T, at: Option<Instant>) {
        let before = match at {
            Some(at) => self.at.insert(what, at),
            None => self.at.remove(&what),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.queue.remove(&(before, what));
        }
        if let Some(at) = at {
            self.queue.insert((at, what));
        }
    }

    /// Takes one that is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<T> {
        let (at, what) = *self.queue.first()?;
        if at > now {
            return None;
        }
        self.set(what, None);
        Some(what)
    }

    /// The earliest.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_refresh_is_never_later_than_the_interval_and_leaves_time_for_the_read() {
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..10_000 {
            let delay = refresh_after(MINUTE, None, false, &mut rng);
            assert!(delay >= MINUTE.mul_f64(0.8) && delay <= MINUTE.mul_f64(0.95), "{delay:?}");
        }
    }

    #[test]
    fn a_short_lease_is_refreshed_at_two_thirds_and_a_long_one_is_not_refreshed_by_interval() {
        let mut rng = SmallRng::seed_from_u64(2);
        for _ in 0..1_000 {
            let short = refresh_after(MINUTE, Some(Duration::from_secs(30)), false, &mut rng);
            assert!(short >= Duration::from_secs(15) && short <= Duration::from_secs(21), "{short:?}");
            let hint = refresh_after(MINUTE, Some(Duration::from_secs(2_764_800)), false, &mut rng);
            assert!(hint <= MINUTE, "{hint:?}");
            let leased = refresh_after(MINUTE, Some(Duration::from_secs(3_600)), true, &mut rng);
            assert!(leased > MINUTE && leased < Duration::from_secs(2_420), "{leased:?}");
        }
    }

    #[test]
    fn retries_double_from_one_second_to_the_cap_and_are_spread_by_half() {
        let mut rng = SmallRng::seed_from_u64(3);
        for failures in 1..100_u32 {
            let full = Duration::from_secs(1 << failures.saturating_sub(1).min(6)).min(MINUTE);
            let delay = retry_after(failures, Duration::from_secs(600), None, &mut rng);
            assert!(delay >= full.mul_f64(0.5) && delay <= full, "{failures}: {delay:?}");
        }
        assert!(retry_after(50, Duration::from_secs(10), None, &mut rng) <= Duration::from_secs(10));
        assert!(retry_after(50, Duration::from_secs(1), None, &mut rng) <= SHORTEST_CAP);
    }

    #[test]
    fn retry_after_is_honoured_but_not_for_ever() {
        let mut rng = SmallRng::seed_from_u64(4);
        let asked = retry_after(1, MINUTE, Some(Duration::from_secs(90)), &mut rng);
        assert!(asked >= Duration::from_secs(90) && asked <= Duration::from_secs(108));
        assert!(retry_after(1, MINUTE, Some(Duration::MAX), &mut rng) <= RETRY_AFTER_CAP.mul_f64(1.2));
    }

    #[test]
    fn a_moved_wake_up_fires_once_and_a_removed_one_never() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut schedule = Schedule::new();
        schedule.set('a', Some(at(5)));
        schedule.set('b', Some(at(1)));
        schedule.set('a', Some(at(2)));
        schedule.set('b', None);
        assert_eq!(schedule.next(), Some(at(2)));
        assert_eq!(schedule.pop(at(1)), None);
        assert_eq!(schedule.pop(at(9)), Some('a'));
        assert_eq!(schedule.pop(at(9)), None);
        assert_eq!(schedule.next(), None);
    }
}
