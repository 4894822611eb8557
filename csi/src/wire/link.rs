//! A connection between shim and agent: questions and answers in both directions over one unix stream socket, each frame with its
//! descriptors.
//!
//! ```text
//!   ask ──▶ queue ──sendmsg, SCM_RIGHTS──▶ socket ──recvmsg──▶ Asked (a question) │ what ask returns (an answer)
//! ```
//! The lowest bit of a frame's id tells who asked: 0 the one that connected, 1 the one that accepted. A descriptor travels with the
//! first byte of its frame, and no read goes beyond the end of a frame, so none can come to another frame than its own. No answer
//! carries descriptors.
//!
//! **Bounds.** A question holds one of `AT_ONCE` turns until it is both written and over, on the side that asks as on the side
//! that answers. So neither queue grows beyond that, whatever the other side does, and a side that keeps to it never makes the
//! other stop reading, behind which its answers would wait.
//!
//! **Ends.** Another framing, descriptors that were not announced, or half a frame end the connection. An answer that nobody waits
//! for (any more) is counted. A message that cannot be read is answered, and the connection lives on.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{timeout, timeout_at};
use zeroize::Zeroizing;

use super::message::Refused;
use super::{Fault, HEADER, Header, Message, encode};

/// Most questions of one side at a time; more wait with who asks, within their deadlines.
pub const AT_ONCE: usize = 256;

/// Turns that only `Stats` takes: a busy agent is not to be taken for a hung one.
const HEARTBEATS: usize = 8;
/// The rest of a frame comes at once: who sent half of one is stopped, or hostile.
const REST: Duration = Duration::from_secs(10);
/// What was answered before a connection is ended here may still be written.
const LINGER: Duration = Duration::from_secs(1);
/// `super::MOST_DESCRIPTORS` of them, as the kernel packs them. More are cut off by it, which it tells.
const SPACE: usize = rustix::cmsg_space!(ScmRights(64));
/// gRPC's codes.
const INVALID_ARGUMENT: u32 = 3;
const UNAVAILABLE: u32 = 14;

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
    Fault(#[from] Fault),
}

/// One side of a connection; clones are the same side. The connection ends when the last one and the receiver of questions are
/// dropped, when the other side ends it, or with [`Link::close`].
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    /// Its sender goes with the connection.
    ended: watch::Receiver<()>,
}

/// A question of the other side. One that is dropped is answered with `Refused`.
pub struct Asked {
    /// What is asked; never an answer.
    pub message: Message,
    /// What came along.
    pub descriptors: Vec<OwnedFd>,
    /// The way back, for who takes the question apart.
    pub reply: Reply,
}

/// The way back for one answer. Dropped without, it answers `Refused`.
pub struct Reply {
    id: u32,
    to: mpsc::UnboundedSender<Frame>,
    turn: Arc<OwnedSemaphorePermit>,
    answered: bool,
}

/// Ready to be written.
struct Frame {
    bytes: Zeroizing<Vec<u8>>,
    descriptors: Vec<OwnedFd>,
    /// Of a question: when nobody waits for its answer any more, it is not asked.
    question: Option<u32>,
    _turn: Arc<OwnedSemaphorePermit>,
}

struct Shared {
    queue: mpsc::UnboundedSender<Frame>,
    /// Who waits for the answer to which question: as many as there are [`Waiting`].
    waiting: Mutex<HashMap<u32, oneshot::Sender<Message>>>,
    next: AtomicU32,
    turns: Arc<Semaphore>,
    heartbeats: Arc<Semaphore>,
    close: Notify,
    strays: AtomicU64,
}

impl Asked {
    /// Answers.
    pub fn answer(self, message: Message) {
        self.reply.answer(message);
    }
}

impl Reply {
    /// Answers. What does not fit a frame is answered with `Refused`.
    pub fn answer(mut self, message: Message) {
        self.send(&message);
    }

