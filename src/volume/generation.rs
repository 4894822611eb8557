//! A volume's generations: the newest, the one before it, and at most `OLDER` older ones on which a handle is open.
//!
//! ```text
//!   install ──▶ current ──install──▶ previous ──install──▶ older (while open) ──last release, or too many──▶ gone
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::opens::Opens;
use super::snapshot::Snapshot;
use crate::time::Moment;

/// How many generations before the previous one are kept for handles that are open on them. Beyond, the oldest goes and
/// its readers get ESTALE: memory stays bounded, however often a secret rotates under a file that is never closed.
pub const OLDER: usize = 8;

/// Numbers of gone generations that wait to be told.
const UNTOLD: usize = 256;

/// One generation: a snapshot, when it was installed, and how many handles are open on it.
pub struct Generation {
    /// The files' bytes.
    pub snapshot: Snapshot,
    /// When it became the current one.
    pub installed: Moment,
    /// Per file, the generation in which its bytes last changed.
    since: Vec<u32>,
    opens: Arc<Opens>,
    /// Where its handles are counted.
    place: usize,
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
        self.opens.count(self.place, self.number())
    }
}

/// The kept generations, oldest first.
pub struct Generations {
    kept: RwLock<Vec<Arc<Generation>>>,
    opens: Arc<Opens>,
    /// The highest number ever given.
    highest: AtomicU32,
    /// Numbers that went and that whoever keeps them for a successor was not told of.
    untold: Mutex<Vec<u32>>,
}

impl Generations {
    /// None yet; handles are counted in this table.
    #[must_use]
    pub fn new(opens: Arc<Opens>) -> Self {
        Self { kept: RwLock::default(), opens, highest: AtomicU32::new(0), untold: Mutex::default() }
    }

    /// The table in which is counted.
    #[must_use]
    pub fn opens(&self) -> &Arc<Opens> {
        &self.opens
    }

    /// The number for the next one: above every number that was ever given, also to one that could not be read.
    #[must_use]
    pub fn next_number(&self) -> u32 {
        self.highest.load(Ordering::Acquire) + 1
    }

    /// Takes over what a predecessor left: snapshots, and the numbers of those that cannot be read. If its counts are lost,
    /// every generation counts as open until the limit pushes it out.
    pub fn restore(&self, mut snapshots: Vec<Snapshot>, lost: &[u32], counted: bool, now: Moment) {
        snapshots.sort_by_key(Snapshot::generation);
        snapshots.drain(..snapshots.len().saturating_sub(OLDER + 2)).for_each(|old| {
            self.untold().push(old.generation());
            old.pages().wipe_on_drop();
        });
        let numbers: Vec<u32> = snapshots.iter().map(Snapshot::generation).collect();
        self.opens.keep_only(&numbers);
        let mut kept = self.write();
        for snapshot in snapshots {
            let (number, before) = (snapshot.generation(), kept.last());
            let since = |file| {
                let same = before
                    .filter(|before: &&Arc<Generation>| before.snapshot.value(file) == snapshot.value(file));
                same.map_or(number, |before| before.since(file))
            };
            let since = (0..snapshot.files().len()).map(since).collect();
            let place = self.opens.place(number);
            if !counted {
                self.opens.assume_open(place, number);
            }
            let opens = Arc::clone(&self.opens);
            kept.push(Arc::new(Generation { snapshot, installed: now, since, opens, place }));
        }
        let newest = kept.last().map_or(0, |newest| newest.number());
        // One that is lost and the newest is told of by nobody: it is what keeps its number from being given again.
        self.untold().extend(lost.iter().filter(|number| **number < newest));
        self.highest.fetch_max(lost.iter().copied().fold(newest, u32::max), Ordering::AcqRel);
        self.bury(prune(&mut kept), &kept);
    }

    /// Gives up all, for good.
    pub fn give_up(&self) {
        let mut kept = self.write();
        let all = std::mem::take(&mut *kept);
        self.bury(all, &kept);
    }

