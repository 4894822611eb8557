//! System calls that rustix lacks, behind safe functions and owned types, and the process allocator. The only unsafe code of
//! the shim.

#![allow(unsafe_code, reason = "this is the module where it is allowed; every block states its invariants")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, LazyLock, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What [`wake`] sends: ignored unless somebody wants it, so that a stray one ends nobody.
const WAKE: i32 = libc::SIGURG;

/// A further descriptor of the connection of `fuse`, with requests in flight of its own (`FUSE_DEV_IOC_CLONE`).
///
/// # Errors
/// open(2) of /dev/fuse; EINVAL or EPERM if `fuse` was never mounted.
pub(crate) fn clone_device(fuse: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);
    let clone = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let number = fuse.as_raw_fd().cast_unsigned();
    // SAFETY: this request reads one u32 through its argument, which Setter holds during the call; the number in it is open, as
    // the borrow proves, and the kernel takes a reference of its own.
    unsafe { rustix::ioctl::ioctl(&clone, rustix::ioctl::Setter::<CLONE, u32>::new(number)) }?;
    Ok(clone)
}

/// Sets attributes of a mount, makes it private, and with `users` maps its owners into that user namespace
/// (`mount_setattr(2)`).
///
/// # Errors
/// EINVAL if the file system cannot be mapped, or the mount can be seen already; EPERM for the initial user namespace.
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    users: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let map = if users.is_some() { MountAttrFlags::MOUNT_ATTR_IDMAP } else { MountAttrFlags::empty() };
    let attributes = libc::mount_attr {
        attr_set: u64::from((set | map).bits()),
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: users.map_or(0, |users| u64::from(users.as_raw_fd().cast_unsigned())),
    };
    let (path, size) = (c"".as_ptr(), size_of::<libc::mount_attr>());
    // SAFETY: the kernel reads an empty, terminated path and `size` bytes of a structure that outlives the call; both
    // descriptors are open, as the borrows prove. It writes nothing.
    let result = unsafe {
        let mount = mount.as_raw_fd();
        libc::syscall(libc::SYS_mount_setattr, mount, path, libc::AT_EMPTY_PATH, &raw const attributes, size)
    };
    check(result)
}

/// The process at the other end of a unix socket, as it was when it connected. Before Linux 6.5 it is looked up by its number,
/// which may name another process by now if that one has ended.
///
/// # Errors
/// ESRCH or EINVAL if it is gone; EMFILE.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: RawFd = -1;
    let mut size = libc::socklen_t::try_from(size_of::<RawFd>()).unwrap_or_default();
    // SAFETY: the kernel writes at most `size` bytes through the first pointer and a length through the second; both are ours and
    // outlive the call.
    let result = unsafe {
        let socket = socket.as_raw_fd();
        libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERPIDFD, (&raw mut fd).cast(), &raw mut size)
    };
    match check(result.into()) {
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows it. It is closed on exec.
        Ok(()) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            Ok(pidfd_open(rustix::net::sockopt::socket_peercred(socket)?.pid, PidfdFlags::empty())?)
        }
        Err(error) => Err(error),
    }
}

/// Lets [`wake`] interrupt blocking calls: they return EINTR.
///
/// # Errors
/// None that sigaction(2) knows for this signal.
pub(crate) fn install_wake_signal() -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: all zeros is a valid sigaction: no flags (above all not SA_RESTART), an empty mask. The handler does nothing, so
    // it is safe at any point of any thread.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        libc::sigaction(WAKE, &raw const action, std::ptr::null_mut())
    };
    check(result.into())
}

/// Interrupts a thread of this process if it is in a blocking call just now; a call that begins later is not, so repeat it until
/// the thread has done what it was woken for. One that has ended needs no waking.
///
/// # Errors
/// None that tgkill(2) knows for a thread of this process.
pub(crate) fn wake(thread: Pid) -> io::Result<()> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: takes three numbers; the process is this one, and the signal's action is to do nothing, or to be ignored.
    match check(unsafe { libc::syscall(libc::SYS_tgkill, process, thread.as_raw_nonzero().get(), WAKE) }) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

/// Runs `work` on a thread that may hang in the kernel, may change its namespaces, and has no descriptor but the standard ones:
/// while it hangs it keeps no FUSE connection alive that should die with this process. `work` opens what it needs; descriptors
/// go neither in nor out.
///
/// # Errors
/// Those of `work`; TimedOut after `deadline`, and the thread is left to itself; QuotaExceeded while 64 such threads hang.
pub(crate) fn seclude<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    // One reference for each that runs, and this one.
    static RUNNING: LazyLock<Arc<()>> = LazyLock::new(Arc::default);
    let place = Arc::clone(&RUNNING);
    if Arc::strong_count(&place) > 65 {
        return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "64 threads hang in the kernel already"));
    }
    let (answer, answered) = mpsc::sync_channel(1);
    let run = move || {
        let _place = place;
        // SAFETY: both take numbers. From here the thread has a working directory and a descriptor table of its own; the standard
        // library keeps no descriptors per thread, and `work` owns none of the old table, so nobody misses those closed here.
        let alone = check(unsafe { libc::unshare(libc::CLONE_FS) }.into()).and_then(|()| {
            check(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_UNSHARE) })
        });
        // Whoever waited may have given up.
        let _ = answer.send(alone.and_then(|()| work()));
    };
    thread::Builder::new().name("secluded".to_owned()).stack_size(256 << 10).spawn(run)?;
    answered.recv_timeout(deadline).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Lets tasks wait for a descriptor, from within a tokio runtime.
///
/// # Errors
/// EPERM if it is not one that can be polled; ENOMEM, ENOSPC.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps one descriptor open, and the same, from now until it is dropped, and the result drops its
    // registration before it.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    watched.map_err(|error| error.into_parts().1)
}

