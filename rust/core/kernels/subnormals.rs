//! The arithmetic that every kernel counts on, on threads that inherit another.
//!
//! A new thread takes over the floating-point mode of the one that starts it. Some libraries switch that to take numbers below
//! 2^-126 for zero, for their own speed and for the whole thread that loads them: scores would then depend on who made the pool.

#![allow(unsafe_code)]

/// Switches this thread to the mode of IEEE 754: to nearest, and no number taken for zero.
#[cfg(target_arch = "x86_64")]
pub fn keep() {
    /// What a process starts with: all exceptions masked, to nearest, neither inputs nor results flushed.
    static DEFAULT: u32 = 0x1f80;
    // SAFETY: the instruction reads four bytes, and sets the mode that Rust takes for granted.
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const DEFAULT, options(nostack, readonly, preserves_flags));
    }
}

/// The same.
#[cfg(target_arch = "aarch64")]
pub fn keep() {
    // SAFETY: zero is the mode that Rust takes for granted.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) 0_u64, options(nostack, nomem, preserves_flags)) };
}

/// Elsewhere nothing is known to switch it.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn keep() {}
