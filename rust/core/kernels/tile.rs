//! Products of packed panels: one micro-kernel shape, written once and instantiated per element type and instruction set.
//!
//! A *panel* holds [`PANEL`] columns of a matrix, row after row, as 32-bit words: one `f32`, or two `bf16` of neighbouring
//! rows. The kernel multiplies 8 columns of one panel with the 32 of another, over any depth, in registers: every step
//! loads the 32 words of `b`, broadcasts 8 words of `a`, and does 8 x 32 fused multiply-adds. Both sides read the same
//! layout, so a symmetric product packs its matrix once.
//!
//! | instruction set | registers of the accumulator | multiply-adds per step and instruction |
//! | --- | --- | --- |
//! | AVX-512F | 8 x 2 of 16 f32 | 16 |
//! | AVX-512 BF16 | 8 x 2 of 16 f32 | 32 |
//! | AVX2 + FMA | 4 x 2 of 8 f32, four times | 8 |
//! | any | 4 x 1 of 8 f32, eight times | what the compiler makes of it |
//!
//! Error of a sum over `depth` terms in `f32`: at most `depth * 2^-24 * sum |a| |b|`, to first order.

#![allow(unsafe_code)]
// Intrinsics become instructions only once everything between them and the function with the target feature is inlined.
#![allow(clippy::inline_always)]

use half::bf16;

/// Columns of a panel.
pub const PANEL: usize = 32;
/// Rows of a register tile.
const STRIP: usize = 8;
/// Elements of the product of two panels.
pub const PRODUCT: usize = PANEL * PANEL;

/// What a panel's words hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// One `f32`.
    F32,
    /// Two `bf16`: the even row in the low half.
    Bf16Pair,
}

/// 8 columns of `a` times 32 columns of `b` over `depth` words, written to an 8 x 32 block.
type Strip = unsafe fn(a: *const u32, b: *const u32, depth: usize, out: *mut f32);
/// The same, added in `f64` to a block whose rows are `stride` apart.
type StripAdd = unsafe fn(a: *const u32, b: *const u32, depth: usize, out: *mut f64, stride: usize);

/// The micro-kernels of one instruction set for one kind of word.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Name of the instruction set.
    pub name: &'static str,
    strip: Strip,
    strip_add: StripAdd,
}

impl Kernel {
    /// The fastest kernel of this machine for `word`; `None` when it has no instruction for such words.
    pub fn best(word: Word) -> Option<Self> {
        Self::available(word).into_iter().next()
    }

    /// Every kernel of this machine for `word`, fastest first.
    pub fn available(word: Word) -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if word == Word::F32 && is_x86_feature_detected!("avx512f") {
                found.push(x86::AVX512);
            }
            if word == Word::Bf16Pair && is_x86_feature_detected!("avx512bf16") {
                found.push(x86::AVX512_BF16);
            }
            if word == Word::F32 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(x86::AVX2);
            }
        }
        if word == Word::F32 {
            found.push(PORTABLE);
        }
        found
    }

    /// The f32 kernel of this machine.
    pub fn f32() -> Self {
        Self::best(Word::F32).unwrap_or(PORTABLE)
    }

    /// Writes the 32 x 32 product of panels `a` and `b`, `depth` words deep, to `out`.
    ///
    /// # Panics
    /// When a panel holds fewer than `depth` rows.
    pub fn product(&self, a: &[u32], b: &[u32], depth: usize, out: &mut [f32; PRODUCT]) {
        assert!(a.len() >= depth * PANEL && b.len() >= depth * PANEL, "panels of at least {depth} rows");
        for strip in 0..PANEL / STRIP {
            let corner = out[strip * STRIP * PANEL..].as_mut_ptr();
            // SAFETY: both panels hold `depth * PANEL` words (asserted), a strip writes STRIP * PANEL of the PRODUCT
            // elements behind `corner`, and the kernel is only ever built for instructions that were detected.
            unsafe { (self.strip)(a.as_ptr().add(strip * STRIP), b.as_ptr(), depth, corner) }
        }
    }

    /// Adds the 32 x 32 product of panels `a` and `b`, `depth` words deep, to the block of `out` at `corner`.
    ///
    /// # Panics
    /// When a panel holds fewer than `depth` rows, or `out` ends before the block does.
    pub fn add_product(
        &self,
        a: &[u32],
        b: &[u32],
        depth: usize,
        out: &mut [f64],
        corner: usize,
        stride: usize,
    ) {
        assert!(a.len() >= depth * PANEL && b.len() >= depth * PANEL, "panels of at least {depth} rows");
        assert!(stride >= PANEL && out.len() >= corner + (PANEL - 1) * stride + PANEL, "room for a block");
        for strip in 0..PANEL / STRIP {
            let corner = out[corner + strip * STRIP * stride..].as_mut_ptr();
            // SAFETY: as in `product`; the last row of the strip ends within `out` (asserted).
            unsafe { (self.strip_add)(a.as_ptr().add(strip * STRIP), b.as_ptr(), depth, corner, stride) }
        }
    }
}

