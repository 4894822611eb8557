//! One call of `kubectl`: what it was to do, in words, so that a refusal says which right is missing; its deadline, after which it
//! is killed; and what it said, which is wiped, since it may be a token.

use std::io::{self, Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use crate::cli::exit;

/// Longest answer that is taken: the pods of a node's agents are a few KiB each, and there are at most 5,000 nodes.
const LONGEST: usize = 64 << 20;
/// Pieces of 64 KiB that a reader may be ahead of who listens.
const AHEAD: usize = 4;
/// Of what a failed call printed, people see so many bytes.
const LONGEST_WORDS: usize = 500;

/// The person's `kubectl`.
pub(super) struct Kubectl {
    global: Vec<String>,
    timeout: Duration,
}

/// What a call came to.
pub(super) struct Said {
    /// The exit code; `None` after a signal. That of the program in the container, for `exec`.
    pub(super) code: Option<i32>,
    /// Standard output.
    pub(super) out: Zeroizing<Vec<u8>>,
    /// Standard error, made text.
    pub(super) err: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// No kubectl.
    #[error("cannot run kubectl: {0}; install it, or put it into PATH")]
    Missing(io::Error),
    /// It was killed.
    #[error(
        "cannot {what}: no answer within {seconds} s{said}; try `kubectl get --raw /readyz`, or give a longer --timeout"
    )]
    Late {
        /// What was to be done.
        what: String,
        /// For how long was waited.
        seconds: u64,
        /// What kubectl had printed till then.
        said: String,
    },
    /// A right is missing.
    #[error(
        "you may not {what}: {said}; ask for that right (`kubectl fuse-secrets --help` lists all that are needed)"
    )]
    Forbidden {
        /// What was to be done.
        what: String,
        /// What the API server said.
        said: String,
    },
    /// It is not there.
    #[error("cannot {what}: {said}")]
    NotFound {
        /// What was to be done.
        what: String,
        /// What the API server said.
        said: String,
    },
    /// No connection to the API server, or no credentials that it takes.
    #[error("cannot {what}: {said}; is this the right context, and does `kubectl version` answer?")]
    Unreachable {
        /// What was to be done.
        what: String,
        /// What kubectl said.
        said: String,
    },
    /// Anything else.
    #[error("cannot {what}: {said}")]
    Failed {
        /// What was to be done.
        what: String,
        /// What kubectl said.
        said: String,
    },
}

impl CallError {
    /// The process's exit code.
    pub(super) fn code(&self) -> u8 {
        match self {
            Self::Missing(_) | Self::Late { .. } | Self::Unreachable { .. } => exit::UNAVAILABLE,
            Self::Forbidden { .. } => exit::REFUSED,
            Self::NotFound { .. } => exit::DATA,
            Self::Failed { .. } => exit::FAILED,
        }
    }

    /// In a table, which has no room for the API server's own words.
    pub(super) fn short(&self) -> String {
        match self {
            Self::Forbidden { what, .. } => format!("you may not {what}"),
            other => other.to_string(),
        }
    }

