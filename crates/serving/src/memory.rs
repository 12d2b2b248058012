//! Gives freed memory back to the system. glibc by itself gives back only what is free at the end of its heap, so
//! a single allocation there keeps all the memory of ten thousand connections that are gone.

/// Gives back all pages of the heap that hold nothing. This takes some milliseconds per 100 MB, in which no
/// other thread can allocate memory. Other allocators than glibc's are left alone.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "the standard library has no safe call for this")]
    // SAFETY: malloc_trim takes no pointer, may be called at any time from any thread, and moves no allocation.
    unsafe {
        libc::malloc_trim(0);
    }
}
