//! What an x86-64 processor says of itself.
#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};

/// Leaf `leaf`, number `number` of it; nothing where the processor has no such leaf.
pub fn cpuid(leaf: u32, number: u32) -> Option<CpuidResult> {
    /// The first leaf of a range says which is its last.
    const RANGE: u32 = 0x8000_0000;
    #[allow(unused_unsafe, reason = "the oldest compiler that is supported takes CPUID for unsafe")]
    // SAFETY: every x86-64 processor has the instruction.
    unsafe {
        (__cpuid(leaf & RANGE).eax >= leaf).then(|| __cpuid_count(leaf, number))
    }
}
