//! When to ask again, and how long to wait before. One *round* asks each member of the cluster at most once; between
//! rounds there is a pause that doubles, with jitter, so that agents that failed together do not come back together.
//!
//! | what happened | next |
//! |---|---|
//! | no connection, bad certificate, 5xx, sealed, 412, no answer in time | the next member, then a pause |
//! | 429 | a pause of at least `Retry-After` |
//! | anything else | the answer stands |
//!
//! A question that changes something (POST, PUT) is asked again only if it was surely not acted upon.

use std::time::Duration;

use super::{ErrorKind, StoreError};

/// Rounds of one call: with the pauses below about two seconds in all. Beyond that the cache's own schedule takes over,
/// and a publish fails while its cause is still worth reading.
pub(super) const ROUNDS: u32 = 4;

/// The first pause, before jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause before jitter, whatever the round.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// One exchange that gave no answer that stands.
pub(super) struct Failure {
    /// What happened.
    pub(super) error: StoreError,
    /// Whether the store may have acted on the question.
    pub(super) may_have_acted: bool,
}

/// What to do after a failure.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask the next member, and pause when there is none.
    Member,
    /// Pause before anybody is asked.
    Pause,
    /// Give up.
    Stop,
}

/// What to do after `failure` of a question that may (`repeatable`) or may not be acted upon twice.
pub(super) fn next(failure: &Failure, repeatable: bool) -> Next {
    if failure.may_have_acted && !repeatable {
        return Next::Stop;
    }
    match failure.error.kind {
        ErrorKind::Unreachable | ErrorKind::Unavailable | ErrorKind::Certificate => Next::Member,
        ErrorKind::RateLimited => Next::Pause,
        _ => Next::Stop,
    }
}

/// The pause after round `round` (from 0): half to all of the doubled time, and no less than the store asked for.
pub(super) fn pause(round: u32, retry_after: Option<Duration>) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << round.min(16)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::random_range(0.5..=1.0)).max(retry_after.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: ErrorKind, may_have_acted: bool) -> Failure {
        let error = StoreError {
            kind,
            asked: String::new(),
            answered: String::new(),
            remedy: None,
            retry_after: None,
        };
        Failure { error, may_have_acted }
    }

    #[test]
    fn what_may_have_been_acted_upon_is_not_asked_twice_unless_it_is_repeatable() {
        assert_eq!(next(&failure(ErrorKind::Unavailable, true), true), Next::Member);
        assert_eq!(next(&failure(ErrorKind::Unavailable, true), false), Next::Stop);
        assert_eq!(next(&failure(ErrorKind::Unreachable, false), false), Next::Member);
    }

    #[test]
    fn answers_that_stand_are_not_asked_again() {
        for kind in [ErrorKind::Denied, ErrorKind::Missing, ErrorKind::Refused, ErrorKind::Malformed] {
            assert_eq!(next(&failure(kind, true), true), Next::Stop);
        }
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_respect_the_store() {
        for round in 0..40 {
            let limit = Duration::from_millis(250 << round.min(10)).min(LONGEST_PAUSE);
            let pause = pause(round, None);
            assert!(pause >= limit / 2 && pause <= limit, "round {round}: {pause:?}");
        }
        assert!(pause(0, Some(Duration::from_secs(7))) >= Duration::from_secs(7));
    }
}
