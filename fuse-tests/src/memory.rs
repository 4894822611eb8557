//! What a process's memory holds: every mapping it may write, and private anonymous ones that it may not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// A place where a needle was found; says where, and never what stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Name of the needle.
    pub needle: String,
    /// The mapping's line of `/proc/PID/maps`, and the offset in it.
    pub place: String,
    /// The 48 bytes before, with everything but letters that make words replaced.
    pub before: String,
}

/// A look at a process's memory.
#[derive(Debug, Default)]
pub struct Look {
    /// Where needles were found.
    pub found: Vec<Found>,
    /// Bytes that were looked at.
    pub bytes: u64,
    /// Mappings that not even root may read this way: `memfd_secret(2)`.
    pub closed: usize,
}

/// Searches a process's memory, as root, for each of the named needles.
///
/// # Errors
/// The process is gone, or may not be read; or a mapping that is no secret memory cannot be.
pub fn search(pid: u32, needles: &[(&str, &[u8])]) -> io::Result<Look> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut look = Look::default();
    for line in maps.lines() {
        let Some((start, end)) = range(line) else { continue };
        let mut fields = line.split_whitespace().skip(1);
        let rights = fields.next().unwrap_or_default();
        let name = fields.nth(3).unwrap_or_default();
        let writable = rights.starts_with("rw");
        let anonymous = rights.starts_with('r') && rights.ends_with('p') && name.is_empty();
        let secret = name.starts_with("/secretmem");
        if name.starts_with("[v") || !(writable || anonymous || secret) {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or_default()];
        match memory.read_exact_at(&mut bytes, start) {
            Ok(()) => {}
            Err(_) if secret => {
                look.closed += 1;
                continue;
            }
            // It went while this ran.
            Err(_) if !still_mapped(pid, line)? => continue,
            Err(error) => return Err(io::Error::new(error.kind(), format!("{line}: {error}"))),
        }
        look.bytes += end - start;
        for (needle, at) in positions(&bytes, needles) {
            look.found.push(Found {
                needle: needle.to_owned(),
                place: format!("{line} +{at:#x}"),
                before: masked(&bytes[at.saturating_sub(48)..at]),
            });
        }
    }
    Ok(look)
}

/// Connections that a process has to a port of this machine.
///
/// # Errors
/// The process is gone, or may not be looked at.
pub fn connections(pid: u32, port: u16) -> io::Result<usize> {
    let mut sockets = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        // A descriptor may close at any time.
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        sockets.extend(
            target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')).map(str::to_owned),
        );
    }
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let suffix = format!(":{port:04X}");
    let ours = table.lines().skip(1).filter(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(2).is_some_and(|remote| remote.ends_with(&suffix))
            && fields.get(9).is_some_and(|inode| sockets.iter().any(|socket| socket == inode))
    });
    Ok(ours.count())
}

/// Names of the files below /proc that name a process's arguments and environment and hold one of the needles.
///
/// # Errors
/// /proc cannot be listed.
pub fn search_arguments(needles: &[(&str, &[u8])]) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        if !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        for name in ["environ", "cmdline"] {
            // A process may end at any time.
            let Ok(bytes) = std::fs::read(entry.path().join(name)) else { continue };
            let hits = positions(&bytes, needles);
            found.extend(
                hits.iter().map(|(needle, _)| format!("{needle} in {}", entry.path().join(name).display())),
            );
        }
    }
    Ok(found)
}

fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

fn still_mapped(pid: u32, line: &str) -> io::Result<bool> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().any(|now| now == line))
}

/// Where each needle begins, in one pass for all of them: what is searched is large.
fn positions<'a>(bytes: &[u8], needles: &[(&'a str, &[u8])]) -> Vec<(&'a str, usize)> {
    let mut by_first = vec![Vec::new(); 256];
    for needle in needles {
        by_first[usize::from(needle.1[0])].push(needle);
    }
    let mut found = Vec::new();
    for (at, byte) in bytes.iter().enumerate() {
        for (name, text) in &by_first[usize::from(*byte)] {
            if bytes[at..].starts_with(text) {
                found.push((*name, at));
            }
        }
    }
    found
}

/// What may be printed of unknown bytes: punctuation, which tells JSON from HTTP, and letters, but no digit.
fn masked(bytes: &[u8]) -> String {
    let mask = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'{' | b'}' | b'"' | b':' | b',' | b'/' | b'-' | b'_' => {
            char::from(*byte)
        }
        0 => '0',
        _ => '.',
    };
    bytes.iter().map(mask).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_found_wherever_it_begins() {
        let found = positions(b"aab-aabb", &[("one", b"aab"), ("other", b"bb")]);
        assert_eq!(found, [("one", 0), ("one", 4), ("other", 6)]);
    }
}
