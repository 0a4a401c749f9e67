//! Products of packed panels of `f32`: one micro-kernel shape, written once and instantiated per instruction set.
//!
//! A *panel* holds [`PANEL`] columns of a matrix, row after row. The kernel multiplies 8 columns of one panel with the 32 of
//! another, over any depth, in registers: every step loads the 32 numbers of `b`, broadcasts 8 numbers of `a`, and does
//! 8 x 32 fused multiply-adds. Both sides read the same layout, so a symmetric product packs its matrix once.
//!
//! | instruction set | registers of the accumulator |
//! | --- | --- |
//! | AVX-512F | 8 x 2 of 16 |
//! | AVX2 + FMA | 4 x 2 of 8, four times |
//! | any | 4 x 1 of 8, eight times: what the compiler makes of it |
//!
//! Error of a sum over `depth` terms: at most `depth * 2^-24 * sum |a| |b|`, to first order.

#![allow(unsafe_code)]
// Intrinsics become instructions only once everything between them and the function with the target feature is inlined.
#![allow(clippy::inline_always)]

use std::ops::{Deref, DerefMut};

use super::gemm::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::gemm::isa::Path;
use crate::error::Result;

/// Columns of a panel.
pub const PANEL: usize = 32;
/// Rows of a register tile.
const STRIP: usize = 8;

/// 8 columns of `a` times 32 columns of `b` over `depth` rows, added in `f64` to a block whose rows are `stride` apart.
type Strip = unsafe fn(a: *const f32, b: *const f32, depth: usize, out: *mut f64, stride: usize);

/// The micro-kernel of one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    strip: Strip,
}

impl Kernel {
    /// The kernel of the fastest path of this processor.
    ///
    /// # Errors
    /// As [`Isa::choose`].
    pub fn choose() -> Result<Self> {
        Ok(Self::of(Isa::choose()?))
    }

    /// The kernel of a path.
    pub fn of(isa: Isa) -> Self {
        match isa.path() {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 | Path::Avx512Bf16 | Path::Avx512Vnni => x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => x86::AVX2,
            _ => PORTABLE,
        }
    }

    /// Adds the 32 x 32 product of panels `a` and `b`, `depth` rows deep, to the block of `out` at `corner`.
    ///
    /// # Panics
    /// When a panel holds fewer than `depth` rows, or `out` ends before the block does.
    pub fn add_product(
        &self,
        a: &[f32],
        b: &[f32],
        depth: usize,
        out: &mut [f64],
        corner: usize,
        stride: usize,
    ) {
        assert!(a.len() >= depth * PANEL && b.len() >= depth * PANEL, "panels of at least {depth} rows");
        assert!(stride >= PANEL && out.len() >= corner + (PANEL - 1) * stride + PANEL, "room for a block");
        for strip in 0..PANEL / STRIP {
            let corner = out[corner + strip * STRIP * stride..].as_mut_ptr();
            // SAFETY: both panels hold `depth * PANEL` numbers and the last row of the strip ends within `out` (asserted);
            // an `Isa` exists only for a path whose features the processor was asked for.
            unsafe { (self.strip)(a.as_ptr().add(strip * STRIP), b.as_ptr(), depth, corner, stride) }
        }
    }
}

/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;

/// Zeros that begin on a cache line: no vector of a panel or of a tile straddles two lines.
#[derive(Debug)]
pub struct Aligned<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// `len` of them.
    pub fn zeros(len: usize) -> Self {
        let values = vec![T::default(); len + LINE / size_of::<T>()];
        // The offset of memory that cannot be aligned is out of range; then alignment is given up.
        let start = values.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { values, start, len }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.values[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..self.start + self.len]
    }
}

/// A vector of `f32` and its multiply-add.
trait Lanes: Copy {
    const N: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn splat(from: *const f32) -> Self;
    unsafe fn multiply_add(a: Self, b: Self, sum: Self) -> Self;
    unsafe fn store(self, to: *mut f32);
}

/// `ROWS` columns of `a` times `VECTORS` vectors of `b`: the one loop of this file.
///
/// # Safety
/// `a` is readable at `i * PANEL + 0..ROWS` and `b` at `i * PANEL + 0..VECTORS * L::N` for `i` in `0..depth`; `out` is
/// writable at `r * PANEL + 0..VECTORS * L::N` for `r` in `0..ROWS`; the machine has the instructions of `L`.
#[inline(always)]
unsafe fn register_tile<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    a: *const f32,
    b: *const f32,
    depth: usize,
    out: *mut f32,
) {
    // SAFETY: the reads and writes are those the caller vouches for.
    unsafe {
        let mut sums = [[L::zero(); VECTORS]; ROWS];
        for i in 0..depth {
            let mut columns = [L::load(b.add(i * PANEL)); VECTORS];
            for (v, column) in columns.iter_mut().enumerate().skip(1) {
                *column = L::load(b.add(i * PANEL + v * L::N));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let scalar = L::splat(a.add(i * PANEL + r));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = L::multiply_add(scalar, column, *sum);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                sum.store(out.add(r * PANEL + v * L::N));
            }
        }
    }
}

