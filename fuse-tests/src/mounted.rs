//! A directory with a mount that goes when it is dropped.

use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

/// A directory of its own to mount on, and what is mounted there until this is dropped.
pub struct Mounted {
    path: PathBuf,
    /// Not looked at while something is mounted: it is only removed.
    directory: Option<TempDir>,
}

impl Default for Mounted {
    fn default() -> Self {
        Self::new()
    }
}

impl Mounted {
    /// A fresh directory, which anybody may enter.
    ///
    /// # Panics
    /// No directory can be made.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("fuse-tests-").tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let path = directory.path().canonicalize().unwrap().join("mnt");
        std::fs::create_dir(&path).unwrap();
        Self { path, directory: Some(directory) }
    }

    /// The mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the mount.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The bytes of a file.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The text of a file.
    ///
    /// # Panics
    /// It cannot be read, or is no text.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// Whether something is mounted here.
    #[must_use]
    pub fn is_mounted(&self) -> bool {
        mounts_below(&self.path) > 0
    }

    /// Takes the mount away as umount2(2) does, lazily. By the raw call: umount(8) looks at the mount first, and would hang.
    pub fn unmount(&self) {
        while self.is_mounted() && unmount(&self.path, UnmountFlags::DETACH).is_ok() {}
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount();
        if mounts_below(&self.path) > 0 {
            // Removing would go through the mount.
            let _kept = self.directory.take().map(TempDir::keep);
            assert!(std::thread::panicking(), "{} stays mounted", self.path.display());
        }
    }
}

/// Mounts at and below a path.
///
/// # Panics
/// The table of mounts cannot be read.
#[must_use]
pub fn mounts_below(path: &Path) -> usize {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| Path::new(point).starts_with(path)).count()
}