/// Packs two rows of `bf16` values into one row of words.
pub fn pair_words(even: &[bf16], odd: &[bf16], words: &mut [u32]) {
    for ((word, even), odd) in words.iter_mut().zip(even).zip(odd) {
        *word = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
    }
}

/// A vector of words and the multiply-add that goes with it.
trait Lanes: Copy {
    type Sum: Copy;
    const N: usize;
    unsafe fn zero() -> Self::Sum;
    unsafe fn load(from: *const u32) -> Self;
    unsafe fn splat(word: *const u32) -> Self;
    unsafe fn multiply_add(a: Self, b: Self, sum: Self::Sum) -> Self::Sum;
    unsafe fn store(sum: Self::Sum, to: *mut f32);
}

/// `ROWS` columns of `a` times `VECTORS` vectors of `b`: the one loop of this file.
///
/// # Safety
/// `a` is readable at `i * PANEL + 0..ROWS` and `b` at `i * PANEL + 0..VECTORS * L::N` for `i` in `0..depth`; `out` is
/// writable at `r * PANEL + 0..VECTORS * L::N` for `r` in `0..ROWS`; the machine has the instructions of `L`.
#[inline(always)]
unsafe fn register_tile<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    a: *const u32,
    b: *const u32,
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
                L::store(*sum, out.add(r * PANEL + v * L::N));
            }
        }
    }
}

/// The register tiles that make up one strip of 8 x 32.
#[inline(always)]
unsafe fn strip<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    a: *const u32,
    b: *const u32,
    depth: usize,
    out: *mut f32,
) {
    for row in (0..STRIP).step_by(ROWS) {
        for column in (0..PANEL).step_by(VECTORS * L::N) {
            // SAFETY: `row + ROWS <= STRIP` and `column + VECTORS * L::N <= PANEL` by the steps.
            unsafe {
                register_tile::<L, ROWS, VECTORS>(
                    a.add(row),
                    b.add(column),
                    depth,
                    out.add(row * PANEL + column),
                );
            }
        }
    }
}

#[inline(always)]
unsafe fn strip_add<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    a: *const u32,
    b: *const u32,
    depth: usize,
    out: *mut f64,
    stride: usize,
) {
    let mut block = [0.0_f32; STRIP * PANEL];
    // SAFETY: `block` has room for a strip, and the caller vouches for STRIP rows of PANEL elements behind `out`.
    unsafe {
        strip::<L, ROWS, VECTORS>(a, b, depth, block.as_mut_ptr());
        for (r, row) in block.chunks_exact(PANEL).enumerate() {
            for (c, value) in row.iter().enumerate() {
                *out.add(r * stride + c) += f64::from(*value);
            }
        }
    }
}

