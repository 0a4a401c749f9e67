//! Asking for a cache line before it is needed: for scattered reads whose addresses are known some steps ahead.
#![allow(unsafe_code)]

/// Asks for the line of `slice[index]`; an index outside asks for nothing of use.
#[inline(always)]
#[allow(clippy::inline_always, reason = "a call would cost more than the instruction")]
pub fn fetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program can see, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().wrapping_add(index).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}
