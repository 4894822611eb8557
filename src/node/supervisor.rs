//! The agent's first process: it starts a worker, tells the shim which one it is, and starts another when it dies.
//!
//! ```text
//!            the shim answers            Done               it died: the next one at once
//!   Waiting ──────────────────▶ Started ──────▶ Working ───────────────────────────────────▶ Started
//!                                  │ it ended with a code that a restart does not change
//!                                  ▼
//!                                ended, with that code
//! ```
//! kubelet's own restart of a container comes after 1 s to 5 min, for which all readers would wait.
//!
//! The worker is this program with a hidden flag. Its standard input is one end of a socket: a byte on it says that the shim knows
//! the worker now, and brings the listening socket of the health port along, which so outlives every worker. The worker ends with
//! its supervisor, by the kernel's hand.

use std::convert::Infallible;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_secrets_csi::health;
use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::Link;
use fuse_secrets_csi::wire::message::{Role, Worker};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::signal::unix::{Signal as Heard, SignalKind, signal};
use tokio::sync::watch;

use super::health::Waiting;
use super::{PATIENCE, attach_at_last, undone};

/// A worker that lived shorter than this will do so again.
const SHORT: Duration = Duration::from_secs(1);
/// First and longest pause before the next worker, when the last one was short-lived and not the first such one.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Pause before a worker that the shim refused is announced again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long a worker may take to leave: 20 s for a shim that is away, 6 s for what was read, and some.
const LEAVING: Duration = Duration::from_secs(30);

/// How long to wait before the next worker.
#[derive(Debug, Default)]
pub struct Backoff {
    pause: Option<Duration>,
}

impl Backoff {
    /// The last worker lived for so long.
    pub fn after(&mut self, lived: Duration) -> Duration {
        if lived >= SHORT {
            self.pause = None;
            return Duration::ZERO;
        }
        let pause = self.pause.unwrap_or_default();
        self.pause = Some((pause * 2).clamp(PAUSES.0, PAUSES.1));
        pause
    }
}

/// What a supervisor needs.
pub struct Supervisor {
    /// The worker's command line.
    pub command: Command,
    /// Listens where health is told.
    pub health: Option<TcpListener>,
    /// Exit codes of a worker that a restart does not change.
    pub hopeless: &'static [u8],
}

/// Why a supervisor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to, and the worker left.
    Told,
    /// It was told to, and the worker did not leave in time.
    Stuck,
    /// The worker ended with a code that a restart does not change.
    Hopeless(u8),
}

/// The connection to the shim and its number, from 1; `None`: there is none now.
type Attached = watch::Receiver<Option<(u64, Link)>>;

impl Supervisor {
    /// Keeps a worker running until `stop` returns.
    pub async fn run(mut self, socket: &Path, stop: impl Future<Output = ()>) -> Ended {
        let (tell, mut attached) = watch::channel(None);
        let mut process = None;
        let supervising = async {
            let code = tokio::select! {
                code = self.keep_working(&mut attached, &mut process) => Some(code),
                () = stop => None,
            };
            match (code, &mut process) {
                (Some(code), _) => Ended::Hopeless(code),
                (None, None) => Ended::Told,
                (None, Some(process)) => process.leave(&mut attached).await,
            }
        };
        tokio::select! {
            ended = supervising => ended,
            never = keep_attached(socket, &tell) => match never {},
        }
    }