    fn send(&mut self, message: &Message) {
        self.answered = true;
        let bytes = encode(self.id, message, 0).or_else(|fault| encode(self.id, &refused(fault), 0));
        // Neither fails: a refusal fits a frame, and when the connection is gone nobody waits for an answer.
        let _ = bytes.map(|bytes| {
            let turn = Arc::clone(&self.turn);
            self.to.send(Frame { bytes, descriptors: Vec::new(), question: None, _turn: turn })
        });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered {
            let text = "the question was given up: ask again".to_owned();
            self.send(&Message::Refused(Refused { code: UNAVAILABLE, text }));
        }
    }
}

impl Link {
    /// Speaks on a connected socket, from within a tokio runtime.
    #[must_use]
    pub fn start(socket: UnixStream, end: End) -> (Self, mpsc::Receiver<Asked>) {
        let (queue, frames) = mpsc::unbounded_channel();
        let (questions, asked) = mpsc::channel(AT_ONCE);
        let (alive, ended) = watch::channel(());
        let shared = Arc::new(Shared {
            queue,
            waiting: Mutex::default(),
            next: AtomicU32::new(u32::from(end == End::Accepted)),
            turns: Arc::new(Semaphore::new(AT_ONCE - HEARTBEATS)),
            heartbeats: Arc::new(Semaphore::new(HEARTBEATS)),
            close: Notify::new(),
            strays: AtomicU64::new(0),
        });
        let link = Self { shared: Arc::clone(&shared), ended };
        tokio::spawn(async move {
            shared.run(&socket, frames, questions, &alive).await;
            drop(socket);
            drop(alive);
        });
        (link, asked)
    }

    /// Asks, and waits for the answer: any message, `Refused` and `Unsupported` among them. May be dropped while it waits.
    ///
    /// # Errors
    /// [`AskError`]
    pub async fn ask(
        &self,
        message: &Message,
        descriptors: Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<Message, AskError> {
        tokio::select! {
            biased;
            answer = timeout_at(deadline.into(), self.shared.ask(message, descriptors)) => {
                answer.map_err(|_| AskError::Deadline)?
            }
            () = self.closed() => Err(AskError::Closed),
        }
    }

    /// Ends the connection for both sides. What was answered before is still written.
    pub fn close(&self) {
        self.shared.close.notify_one();
    }

    /// Returns when the connection has ended, for whatever reason.
    pub async fn closed(&self) {
        // Nothing is ever sent there: it ends with an error when the sender is gone.
        let _ = self.ended.clone().changed().await;
    }

    /// Answers that came when nobody waited for them, or with descriptors, which were closed.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.shared.strays.load(Ordering::Relaxed)
    }
}

