//! What a process takes of a machine, as /proc tells it.

use std::fs;
use std::ops::Add;
use std::time::Duration;

use crate::report::Error;

/// Memory of a process, in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Of all mappings: what is shared counts in parts.
    pub pss: f64,
    /// Of it, what no file backs and may be swapped.
    pub anonymous: f64,
    /// Of it, what lies in mappings that cannot be swapped, `memfd_secret(2)` among them.
    pub locked: f64,
}

impl Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            pss: self.pss + other.pss,
            anonymous: self.anonymous + other.anonymous,
            locked: self.locked + other.locked,
        }
    }
}

/// The memory of a process.
///
/// # Errors
/// It has ended.
pub fn usage(pid: u32) -> Result<Usage, Error> {
    let (mut sum, mut one) = (Usage::default(), Usage::default());
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim().trim_end_matches(" kB");
        match key {
            "Pss" => one.pss = value.parse()?,
            "Anonymous" => one.anonymous = value.parse()?,
            "Locked" => one.locked = value.parse()?,
            // A mapping's last line.
            "VmFlags" => {
                if one.locked > 0.0 {
                    one.anonymous = 0.0;
                }
                sum = sum + std::mem::take(&mut one);
            }
            _ => {}
        }
    }
    Ok(sum)
}

/// How long all threads of a process ran so far.
///
/// # Errors
/// It has ended.
pub fn cpu(pid: u32) -> Result<Duration, Error> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that ends meanwhile did nothing that counts.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanoseconds += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// Its threads.
///
/// # Errors
/// It has ended.
pub fn threads(pid: u32) -> Result<usize, Error> {
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?.count())
}
