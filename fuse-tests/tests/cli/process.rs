use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Nothing here takes that long, but on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running program. Killed, if a test leaves it.
pub(crate) struct Process {
    child: Child,
    handle: OwnedFd,
    out: Stream,
    err: Stream,
}

/// What a finished program left.
pub(crate) struct Ended {
    /// The exit code; -1 after a signal.
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

struct Stream {
    lines: Receiver<String>,
    seen: String,
}

impl Stream {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                if tell.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Self { lines, seen: String::new() }
    }

    fn until(&mut self, text: &str) -> bool {
        let end = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push_str(&line),
                Err(_) => return false,
            }
        }
        true
    }

    fn rest(mut self) -> String {
        let end = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.seen.push_str(&line);
        }
        self.seen
    }
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let pid = Pid::from_child(&child);
        Self {
            handle: pidfd_open(pid, PidfdFlags::empty()).unwrap(),
            out: Stream::of(child.stdout.take().unwrap()),
            err: Stream::of(child.stderr.take().unwrap()),
            child,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a text on standard output; returns all of it so far.
    pub(crate) fn says(&mut self, text: &str) -> String {
        let said = self.out.until(text);
        assert!(said, "never said {text:?}, but {:?} and {:?}", self.out.seen, self.err.seen);
        self.out.seen.clone()
    }

    /// Waits for a text on standard error; returns all of it so far.
    pub(crate) fn logs(&mut self, text: &str) -> String {
        assert!(self.err.until(text), "never logged {text:?}, but {:?}", self.err.seen);
        self.err.seen.clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.handle, signal).unwrap();
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Ended {
        let timeout = rustix::event::Timespec::try_from(PATIENCE).unwrap();
        let ended = poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&timeout)).unwrap();
        assert_eq!(ended, 1, "did not end; it said {:?} and {:?}", self.out.seen, self.err.seen);
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        let gone = || Stream { lines: channel().1, seen: String::new() };
        let (out, err) = (std::mem::replace(&mut self.out, gone()), std::mem::replace(&mut self.err, gone()));
        Ended { code, out: out.rest(), err: err.rest() }
    }

    pub(crate) fn end_by(self, signal: Signal) -> Ended {
        self.signal(signal);
        self.end()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails where it has ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> Ended {
    Process::start(command).end()
}

/// Asks again until the answer is right; each question is a process, so this does not spin.
pub(crate) fn until(what: &str, mut right: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !right() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
    }
}
