//! Gives freed memory back to the system. By itself, glibc gives back only the free memory at the end of its
//! heap. So a single allocation at the end of the heap is enough to keep all the memory of ten thousand
//! closed connections.

/// Gives back all unused pages of the heap. This takes some milliseconds per 100 MB, during which no other
/// thread can allocate memory. Without glibc, this function does nothing.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "the standard library has no safe call for this")]
    // SAFETY: malloc_trim takes no pointer, may be called at any time from any thread, and moves no
    // allocation.
    unsafe {
        libc::malloc_trim(0);
    }
}