    /// Numbers that went since this was asked last; always none where nobody keeps them.
    #[must_use]
    pub fn take_gone(&self) -> Vec<u32> {
        std::mem::take(&mut *self.untold())
    }

    /// Takes back what [`Generations::take_gone`] gave and could not be told.
    pub fn untell(&self, gone: Vec<u32>) {
        self.untold().extend(gone);
    }

    /// All that are kept, oldest first.
    #[must_use]
    pub fn kept(&self) -> Vec<Arc<Generation>> {
        self.read().clone()
    }

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
        let (number, opens) = (snapshot.generation(), Arc::clone(&self.opens));
        let place = opens.place(number);
        self.highest.fetch_max(number, Ordering::AcqRel);
        kept.push(Arc::new(Generation { snapshot, installed: now, since, opens, place }));
        gone.extend(prune(&mut kept));
        self.bury(gone, &kept)
    }

    /// Counts a handle on a generation; `None`: it is gone. Counted under the lock, so that no `install` can drop it between.
    #[must_use]
    pub fn open(&self, number: u32) -> Option<Arc<Generation>> {
        let kept = self.read();
        let generation = kept.iter().rev().find(|generation| generation.number() == number)?;
        self.opens.add(generation.place, number);
        Some(Arc::clone(generation))
    }

    /// Takes a handle off a generation. Returns the numbers of those that went with it. A generation that is gone
    /// already is no fault: its handles close later.
    pub fn release(&self, number: u32) -> Vec<u32> {
        let Some(generation) = self.find(number) else { return Vec::new() };
        if !self.opens.take(generation.place, number) {
            return Vec::new();
        }
        let mut kept = self.write();
        let gone = prune(&mut kept);
        self.bury(gone, &kept).into_iter().map(|(number, _)| number).collect()
    }

    /// The end of generations: they are wiped as soon as nobody reads them, and their places are free. Returns the numbers,
    /// and whether each still had an open handle.
    fn bury(&self, gone: Vec<Arc<Generation>>, kept: &[Arc<Generation>]) -> Vec<(u32, bool)> {
        let told: Vec<_> =
            gone.iter().map(|generation| (generation.number(), generation.open_handles() > 0)).collect();
        gone.iter().for_each(|generation| generation.snapshot.pages().wipe_on_drop());
        if !gone.is_empty() {
            self.opens.keep_only(&kept.iter().map(|generation| generation.number()).collect::<Vec<_>>());
        }
        if self.opens.file().is_some() {
            let mut untold = self.untold();
            untold.extend(told.iter().map(|(number, _)| number));
            // While nobody listens they are of no use: a keeper that comes back is given all that is kept.
            let surplus = untold.len().saturating_sub(UNTOLD);
            untold.drain(..surplus);
        }
        told
    }

    fn untold(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
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
    use crate::secret::pages::{SecretMemory, Sharing};
    use std::time::SystemTime;

    fn install(generations: &Generations, memory: &Arc<SecretMemory>, number: u32) -> Vec<(u32, bool)> {
        let snapshot = Snapshot::write(memory, Sharing::Own, number, SystemTime::UNIX_EPOCH, &[]).unwrap();
        generations.install(snapshot, Vec::new(), Moment::now(), false)
    }

    #[test]
    fn only_the_current_and_the_previous_are_kept_while_nothing_is_open() {
        let (generations, memory) = (Generations::new(Arc::new(Opens::own(0))), SecretMemory::new().unwrap());
        for number in 1..=5 {
            install(&generations, &memory, number);
        }
        assert_eq!(generations.numbers(), [4, 5]);
    }

    #[test]
    fn an_open_handle_keeps_its_generation_until_it_closes() {
        let (generations, memory) = (Generations::new(Arc::new(Opens::own(0))), SecretMemory::new().unwrap());
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
        let (generations, memory) = (Generations::new(Arc::new(Opens::own(0))), SecretMemory::new().unwrap());
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
