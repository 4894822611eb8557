//! Where agents of one user meet: a directory that nobody else may enter. Root's lies in one that everybody may pass, because the
//! shim's socket, which is not for root alone, is its neighbour (`/run/fuse-secrets/node`).

use std::ffi::OsStr;
use std::fs::{Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The runtime directory of the present user: `/run/fuse-secrets/agents` for root, else `$XDG_RUNTIME_DIR/fuse-secrets`, else a
/// directory in /tmp that carries the user's number.
#[must_use]
pub fn directory() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    if user == 0 {
        return PathBuf::from("/run/fuse-secrets/agents");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) if Path::new(&runtime).is_absolute() => Path::new(&runtime).join("fuse-secrets"),
        _ => PathBuf::from(format!("/tmp/fuse-secrets-{user}")),
    }
}

/// Makes a directory that only the present user may enter, or checks one that is there: in /tmp somebody else may have made it
/// first. A parent that is missing is made for everybody to pass.
///
/// # Errors
/// It cannot be made, is not a directory, belongs to somebody else, or others may enter it.
pub fn make_private(path: &Path) -> io::Result<()> {
    let make = || std::fs::DirBuilder::new().mode(0o700).create(path);
    let made = match (make(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir(parent)?;
            // Whatever the umask.
            std::fs::set_permissions(parent, Permissions::from_mode(0o755))?;
            make()
        }
        (made, _) => made,
    };
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other,
    }
    let found = std::fs::symlink_metadata(path)?;
    if is_private(&found, rustix::process::geteuid().as_raw()) {
        return Ok(());
    }
    let text = format!(
        "{} must be a directory of this user's that nobody else may enter (mode 0700)",
        path.display()
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// Every directory in which an agent may be found by the present user: its own, and for root those of all users. One that is
/// not its user's alone is left out: in /tmp anybody may make it.
#[must_use]
pub fn directories() -> Vec<PathBuf> {
    let user = rustix::process::geteuid();
    let mut found = vec![(directory(), user.as_raw())];
    if user.is_root() {
        let entries = |path: &str| std::fs::read_dir(path).into_iter().flatten().flatten();
        let number = |name: &OsStr, prefix: &str| name.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok();
        found.extend(
            entries("/run/user").filter_map(|entry| {
                Some((entry.path().join("fuse-secrets"), number(&entry.file_name(), "")?))
            }),
        );
        found.extend(
            entries("/tmp")
                .filter_map(|entry| Some((entry.path(), number(&entry.file_name(), "fuse-secrets-")?))),
        );
    }
    found.retain(|(path, owner)| {
        std::fs::symlink_metadata(path).is_ok_and(|found| is_private(&found, *owner))
    });
    found.into_iter().map(|(path, _)| path).collect()
}

fn is_private(found: &Metadata, owner: u32) -> bool {
    found.is_dir() && found.uid() == owner && found.mode() & 0o077 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_directory_that_others_may_enter_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let made = parent.path().join("passed/made");
        make_private(&made).unwrap();
        make_private(&made).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&made), mode(made.parent().unwrap())), (0o700, 0o755));
        std::fs::set_permissions(&made, Permissions::from_mode(0o750)).unwrap();
        assert!(make_private(&made).unwrap_err().to_string().contains("mode 0700"));
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        assert!(make_private(&link).is_err());
    }
}
