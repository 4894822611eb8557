//! What goes wrong in the file system, and the one translation to an errno.

/// Why a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such name or inode.
    #[error("no such file")]
    NotFound,
    /// A name that no file can have.
    #[error("the name is too long")]
    NameTooLong,
    /// A directory was needed.
    #[error("not a directory")]
    NotDirectory,
    /// A file was needed.
    #[error("is a directory")]
    IsDirectory,
    /// The generation is no longer kept.
    #[error("the generation is no longer kept")]
    Stale,
    /// The value's grace ended, or it never came.
    #[error("the value is no longer served")]
    Gone,
    /// An attempt to change something.
    #[error("the file system is read-only")]
    ReadOnly,
    /// A call that makes no sense for this inode.
    #[error("not a link")]
    Invalid,
}

impl Error {
    /// The errno that the caller gets.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            // The kernel itself refuses only from 1,024 bytes on.
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::NotDirectory => libc::ENOTDIR,
            Self::IsDirectory => libc::EISDIR,
            // On ESTALE the kernel walks the path once more with fresh look-ups, so a reader that goes through `..data`
            // arrives at the newest generation; only a handle that stayed open too long sees it.
            Self::Stale => libc::ESTALE,
            // Not ENOENT: the file is there by contract, and EIO is what an application logs loudly.
            Self::Gone => libc::EIO,
            Self::ReadOnly => libc::EROFS,
            Self::Invalid => libc::EINVAL,
        }
    }
}
