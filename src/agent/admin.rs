//! The socket that the debug commands ask: `agent-<pid>.sock` in the runtime directory, for root and the agent's user only
//! (the directory is 0700, the socket 0600, and the peer's uid is checked as well).
//!
//! One question per connection: a line of JSON, answered with a line of JSON. Names, times and counts, never a value.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::status::{self, MountDetail, MountStatus};
use super::{Agent, runtime};

/// A question or answer that takes longer is given up.
const DEADLINE: Duration = Duration::from_secs(5);
/// A longer question is none.
const LONGEST_QUESTION: u64 = 16 << 10;
/// A longer reply is cut, and so none: a thousand mounts take less than one MiB.
const LONGEST_REPLY: u64 = 16 << 20;
/// Agents of one user that are asked.
const MOST_AGENTS: usize = 256;
/// Answers being written at a time.
const AT_ONCE: usize = 16;

/// What may be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// All mounts.
    Mounts,
    /// One mount with its files.
    Mount(String),
    /// The counters, as Prometheus reads them.
    Metrics,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Question::Mounts`].
    Mounts(Vec<MountStatus>),
    /// To [`Question::Mount`]; `None`: this agent has no such mount.
    Mount(Option<Box<MountDetail>>),
    /// To [`Question::Metrics`].
    Metrics(String),
    /// The question was not understood.
    Refused(String),
}

/// The listening socket; the file goes when this is dropped.
pub struct Socket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "cannot remove the socket");
        }
    }
}

/// Opens the socket and answers on it until it is dropped.
///
/// # Errors
/// The runtime directory or the socket cannot be made.
pub fn listen(agent: &Arc<Agent>) -> io::Result<Socket> {
    let directory = runtime::directory();
    runtime::make_private(&directory)?;
    let path = directory.join(format!("agent-{}.sock", std::process::id()));
    // The process that had this number and left the file is gone: the number is ours.
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let task = tokio::spawn(answer_all(listener, Arc::clone(agent)));
    Ok(Socket { path, task })
}

/// Asks every agent that the present user may ask, all at once. Agents that do not answer are told apart from those that are
/// gone.
pub async fn ask_all(question: &Question) -> Vec<(PathBuf, io::Result<Reply>)> {
    let Ok(question) = serde_json::to_vec(question) else { return Vec::new() };
    let question: Arc<[u8]> = question.into();
    let own = runtime::directory();
    let mut asked = JoinSet::new();
    for directory in runtime::directories() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        let sockets = entries.flatten().map(|entry| entry.path());
        for path in sockets.filter(|path| path.extension().is_some_and(|e| e == "sock")).take(MOST_AGENTS) {
            let (question, ours) = (Arc::clone(&question), directory == own);
            asked.spawn(async move {
                let answer = tokio::time::timeout(DEADLINE, ask(&path, &question)).await;
                let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within 5 s"));
                match answer.unwrap_or_else(late) {
                    // Left behind by a process that was killed; its successor of the same number would have taken it over.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                        // Not for root in another user's directory, which may be anything by now.
                        if ours {
                            let _ = std::fs::remove_file(&path);
                        }
                        None
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                    answer => Some((path, answer)),
                }
            });
        }
    }
    let mut answers: Vec<_> = asked.join_all().await.into_iter().flatten().collect();
    answers.sort_by(|a, b| a.0.cmp(&b.0));
    answers
}

async fn ask(path: &Path, question: &[u8]) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(question).await?;
    stream.write_all(b"\n").await?;
    let mut reply = Vec::new();
    stream.take(LONGEST_REPLY).read_to_end(&mut reply).await?;
    Ok(serde_json::from_slice(&reply)?)
}

async fn answer_all(listener: UnixListener, agent: Arc<Agent>) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    let answered = tokio::time::timeout(DEADLINE, answer(stream, &agent)).await;
                    if let Ok(Err(error)) = answered {
                        tracing::debug!(%error, "a question on the admin socket was not answered");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely; others will be closed.
                tracing::warn!(%error, "cannot accept on the admin socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(stream: UnixStream, agent: &Agent) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "another user"));
    }
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(LONGEST_QUESTION)).read_line(&mut line).await?;
    let reply = match serde_json::from_str(&line) {
        Ok(Question::Mounts) => Reply::Mounts(status::mounts(agent)),
        Ok(Question::Mount(path)) => Reply::Mount(status::detail(agent, &path).map(Box::new)),
        Ok(Question::Metrics) => Reply::Metrics(agent.metrics().render()),
        Err(_) => Reply::Refused("not a question of this version".to_owned()),
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    writer.write_all(&bytes).await
}
