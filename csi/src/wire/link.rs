//! A connection between shim and agent: questions and answers in both directions over one unix stream socket, each frame with its
//! descriptors.
//!
//! ```text
//!   ask ──▶ writer task ──sendmsg, SCM_RIGHTS──▶ socket ──recvmsg──▶ reader task ──▶ Asked (a question) │ ask's return (an answer)
//! ```
//! The lowest bit of a frame's id tells who asked: 0 the one that connected, 1 the one that accepted. A descriptor travels with the
//! first byte of its frame. What arrives in excess or for nobody is closed.

use std::os::fd::OwnedFd;
use std::time::Instant;

use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::Message;

/// Most questions of the other side that are worked on at a time; more wait in the socket.
pub const AT_ONCE: usize = 256;

/// Which end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It connected: the agent.
    Connected,
    /// It accepted: the shim.
    Accepted,
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The other side is gone, or spoke another protocol.
    #[error("the connection is closed")]
    Closed,
    /// No answer in time.
    #[error("no answer in time")]
    Deadline,
    /// The question does not fit a frame.
    #[error(transparent)]
    Fault(#[from] super::Fault),
}

/// One side of a connection; clones are the same side. The connection ends when the last one and the receiver of questions are
/// dropped, when the other side ends it, or with [`Link::close`].
#[derive(Clone)]
pub struct Link {}

/// A question of the other side.
pub struct Asked {
    /// What is asked; never an answer.
    pub message: Message,
    /// What came along.
    pub descriptors: Vec<OwnedFd>,
}

impl Asked {
    /// Answers. A question that is dropped without is answered with `Refused`.
    pub fn answer(self, _message: Message) {
        todo!()
    }
}

impl Link {
    /// Speaks on a connected socket, from within a tokio runtime.
    #[must_use]
    pub fn start(_socket: UnixStream, _end: End) -> (Self, mpsc::Receiver<Asked>) {
        todo!()
    }

    /// Asks, and waits for the answer: any message, `Refused` and `Unsupported` among them. May be dropped while it waits.
    ///
    /// # Errors
    /// [`AskError`]
    pub async fn ask(
        &self,
        _message: &Message,
        _descriptors: Vec<OwnedFd>,
        _deadline: Instant,
    ) -> Result<Message, AskError> {
        todo!()
    }

    /// Ends the connection for both sides.
    pub fn close(&self) {
        todo!()
    }

    /// Returns when the connection has ended, for whatever reason.
    pub async fn closed(&self) {
        todo!()
    }
}
