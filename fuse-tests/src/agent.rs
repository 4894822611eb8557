//! A child that serves volumes as it is told, over pipes: a line of JSON each way per command.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command as Process, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use fuse_secrets::agent::runtime;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::mounted::Mounted;
use crate::stamp::Content;
use crate::wait;

/// What the child can be told.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Mount a volume that has no store behind it.
    Bare {
        /// Where.
        path: PathBuf,
        /// Its files.
        files: Vec<BareFile>,
        /// What they hold, in the same order.
        contents: Vec<Content>,
    },
    /// Serve such a volume on the mount that came over the link under its name, and have its parts kept.
    Lend {
        /// Where it is mounted, which is also its name.
        path: PathBuf,
        /// Its files.
        files: Vec<BareFile>,
        /// What they hold, in the same order.
        contents: Vec<Content>,
    },
    /// Install a generation of such a volume.
    Install {
        /// Which.
        path: PathBuf,
        /// What its files hold from now on.
        contents: Vec<Content>,
    },
    /// Mount a class, as `fuse-secrets mount` does.
    Class {
        /// Where.
        path: PathBuf,
        /// The document.
        class: String,
        /// Settings, as the environment spells them, in lower case and without prefix: `token_file`.
        settings: BTreeMap<String, String>,
    },
    /// Let the next handler that announces a change panic, with the bytes of the volume's first file in the message.
    Panic {
        /// Of which volume.
        path: PathBuf,
    },
    /// Numbers of the generations that are kept.
    Generations {
        /// Of which volume.
        path: PathBuf,
    },
    /// The counters.
    Metrics,
    /// Keep a text in memory, for a search that must find it.
    Plant(String),
    /// Forget a volume; its mount has gone before.
    Forget {
        /// Which.
        path: PathBuf,
    },
}

/// A file without a store behind it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct BareFile {
    /// Its path.
    pub path: String,
    /// Its owner.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
    /// Its permission bits.
    pub mode: Option<u16>,
}

impl From<&str> for BareFile {
    fn from(path: &str) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }
}

/// What the child answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// To [`Command::Generations`].
    Generations(Vec<u32>),
    /// To [`Command::Metrics`].
    Metrics(BTreeMap<String, u64>),
    /// It could not be done.
    Failed(String),
}

/// The child. It ends, and with it whatever it serves, when this is dropped.
pub struct Agent {
    child: Child,
    commands: Option<ChildStdin>,
    answers: Receiver<String>,
    log: NamedTempFile,
}

impl Agent {
    /// Starts the program `test-agent`, which logs at trace.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn start(program: &str) -> Self {
        Self::start_with(program, &[])
    }

    /// The same with arguments: the socket of one who keeps what it deposits, and the word `resend` or `clone`.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn start_with(program: &str, arguments: &[&str]) -> Self {
        let log = NamedTempFile::new().unwrap();
        let mut child = Process::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let commands = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (tell, answers) = channel();
        // Ends with the child, whose output it reads.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        Self { child, commands, answers, log }
    }

    /// Tells it something and waits until it is done.
    ///
    /// # Errors
    /// The text of its refusal; or it does not answer within 60 s, or is gone.
    ///
    /// # Panics
    /// It answers something else than JSON.
    pub fn ask(&mut self, command: &Command) -> Result<Answer, String> {
        let mut line = serde_json::to_vec(command).unwrap();
        line.push(b'\n');
        let sent = self.commands.as_mut().ok_or("it is ending")?.write_all(&line);
        sent.map_err(|error| format!("{command:?}: {error}"))?;
        let answer = self.answers.recv_timeout(Duration::from_secs(60));
        match serde_json::from_str(&answer.map_err(|error| format!("{command:?}: {error}"))?).unwrap() {
            Answer::Failed(why) => Err(why),
            answer => Ok(answer),
        }
    }

    /// Mounts a volume without a store.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn bare(&mut self, files: &[BareFile], contents: &[Content]) -> Mounted {
        let mounted = Mounted::new();
        let (files, contents) = (files.to_vec(), contents.to_vec());
        self.ask(&Command::Bare { path: mounted.path().to_owned(), files, contents }).unwrap();
        mounted
    }

    /// The same with named texts.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn texts(&mut self, files: &[(&str, &str)]) -> Mounted {
        let (names, texts): (Vec<BareFile>, Vec<Content>) =
            files.iter().map(|(name, text)| (BareFile::from(*name), Content::from(*text))).unzip();
        self.bare(&names, &texts)
    }

    /// Gives a volume's files other content.
    ///
    /// # Panics
    /// It refuses.
    pub fn install(&mut self, mounted: &Mounted, contents: &[Content]) {
        let (path, contents) = (mounted.path().to_owned(), contents.to_vec());
        self.ask(&Command::Install { path, contents }).unwrap();
    }

    /// The same with texts.
    ///
    /// # Panics
    /// It refuses.
    pub fn install_texts(&mut self, mounted: &Mounted, texts: &[&str]) {
        let contents: Vec<Content> = texts.iter().map(|text| Content::from(*text)).collect();
        self.install(mounted, &contents);
    }

    /// Numbers of the generations that it keeps.
    ///
    /// # Panics
    /// It knows no such volume.
    pub fn generations(&mut self, mounted: &Mounted) -> Vec<u32> {
        match self.ask(&Command::Generations { path: mounted.path().to_owned() }) {
            Ok(Answer::Generations(numbers)) => numbers,
            other => panic!("{other:?}"),
        }
    }

    /// One of its counters, by the name without `fuse_secrets_`.
    ///
    /// # Panics
    /// There is no such counter.
    pub fn metric(&mut self, name: &str) -> u64 {
        match self.ask(&Command::Metrics) {
            Ok(Answer::Metrics(all)) => all[&format!("fuse_secrets_{name}")],
            other => panic!("{other:?}"),
        }
    }

    /// Unmounts a volume and lets go of it.
    ///
    /// # Panics
    /// It does not let go.
    pub fn unmount(&mut self, mounted: &Mounted) {
        mounted.unmount();
        self.ask(&Command::Forget { path: mounted.path().to_owned() }).unwrap();
    }

    /// Kills it by SIGKILL, and returns when nothing of it is left.
    ///
    /// # Panics
    /// It cannot be killed.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = std::fs::remove_file(runtime::directory().join(format!("agent-{}.sock", self.child.id())));
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged so far.
    ///
    /// # Panics
    /// The log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        read_log(self.log.path())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (log, metrics) = (self.log(), self.ask(&Command::Metrics));
            let start = log.lines().count().saturating_sub(50);
            let last: Vec<&str> = log.lines().skip(start).collect();
            let _ = writeln!(std::io::stderr(), "the agent's last words:\n{}\n{metrics:?}", last.join("\n"));
        }
        drop(self.commands.take());
        end(&mut self.child, "test-agent");
    }
}

/// Waits for a child that was told to end; kills it if it does not. A child that ends by itself leaves no socket.
pub(crate) fn end(child: &mut Child, name: &str) {
    let end = std::time::Instant::now() + wait::SOON;
    while std::time::Instant::now() < end {
        if !matches!(child.try_wait(), Ok(None)) {
            let socket = runtime::directory().join(format!("agent-{}.sock", child.id()));
            assert!(std::thread::panicking() || !socket.exists(), "{name} left {}", socket.display());
            return;
        }
        wait::pause(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    assert!(std::thread::panicking(), "{name} did not end by itself");
}

pub(crate) fn read_log(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()
}
