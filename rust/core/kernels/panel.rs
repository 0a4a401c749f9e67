//! Products `A^T B` of packed matrices of `f32`: one micro-kernel, written once and instantiated per instruction set.
//!
//! A *panel* holds a few neighbouring columns of a matrix, row after row without gaps. The kernel multiplies a panel of `A`
//! with one of `B`, over any depth, in registers: every step loads the row of `B`, broadcasts the numbers of `A` one by one,
//! and does as many fused multiply-adds as there are vectors in the tile. How wide a panel is depends on its [`Side`]: the
//! broadcast side has as many columns as the tile has rows. A matrix that meets itself is packed for both sides, which costs
//! little beside the product and keeps every read of the kernel in one stream; in panels of one width for both it ran at 0.8 of
//! the rate (Zen 3).
//!
//! | instruction set | tile | registers of sums |
//! | --- | --- | --- |
//! | AVX-512F | 12 x 32 | 24 of 16 |
//! | AVX2 + FMA | 6 x 16 | 12 of 8 |
//! | NEON | 8 x 8 | 16 of 4 |
//! | any | 4 x 8 | what the compiler makes of it |
//!
//! Error of a sum over `depth` terms: at most `depth * 2^-24 * sum |a| |b|`, to first order.

#![allow(unsafe_code)]
// Intrinsics become instructions only once everything between them and the function with the target feature is inlined.
#![allow(clippy::inline_always)]

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::isa::Path;

/// Which factor of a product a panel is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its columns are the rows of the product.
    Left,
    /// Its columns are the columns of the product.
    Right,
}

/// A panel of either side, `depth` steps, added in `f64` to a block whose rows are `stride` apart.
type Tile = unsafe fn(left: *const f32, right: *const f32, depth: usize, out: *mut f64, stride: usize);

/// The micro-kernel of one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    tile: Tile,
    rows: usize,
    columns: usize,
}

impl Kernel {
    /// The kernel of a path.
    pub fn of(isa: Isa) -> Self {
        match isa.path() {
            #[cfg(target_arch = "x86_64")]
            path if path >= Path::Avx512 => x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => x86::AVX2,
            _ => PORTABLE,
        }
    }

    /// Columns in a panel of a side.
    pub fn width(&self, side: Side) -> usize {
        match side {
            Side::Left => self.rows,
            Side::Right => self.columns,
        }
    }

    /// Adds the product of two panels, `depth` steps deep, to the block of `out` at `corner`.
    ///
    /// # Panics
    /// When a panel holds fewer than `depth` steps, or `out` ends before the block does.
    pub fn add_product(
        &self,
        left: &[f32],
        right: &[f32],
        depth: usize,
        out: &mut [f64],
        corner: usize,
        stride: usize,
    ) {
        assert!(left.len() >= depth * self.rows && right.len() >= depth * self.columns, "{depth} steps");
        assert!(out.len() >= corner + (self.rows - 1) * stride + self.columns, "room for a block");
        // SAFETY: both panels hold `depth` steps and the last row of the block ends within `out` (asserted); an `Isa` exists
        // only for a path whose features the processor was asked for.
        unsafe { (self.tile)(left.as_ptr(), right.as_ptr(), depth, out.as_mut_ptr().add(corner), stride) }
    }
}

/// A vector of `f32` and its multiply-add.
trait Lanes: Copy {
    const N: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn splat(from: *const f32) -> Self;
    unsafe fn multiply_add(a: Self, b: Self, sum: Self) -> Self;
    unsafe fn add_to(self, to: *mut f64);
}

/// `ROWS` columns of `left` times `VECTORS` vectors of `right`: the one loop of this file.
///
/// # Safety
/// `left` is readable for `depth * ROWS` numbers and `right` for `depth * VECTORS * L::N`; `out` is readable and writable at
/// `r * stride + 0..VECTORS * L::N` for `r` in `0..ROWS`; the machine has the instructions of `L`.
#[inline(always)]
unsafe fn tile<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    left: *const f32,
    right: *const f32,
    depth: usize,
    out: *mut f64,
    stride: usize,
) {
    // SAFETY: the reads and writes are those the caller vouches for.
    unsafe {
        let mut sums = [[L::zero(); VECTORS]; ROWS];
        for i in 0..depth {
            let (left, right) = (left.add(i * ROWS), right.add(i * VECTORS * L::N));
            let mut columns = [L::load(right); VECTORS];
            for (v, column) in columns.iter_mut().enumerate().skip(1) {
                *column = L::load(right.add(v * L::N));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let scalar = L::splat(left.add(r));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = L::multiply_add(scalar, column, *sum);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                sum.add_to(out.add(r * stride + v * L::N));
            }
        }
    }
}

