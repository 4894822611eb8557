//! A signal that only interrupts: it ends a system call in which a thread waits, and does nothing else. `SIGURG`, which a process
//! that has no handler for it ignores, so that a stray one never hurts.

use std::ffi::c_int;
use std::io;
use std::sync::OnceLock;

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(i32);

impl Thread {
    /// The one that asks.
    #[must_use]
    pub fn current() -> Self {
        Self(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// Ends its system call with EINTR, if it waits in one. A thread that has ended is no fault: then nobody is woken, or
    /// another thread of this process, which is used to it.
    ///
    /// # Errors
    /// The handler cannot be installed.
    pub fn wake(self) -> io::Result<()> {
        install()?;
        // SAFETY: three numbers, no memory. The signal has a handler since the line above, which does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, libc::SIGURG) };
        Ok(())
    }
}

extern "C" fn nothing(_: c_int) {}

/// Once per process. Without SA_RESTART: the interrupted call is not to go on by itself.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        // SAFETY: a zeroed sigaction is a valid one (no flags, empty mask); its handler is a function that lives for ever and is
        // safe in a signal, as it does nothing; the old action is not asked for.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
            libc::sigaction(libc::SIGURG, &raw const action, std::ptr::null_mut())
        };
        if result == 0 { None } else { io::Error::last_os_error().raw_os_error() }
    });
    failed.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_read_that_waits_is_interrupted() {
        let (reader, _writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (tell, hear) = channel();
        let waiting = std::thread::spawn(move || {
            tell.send(Thread::current()).unwrap();
            let result = rustix::io::read(reader.as_fd(), &mut [0; 8]);
            tell.send(Thread::current()).unwrap();
            result
        });
        let thread = hear.recv().unwrap();
        // It may not wait yet: the signal is sent until it did its work.
        while hear.recv_timeout(Duration::from_millis(2)).is_err() {
            thread.wake().unwrap();
        }
        assert_eq!(waiting.join().unwrap(), Err(rustix::io::Errno::INTR));
    }
}
