//! The process allocator, and system calls that rustix lacks, behind safe functions and owned types. The only unsafe code of
//! this crate.

#![allow(unsafe_code, reason = "this is the module where it is allowed; every block states its invariants")]

/// The process allocator: wipes every block that is freed.
pub mod alloc;
/// Descriptors.
pub mod fd;
/// Mapped memory as owned values: unreadable for others, locked, wiped when dropped.
pub mod mapping;
/// A signal that only interrupts.
pub mod wake;
/// Words that several processes share.
pub mod words;

/// Size of a page in bytes: 4 KiB on most machines, up to 64 KiB on arm64. Never allocates.
#[must_use]
pub fn page_size() -> usize {
    // SAFETY: sysconf takes a number and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX knows no failure for this name; 4 KiB is the smallest page of any supported machine.
    usize::try_from(size).unwrap_or(4096)
}