/// Keeps glibc's heaps few, and makes it return what large blocks leave behind. Elsewhere there is nothing to pin.
pub(crate) fn pin_heaps() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 256 << 10)] {
        // SAFETY: mallopt takes two numbers and locks the heap it changes. It refuses only unknown options.
        unsafe { libc::mallopt(option, value) };
    }
}

/// The system's allocator, which wipes every block before it is freed: tokens pass through buffers of libraries that wipe nothing.
pub(crate) struct Wiping;

// SAFETY: every call goes to the system's allocator with the caller's own block and layout. `realloc` is the trait's: a new
// block, a copy, `dealloc` of the old.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's block of this layout, which nobody uses any more; after the first line its bytes are initialised, so
        // that the barrier, which keeps the compiler from leaving the wipe out, may look at them as a slice.
        unsafe {
            block.write_bytes(0, layout.size());
            zeroize::optimization_barrier(std::slice::from_raw_parts(block, layout.size()));
            System.dealloc(block, layout);
        }
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use rustix::io::Errno;

    use super::*;
    use crate::child;

    const CANARY: u8 = 0xC7;

    fn canaries(address: usize, length: usize) -> usize {
        let mut bytes = vec![0; length];
        // Looked at as the kernel sees it: a freed block may not be read through a reference, nor may it be mapped still.
        if let Err(error) = File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, address as u64) {
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "only an unmapped block cannot be read");
            return 0;
        }
        bytes.chunks_exact(8).filter(|run| **run == [CANARY; 8]).count() * 8
    }

    #[test]
    fn a_freed_block_holds_no_canary_and_neither_does_one_that_was_outgrown() {
        for size in [64, 4096, 100 << 10] {
            let layout = Layout::from_size_align(size, 8).unwrap();
            // SAFETY: each block is written within its size and freed once, with the layout it has then.
            unsafe {
                let block = Wiping.alloc(layout);
                block.write_bytes(CANARY, size);
                assert_eq!(canaries(block.addr(), size), size, "the control");
                let larger = Wiping.realloc(block, layout, 2 * size);
                if larger != block {
                    assert_eq!(canaries(block.addr(), size), 0);
                }
                assert_eq!(canaries(larger.addr(), size), size, "its content came along");
                Wiping.dealloc(larger, Layout::from_size_align(2 * size, 8).unwrap());
                assert_eq!(canaries(larger.addr(), size), 0);
            }
        }
    }

    #[test]
    fn a_clone_gets_the_requests_of_a_connection_and_only_a_mounted_one_has_clones() {
        let (fuse, _mount) = crate::mount::create("csi-1", &child::options()).unwrap();
        let clone = clone_device(fuse.as_fd()).unwrap();
        let mut init = [0; 8192];
        assert!(rustix::io::read(&clone, &mut init).unwrap() > 40);
        assert_eq!(init[4..8], 26_u32.to_ne_bytes(), "FUSE_INIT");
        let unmounted = File::open("/dev/fuse").unwrap();
        assert!(clone_device(unmounted.as_fd()).is_err());
    }

    #[test]
    fn the_peer_of_a_socket_is_the_process_that_connected() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = peer_pidfd(ours.as_fd()).unwrap();
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", peer.as_raw_fd())).unwrap();
        assert!(told.lines().any(|line| line == format!("Pid:\t{}", std::process::id())), "{told}");
        let flags = rustix::io::fcntl_getfd(&peer).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn a_thread_that_blocks_is_woken() {
        install_wake_signal().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let (tell, told) = mpsc::channel();
        let blocked = thread::spawn(move || {
            tell.send(rustix::thread::gettid()).unwrap();
            rustix::io::read(&reader, &mut [0; 1])
        });
        let id = told.recv().unwrap();
        while !blocked.is_finished() {
            wake(id).unwrap();
            thread::yield_now();
        }
        assert_eq!(blocked.join().unwrap(), Err(Errno::INTR));
        wake(id).unwrap();
    }

    #[test]
    fn a_secluded_thread_has_no_descriptors_and_its_directory_is_its_own() {
        let held = File::open("/dev/null").unwrap();
        let here = std::env::current_dir().unwrap();
        let numbers = seclude(Duration::from_secs(60), || {
            rustix::process::chdir("/proc")?;
            let numbers = std::fs::read_dir("/proc/thread-self/fd")?;
            numbers
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<_>>>()
        });
        // The fourth is the listing itself.
        assert!(numbers.unwrap().iter().all(|number| ["0", "1", "2", "3"].contains(&number.as_str())));
        assert_eq!(std::env::current_dir().unwrap(), here);
        held.metadata().unwrap();
    }

    #[test]
    fn secluded_threads_that_hang_are_left_to_themselves_and_bounded() {
        let name = "sys::tests::secluded_threads_that_hang_are_left_to_themselves_and_bounded";
        if child::argument().is_none() {
            // Alone in its process: other tests seclude threads too.
            return child::in_own_mounts(name);
        }
        let (never, answer) = std::sync::mpsc::channel::<()>();
        let answer = std::sync::Arc::new(std::sync::Mutex::new(answer));
        let hang = || {
            let answer = std::sync::Arc::clone(&answer);
            let work = move || answer.lock().unwrap().recv().map_err(io::Error::other);
            seclude(Duration::from_millis(1), work).unwrap_err().kind()
        };
        for _ in 0..64 {
            assert_eq!(hang(), io::ErrorKind::TimedOut);
        }
        assert_eq!(hang(), io::ErrorKind::QuotaExceeded);
        drop(never);
        while seclude(Duration::from_secs(60), || Ok(())).is_err() {
            thread::yield_now();
        }
    }
}