    /// Nothing is the matter but that it is not there.
    pub(super) fn is_absence(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

impl Kubectl {
    /// With the person's choice of cluster.
    pub(super) fn new(context: Option<&str>, kubeconfig: Option<&Path>, timeout: Duration) -> Self {
        let context = context.map(|context| format!("--context={context}"));
        let kubeconfig = kubeconfig.map(|file| format!("--kubeconfig={}", file.display()));
        Self { global: context.into_iter().chain(kubeconfig).collect(), timeout }
    }

    /// Asks for an object, or a list of them.
    ///
    /// # Errors
    /// [`CallError`]
    pub(super) fn get<T: DeserializeOwned>(&self, what: &str, arguments: &[&str]) -> Result<T, CallError> {
        let arguments = [arguments, &["-o", "json"]].concat();
        let said = self.ask(what, &arguments)?;
        serde_json::from_slice(&said.out).map_err(|_| {
            let said = "kubectl printed something else than that object as JSON".to_owned();
            CallError::Failed { what: what.to_owned(), said }
        })
    }

    /// The same, where it may be missing.
    ///
    /// # Errors
    /// [`CallError`], but not for what is not there.
    pub(super) fn find<T: DeserializeOwned>(
        &self,
        what: &str,
        arguments: &[&str],
    ) -> Result<Option<T>, CallError> {
        match self.get(what, arguments) {
            Err(error) if error.is_absence() => Ok(None),
            found => found.map(Some),
        }
    }

    /// Any call that succeeds or is an error. `what` follows "you may not": `list pods in namespace a`.
    ///
    /// # Errors
    /// [`CallError`]
    pub(super) fn ask(&self, what: &str, arguments: &[&str]) -> Result<Said, CallError> {
        let said = self.run(what, arguments, None, self.timeout)?;
        if said.code == Some(0) { Ok(said) } else { Err(failure(what, &said)) }
    }

    /// Runs a program in a container. Its own failure is no error here: [`Said::code`].
    ///
    /// # Errors
    /// [`CallError::Missing`], [`CallError::Late`]
    pub(super) fn exec(
        &self,
        place: &[&str],
        program: &[&str],
        input: Option<Zeroizing<Vec<u8>>>,
        timeout: Option<Duration>,
    ) -> Result<Said, CallError> {
        let flags: &[&str] = if input.is_some() { &["exec", "-i"] } else { &["exec"] };
        let arguments = [flags, place, &["--"], program].concat();
        self.run("run a program in the agent's container", &arguments, input, timeout.unwrap_or(self.timeout))
    }

    fn run(
        &self,
        what: &str,
        arguments: &[&str],
        input: Option<Zeroizing<Vec<u8>>>,
        timeout: Duration,
    ) -> Result<Said, CallError> {
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut command = Command::new("kubectl");
        command.args(&self.global).args(arguments);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(CallError::Missing)?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            // A program that ends without reading it has its reasons, and says them.
            std::thread::spawn(move || drop(stdin.write_all(&input)));
        }
        let (out, err) = (listen(child.stdout.take()), listen(child.stderr.take()));
        let end = Instant::now() + timeout;
        let (out, err) = (out.until(end), err.until(end));
        if !(out.is_whole && err.is_whole) {
            return Err(late(what, timeout, child, &err.bytes));
        }
        if out.bytes.len() > LONGEST {
            let _ = child.kill();
            let _ = child.wait();
            let said = format!("it answered more than {LONGEST} bytes");
            return Err(CallError::Failed { what: what.to_owned(), said });
        }
        let status = child.wait().map_err(CallError::Missing)?;
        let err = String::from_utf8_lossy(&err.bytes).into_owned();
        Ok(Said { code: status.code(), out: out.bytes, err })
    }
}

impl Said {
    /// What was said last on standard error, without kubectl's remark on the exit code.
    pub(super) fn last_words(&self) -> String {
        words(&self.err)
    }
}

/// Why a call did not succeed, by what kubectl printed: it has one exit code for all.
pub(super) fn failure(what: &str, said: &Said) -> CallError {
    let (what, text) = (what.to_owned(), said.last_words());
    let has = |marks: &[&str]| marks.iter().any(|mark| said.err.contains(mark));
    let said = if text.is_empty() { "kubectl failed without a word".to_owned() } else { text };
    if has(&["(Forbidden)", "is forbidden:"]) {
        CallError::Forbidden { what, said }
    } else if has(&["(NotFound)", "the server doesn't have a resource type"]) {
        CallError::NotFound { what, said }
    } else if has(&[
        "The connection to the server",
        "Unable to connect to the server",
        "(Unauthorized)",
        "You must be logged in to the server",
        "(ServiceUnavailable)",
        "i/o timeout",
    ]) {
        CallError::Unreachable { what, said }
    } else {
        CallError::Failed { what, said }
    }
}

fn late(what: &str, timeout: Duration, mut child: Child, err: &[u8]) -> CallError {
    // It may have ended in this moment.
    let _ = child.kill();
    let _ = child.wait();
    let said = words(&String::from_utf8_lossy(err));
    let said = if said.is_empty() { said } else { format!(" ({said})") };
    CallError::Late { what: what.to_owned(), seconds: timeout.as_secs(), said }
}

/// The last line that tells anything, not too long.
fn words(err: &str) -> String {
    let lines = || err.lines().map(str::trim).filter(|line| !line.is_empty()).rev();
    // kubectl's own log, and its remark on what the program in the container said before.
    let is_log = |line: &str| {
        let (level, rest) = line.split_at(line.chars().next().map_or(0, char::len_utf8));
        ["I", "W", "E", "F"].contains(&level) && rest.bytes().take(4).filter(u8::is_ascii_digit).count() == 4
    };
    let tells = |line: &&str| !line.starts_with("command terminated with exit code") && !is_log(line);
    let line = lines().find(tells).or(lines().next()).unwrap_or_default();
    line.chars().take(LONGEST_WORDS).collect()
}

/// What comes out of a pipe, piece by piece, so that a child which hangs is heard to the end.
struct Pieces(Receiver<Zeroizing<Vec<u8>>>);

struct Heard {
    bytes: Zeroizing<Vec<u8>>,
    /// Whether the pipe was closed, or more came than is taken.
    is_whole: bool,
}

fn listen(pipe: Option<impl Read + Send + 'static>) -> Pieces {
    let (tell, pieces) = sync_channel(AHEAD);
    if let Some(mut pipe) = pipe {
        // Ends with the pipe, or with the one who listens.
        std::thread::spawn(move || {
            let mut piece = Zeroizing::new(vec![0; 64 << 10]);
            loop {
                match pipe.read(&mut piece) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(read @ 1..) if tell.send(Zeroizing::new(piece[..read].to_vec())).is_ok() => {}
                    _ => return,
                }
            }
        });
    }
    Pieces(pieces)
}

