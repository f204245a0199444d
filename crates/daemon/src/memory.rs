//! How the process takes memory from the kernel, and how soon it gives it back.
//!
//! The C library's allocator serves: the node daemon makes some ten thousand small allocations a second at most, so what
//! counts is what stays behind. As it comes, it keeps a heap for each of the many threads that have ever allocated
//! something; and mimalloc, which was here before, kept 80 MB of which 23 MB
//! were in use when a container had started.
#![allow(unsafe_code)] // `mallopt` has no safe wrapper.

/// Heaps that all threads share.
#[cfg(target_env = "gnu")]
const HEAPS: i32 = 2;
/// What is longer than this is mapped by itself and goes back to the kernel when it is freed; pieces, that would pay for
/// it each time, have buffers of their own in the store.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: i32 = 128 << 10;
/// Free bytes at a heap's end that are kept for the next allocation.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 512 << 10;

/// To be called first in a process, before there are threads: threads that have a heap already keep it.
pub(crate) fn be_frugal() {
    set_limits();
    // Huge pages would make 2 MiB of each heap's few kilobytes.
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::debug!(%error, "the kernel gives huge pages as it likes");
    }
}

#[cfg(target_env = "gnu")]
fn set_limits() {
    let limits =
        [(libc::M_ARENA_MAX, HEAPS), (libc::M_MMAP_THRESHOLD, MAPPED_FROM), (libc::M_TRIM_THRESHOLD, KEPT)];
    for (parameter, value) in limits {
        // SAFETY: it only sets numbers inside the allocator, under the allocator's lock.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            tracing::debug!(parameter, value, "the allocator does not take a limit");
        }
    }
}

/// Other C libraries have no such limits.
#[cfg(not(target_env = "gnu"))]
fn set_limits() {}
