//! Where a volume is to be mounted: a directory below kubelet's root.
//!
//! The path comes from kubelet, but what lies on it may not be kubelet's alone. So its parent is resolved once, below the root,
//! following no link, and held as a descriptor; whatever is done afterwards is done to that descriptor and one name.
//! Nothing here looks inside what is mounted on the target: it may be dead, or hang.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, mkdirat, openat2, unlinkat};
use rustix::io::Errno;

use crate::mountinfo::{Device, Entry, topmost};

/// How anything is opened that may lie in a pod's reach: not to be read, through no link.
pub(crate) const HANDLE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const NO_LINKS: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Why a path is not one to mount on; each text names the rule.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    /// The root itself cannot be used.
    #[error("cannot open the kubelet root {0:?}: {1}; --kubelet-root names it")]
    Root(PathBuf, io::Error),
    /// A relative path.
    #[error("target path {0:?} is not absolute")]
    Relative(PathBuf),
    /// A path with `.` or `..`.
    #[error("target path {0:?} has a component . or .., which a target path must not have")]
    Dots(PathBuf),
    /// A path elsewhere: the path, the root.
    #[error(
        "target path {0:?} is not below the kubelet root {1:?}; if kubelet's is another, set --kubelet-root"
    )]
    Outside(PathBuf, PathBuf),
    /// A link on the way.
    #[error(
        "target path {0:?} leads through a symbolic link, and links below the kubelet root are not followed"
    )]
    Link(PathBuf),
    /// Its parent does not exist, so nothing is mounted there either.
    #[error("target path {0:?}: its parent directory does not exist")]
    Missing(PathBuf),
    /// Its parent cannot be opened for another reason.
    #[error("cannot open the parent directory of target path {0:?}: {1}")]
    Parent(PathBuf, io::Error),
}

/// kubelet's root directory, below which every target lies.
#[derive(Debug)]
pub(crate) struct Root {
    directory: OwnedFd,
    given: PathBuf,
    real: PathBuf,
}

impl Root {
    /// Opens the root. It may itself be a link, as some distributions make it.
    ///
    /// # Errors
    /// [`TargetError::Root`]
    pub(crate) fn open(path: &Path) -> Result<Self, TargetError> {
        let open = || Ok((rustix::fs::open(path, HANDLE, Mode::empty())?, path.canonicalize()?));
        let (directory, real) = open().map_err(|error| TargetError::Root(path.to_owned(), error))?;
        Ok(Self { directory, given: path.to_owned(), real })
    }

    /// Whether a path lies below the root, as mountinfo shows it.
    pub(crate) fn holds(&self, point: &Path) -> bool {
        point != self.real && point.starts_with(&self.real)
    }

    /// Resolves all of an absolute path but its last component, which need not exist.
    ///
    /// # Errors
    /// [`TargetError`]
    pub(crate) fn resolve(&self, path: &Path) -> Result<Target, TargetError> {
        if !path.is_absolute() {
            return Err(TargetError::Relative(path.to_owned()));
        }
        // Path's own components leave out `.`.
        if path.as_os_str().as_bytes().split(|byte| *byte == b'/').any(|name| matches!(name, b"." | b"..")) {
            return Err(TargetError::Dots(path.to_owned()));
        }
        let outside = || TargetError::Outside(path.to_owned(), self.given.clone());
        let below = path.strip_prefix(&self.given).map_err(|_| outside())?;
        let (Some(parent), Some(name)) = (below.parent(), below.file_name()) else {
            return Err(outside());
        };
        // BENEATH takes no empty path.
        let from = Path::new(".").join(parent);
        let refused = |error| match error {
            Errno::LOOP => TargetError::Link(path.to_owned()),
            Errno::NOENT => TargetError::Missing(path.to_owned()),
            error => TargetError::Parent(path.to_owned(), error.into()),
        };
        let parent = openat2(&self.directory, &from, HANDLE, Mode::empty(), NO_LINKS).map_err(refused)?;
        Ok(Target { parent, name: name.to_owned(), path: self.real.join(below) })
    }
}

/// A directory to mount on, or its absence.
#[derive(Debug)]
pub(crate) struct Target {
    parent: OwnedFd,
    name: OsString,
    path: PathBuf,
}

/// What is mounted on a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Occupant {
    /// Nothing.
    Nothing,
    /// Something that is not the shim's.
    Foreign,
    /// A mount of the shim, alive or dead.
    Ours {
        /// The volume that it serves.
        volume: String,
        /// Its file system.
        device: Device,
    },
}

