//! The process allocator: wipes every block that is freed, whoever allocated it (serde, hyper, rustls: no type of ours).
//!
//! Blocks below 1 MiB are the system allocator's. Larger ones are mappings of their own, of which only the pages that were
//! ever touched are wiped, for the sake of buffers that are large and hardly used: fuser takes 16 MiB per handshake and per
//! thread, and wiping, zeroing or locking all of it costs more than the rest of the program.
//!
//! Not covered: live buffers, stacks, memory of C libraries, and what the kernel holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::ptr;

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

use crate::sys::page_size;

/// Blocks of this size and more are mappings of their own.
const OWN_MAPPING: usize = 1 << 20;

/// The allocator, to be installed with `#[global_allocator]`; call [`pin`] at the start of `main`.
pub struct Wiping;

/// Pins what glibc would otherwise move as the process runs: its mmap threshold, which grows with each freed mapping until
/// large blocks are recycled from a heap that never shrinks, and the number of its heaps, by default eight per core.
/// Elsewhere there is nothing to pin.
pub fn pin() {
    #[cfg(target_env = "gnu")]
    for (option, value) in
        [(libc::M_MMAP_THRESHOLD, 256 << 10), (libc::M_TRIM_THRESHOLD, 128 << 10), (libc::M_ARENA_MAX, 2)]
    {
        // SAFETY: mallopt takes two numbers and locks the heap it changes. It refuses only unknown options.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Gives free pages back to the kernel, wherever in the heap they lie. By itself glibc gives back only what is free at the
/// heap's end, so that one small block above it keeps what a thousand closed mounts have left. Walks the whole heap:
/// milliseconds. Elsewhere there is nothing to give back.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and locks each heap while it walks it; blocks in use stay as they are.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether a block is a mapping of its own. A mapping begins at a page, and a page is 4 KiB at least.
fn is_mapping(size: usize, align: usize) -> bool {
    size >= OWN_MAPPING && align <= 4096
}

// SAFETY: blocks are the system allocator's or fresh mappings; `is_mapping` tells the two apart by size and alignment alone,
// which the caller hands back unchanged. Nothing in here allocates or panics.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_mapping(layout.size(), layout.align()) {
            return map(layout.size());
        }
        // SAFETY: the caller's layout, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_mapping(layout.size(), layout.align()) {
            return map(layout.size());
        }
        // SAFETY: the caller's layout, passed on. Fresh memory stays untouched here: calloc knows that it is zero.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_mapping(layout.size(), layout.align()) {
            // SAFETY: by its layout the block is a mapping that `map` or `realloc` made and that nobody uses any more.
            unsafe {
                wipe_touched(block, layout.size());
                unmap(block, layout.size());
            }
        } else {
            // SAFETY: by its layout the block is the system's, of this size, and nobody uses it any more.
            unsafe {
                wipe(block, layout.size());
                System.dealloc(block, layout);
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if is_mapping(layout.size(), layout.align()) && is_mapping(new_size, layout.align()) {
            // SAFETY: by its layout the block is a mapping of ours; its tail, if it has one, is wiped inside its bounds
            // before it goes. Pages move by page table, so nothing stays at the old place.
            return unsafe {
                if new_size < layout.size() {
                    wipe_touched(block.add(new_size), layout.size() - new_size);
                }
                remap(block, layout.size(), new_size)
            };
        }
        // The system's realloc may move a block and leave the old one as it was.
        // SAFETY: the caller guarantees that new_size, rounded up to the alignment, does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: new_layout is not empty, as the caller guarantees. The blocks are distinct, and both are at least as
        // long as what is copied. The old one is freed once, and only if there is a new one.
        unsafe {
            let new = self.alloc(new_layout);
            if !new.is_null() {
                ptr::copy_nonoverlapping(block, new, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            new
        }
    }
}

/// Overwrites a block with zeros, in a way that the compiler must not leave out before a free.
///
/// # Safety
/// `size` bytes at `block` are writable and belong to the caller.
unsafe fn wipe(block: *mut u8, size: usize) {
    // SAFETY: the caller's bytes; after the first line they are initialised, so that they may be looked at as a slice.
    unsafe {
        block.write_bytes(0, size);
        zeroize::optimization_barrier(std::slice::from_raw_parts(block, size));
    }
}

/// A fresh mapping, zeroed, without huge pages (one touched byte would bring 2 MiB in); null if there is none.
fn map(size: usize) -> *mut u8 {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: no address is asked for, so no mapping of ours is replaced.
    let Ok(start) = (unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), size, access, flags) }) else {
        return ptr::null_mut();
    };
    for advice in [Advice::LinuxDontDump, Advice::LinuxNoHugepage] {
        // An allocator has nobody to tell of a refusal (a kernel without huge pages says EINVAL); dumps are off anyway.
        // SAFETY: the mapping just made; neither advice changes a byte.
        let _ = unsafe { rustix::mm::madvise(start, size, advice) };
    }
    start.cast()
}