    /// Starts workers, until one ends with a code that a restart does not change.
    async fn keep_working(&mut self, attached: &mut Attached, slot: &mut Option<Process>) -> u8 {
        let (mut backoff, mut former) = (Backoff::default(), String::new());
        loop {
            let started = Instant::now();
            let ended = self.work(attached, slot, &former).await;
            *slot = None;
            let pause = backoff.after(started.elapsed());
            match ended {
                Ok(status) => {
                    let code = status.code().and_then(|code| u8::try_from(code).ok());
                    if let Some(code) = code.filter(|code| self.hopeless.contains(code)) {
                        return code;
                    }
                    former = how_it_ended(status);
                    tracing::error!(how = former, ?pause, "the worker ended; starts another");
                }
                Err(error) => tracing::error!(%error, ?pause, "no worker could be started; tries again"),
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One worker, from its start to its end.
    async fn work(
        &mut self,
        attached: &mut Attached,
        slot: &mut Option<Process>,
        former: &str,
    ) -> io::Result<ExitStatus> {
        let health = self.health.as_ref();
        let starting = async {
            // It inherits the limit of locked memory, which the shim has raised when it answered us.
            in_force(attached, |_| true).await;
            let process = slot.insert(Process::start(&mut self.command, former)?);
            tracing::info!(pid = process.child.id(), "worker started");
            tokio::select! {
                ended = ended(&mut process.child, &mut process.ends) => return ended.map(Start::Ended),
                () = introduce(attached, &process.pidfd, &process.former, &mut process.known_to) => {
                    process.go(health.map(AsFd::as_fd))?;
                }
            }
            Ok::<_, io::Error>(Start::Working(process))
        };
        let started = tokio::select! {
            started = starting => started?,
            never = tell_waiting(health) => match never {},
        };
        let process = match started {
            Start::Working(process) => process,
            Start::Ended(status) => return Ok(status),
        };
        tokio::select! {
            ended = ended(&mut process.child, &mut process.ends) => ended,
            never = keep_introduced(attached, &process.pidfd, &process.former, &mut process.known_to) => match never {},
        }
    }
}

/// How a worker's start came out.
enum Start<'a> {
    /// It was told to go.
    Working(&'a mut Process),
    /// It ended before.
    Ended(ExitStatus),
}

/// A worker.
struct Process {
    child: Child,
    pidfd: OwnedFd,
    /// Hears when a child of this process has ended.
    ends: Heard,
    /// How the one before it ended, which only its parent learns: for the shim to tell. Empty: there was none.
    former: String,
    /// The other end of its standard input, until it was told to go.
    input: Option<OwnedFd>,
    /// Number of the connection on which the shim was told of it.
    known_to: u64,
}

impl Process {
    fn start(command: &mut Command, former: &str) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Heard from before there is a child.
        let ends = signal(SignalKind::child())?;
        let mut child = command.stdin(Stdio::from(its)).spawn()?;
        // The command keeps a copy of the other end, with which the worker would not notice that we are gone.
        command.stdin(Stdio::null());
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => {
                let former = former.to_owned();
                Ok(Self { child, pidfd, ends, former, input: Some(ours), known_to: 0 })
            }
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    /// Tells it that the shim knows it.
    fn go(&mut self, health: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(input) = self.input.take() else { return Ok(()) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<_> = health.into_iter().collect();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        match sendmsg(&input, &[IoSlice::new(b"g")], &mut control, SendFlags::NOSIGNAL) {
            // It is gone, as its end will tell.
            Err(rustix::io::Errno::PIPE) => Ok(()),
            sent => Ok(sent.map(|_| ())?),
        }
    }

    /// Tells it to leave, and waits. It may need the shim for it, which must know it then.
    async fn leave(&mut self, attached: &mut Attached) -> Ended {
        // One that is gone already needs no signal.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        let told = tokio::select! {
            ended = ended(&mut self.child, &mut self.ends) => ended.map(|_| Ended::Told),
            never = keep_introduced(attached, &self.pidfd, &self.former, &mut self.known_to) => match never {},
            () = tokio::time::sleep(LEAVING) => {
                tracing::error!("the worker does not leave; ends it");
                self.child.kill().map(|()| Ended::Stuck)
            }
        };
        match told.and_then(|told| self.child.wait().map(|_| told)) {
            Ok(told) => told,
            Err(error) => {
                tracing::error!(%error, "cannot wait for the worker");
                Ended::Stuck
            }
        }
    }
}

/// Waits for the supervisor's word on standard input; the listening socket of the health port comes along. Blocks its thread.
///
/// # Errors
/// `UnexpectedEof`: the supervisor is gone.
pub fn wait_for_go(input: BorrowedFd<'_>) -> io::Result<Option<TcpListener>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(input, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let listener = descriptors.next().and_then(|mut descriptors| descriptors.next()).map(TcpListener::from);
    if message.bytes == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(listener) }
}

/// Listens where health is told. On a node without IPv6, "every address" means every one that there is.
///
/// # Errors
/// bind(2)
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = match TcpListener::bind(address) {
        Err(error)
            if address.ip().is_unspecified()
                && error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))?
        }
        listener => listener?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// How a process ended, for people.