impl Pieces {
    fn until(self, end: Instant) -> Heard {
        let mut bytes = Zeroizing::new(Vec::new());
        loop {
            match self.0.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(RecvTimeoutError::Disconnected) => return Heard { bytes, is_whole: true },
                Err(RecvTimeoutError::Timeout) => return Heard { bytes, is_whole: false },
            }
            if bytes.len() > LONGEST {
                return Heard { bytes, is_whole: true };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(err: &str) -> CallError {
        let err = err.to_owned();
        failure("list pods in namespace a", &Said { code: Some(1), out: Zeroizing::default(), err })
    }

    #[test]
    fn a_missing_right_is_named_with_what_it_is_for_and_exits_with_77() {
        let error = failed(
            "Error from server (Forbidden): pods is forbidden: User \"u\" cannot list resource \"pods\" in API group \"\" in \
             the namespace \"a\"\n",
        );
        assert_eq!(error.code(), 77);
        assert!(
            error.to_string().starts_with("you may not list pods in namespace a: Error from server"),
            "{error}"
        );
    }

    #[test]
    fn failures_of_kubectl_are_told_apart_by_what_it_prints() {
        for (text, code) in [
            (
                "E1128 08:41:55.469035 25045 memcache.go:265] \"Unhandled Error\"\nThe connection to the server 127.0.0.1:1 was \
              refused - did you specify the right host or port?\n",
                69,
            ),
            ("error: You must be logged in to the server (Unauthorized)\n", 69),
            ("Error from server (NotFound): pods \"x\" not found\n", 65),
            ("error: something else\ncommand terminated with exit code 3\n", 1),
            ("", 1),
        ] {
            let error = failed(text);
            assert_eq!(error.code(), code, "{error}");
            assert!(
                !error.to_string().contains("memcache") && !error.to_string().contains("exit code"),
                "{error}"
            );
        }
    }

    #[test]
    fn log_lines_of_kubectl_are_told_only_where_it_says_nothing_else() {
        assert_eq!(words("W0101 00:00:00.0 1 a.go:1] warned\nreason\n\n"), "reason");
        assert_eq!(words("W0101 00:00:00.0 1 a.go:1] warned\n"), "W0101 00:00:00.0 1 a.go:1] warned");
        assert_eq!(words("é\n"), "é");
    }
}
