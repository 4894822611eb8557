//! What is mounted in a mount namespace: `/proc/PID/mountinfo`, of which a line reads (proc_pid_mountinfo(5))
//!
//! ```text
//! 36 35 0:57 / /var/lib/kubelet/pods/…/mount ro,nosuid shared:7 - fuse.fuse-secrets csi-1f… rw,user_id=0
//! id parent device root point                options  optional  - kind              source  …
//! ```

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The type of the shim's mounts.
const KIND: &str = "fuse.fuse-secrets";

/// What the kernel appends to the path of a file whose name is forgotten. No path has two slashes otherwise.
const FORGOTTEN: &[u8] = b"//deleted";

/// Major and minor number of a file system: distinct among all that are mounted anywhere on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device(pub u32, pub u32);

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0, self.1)
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Distinct among the mounts that exist; the same as statx(2) tells.
    pub id: u64,
    /// The mount on which it lies.
    pub parent: u64,
    /// Its file system.
    pub device: Device,
    /// What of the file system is mounted: `/` is all of it.
    pub root: PathBuf,
    /// Where, as seen from the root of the process.
    pub point: PathBuf,
    /// Options of the mount (not of its file system).
    pub options: String,
    /// Type and subtype.
    pub kind: OsString,
    /// What was named as its source.
    pub source: OsString,
}

impl Entry {
    /// The volume that it serves, if it is one of the shim's mounts.
    pub(crate) fn volume(&self) -> Option<&str> {
        if self.kind == KIND { self.source.to_str() } else { None }
    }

    /// Whether another mount of `entries` lies on top of it.
    pub(crate) fn is_covered(&self, entries: &[Self]) -> bool {
        entries.iter().any(|above| above.parent == self.id && above.point == self.point)
    }
}

/// The mounts of this process's namespace.
///
/// # Errors
/// As reading /proc does.
pub(crate) fn read() -> io::Result<Vec<Entry>> {
    parse(&std::fs::read("/proc/self/mountinfo")?)
}

/// What is mounted at `point` and not covered.
pub(crate) fn topmost<'a>(entries: &'a [Entry], point: &Path) -> Option<&'a Entry> {
    entries.iter().find(|entry| entry.point == point && !entry.is_covered(entries))
}

/// The mounts of a file of this format, in its order.
///
/// # Errors
/// InvalidData with the number of a line that is none.
pub(crate) fn parse(text: &[u8]) -> io::Result<Vec<Entry>> {
    let lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    let malformed =
        |at: usize| io::Error::new(io::ErrorKind::InvalidData, format!("mountinfo: line {}", at + 1));
    lines.map(|(at, line)| entry(line).ok_or_else(|| malformed(at))).collect()
}

fn entry(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut field = || fields.next();
    let (id, parent, device) = (number(field()?)?, number(field()?)?, field()?);
    let colon = device.iter().position(|byte| *byte == b':')?;
    let device = Device(number(&device[..colon])?, number(&device[colon + 1..])?);
    let root = unescape(field()?);
    let root = PathBuf::from(OsString::from_vec(root.strip_suffix(FORGOTTEN).unwrap_or(&root).to_vec()));
    let point = PathBuf::from(OsString::from_vec(unescape(field()?)));
    let options = String::from_utf8_lossy(field()?).into_owned();
    while field()? != b"-" {}
    let (kind, source) = (OsString::from_vec(unescape(field()?)), OsString::from_vec(unescape(field()?)));
    Some(Entry { id, parent, device, root, point, options, kind, source })
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Undoes the kernel's escapes: a backslash and three octal digits for each byte that would end a field.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, others)) = rest.split_first() {
        match others {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use proptest::prelude::*;

    use super::*;

    /// The kernel's own escapes: mangle() for names of types and sources, seq_path() for paths.
    fn escape(bytes: &[u8]) -> Vec<u8> {
        let escaped = |byte: &u8| match byte {
            b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{byte:03o}").into_bytes(),
            _ => vec![*byte],
        };
        bytes.iter().flat_map(escaped).collect()
    }

    fn line(entry: &Entry, optional: &str) -> Vec<u8> {
        let mut line = format!("{} {} {} ", entry.id, entry.parent, entry.device).into_bytes();
        line.extend(escape(entry.root.as_os_str().as_bytes()));
        line.push(b' ');
        line.extend(escape(entry.point.as_os_str().as_bytes()));
        line.extend(format!(" {} {optional}- ", entry.options).into_bytes());
        line.extend(escape(entry.kind.as_bytes()));
        line.push(b' ');
        line.extend(escape(entry.source.as_bytes()));
        line.extend(b" rw,user_id=0,group_id=0\n");
        line
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        // Often one that is escaped.
        proptest::collection::vec(
            prop_oneof![1..=255_u8, Just(b' '), Just(b'\\'), Just(b'\n'), Just(b'0')],
            1..40,
        )
    }

    fn entries() -> impl Strategy<Value = Entry> {
        let numbers = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>());
        (numbers, bytes(), bytes(), "[a-z,=]{1,20}", bytes(), bytes()).prop_map(
            |((id, parent, major, minor), root, point, options, kind, source)| Entry {
                id,
                parent,
                device: Device(major, minor),
                root: OsString::from_vec(root).into(),
                point: OsString::from_vec(point).into(),
                options,
                kind: OsString::from_vec(kind),
                source: OsString::from_vec(source),
            },
        )
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_escapes_comes_back(
            written in proptest::collection::vec((entries(), "((shared|master|propagate_from):[0-9]{1,3} ){0,3}"), 0..4)
        ) {
            let text: Vec<u8> = written.iter().flat_map(|(entry, optional)| line(entry, optional)).collect();
            let written: Vec<_> = written.into_iter().map(|(entry, _)| entry).collect();
            prop_assert_eq!(parse(&text).unwrap(), written);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let text = b"36 35 0:57 / /a ro - fuse.fuse-secrets csi-1 rw\n36 35 nonsense\n";
        assert_eq!(parse(text).unwrap_err().to_string(), "mountinfo: line 2");
    }

    #[test]
    fn a_root_whose_name_is_forgotten_is_the_file_that_it_was() {
        let text = b"36 35 0:57 /nested/tls.crt//deleted /a ro - fuse.fuse-secrets csi-1 rw\n";
        assert_eq!(parse(text).unwrap()[0].root, Path::new("/nested/tls.crt"));
    }

    #[test]
    fn the_topmost_of_a_stack_is_found_whatever_the_order() {
        let text = b"9 35 0:3 / /a ro - tmpfs c rw\n35 1 0:1 / /a ro - tmpfs a rw\n36 9 0:2 / /a/b ro - tmpfs b rw\n";
        let entries = parse(text).unwrap();
        assert_eq!(topmost(&entries, Path::new("/a")).unwrap().source, "c");
        assert_eq!(topmost(&entries, Path::new("/c")), None);
    }

    #[test]
    fn this_process_has_mounts() {
        assert!(read().unwrap().iter().any(|entry| entry.point == Path::new("/proc")));
    }
}
