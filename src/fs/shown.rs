//! The switch rule: which generation a live inode shows.
//!
//! `fstat(2)` reaches a file system without a handle, so its answer can only follow the inode. An application that opens,
//! asks for the size and reads that many bytes must not be given the size of one version and the bytes of another. So:
//!
//! ```text
//!            a generation with other bytes comes
//!   Settled ─────────────────────────────────────▶ Lagging
//!      ▲                                              │  looked at, the kernel has acknowledged the new generation, and
//!      │                                              │  nobody opened it for QUIET; or it has lagged for LATEST, or what
//!      └──────────────────────────────────────────────┘  it shows is gone
//! ```
//! While it lags, opens pin the older generation (they see one version, whole), and attributes are not to be cached. Without
//! the acknowledgement an open could pin the new bytes while the kernel still answers `fstat` with the old size.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::time::Moment;
use crate::volume::{Generation, Generations};

/// An open this long ago has done its `fstat`.
pub const QUIET: Duration = Duration::from_millis(100);
/// However often a file is opened, a new generation takes over after this time.
pub const LATEST: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
struct State {
    /// The generation that is shown; 0 before the first look.
    generation: u32,
    last_open: Option<Moment>,
    /// Since when a generation with other bytes is known.
    lagging: Option<Moment>,
}

/// A look at a live file.
#[derive(Clone, Copy)]
pub struct Look {
    /// Which file of the spec.
    pub index: usize,
    /// When.
    pub now: Moment,
    /// Whether to open it.
    pub opening: bool,
    /// Whether the kernel has given up what it believed before the newest generation.
    pub acknowledged: bool,
}

/// Which generation one live file shows.
pub struct Shown(Mutex<State>);

impl Shown {
    /// Shows what a predecessor showed; 0: nothing was shown yet. Of that one's opens nothing is known: the last may have been
    /// just now.
    #[must_use]
    pub fn new(generation: u32, now: Moment) -> Self {
        let last_open = (generation != 0).then_some(now);
        Self(Mutex::new(State { generation, last_open, lagging: None }))
    }

    /// Applies the rule: the generation to show, and whether its bytes are others than before.
    #[must_use]
    pub fn decide(
        &self,
        look: Look,
        current: &Arc<Generation>,
        kept: &Generations,
    ) -> (Arc<Generation>, bool) {
        let Look { index, now, opening, acknowledged } = look;
        let mut state = self.state();
        let last_open = state.last_open;
        if opening {
            state.last_open = Some(now);
        }
        // `current` may have been read before somebody else's newer one was shown here: never go back.
        if state.generation >= current.number() {
            let generation = kept.find(state.generation).unwrap_or_else(|| Arc::clone(current));
            return (generation, false);
        }
        let shown = kept.find(state.generation);
        let same_bytes = shown.as_ref().is_some_and(|shown| shown.since(index) == current.since(index));
        if let (Some(shown), false) = (shown, same_bytes) {
            let lagging = *state.lagging.get_or_insert(now);
            let quiet = last_open.is_none_or(|open| now.since(open) >= QUIET);
            if !(quiet && acknowledged) && now.since(lagging) < LATEST {
                return (shown, false);
            }
        }
        let switched = state.generation != 0 && !same_bytes;
        state.generation = current.number();
        kept.opens().show(index, current.number());
        state.lagging = None;
        (Arc::clone(current), switched)
    }

    /// The generation that is shown, as it is; the newest if none was yet or it is gone.
    #[must_use]
    pub fn generation(&self, kept: &Generations) -> Option<Arc<Generation>> {
        let number = self.state().generation;
        kept.find(number).or_else(|| kept.current())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
