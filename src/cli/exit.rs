//! Exit codes (sysexits.h where it has a name for it), and the line on standard error that goes with them.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::agent::{ServeError, StartError};
use crate::cache::CacheError;
use crate::node::refusal::Code;
use crate::store::ErrorKind;
use crate::volume::snapshot::WriteError;
use crate::volume::{BuildError, PublishError};

/// Done.
pub const OK: u8 = 0;
/// Failed; the message says what and why.
pub const FAILED: u8 = 1;
/// `EX_USAGE`: the command line, an environment variable or the configuration file is wrong.
pub const USAGE: u8 = 64;
/// `EX_DATAERR`: a class document has faults, or asks for a key that its secret does not have.
pub const DATA: u8 = 65;
/// `EX_NOINPUT`: a file that was named cannot be read.
pub const NO_INPUT: u8 = 66;
/// `EX_UNAVAILABLE`: the store or the API server cannot be reached, or does not answer.
pub const UNAVAILABLE: u8 = 69;
/// `EX_SOFTWARE`: a fault of this program.
pub const SOFTWARE: u8 = 70;
/// `EX_CANTCREAT`: the directory cannot be mounted on.
pub const CANNOT_MOUNT: u8 = 73;
/// `EX_TEMPFAIL`: a limit of memory or of the cache is reached.
pub const LIMIT: u8 = 75;
/// `EX_NOPERM`: the store or the API server refused.
pub const REFUSED: u8 = 77;

/// Prints a line to standard error. Nobody can be told that standard error is closed.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "fuse-secrets: {text}");
}

/// Prints an error with its causes, on one line each where it has several, and gives the exit code.
pub fn report(code: u8, error: &dyn Error) -> ExitCode {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    complain(&text);
    ExitCode::from(code)
}

/// The exit code after printing; a closed pipe is no failure of ours.
#[must_use]
pub fn printed(result: io::Result<()>, code: u8) -> ExitCode {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => report(FAILED, &error),
        _ => ExitCode::from(code),
    }
}

/// The code for a publish that is refused.
#[must_use]
pub fn refusal(code: Code) -> u8 {
    match code {
        Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition => DATA,
        Code::PermissionDenied => REFUSED,
        Code::ResourceExhausted => LIMIT,
        Code::Unavailable | Code::DeadlineExceeded => UNAVAILABLE,
        Code::Internal => SOFTWARE,
    }
}

/// The code for an agent that did not start.
#[must_use]
pub fn start(error: &StartError) -> u8 {
    match error {
        StartError::Memory(_) => LIMIT,
        StartError::Thread(_) => FAILED,
    }
}

/// The code for a volume that could not be served.
#[must_use]
pub fn serve(error: &ServeError) -> u8 {
    match error {
        ServeError::Publish(PublishError::Store(errors)) => {
            errors.first().map_or(FAILED, |(_, error)| match error.kind {
                ErrorKind::Unreachable
                | ErrorKind::Certificate
                | ErrorKind::RateLimited
                | ErrorKind::Unavailable
                | ErrorKind::Malformed
                | ErrorKind::Deadline => UNAVAILABLE,
                ErrorKind::Denied | ErrorKind::Missing | ErrorKind::Refused => REFUSED,
                ErrorKind::Local => NO_INPUT,
                ErrorKind::Full => LIMIT,
            })
        }
        ServeError::Publish(PublishError::Cache(CacheError::Limit { .. })) => LIMIT,
        ServeError::Publish(PublishError::Build(BuildError::Extract(_))) => DATA,
        ServeError::Publish(PublishError::Build(BuildError::Write(WriteError::Memory(_)))) => LIMIT,
        ServeError::Mount(_) => CANNOT_MOUNT,
        ServeError::Publish(_) | ServeError::Serve(_) | ServeError::Twice(_) => FAILED,
    }
}
