//! Credential files: small, regular, and no business of anybody else.

use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use zeroize::Zeroizing;

use crate::secret::Token;
use crate::store::error::Unusable;

/// Largest credential file. Tokens are one or two KiB.
const LARGEST: u64 = 64 << 10;

/// Reads one credential. Blocks, but never on a pipe. `private`: warn if everybody may read it.
pub(super) fn read(path: &Path, private: bool) -> Result<Token, Unusable> {
    let refuse =
        |what: String, remedy| Unusable { what: format!("cannot use {}: {what}", path.display()), remedy };
    let io = |error: std::io::Error| {
        refuse(error.to_string(), "check that it exists and that the agent may read it")
    };
    let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(refuse(
            "not a regular file".to_owned(),
            "it is read at each login, so a pipe cannot serve",
        ));
    }
    if private && meta.mode() & 0o004 != 0 {
        tracing::warn!(path = %path.display(), "every user may read this credential file: chmod o-r");
    }
    let too_large =
        || refuse(format!("larger than {LARGEST} bytes"), "name the file that holds the token alone");
    if meta.len() > LARGEST {
        return Err(too_large());
    }
    // One byte of room beyond the limit, so that the buffer never moves.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(LARGEST + 1).unwrap_or(usize::MAX)));
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > LARGEST {
        return Err(too_large());
    }
    let wrong = "it must hold the credential alone, on one line";
    let text = String::from_utf8(std::mem::take(&mut *bytes)).map_err(|error| {
        drop(Zeroizing::new(error.into_bytes()));
        refuse("not text".to_owned(), wrong)
    })?;
    Token::new(text).map_err(|error| refuse(error.to_string(), wrong))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path) -> String {
        match read(path, true) {
            Ok(_) => panic!("not refused"),
            Err(fault) => format!("{}; {}", fault.what, fault.remedy),
        }
    }

    #[test]
    fn blanks_around_a_token_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "  hvs.abc\n\n").unwrap();
        assert_eq!(read(&path, true).ok().unwrap().expose(), "hvs.abc");
    }

    #[test]
    fn what_cannot_be_a_credential_is_refused_with_the_path_and_without_the_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(refused(&path).contains("token: No such file"), "{}", refused(&path));
        for content in [&b""[..], b"two s3cret\nlines s3cret", b"s3cret\xff", &[b's'; 70_000]] {
            std::fs::write(&path, content).unwrap();
            let text = refused(&path);
            assert!(text.contains(path.to_str().unwrap()) && !text.contains("s3cret"), "{text}");
        }
        assert!(refused(dir.path()).contains("not a regular file"));
    }

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, 0o600.into(), 0).unwrap();
        assert!(refused(&path).contains("not a regular file"));
    }
}
