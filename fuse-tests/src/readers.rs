//! Threads that read and judge what they read: no value torn, none older than one seen before.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::stamp;

/// What one reader saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Values.
    pub reads: u64,
    /// Times that a value was newer than the one before.
    pub newer: u64,
    /// The newest.
    pub version: u32,
}

/// Readers at work. They stop when this is dropped.
pub struct Readers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Seen, String>>>,
}

impl Readers {
    /// Starts one reader per path.
    ///
    /// # Panics
    /// No thread left.
    #[must_use]
    pub fn start(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |path: PathBuf| {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new().name("reader".to_owned()).spawn(move || read(&path, &stop)).unwrap()
        };
        let threads = paths.into_iter().map(start).collect();
        Self { stop, threads }
    }

    /// Stops them and tells what each saw, or the first fault that it met.
    ///
    /// # Panics
    /// A reader did.
    #[must_use]
    pub fn finish(mut self) -> Vec<Result<Seen, String>> {
        self.stop.store(true, Ordering::Release);
        self.threads.drain(..).map(|thread| thread.join().unwrap()).collect()
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn read(path: &std::path::Path, stop: &AtomicBool) -> Result<Seen, String> {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Acquire) {
        let value = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let version = stamp::check(&value).map_err(|fault| format!("{}: {fault}", path.display()))?;
        if version < seen.version {
            return Err(format!("{}: {version} after {}", path.display(), seen.version));
        }
        seen.newer += u64::from(version > seen.version);
        seen.version = version;
        seen.reads += 1;
    }
    Ok(seen)
}