/// Takes a question from the list when its asker gives up.
struct Waiting<'a>(&'a Shared, u32);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(&self.1);
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Message>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, message: &Message, descriptors: Vec<OwnedFd>) -> Result<Message, AskError> {
        let id = self.next.fetch_add(2, Ordering::Relaxed);
        let bytes = encode(id, message, descriptors.len())?;
        let turns = if matches!(message, Message::Stats(_)) { &self.heartbeats } else { &self.turns };
        let turn = Arc::clone(turns).acquire_owned().await.map_err(|_| AskError::Closed)?;
        let turn = Arc::new(turn);
        let (asker, answer) = oneshot::channel();
        self.waiting().insert(id, asker);
        let _waiting = Waiting(self, id);
        let frame = Frame { bytes, descriptors, question: Some(id), _turn: Arc::clone(&turn) };
        self.queue.send(frame).map_err(|_| AskError::Closed)?;
        answer.await.map_err(|_| AskError::Closed)
    }

    /// Until the connection has ended.
    async fn run(
        &self,
        socket: &UnixStream,
        frames: mpsc::UnboundedReceiver<Frame>,
        questions: mpsc::Sender<Asked>,
        alive: &watch::Sender<()>,
    ) {
        let last = Notify::new();
        let mut writing = std::pin::pin!(self.write(socket, frames, &last));
        let unused = async {
            questions.closed().await;
            alive.closed().await;
        };
        let ended = tokio::select! {
            ended = &mut writing => ended,
            ended = self.read(socket, &questions) => ended,
            () = async { tokio::select! { () = self.close.notified() => {}, () = unused => {} } } => {
                last.notify_one();
                timeout(LINGER, writing).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "a connection between shim and agent ended");
        }
    }

    async fn write(
        &self,
        socket: &UnixStream,
        mut frames: mpsc::UnboundedReceiver<Frame>,
        last: &Notify,
    ) -> io::Result<()> {
        loop {
            let frame = tokio::select! {
                biased;
                frame = frames.recv() => frame,
                () = last.notified() => {
                    frames.close();
                    continue;
                }
            };
            let Some(frame) = frame else { return Ok(()) };
            if frame.question.is_none_or(|id| self.waiting().contains_key(&id)) {
                send(socket, frame).await?;
            }
        }
    }

    /// Until the other side has ended the connection, or must not go on.
    async fn read(&self, socket: &UnixStream, questions: &mpsc::Sender<Asked>) -> io::Result<()> {
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        while let Some((header, payload, descriptors)) = receive(socket).await? {
            let message = header.open(&payload);
            drop(payload);
            if header.id % 2 == self.next.load(Ordering::Relaxed) % 2 {
                let asker = self.waiting().remove(&header.id);
                let answer = message.unwrap_or_else(|fault| refusal(&header, fault));
                let taken = asker.is_some_and(|asker| asker.send(answer).is_ok());
                self.strays.fetch_add(u64::from(!taken || !descriptors.is_empty()), Ordering::Relaxed);
                continue;
            }
            let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return Ok(()) };
            let turn = Arc::new(turn);
            let reply = Reply { id: header.id, to: self.queue.clone(), turn, answered: false };
            match message {
                Err(fault) => reply.answer(refusal(&header, fault)),
                Ok(Message::Done(_) | Message::Refused(_) | Message::Unsupported(_)) => {
                    reply.answer(refused("an answer instead of a question"));
                }
                // There is room, as each holds a turn. When nobody asks for questions any more, dropping answers it.
                Ok(message) => drop(questions.try_send(Asked { message, descriptors, reply })),
            }
        }
        Ok(())
    }
}

fn refused(why: impl ToString) -> Message {
    Message::Refused(Refused { code: INVALID_ARGUMENT, text: why.to_string() })
}

fn refusal(header: &Header, fault: Fault) -> Message {
    if matches!(fault, Fault::Unsupported(_)) { header.unsupported() } else { refused(fault) }
}

async fn send(socket: &UnixStream, frame: Frame) -> io::Result<()> {
    let mut descriptors = frame.descriptors;
    let mut rest = frame.bytes.as_slice();
    while !rest.is_empty() {
        let once = || {
            let carried: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); SPACE];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !carried.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&carried)) {
                return Err(invalid("more descriptors than are taken"));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            Ok(sendmsg(socket, &[IoSlice::new(rest)], &mut control, flags)?)
        };
        let sent = socket.async_io(Interest::WRITABLE, once).await?;
        descriptors.clear();
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// The next frame; `None` when the other side has ended the connection between two.
async fn receive(socket: &UnixStream) -> io::Result<Option<(Header, Zeroizing<Vec<u8>>, Vec<OwnedFd>)>> {
    let mut head = [0; HEADER];
    let (first, descriptors) = read_some(socket, &mut head).await?;
    if first == 0 {
        return Ok(None);
    }
    let rest = async {
        fill(socket, head.get_mut(first..).unwrap_or_default()).await?;
        let header = Header::decode(&head).map_err(invalid)?;
        if usize::from(header.descriptors) != descriptors.len() {
            return Err(invalid("another number of descriptors than its header announces"));
        }
        let mut payload = Zeroizing::new(vec![0; header.length]);
        fill(socket, &mut payload).await?;
        Ok(Some((header, payload, descriptors)))
    };
    timeout(REST, rest).await.map_err(|_| invalid("half a frame"))?
}

async fn fill(socket: &UnixStream, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        let (read, descriptors) = read_some(socket, into).await?;
        if read == 0 || !descriptors.is_empty() {
            return Err(invalid("half a frame"));
        }
        into = into.get_mut(read..).unwrap_or_default();
    }
    Ok(())
}

async fn read_some(socket: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let once = || {
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let descriptors = rights.flatten().collect();
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(invalid("more descriptors than are taken, or than this process may open"));
        }
        Ok((message.bytes, descriptors))
    };
    socket.async_io(Interest::READABLE, once).await
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
