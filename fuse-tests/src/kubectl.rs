//! `kubectl` for tests without an API server: a directory for `PATH` in which `kubectl` is the stand-in `test-kubectl`, and who
//! answers its calls.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tempfile::TempDir;

/// A call of `kubectl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its standard input, where it was called with `-i`.
    pub input: String,
}

/// What it is to print, and its exit code.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// To standard output.
    pub out: String,
    /// To standard error.
    pub err: String,
    /// The exit code.
    pub code: u8,
}

impl Answer {
    /// An object.
    #[must_use]
    pub fn of(value: &Value) -> Self {
        Self { out: value.to_string(), ..Self::default() }
    }

    /// A failure, in words of the real `kubectl`.
    #[must_use]
    pub fn failure(err: &str) -> Self {
        Self { err: format!("{err}\n"), code: 1, ..Self::default() }
    }
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let code = output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255);
        let mut err = text(output.stderr);
        if code != 0 {
            // As the real one remarks.
            err.push_str(&format!("command terminated with exit code {code}\n"));
        }
        Self { out: text(output.stdout), err, code }
    }
}

impl Call {
    /// Whether these words stand in it, in this order and next to each other.
    #[must_use]
    pub fn has(&self, words: &[&str]) -> bool {
        self.arguments.windows(words.len()).any(|part| part == words)
    }

    /// What is run in a container: the words after `--`.
    #[must_use]
    pub fn program(&self) -> &[String] {
        let at =
            self.arguments.iter().position(|word| word == "--").map_or(self.arguments.len(), |at| at + 1);
        &self.arguments[at..]
    }
}

/// Answers calls until it is dropped.
pub struct Kubectl {
    directory: TempDir,
    calls: Arc<Mutex<Vec<Call>>>,
    ends: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl Kubectl {
    /// With who answers; `None`: it hangs. `stand_in` is the path of `test-kubectl`.
    ///
    /// # Panics
    /// No socket can be made.
    #[must_use]
    pub fn answered_by(
        stand_in: &str,
        answer: impl Fn(&Call) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(stand_in, directory.path().join("kubectl")).unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let (calls, answer) = (Arc::new(Mutex::new(Vec::new())), Arc::new(answer));
        let heard = Arc::clone(&calls);
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        // Each call has a thread, since they come at once.
        let listening = std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (answer, heard) = (Arc::clone(&answer), Arc::clone(&heard));
                std::thread::spawn(move || {
                    let call: Call = serde_json::from_reader(&stream).unwrap();
                    heard.lock().unwrap().push(call.clone());
                    match answer(&call) {
                        // Nobody reads it where the call was given up.
                        Some(answer) => drop(serde_json::to_writer(&mut stream, &answer)),
                        // Held open for as long as the test runs, but nothing of the test's own.
                        None => {
                            drop(answer);
                            loop {
                                std::thread::park();
                            }
                        }
                    }
                });
            }
        });
        Self { directory, calls, ends, listening: Some(listening) }
    }

    /// A program that finds this `kubectl`.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("PATH", self.directory.path());
        command.env("TEST_KUBECTL", self.directory.path().join("socket"));
        command
    }

    /// The calls so far.
    ///
    /// # Panics
    /// A thread that answers has panicked.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }
}

impl Drop for Kubectl {
    /// With it goes what its answers are made of, such as a whole node.
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if UnixStream::connect(self.directory.path().join("socket")).is_ok()
            && let Some(listening) = self.listening.take()
        {
            let _ = listening.join();
        }
    }
}