impl Target {
    /// The path without links, as mountinfo shows it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory if it does not exist; whether it did not.
    ///
    /// # Errors
    /// NotADirectory (or a loop) if something else is there; as mkdirat(2).
    pub(crate) fn create(&self) -> io::Result<bool> {
        match mkdirat(&self.parent, &self.name, Mode::from_raw_mode(0o750)) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => self.open().map(|_| false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it does not exist or holds nothing. Only while nothing is mounted on it: this looks inside.
    ///
    /// # Errors
    /// A loop if it is a link, NotADirectory; as getdents(2).
    pub(crate) fn is_empty(&self) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside = match openat2(&self.parent, &self.name, flags, Mode::empty(), NO_LINKS) {
            Err(Errno::NOENT) => return Ok(true),
            opened => Dir::new(opened?)?,
        };
        for entry in inside {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes the directory; that there is none is no error.
    ///
    /// # Errors
    /// DirectoryNotEmpty, ResourceBusy while something is mounted on it, as unlinkat(2).
    pub(crate) fn remove(&self) -> io::Result<()> {
        match unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What is on top of it in a list of this namespace's mounts.
    pub(crate) fn occupant(&self, entries: &[Entry]) -> Occupant {
        let Some(entry) = topmost(entries, &self.path) else { return Occupant::Nothing };
        entry.volume().map_or(Occupant::Foreign, |volume| Occupant::Ours {
            volume: volume.to_owned(),
            device: entry.device,
        })
    }

    /// A handle on the directory, or on what is mounted there, which is not asked.
    ///
    /// # Errors
    /// A loop if it is a link, NotADirectory, NotFound.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        Ok(openat2(&self.parent, &self.name, HANDLE, Mode::empty(), NO_LINKS)?)
    }

    /// A path to the target itself for calls that take no descriptor: no other can be meant by it, whatever happens to the
    /// directories above, as long as this target lives.
    pub(crate) fn handle(&self) -> PathBuf {
        Path::new(&format!("/proc/self/fd/{}", self.parent.as_raw_fd())).join(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn refused(root: &Root, path: &Path) -> String {
        root.resolve(path).unwrap_err().to_string()
    }

    #[test]
    fn paths_that_are_not_below_the_root_are_refused_with_the_rule() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("pods")).unwrap();
        let root = Root::open(directory.path()).unwrap();
        assert!(refused(&root, Path::new("pods/mount")).contains("is not absolute"));
        assert!(refused(&root, Path::new("")).contains("is not absolute"));
        for dots in ["pods/../pods/mount", "pods/./mount", "pods/..", "../mount", "pods/mount/."] {
            assert!(
                refused(&root, &directory.path().join(dots)).contains("has a component . or .."),
                "{dots}"
            );
        }
        let beside = PathBuf::from(format!("{}-beside/mount", directory.path().display()));
        for outside in [Path::new("/etc/mount"), Path::new("/"), directory.path(), &beside] {
            assert!(refused(&root, outside).contains("is not below the kubelet root"), "{outside:?}");
        }
        assert!(
            refused(&root, &directory.path().join("no/mount")).contains("parent directory does not exist")
        );
        assert!(matches!(root.resolve(&directory.path().join("no/mount")), Err(TargetError::Missing(_))));
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert!(
            refused(&root, &directory.path().join("file/mount")).contains("cannot open the parent directory")
        );
        assert!(
            refused(&root, &directory.path().join("a\0b/mount")).contains("cannot open the parent directory")
        );
    }

    #[test]
    fn no_link_below_the_root_is_followed() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("pods")).unwrap();
        symlink(elsewhere.path(), directory.path().join("out")).unwrap();
        symlink("pods", directory.path().join("in")).unwrap();
        symlink("/proc/self/root", directory.path().join("magic")).unwrap();
        let root = Root::open(directory.path()).unwrap();
        for link in ["out/mount", "in/mount", "magic/mount", "in/deeper/mount"] {
            let text = refused(&root, &directory.path().join(link));
            assert!(text.contains("leads through a symbolic link"), "{text}");
        }
        symlink(elsewhere.path(), directory.path().join("pods/mount")).unwrap();
        let target = root.resolve(&directory.path().join("pods/mount")).unwrap();
        assert_eq!(target.create().unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(target.remove().unwrap_err().kind(), io::ErrorKind::NotADirectory);
        assert!(elsewhere.path().exists());
    }

    #[test]
    fn a_root_that_is_a_link_is_followed_once_and_targets_have_their_real_path() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("real");
        std::fs::create_dir_all(real.join("pods")).unwrap();
        symlink(&real, directory.path().join("kubelet")).unwrap();
        let root = Root::open(&directory.path().join("kubelet")).unwrap();
        let target = root.resolve(&directory.path().join("kubelet//pods/mount/")).unwrap();
        assert_eq!(target.path(), real.join("pods/mount"));
        assert!(Root::open(&real.join("no")).unwrap_err().to_string().contains("--kubelet-root"));
    }

    #[test]
    fn a_directory_is_made_once_and_removed_once() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        let target = root.resolve(&directory.path().join("mount")).unwrap();
        assert_eq!((target.create().unwrap(), target.create().unwrap()), (true, false));
        let mode = rustix::fs::fstat(target.open().unwrap()).unwrap().st_mode;
        assert_eq!(mode & 0o7777, 0o750);
        std::fs::write(directory.path().join("mount/file"), "").unwrap();
        assert_eq!(target.remove().unwrap_err().kind(), io::ErrorKind::DirectoryNotEmpty);
        std::fs::remove_file(directory.path().join("mount/file")).unwrap();
        target.remove().unwrap();
        target.remove().unwrap();
        std::fs::write(directory.path().join("mount"), "").unwrap();
        assert_eq!(target.create().unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn what_is_mounted_on_a_target_is_told_by_type_and_source() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        let target = root.resolve(&directory.path().join("mount")).unwrap();
        let at = target.path().display();
        let occupant = |lines: String| target.occupant(&crate::mountinfo::parse(lines.as_bytes()).unwrap());
        let foreign = format!("36 1 0:5 / {at} rw - tmpfs secrets rw\n");
        assert_eq!(occupant(format!("36 1 0:5 / {at}-2 rw - tmpfs secrets rw\n")), Occupant::Nothing);
        assert_eq!(occupant(foreign.clone()), Occupant::Foreign);
        let ours = Occupant::Ours { volume: "csi-1".to_owned(), device: Device(0, 6) };
        assert_eq!(occupant(format!("{foreign}37 36 0:6 / {at} ro - fuse.fuse-secrets csi-1 rw\n")), ours);
        assert_eq!(occupant(format!("37 36 0:6 / {at} ro - fuse.other csi-1 rw\n")), Occupant::Foreign);
    }
}