/// One [`Kernel`]: the generic tile, compiled for the instructions of `$lanes`.
macro_rules! kernel {
    ($constant:ident, $lanes:ty, $rows:expr, $vectors:literal $(, $feature:literal)?) => {
        pub(super) const $constant: Kernel = {
            $(#[target_feature(enable = $feature)])?
            unsafe fn compiled(a: *const f32, b: *const f32, depth: usize, out: *mut f64, stride: usize) {
                // SAFETY: handed on from the caller.
                unsafe { tile::<$lanes, { $rows }, $vectors>(a, b, depth, out, stride) }
            }
            Kernel { tile: compiled, rows: $rows, columns: $vectors * <$lanes as Lanes>::N }
        };
    };
}

mod portable {
    use super::{Kernel, Lanes, tile};

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
        unsafe fn add_to(self, to: *mut f64) {
            for (i, x) in self.0.into_iter().enumerate() {
                // SAFETY: eight numbers are writable.
                unsafe { *to.add(i) += f64::from(x) }
            }
        }
    }

    kernel!(PORTABLE, Plain, if cfg!(target_arch = "aarch64") { 8 } else { 4 }, 1);
}
use portable::PORTABLE;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_add_pd, _mm256_castps256_ps128, _mm256_cvtps_pd, _mm256_extractf128_ps,
        _mm256_fmadd_ps, _mm256_loadu_pd, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_storeu_pd, _mm512_add_pd, _mm512_castps512_ps256, _mm512_cvtps_pd, _mm512_extractf32x8_ps,
        _mm512_fmadd_ps, _mm512_loadu_pd, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_pd,
    };

    use super::{Kernel, Lanes, tile};

    /// `Lanes` over intrinsics.
    macro_rules! lanes {
        ($name:ident($vector:ty), $n:literal, $zero:ident, $load:ident, $splat:ident, $fma:ident, $add:ident) => {
            #[derive(Clone, Copy)]
            struct $name($vector);
            impl Lanes for $name {
                const N: usize = $n;
                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: the caller of `tile` vouches for the instructions, here and below.
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
                unsafe fn add_to(self, to: *mut f64) {
                    // SAFETY: N numbers are readable and writable.
                    unsafe { $add(self.0, to) }
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn add_8(sum: __m256, to: *mut f64) {
        // SAFETY: the caller vouches for eight numbers and for AVX2.
        unsafe {
            let low = _mm256_cvtps_pd(_mm256_castps256_ps128(sum));
            let high = _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(sum));
            _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), low));
            _mm256_storeu_pd(to.add(4), _mm256_add_pd(_mm256_loadu_pd(to.add(4)), high));
        }
    }

    #[inline(always)]
    unsafe fn add_16(sum: __m512, to: *mut f64) {
        // SAFETY: the caller vouches for sixteen numbers and for AVX-512DQ.
        unsafe {
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(sum));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(sum));
            _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
            _mm512_storeu_pd(to.add(8), _mm512_add_pd(_mm512_loadu_pd(to.add(8)), high));
        }
    }

    lanes!(F32x16(__m512), 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, add_16);
    lanes!(F32x8(__m256), 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, add_8);

    kernel!(AVX512, F32x16, 12, 2, "avx512f,avx512bw,avx512dq,avx512vl");
    kernel!(AVX2, F32x8, 6, 2, "avx2,fma");
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRIDE: usize = 40;

    fn panel(len: usize, seed: u32) -> Vec<f32> {
        (0..len)
            .map(|i| {
                let hash = (i as u32 ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
                f32::from(hash as u16) / 32_768.0 - 1.0
            })
            .collect()
    }

    #[test]
    fn every_kernel_multiplies_panels_within_its_error_bound() {
        for (depth, isa) in [1, 2, 7, 255].into_iter().flat_map(|d| Isa::available().map(move |isa| (d, isa)))
        {
            let kernel = Kernel::of(isa);
            let (rows, columns) = (kernel.width(Side::Left), kernel.width(Side::Right));
            let (a, b) = (panel(depth * rows, 1), panel(depth * columns, 2));
            let mut out = vec![1.0; rows * STRIDE];
            kernel.add_product(&a, &b, depth, &mut out, 3, STRIDE);
            for (r, c) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
                let terms = (0..depth).map(|i| f64::from(a[i * rows + r]) * f64::from(b[i * columns + c]));
                let (exact, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                let bound = (depth + 1) as f64 * 2.0_f64.powi(-24) * size + 1e-15;
                assert!((out[3 + r * STRIDE + c] - 1.0 - exact).abs() <= bound, "{isa:?} at {r},{c}");
            }
            let outside = |at: usize| at % STRIDE < 3 || at % STRIDE >= 3 + columns;
            assert!(
                (0..out.len()).filter(|&at| outside(at)).all(|at| out[at] == 1.0),
                "{isa:?} beside the block"
            );
        }
    }
}
