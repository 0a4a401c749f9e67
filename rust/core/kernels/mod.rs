//! Arithmetic on one block: slices in, numbers out. No I/O, no threads, no file names.

pub mod caches;
pub mod checksum;
pub mod cosine;
#[cfg(target_arch = "x86_64")]
mod cpuid;
pub mod gemm;
pub mod gram;
pub mod isa;
pub mod moments;
pub mod panel;
pub mod prefetch;
pub mod residual;
pub mod sets;
pub mod sieve;
pub mod subnormals;
pub mod topk;
