//! Threads that read and judge what they read: no value torn, none older than one seen before. An error of the kernel is counted,
//! and the reader goes on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::stamp;
use crate::wait::{pause, until_true};

/// Longest wait for readers, who may wait for agents, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// What one reader saw, or all.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Values.
    pub reads: u64,
    /// Times that a value was newer than the one before.
    pub newer: u64,
    /// The newest.
    pub version: u32,
    /// Reads that failed, by error number.
    pub failed: BTreeMap<i32, u64>,
    /// The longest time that one value took, from open to end, failed or not.
    pub longest: Duration,
}

impl Seen {
    /// This and what another saw.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.reads += other.reads;
        self.newer += other.newer;
        self.version = self.version.max(other.version);
        self.longest = self.longest.max(other.longest);
        other.failed.into_iter().for_each(|(error, count)| *self.failed.entry(error).or_default() += count);
        self
    }
}

/// Readers at work. They stop when this is dropped.
pub struct Readers {
    stop: Arc<AtomicBool>,
    started: Instant,
    readers: Vec<Reader>,
}

struct Reader {
    reads: Arc<AtomicU64>,
    thread: JoinHandle<Result<Seen, String>>,
}

impl Readers {
    /// Starts one reader per path, which reads again and again.
    ///
    /// # Panics
    /// No thread left.
    #[must_use]
    pub fn start(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        Self::paced(paths, Duration::ZERO)
    }

    /// Starts one reader per path, which pauses for so long after each value, as an application would: many of them leave the
    /// processor to those who serve.
    ///
    /// # Panics
    /// No thread left.
    #[must_use]
    pub fn paced(paths: impl IntoIterator<Item = PathBuf>, between: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |path: PathBuf| {
            let reads = Arc::<AtomicU64>::default();
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&reads));
            let reader = std::thread::Builder::new().name("reader".to_owned());
            let thread = reader.spawn(move || read(&path, between, &count, &stop)).unwrap();
            Reader { reads, thread }
        };
        let readers = paths.into_iter().map(start).collect();
        Self { stop, started: Instant::now(), readers }
    }

    /// Waits until each of them has begun and ended a read, from now on, that did not fail.
    ///
    /// # Panics
    /// One has not within 30 s. One that met a fault is not waited for: [`Readers::finish`] tells.
    pub fn go_on(&self) {
        for Reader { reads, thread } in &self.readers {
            let before = reads.load(Ordering::Acquire);
            // The first may have begun before.
            until_true("a reader that goes on", PATIENCE, || {
                reads.load(Ordering::Acquire) >= before + 2 || thread.is_finished()
            });
        }
    }

    /// Stops them and tells what each saw, or the first fault that it met.
    ///
    /// # Panics
    /// A reader did.
    #[must_use]
    pub fn finish(mut self) -> Vec<Result<Seen, String>> {
        self.stop.store(true, Ordering::Release);
        self.readers.drain(..).map(|reader| reader.thread.join().unwrap()).collect()
    }

    /// Stops them and tells what all saw, also to whoever runs the test.
    ///
    /// # Panics
    /// A reader met a fault, or none read anything.
    #[must_use]
    pub fn report(self, what: &str) -> Seen {
        let (started, count) = (self.started, self.readers.len());
        let seen = self.finish().into_iter().map(Result::unwrap).reduce(Seen::and).unwrap();
        let (time, Seen { reads, failed, longest, .. }) = (started.elapsed(), &seen);
        #[allow(clippy::print_stdout, reason = "a figure of a test, shown when asked for")]
        {
            let rate = *reads as f64 / time.as_secs_f64();
            println!(
                "{what}: {count} readers, {reads} reads in {time:.1?} ({rate:.0}/s), failed by errno: {failed:?}, \
                 longest read {longest:.1?}"
            );
        }
        assert!(*reads > 0, "{what}: nobody read anything");
        seen
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn read(path: &Path, between: Duration, reads: &AtomicU64, stop: &AtomicBool) -> Result<Seen, String> {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Acquire) {
        let begun = Instant::now();
        let read = std::fs::read(path);
        seen.longest = seen.longest.max(begun.elapsed());
        match read {
            Ok(value) => {
                let version = stamp::check(&value).map_err(|fault| format!("{}: {fault}", path.display()))?;
                if version < seen.version {
                    return Err(format!("{}: {version} after {}", path.display(), seen.version));
                }
                seen.newer += u64::from(version > seen.version);
                seen.version = version;
                seen.reads += 1;
                reads.store(seen.reads, Ordering::Release);
            }
            Err(error) => *seen.failed.entry(error.raw_os_error().unwrap_or(0)).or_default() += 1,
        }
        if !between.is_zero() {
            pause(between);
        }
    }
    Ok(seen)
}
