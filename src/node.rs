//! The agent's side of the node protocol: two processes that the shim knows apart.
//!
//! ```text
//!   supervisor ──Hello──▶ shim        checked, its limit of locked memory raised
//!       │ starts a worker; Worker, with its pidfd ──▶ shim
//!       │ Done: one byte on the worker's standard input
//!       ▼
//!   worker ────Hello────▶ shim        the process that was announced, and no other
//!              Adopt ◀────┤           what no living agent serves
//!            Publish ◀────┤           and whatever kubelet wants
//!            Deposit ─────▶
//! ```
//! A worker holds all secrets and does all work; it may die at any moment, and the next one adopts what it served. The supervisor
//! does nothing else but start it, so it has no reason to die. Both connect again, for ever, when the shim is away: the volumes
//! are served all the while.

/// No right that is not needed.
pub mod confine;
/// What the health port tells.
pub mod health;
/// What a pod asks for, made of what kubelet says of it.
pub mod publish;
/// Errors as gRPC codes and texts.
pub mod refusal;
/// The first process.
pub mod supervisor;
/// The agent as the protocol asks it.
mod volumes;
/// The second process.
pub mod worker;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::{AskError, Asked, End, Link};
use fuse_secrets_csi::wire::message::{Hello, Role};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// First and longest pause between two attempts to reach the shim: it is a process of this node, gone for moments.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));
/// How long a shim may take to answer what needs no work of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no connection to the shim.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nobody listens.
    #[error("no shim answers at {path}: {error}; is fuse-secrets-csi running, and --node-socket its socket?")]
    Absent {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The socket is not for this user.
    #[error("this user may not ask the shim at {path}; it listens to root and to its agent's user")]
    Forbidden {
        /// The socket.
        path: PathBuf,
    },
    /// It knows who we are, and does not want us.
    #[error("the shim refused: {0}")]
    Refused(String),
    /// It does not answer, or not as a shim does.
    #[error("the shim at {path} did not say hello: {why}")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// Connects and says hello.
///
/// # Errors
/// [`AttachError`]
pub async fn attach(path: &Path, role: Role) -> Result<(Link, mpsc::Receiver<Asked>, Hello), AttachError> {
    let socket = UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => AttachError::Forbidden { path: path.to_owned() },
        _ => AttachError::Absent { path: path.to_owned(), error },
    })?;
    let (link, asked) = Link::start(socket, End::Connected);
    let hello = Hello { program: program(), role, ..Hello::default() };
    let silent = |why: String| AttachError::Silent { path: path.to_owned(), why };
    match link.ask(&Message::Hello(hello), Vec::new(), Instant::now() + PATIENCE).await {
        Ok(Message::Hello(hello)) if hello.role == Role::Shim => Ok((link, asked, hello)),
        Ok(Message::Refused(refused)) => Err(AttachError::Refused(refused.text)),
        Ok(Message::Unsupported(_)) => {
            Err(silent("it is of another version; update the older one".to_owned()))
        }
        Ok(_) => Err(silent("it answered something else".to_owned())),
        Err(error) => Err(silent(error.to_string())),
    }
}

/// The same, until it succeeds. What stands in the way is told once for each reason, and again after it was overcome.
pub async fn attach_at_last(path: &Path, role: Role) -> (Link, mpsc::Receiver<Asked>, Hello) {
    let (mut pause, mut told) = (PAUSES.0, String::new());
    loop {
        match attach(path, role).await {
            Ok(attached) => {
                if !told.is_empty() {
                    tracing::info!("the shim answers");
                }
                return attached;
            }
            Err(error) => {
                let text = error.to_string();
                if text != told {
                    tracing::warn!("{text}; goes on trying");
                    told = text;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// What we call ourselves.
fn program() -> String {
    format!("fuse-secrets {}", env!("CARGO_PKG_VERSION"))
}

/// What is wrong with an answer that is no `Done`.
fn undone(answer: Result<Message, AskError>) -> Result<(), String> {
    match answer {
        Ok(Message::Done(_)) => Ok(()),
        Ok(Message::Refused(refused)) => Err(refused.text),
        Ok(Message::Unsupported(_)) => Err("the shim is too old for this; update it".to_owned()),
        Ok(_) => Err("the shim answered something else".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
