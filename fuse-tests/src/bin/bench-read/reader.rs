//! What reads: a process of its own, as a server must not touch its own mount, and as applications are other processes.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use crate::Error;

/// `bench-read reader OPERATION PATH MILLISECONDS`: prints a line when ready, begins with the first byte of its standard
/// input, and prints operations and nanoseconds.
pub(crate) fn run(operation: &str, path: &str, milliseconds: &str) -> Result<(), Error> {
    let length = Duration::from_millis(milliseconds.parse()?);
    let file = File::open(path)?;
    let mut buffer = vec![0; usize::try_from(file.metadata()?.len())?.max(4096)];
    let size = file.read_at(&mut buffer, 0)?;
    let mut operation: Box<dyn FnMut() -> io::Result<usize>> = match operation {
        "open-read-close" => {
            drop(file);
            Box::new(|| File::open(path)?.read(&mut buffer))
        }
        "read" => Box::new(move || file.read_at(&mut buffer, 0)),
        other => return Err(format!("no such operation: {other}").into()),
    };
    println!("ready");
    io::stdout().flush()?;
    io::stdin().read_exact(&mut [0])?;
    let start = Instant::now();
    let mut operations = 0u64;
    while start.elapsed() < length {
        if operation()? != size {
            return Err("a short read".into());
        }
        operations += 1;
    }
    println!("{operations} {}", start.elapsed().as_nanos());
    Ok(())
}