/// The register tiles that make up one strip of 8 x 32, added to `out`.
#[inline(always)]
unsafe fn strip<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    a: *const f32,
    b: *const f32,
    depth: usize,
    out: *mut f64,
    stride: usize,
) {
    let mut block = [0.0_f32; STRIP * PANEL];
    for row in (0..STRIP).step_by(ROWS) {
        for column in (0..PANEL).step_by(VECTORS * L::N) {
            let corner = block[row * PANEL + column..].as_mut_ptr();
            // SAFETY: `row + ROWS <= STRIP` and `column + VECTORS * L::N <= PANEL` by the steps.
            unsafe { register_tile::<L, ROWS, VECTORS>(a.add(row), b.add(column), depth, corner) }
        }
    }
    for (r, row) in block.chunks_exact(PANEL).enumerate() {
        for (c, value) in row.iter().enumerate() {
            // SAFETY: the caller vouches for STRIP rows of PANEL elements behind `out`.
            unsafe { *out.add(r * stride + c) += f64::from(*value) }
        }
    }
}

/// One [`Kernel`]: the generic strip, compiled for the instructions of `$lanes`.
macro_rules! kernel {
    ($constant:ident, $lanes:ty, $rows:literal, $vectors:literal $(, $feature:literal)?) => {
        pub(super) const $constant: Kernel = {
            $(#[target_feature(enable = $feature)])?
            unsafe fn compiled(a: *const f32, b: *const f32, depth: usize, out: *mut f64, stride: usize) {
                // SAFETY: handed on from the caller.
                unsafe { strip::<$lanes, $rows, $vectors>(a, b, depth, out, stride) }
            }
            Kernel { strip: compiled }
        };
    };
}

mod portable {
    use super::{Kernel, Lanes, strip};

    /// Eight numbers in whatever registers there are. The product is rounded before it is added, unless the target always
    /// has a fused multiply-add: calling one in software would be slower by far.
    #[derive(Clone, Copy)]
    pub struct Plain([f32; 8]);

    impl Lanes for Plain {
        const N: usize = 8;
        #[inline(always)]
        unsafe fn zero() -> Self {
            Self([0.0; 8])
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: eight numbers are readable, as for every implementation.
            Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
        }
        #[inline(always)]
        unsafe fn splat(from: *const f32) -> Self {
            // SAFETY: one number is readable.
            Self([unsafe { *from }; 8])
        }
        #[inline(always)]
        unsafe fn multiply_add(a: Self, b: Self, mut sum: Self) -> Self {
            for ((sum, a), b) in sum.0.iter_mut().zip(a.0).zip(b.0) {
                let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
                *sum = if fused { a.mul_add(b, *sum) } else { a * b + *sum };
            }
            sum
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: eight numbers are writable.
            unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
        }
    }

    kernel!(PORTABLE, Plain, 4, 1);
}
use portable::PORTABLE;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_storeu_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{Kernel, Lanes, strip};

    /// `Lanes` over intrinsics.
    macro_rules! lanes {
        ($name:ident($vector:ty), $n:literal, $zero:ident, $load:ident, $splat:ident, $fma:ident, $store:ident) => {
            #[derive(Clone, Copy)]
            struct $name($vector);
            impl Lanes for $name {
                const N: usize = $n;
                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: the caller of `register_tile` vouches for the instructions, here and below.
                    Self(unsafe { $zero() })
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: N numbers are readable.
                    Self(unsafe { $load(from) })
                }
                #[inline(always)]
                unsafe fn splat(from: *const f32) -> Self {
                    // SAFETY: one number is readable.
                    Self(unsafe { $splat(*from) })
                }
                #[inline(always)]
                unsafe fn multiply_add(a: Self, b: Self, sum: Self) -> Self {
                    // SAFETY: as in `zero`.
                    Self(unsafe { $fma(a.0, b.0, sum.0) })
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: N numbers are writable.
                    unsafe { $store(to, self.0) }
                }
            }
        };
    }

    lanes!(
        F32x16(__m512),
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_storeu_ps
    );
    lanes!(
        F32x8(__m256),
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_storeu_ps
    );

    kernel!(AVX512, F32x16, 8, 2, "avx512f,avx512bw,avx512dq,avx512vl");
    kernel!(AVX2, F32x8, 4, 2, "avx2,fma");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(depth: usize, seed: u32) -> Vec<f32> {
        (0..depth * PANEL)
            .map(|i| {
                let hash = (i as u32 ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
                f32::from(hash as u16) / 32_768.0 - 1.0
            })
            .collect()
    }

    #[test]
    fn every_kernel_multiplies_panels_within_its_error_bound() {
        for depth in [1, 2, 7, 255] {
            let (a, b) = (panel(depth, 1), panel(depth, 2));
            for isa in Isa::available() {
                let mut out = vec![1.0; PANEL * 40];
                Kernel::of(isa).add_product(&a, &b, depth, &mut out, 0, 40);
                for (r, c) in (0..PANEL).flat_map(|r| (0..PANEL).map(move |c| (r, c))) {
                    let terms = (0..depth).map(|i| f64::from(a[i * PANEL + r]) * f64::from(b[i * PANEL + c]));
                    let (exact, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                    let bound = (depth + 1) as f64 * 2.0_f64.powi(-24) * size + 1e-15;
                    assert!((out[r * 40 + c] - 1.0 - exact).abs() <= bound, "{isa:?} at {r},{c}");
                }
            }
        }
    }
}