/// # Safety
/// `start` is a mapping of `map` or `remap` of `size` bytes. If it succeeds (it is not null) the old address is void.
unsafe fn remap(start: *mut u8, size: usize, new_size: usize) -> *mut u8 {
    // SAFETY: the whole of a mapping that is the caller's; the kernel rounds both sizes up to pages as it did in `map`.
    let moved = unsafe { rustix::mm::mremap(start.cast(), size, new_size, MremapFlags::MAYMOVE) };
    moved.map_or(ptr::null_mut(), <*mut c_void>::cast)
}

/// # Safety
/// `start` is a mapping of `map` or `remap` of `size` bytes that nobody uses any more.
unsafe fn unmap(start: *mut u8, size: usize) {
    // It cannot fail on a mapping that exists as a whole, and an allocator has nobody to tell.
    // SAFETY: the caller's mapping; the kernel rounds the size up to pages as it did in `map`.
    let _ = unsafe { rustix::mm::munmap(start.cast(), size) };
}

/// Wipes those pages of a mapping that are in memory. The others were never touched (or are swapped out, against which only
/// a node without swap helps).
///
/// # Safety
/// `size` writable bytes at `start` belong to the caller and lie in a mapping of `map` or `remap`.
unsafe fn wipe_touched(start: *mut u8, size: usize) {
    /// Pages that one mincore(2) tells of: 4 MiB of them in 1 KiB of stack.
    const CHUNK: usize = 1024;
    let page = page_size();
    // `start` is inside a page when a tail is wiped; the bytes up to the next page are few and wiped without asking.
    let head = start.align_offset(page).min(size);
    // SAFETY: inside the caller's bytes.
    unsafe { wipe(start, head) };
    let mut at = head;
    let mut touched = [0; CHUNK];
    while at < size {
        let span = (size - at).min(CHUNK * page);
        let pages = &mut touched[..span.div_ceil(page)];
        // SAFETY: start + at is at a page of the mapping, span ends within it, and there is one byte for each page.
        if unsafe { libc::mincore(start.add(at).cast(), span, pages.as_mut_ptr()) } != 0 {
            pages.fill(1);
        }
        for (index, _) in pages.iter().enumerate().filter(|(_, touched)| **touched & 1 == 1) {
            let offset = at + index * page;
            // SAFETY: inside the caller's bytes: offset < at + span <= size.
            unsafe { wipe(start.add(offset), page.min(size - offset)) };
        }
        at += span;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::secret::child;

    /// The unit tests themselves run on it.
    #[global_allocator]
    static ALLOCATOR: Wiping = Wiping;

    const CANARY: u8 = 0xC7;

    /// How many canary bytes stand at an address, as the kernel sees it: a freed block may not be looked at through a
    /// reference, but `/proc/self/mem` reads whatever is mapped and fails where nothing is. That the block may meanwhile be
    /// somebody else's does not matter: nobody else writes runs of canaries.
    fn canaries(address: usize, length: usize) -> usize {
        let mut bytes = vec![0; length];
        match File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, address as u64) {
            Ok(()) => bytes.chunks_exact(8).filter(|run| **run == [CANARY; 8]).count() * 8,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "only an unmapped block cannot be read");
                0
            }
        }
    }

    #[test]
    fn a_freed_block_holds_no_canary() {
        for size in [64, 4096, 300 << 10, OWN_MAPPING - 8, OWN_MAPPING, 3 * OWN_MAPPING + 4096] {
            let block = vec![CANARY; size];
            let address = block.as_ptr().addr();
            assert_eq!(canaries(address, size), size, "the control: the live block is all canaries");
            drop(block);
            assert_eq!(canaries(address, size), 0, "{size} bytes");
        }
    }

    #[test]
    fn growing_and_shrinking_leave_nothing_behind() {
        for (from, to) in [
            (64, 128),
            (4096, 300 << 10),
            (512 << 10, OWN_MAPPING),
            (OWN_MAPPING, 40 * OWN_MAPPING),
            (300 << 10, 64),
            (OWN_MAPPING, 64),
            (2 * OWN_MAPPING, OWN_MAPPING + 8),
        ] {
            let mut block = vec![CANARY; from];
            let old = block.as_ptr().addr();
            if to < from {
                block.truncate(to);
                block.shrink_to_fit();
            } else {
                block.reserve_exact(to - from);
            }
            assert_eq!(block.capacity(), to);
            assert!(block.iter().all(|byte| *byte == CANARY), "the contents came along");
            let new = block.as_ptr().addr();
            let kept = if new == old { block.len() } else { 0 };
            assert_eq!(canaries(old + kept, from - kept), 0, "{from} to {to} bytes");
        }
    }

    #[test]
    fn a_shrunk_mapping_that_grows_again_is_zero_where_it_was_cut() {
        let old = Layout::from_size_align(2 * OWN_MAPPING, 8).unwrap();
        let new = Layout::from_size_align(OWN_MAPPING + 100, 8).unwrap();
        // SAFETY: one block, its layout passed on from call to call, written and read within its size.
        unsafe {
            let block = Wiping.alloc(old);
            block.write_bytes(CANARY, old.size());
            let block = Wiping.realloc(block, old, new.size());
            let block = Wiping.realloc(block, new, old.size());
            let tail = std::slice::from_raw_parts(block.add(new.size()), old.size() - new.size());
            assert!(tail.iter().all(|byte| *byte == 0));
            Wiping.dealloc(block, old);
        }
    }

    #[test]
    fn a_large_block_with_a_larger_alignment_than_a_page_is_aligned() {
        let layout = Layout::from_size_align(2 * OWN_MAPPING, 1 << 20).unwrap();
        // SAFETY: one block, freed with the layout it was made with.
        unsafe {
            let block = Wiping.alloc(layout);
            assert_eq!(block.addr() % (1 << 20), 0);
            Wiping.dealloc(block, layout);
        }
    }

    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        pages * page_size()
    }

    #[test]
    fn a_hundred_large_buffers_that_are_hardly_used_cost_hardly_any_memory() {
        if !child::is_one() {
            // Alone in its process: other tests allocate meanwhile.
            let name =
                "sys::alloc::tests::a_hundred_large_buffers_that_are_hardly_used_cost_hardly_any_memory";
            return child::run(name, &[]);
        }
        pin();
        let before = resident();
        let mut buffers: Vec<_> = (0..100).map(|_| vec![0_u8; (16 << 20) + 4096]).collect();
        for buffer in &mut buffers {
            buffer[..100].fill(1);
        }
        let held = resident() - before;
        drop(buffers);
        let peak = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().to_owned();
        println!("100 buffers: {held} bytes resident, peak of the process {peak}");
        assert!(held < 4 << 20, "{held} bytes resident");
        let peak: usize = peak.strip_suffix(" kB").unwrap().parse().unwrap();
        assert!(peak << 10 < before + (4 << 20), "freeing them wiped what was never touched");
    }
}