fn how_it_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, signal) => format!("killed by signal {}", signal.unwrap_or_default()),
    }
}

/// Returns when the process has ended.
async fn ended(child: &mut Child, ends: &mut Heard) -> io::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        // `None` would mean that the runtime ends.
        ends.recv().await;
    }
}

async fn keep_attached(socket: &Path, tell: &watch::Sender<Option<(u64, Link)>>) -> Infallible {
    for number in 1.. {
        let (link, mut questions, hello) = attach_at_last(socket, Role::Supervisor).await;
        tracing::info!(shim = hello.program, "registered with the shim");
        tell.send_replace(Some((number, link)));
        // The shim asks a supervisor nothing; a question that is dropped is answered.
        while questions.recv().await.is_some() {}
        tell.send_replace(None);
    }
    std::future::pending().await
}

/// A connection with a number that will do.
async fn in_force(attached: &mut Attached, will_do: impl Fn(u64) -> bool) -> (u64, Link) {
    match attached.wait_for(|now| now.as_ref().is_some_and(|(number, _)| will_do(*number))).await {
        Ok(now) if let Some(now) = now.clone() => now,
        // Whoever attaches lives as long as who asks.
        _ => std::future::pending().await,
    }
}

/// Returns when the shim was told of a worker on a connection on which it was not told before.
async fn introduce(attached: &mut Attached, pidfd: &OwnedFd, former: &str, known_to: &mut u64) {
    let mut told = String::new();
    loop {
        let (number, link) = in_force(attached, |number| number != *known_to).await;
        let why = match pidfd.try_clone() {
            Ok(pidfd) => {
                let message = Message::Worker(Worker { ended: former.to_owned() });
                let answer = link.ask(&message, vec![pidfd], Instant::now() + PATIENCE).await;
                match undone(answer) {
                    Ok(()) => {
                        *known_to = number;
                        return;
                    }
                    Err(why) => why,
                }
            }
            Err(error) => error.to_string(),
        };
        if why != told {
            tracing::warn!("the shim does not take the worker: {why}; goes on trying");
            told = why;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Tells every shim that comes.
async fn keep_introduced(
    attached: &mut Attached,
    pidfd: &OwnedFd,
    former: &str,
    known_to: &mut u64,
) -> Infallible {
    loop {
        introduce(attached, pidfd, former, known_to).await;
    }
}

/// Tells the health port that there is no worker, until this is dropped.
async fn tell_waiting(listener: Option<&TcpListener>) -> Infallible {
    let listener = listener.map(TcpListener::try_clone);
    match listener.map(|listener| listener.and_then(tokio::net::TcpListener::from_std)) {
        Some(Ok(listener)) => health::serve(listener, Arc::new(Waiting)).await,
        Some(Err(error)) => tracing::warn!(%error, "cannot tell how this process is"),
        None => {}
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_lives_make_pauses_grow_from_none_to_a_second_and_a_longer_one_ends_them() {
        let mut backoff = Backoff::default();
        let short = Duration::from_millis(999);
        let pauses: Vec<_> = (0..10).map(|_| backoff.after(short).as_millis()).collect();
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(backoff.after(SHORT), Duration::ZERO);
        assert_eq!(backoff.after(short), Duration::ZERO);
        assert_eq!(backoff.after(short), PAUSES.0);
    }

    #[test]
    fn the_word_to_go_brings_the_listening_socket_along() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let flags = SocketFlags::CLOEXEC;
        for listener in [Some(&listener), None] {
            let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            let child = Command::new("true").spawn().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _inside = runtime.enter();
            let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
            let ends = signal(SignalKind::child()).unwrap();
            let mut process =
                Process { child, pidfd, ends, former: String::new(), input: Some(ours), known_to: 0 };
            process.go(listener.map(AsFd::as_fd)).unwrap();
            let came = wait_for_go(its.as_fd()).unwrap();
            let expected = listener.map(|_| address);
            assert_eq!(came.map(|listener| listener.local_addr().unwrap()), expected);
            process.child.wait().unwrap();
            assert_eq!(wait_for_go(its.as_fd()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn ends_are_told_in_words() {
        assert_eq!(how_it_ended(ExitStatus::from_raw(9)), "killed by signal 9");
        assert_eq!(how_it_ended(ExitStatus::from_raw(70 << 8)), "exited with 70");
    }
}
