//! A volume's generations: the newest, the one before it, and at most `OLDER` older ones on which a handle is open.
//!
//! ```text
//!   install ──▶ current ──install──▶ previous ──install──▶ older (while open) ──last release, or too many──▶ gone
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::snapshot::Snapshot;
use crate::time::Moment;

/// How many generations before the previous one are kept for handles that are open on them. Beyond, the oldest goes and
/// its readers get ESTALE: memory stays bounded, however often a secret rotates under a file that is never closed.
pub const OLDER: usize = 8;

/// One generation: a snapshot, when it was installed, and how many handles are open on it.
pub struct Generation {
    /// The files' bytes.
    pub snapshot: Snapshot,
    /// When it became the current one.
    pub installed: Moment,
    /// Per file, the generation in which its bytes last changed.
    since: Vec<u32>,
    open: AtomicU32,
}

impl Generation {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.snapshot.generation()
    }

    /// The generation in which the bytes of a file last changed: equal numbers are equal bytes.
    #[must_use]
    pub fn since(&self, file: usize) -> u32 {
        self.since.get(file).copied().unwrap_or_else(|| self.number())
    }

    /// Handles open on it.
    #[must_use]
    pub fn open_handles(&self) -> u32 {
        self.open.load(Ordering::Acquire)
    }
}

/// The kept generations, oldest first.
#[derive(Default)]
pub struct Generations {
    kept: RwLock<Vec<Arc<Generation>>>,
}

impl Generations {
    /// The newest; `None` before the first.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Generation>> {
        self.read().last().cloned()
    }

    /// The one with this number, if it is still kept.
    #[must_use]
    pub fn find(&self, number: u32) -> Option<Arc<Generation>> {
        // Newest first: nearly every handle is on the newest.
        self.read().iter().rev().find(|generation| generation.number() == number).cloned()
    }

    /// The numbers of those kept, oldest first.
    #[must_use]
    pub fn numbers(&self) -> Vec<u32> {
        self.read().iter().map(|generation| generation.number()).collect()
    }

    /// Makes a snapshot the current generation. Returns the numbers of those that went, and whether each still had an open
    /// handle. With `forget_older`, all earlier ones go: their values must not be served any more.
    pub fn install(
        &self,
        snapshot: Snapshot,
        since: Vec<u32>,
        now: Moment,
        forget_older: bool,
    ) -> Vec<(u32, bool)> {
        let mut kept = self.write();
        let mut gone = if forget_older { std::mem::take(&mut *kept) } else { Vec::new() };
        kept.push(Arc::new(Generation { snapshot, installed: now, since, open: AtomicU32::new(0) }));
        gone.extend(prune(&mut kept));
        drop(kept);
        gone.iter().map(|generation| (generation.number(), generation.open_handles() > 0)).collect()
    }

    /// Counts a handle on a generation; `None`: it is gone. Counted under the lock, so that no `install` can drop it between.
    #[must_use]
    pub fn open(&self, number: u32) -> Option<Arc<Generation>> {
        let kept = self.read();
        let generation = kept.iter().rev().find(|generation| generation.number() == number)?;
        generation.open.fetch_add(1, Ordering::AcqRel);
        Some(Arc::clone(generation))
    }

    /// Takes a handle off a generation. Returns the numbers of those that went with it. A generation that is gone
    /// already is no fault: its handles close later.
    pub fn release(&self, number: u32) -> Vec<u32> {
        let Some(generation) = self.find(number) else { return Vec::new() };
        let before = generation.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        if before != Ok(1) {
            return Vec::new();
        }
        prune(&mut self.write()).iter().map(|generation| generation.number()).collect()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<Generation>>> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<Generation>>> {
        self.kept.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes out what the rule does not keep, and returns it.
fn prune(kept: &mut Vec<Arc<Generation>>) -> Vec<Arc<Generation>> {
    let older = kept.len().saturating_sub(2);
    let open = kept[..older].iter().filter(|generation| generation.open_handles() > 0).count();
    let mut surplus = open.saturating_sub(OLDER);
    let mut index = 0;
    let mut gone = Vec::new();
    kept.retain(|generation| {
        let is_older = index < older;
        index += 1;
        if !is_older {
            return true;
        }
        let keep = if generation.open_handles() == 0 {
            false
        } else if surplus > 0 {
            surplus -= 1;
            false
        } else {
            true
        };
        if !keep {
            gone.push(Arc::clone(generation));
        }
        keep
    });
    gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::pages::SecretMemory;
    use std::time::SystemTime;

    fn install(generations: &Generations, memory: &Arc<SecretMemory>, number: u32) -> Vec<(u32, bool)> {
        let snapshot = Snapshot::write(memory, number, SystemTime::UNIX_EPOCH, &[]).unwrap();
        generations.install(snapshot, Vec::new(), Moment::now(), false)
    }

    #[test]
    fn only_the_current_and_the_previous_are_kept_while_nothing_is_open() {
        let (generations, memory) = (Generations::default(), SecretMemory::new().unwrap());
        for number in 1..=5 {
            install(&generations, &memory, number);
        }
        assert_eq!(generations.numbers(), [4, 5]);
    }

    #[test]
    fn an_open_handle_keeps_its_generation_until_it_closes() {
        let (generations, memory) = (Generations::default(), SecretMemory::new().unwrap());
        install(&generations, &memory, 1);
        let _ = generations.open(1).unwrap();
        for number in 2..=4 {
            install(&generations, &memory, number);
        }
        assert_eq!(generations.numbers(), [1, 3, 4]);
        assert_eq!(generations.release(1), [1]);
        assert_eq!(generations.numbers(), [3, 4]);
        assert_eq!(generations.release(1), [] as [u32; 0], "a late second release is harmless");
    }

    #[test]
    fn beyond_eight_older_open_ones_the_oldest_goes() {
        let (generations, memory) = (Generations::default(), SecretMemory::new().unwrap());
        let mut gone = Vec::new();
        for number in 1..=11 {
            gone.extend(install(&generations, &memory, number));
            let _ = generations.open(number).unwrap();
        }
        assert_eq!(gone, [(1, true)]);
        assert_eq!(generations.numbers().len(), OLDER + 2);
        assert!(generations.open(1).is_none());
    }
}