/// One [`Kernel`]: the generic strip, compiled for the instructions of `$lanes`.
macro_rules! kernel {
    ($constant:ident, $name:literal, $lanes:ty, $rows:literal, $vectors:literal $(, $feature:literal)?) => {
        pub(super) const $constant: Kernel = {
            $(#[target_feature(enable = $feature)])?
            unsafe fn store(a: *const u32, b: *const u32, depth: usize, out: *mut f32) {
                // SAFETY: handed on from the caller.
                unsafe { strip::<$lanes, $rows, $vectors>(a, b, depth, out) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn add(a: *const u32, b: *const u32, depth: usize, out: *mut f64, stride: usize) {
                // SAFETY: handed on from the caller.
                unsafe { strip_add::<$lanes, $rows, $vectors>(a, b, depth, out, stride) }
            }
            Kernel { name: $name, strip: store, strip_add: add }
        };
    };
}

mod portable {
    use super::{Kernel, Lanes, strip, strip_add};

    /// Eight `f32` in whatever registers there are. The product is rounded before it is added, unless the target
    /// always has a fused multiply-add: calling one in software would be slower by far.
    #[derive(Clone, Copy)]
    pub struct Plain([f32; 8]);

    impl Lanes for Plain {
        type Sum = [f32; 8];
        const N: usize = 8;
        #[inline(always)]
        unsafe fn zero() -> [f32; 8] {
            [0.0; 8]
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self {
            // SAFETY: eight words are readable, as for every implementation.
            Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
        }
        #[inline(always)]
        unsafe fn splat(word: *const u32) -> Self {
            // SAFETY: one word is readable.
            Self([f32::from_bits(unsafe { *word }); 8])
        }
        #[inline(always)]
        unsafe fn multiply_add(a: Self, b: Self, mut sum: [f32; 8]) -> [f32; 8] {
            for ((sum, a), b) in sum.iter_mut().zip(a.0).zip(b.0) {
                *sum = if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                    a.mul_add(b, *sum)
                } else {
                    a * b + *sum
                };
            }
            sum
        }
        #[inline(always)]
        unsafe fn store(sum: [f32; 8], to: *mut f32) {
            // SAFETY: eight elements are writable.
            unsafe { to.cast::<[f32; 8]>().write_unaligned(sum) }
        }
    }

    kernel!(PORTABLE, "portable", Plain, 4, 1);
}
use portable::PORTABLE;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, __m512bh, __m512i, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_storeu_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{Kernel, Lanes, strip, strip_add};

    /// `Lanes` over intrinsics: the words are readable, the elements writable, the instructions present, as the
    /// caller of `register_tile` vouches.
    macro_rules! lanes {
        ($name:ident($vector:ty), $sum:ty, $n:literal, $zero:expr, |$from:ident| $load:expr, |$word:ident| $splat:expr,
         |$a:ident, $b:ident, $c:ident| $fma:expr, |$value:ident, $to:ident| $store:expr) => {
            #[derive(Clone, Copy)]
            struct $name($vector);
            impl Lanes for $name {
                type Sum = $sum;
                const N: usize = $n;
                #[inline(always)]
                unsafe fn zero() -> $sum {
                    // SAFETY: the caller has the instructions.
                    unsafe { $zero }
                }
                #[inline(always)]
                unsafe fn load($from: *const u32) -> Self {
                    // SAFETY: N words are readable.
                    Self(unsafe { $load })
                }
                #[inline(always)]
                unsafe fn splat($word: *const u32) -> Self {
                    // SAFETY: one word is readable.
                    Self(unsafe { $splat })
                }
                #[inline(always)]
                unsafe fn multiply_add(Self($a): Self, Self($b): Self, $c: $sum) -> $sum {
                    // SAFETY: the caller has the instructions.
                    unsafe { $fma }
                }
                #[inline(always)]
                unsafe fn store($value: $sum, $to: *mut f32) {
                    // SAFETY: N elements are writable.
                    unsafe { $store }
                }
            }
        };
    }

    lanes!(
        F32x16(__m512),
        __m512,
        16,
        _mm512_setzero_ps(),
        |p| _mm512_loadu_ps(p.cast()),
        |p| _mm512_set1_ps(*p.cast()),
        |a, b, c| _mm512_fmadd_ps(a, b, c),
        |v, p| _mm512_storeu_ps(p, v)
    );
    lanes!(
        F32x8(__m256),
        __m256,
        8,
        _mm256_setzero_ps(),
        |p| _mm256_loadu_ps(p.cast()),
        |p| _mm256_set1_ps(*p.cast()),
        |a, b, c| _mm256_fmadd_ps(a, b, c),
        |v, p| _mm256_storeu_ps(p, v)
    );
    lanes!(
        Bf16x32(__m512bh),
        __m512,
        16,
        _mm512_setzero_ps(),
        |p| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())),
        |p| std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*p.cast())),
        |a, b, c| _mm512_dpbf16_ps(c, a, b),
        |v, p| _mm512_storeu_ps(p, v)
    );

    kernel!(AVX512, "avx512f", F32x16, 8, 2, "avx512f");
    kernel!(AVX2, "avx2", F32x8, 4, 2, "avx2,fma");
    kernel!(AVX512_BF16, "avx512bf16", Bf16x32, 8, 2, "avx512f,avx512bf16");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(depth: usize, seed: u32) -> Vec<u32> {
        (0..depth * PANEL)
            .map(|i| {
                let hash = (i as u32 ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
                (f32::from(hash as u16) / 32_768.0 - 1.0).to_bits()
            })
            .collect()
    }

    #[test]
    fn every_f32_kernel_multiplies_panels_within_its_error_bound() {
        for depth in [1, 2, 7, 255] {
            let (a, b) = (panel(depth, 1), panel(depth, 2));
            for kernel in Kernel::available(Word::F32) {
                let mut out = [0.0; PRODUCT];
                let mut added = vec![1.0; PANEL * 40];
                kernel.product(&a, &b, depth, &mut out);
                kernel.add_product(&a, &b, depth, &mut added, 0, 40);
                for (r, c) in (0..PANEL).flat_map(|r| (0..PANEL).map(move |c| (r, c))) {
                    let terms = (0..depth).map(|i| {
                        let at = |p: &[u32], j: usize| f64::from(f32::from_bits(p[i * PANEL + j]));
                        at(&a, r) * at(&b, c)
                    });
                    let (exact, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                    let bound = (depth + 1) as f64 * 2.0_f64.powi(-24) * size;
                    assert!(
                        (f64::from(out[r * PANEL + c]) - exact).abs() <= bound,
                        "{} at {r},{c}",
                        kernel.name
                    );
                    assert!(
                        (added[r * 40 + c] - 1.0 - exact).abs() <= bound + 1e-15,
                        "{} at {r},{c}",
                        kernel.name
                    );
                }
            }
        }
    }
}
