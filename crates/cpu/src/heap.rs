//! The C library's allocator in a process that serves for months.
//!
//! glibc gives every thread an arena of its own and never gives back what lies between the blocks of an
//! arena that are still in use: under mixed load that was 0.1 MiB of every request (docs/reliability.md,
//! gate 6), with live memory not growing at all. Invariant: only where memory comes from changes.

/// Most bytes of a block that comes out of an arena; a larger one goes back to the system when freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENA_BLOCK_BYTES_MAX: libc::c_int = 1 << 20;
/// Free bytes at an arena's end that are kept for the next request.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENA_SPARE_BYTES: libc::c_int = 16 << 20;

/// One arena for all threads, and blocks of 1 MiB or more straight from the system. To be called before
/// threads start: an arena that exists stays. Does nothing with another C library.
pub fn share_one_arena() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, ARENA_BLOCK_BYTES_MAX),
        (libc::M_TRIM_THRESHOLD, ARENA_SPARE_BYTES),
    ] {
        // SAFETY: mallopt reads two integers and takes the allocator's own lock. Options it does not know
        // are refused by value, and memory stays valid whatever it answers.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Gives free pages between blocks in use back to the system. Others who allocate from the arena wait
/// meanwhile: milliseconds.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes the allocator's own lock and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
