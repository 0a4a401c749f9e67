//! The micro-kernel: 12 rows × 32 features of sums in 24 registers, written once, instantiated for bytes, for words of 16
//! bits, and for bf16.
//!
//! Every step reads 32 words of the panel (two registers) and broadcasts 12 words of the strip; a word holds four bytes,
//! two of 16 bits, or two bf16 along the input width. 24 dot-product instructions per 14 loads keep both vector pipes of a
//! 512-bit core busy. The epilogue turns sums into upper bounds and hit masks (see [`super::tile`]) before anything is stored.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512d, __m512i, _CMP_NLT_UQ, _mm256_loadu_ps, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi32_ps, _mm512_cvtps_pd, _mm512_dpbf16_ps,
    _mm512_dpbusd_epi32, _mm512_dpwssd_epi32, _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_si512,
    _mm512_storeu_pd, _mm512_storeu_ps,
};

use super::dot::{Group, LANES, add_rest, pairwise};
use super::tile::{COLS, Columns, Lines, ROWS, Tile};
use crate::kernels::prefetch::fetch;

/// Lanes of a register.
const HALF: usize = COLS / 2;

macro_rules! micro_kernel {
    ($(#[$doc:meta])* $name:ident, $features:literal, |$sum:ident, $a:ident, $b:ident| $multiply_add:expr, $start:ident, |$done:ident| $to_float:expr) => {
        $(#[$doc])*
        ///
        /// `strip` holds [`ROWS`] words per step, `panel` [`COLS`]; both have the same number of steps.
        ///
        /// # Safety
        /// The processor has the target features of this function.
        #[target_feature(enable = $features)]
        pub unsafe fn $name(strip: &[u32], panel: &[u32], lines: &Lines, columns: &Columns, tile: &mut Tile) {
            let (a_steps, _) = strip.as_chunks::<ROWS>();
            let (b_steps, _) = panel.as_chunks::<COLS>();
            // Without a step the sums would have to be cleared in memory beforehand, for every tile.
            assert!(!a_steps.is_empty() && a_steps.len() == b_steps.len(), "one or more steps of both sides");
            let mut sums = [[$start(columns, 0), $start(columns, 1)]; ROWS];
            for (a, b) in a_steps.iter().zip(b_steps) {
                let halves = b.as_chunks::<HALF>().0;
                let b = [load(&halves[0]), load(&halves[1])];
                for r in 0..ROWS {
                    let $a = _mm512_set1_epi32(a[r].cast_signed());
                    for h in 0..2 {
                        let ($sum, $b) = (sums[r][h], b[h]);
                        sums[r][h] = $multiply_add;
                    }
                }
            }
            tile.hits = [0; ROWS];
            for h in 0..2 {
                let (span, factors) = (h * HALF, Factors::of(columns, h));
                for r in 0..ROWS {
                    let $done = sums[r][h];
                    let (upper, hits) = factors.bound($to_float, r, lines);
                    tile.hits[r] |= u32::from(hits) << span;
                    store(half_mut(&mut tile.upper[r], span), upper);
                }
            }
        }
    };
}

/// What the sums of unsigned rows begin with, so that they end as those of signed ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn offsets(columns: &Columns, h: usize) -> __m512i {
    load(half(&columns.offset, h * HALF))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn zeros(_: &Columns, _: usize) -> __m512i {
    _mm512_setzero_si512()
}

/// What the bounds of half of a panel's features are made of.
#[derive(Clone, Copy)]
struct Factors {
    scale: __m512,
    bias: __m512,
    norm: __m512,
    residual: __m512,
}

impl Factors {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn of(columns: &Columns, h: usize) -> Self {
        let of = |factors: &[f32; COLS]| load_ps(half(factors, h * HALF));
        Self {
            scale: of(&columns.scale),
            bias: of(&columns.bias),
            norm: of(&columns.norm),
            residual: of(&columns.residual),
        }
    }

    /// The bounds of row `r` of a strip, and which of them hit.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn bound(self, sum: __m512, r: usize, lines: &Lines) -> (__m512, u16) {
        let slack = _mm512_fmadd_ps(_mm512_set1_ps(lines.norm[r]), self.residual, self.bias);
        let slack = _mm512_fmadd_ps(_mm512_set1_ps(lines.slack[r]), self.norm, slack);
        let upper = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(lines.scale[r]), self.scale), slack);
        let hits = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(upper, _mm512_set1_ps(lines.threshold[r]));
        (upper, hits)
    }
}

/// Bounds of a tile whose f32 sums are in memory.
///
/// # Safety
/// The processor has the target features of this function.
#[target_feature(enable = "avx512f")]
pub unsafe fn bounds(sums: &[[f32; COLS]; ROWS], lines: &Lines, columns: &Columns, tile: &mut Tile) {
    let factors = [Factors::of(columns, 0), Factors::of(columns, 1)];
    for (r, sums) in sums.iter().enumerate() {
        let mut hits = [0; 2];
        for (h, factors) in factors.iter().enumerate() {
            let span = h * HALF;
            let (upper, hit) = factors.bound(load_ps(half(sums, span)), r, lines);
            hits[h] = u32::from(hit) << span;
            store(half_mut(&mut tile.upper[r], span), upper);
        }
        tile.hits[r] = hits[0] | hits[1];
    }
}

micro_kernel!(
    /// Bounds of a tile from unsigned bytes of rows and signed bytes of features (VPDPBUSD).
    bytes, "avx512f,avx512bw,avx512vnni",
    |sum, a, b| _mm512_dpbusd_epi32(sum, a, b),
    offsets,
    |done| _mm512_cvtepi32_ps(done)
);

micro_kernel!(
    /// Bounds of a tile from signed pairs of 16 bits (VPDPWSSD); norms bound the sums, see [`super::quantize::words`].
    words, "avx512f,avx512bw,avx512vnni",
    |sum, a, b| _mm512_dpwssd_epi32(sum, a, b),
    zeros,
    |done| _mm512_cvtepi32_ps(done)
);

micro_kernel!(
    /// Bounds of a tile from bf16 pairs (VDPBF16PS).
    brain_floats, "avx512f,avx512bw,avx512bf16",
    |sum, a, b| _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), pairs(a), pairs(b))),
    zeros,
    |done| _mm512_castsi512_ps(done)
);

/// Rows that one reading of a feature serves.
const ABREAST: usize = 4;

/// See [`super::dot::dots_of`]: four rows abreast, and the rows and the feature that come next fetched meanwhile.
///
/// # Safety
/// The processor has the target features of this function.
#[target_feature(enable = "avx512f")]
pub unsafe fn dots_of(group: Group<'_>, x: &[f32], products: &mut [f64]) {
    let d = group.w.len();
    let row = |r: u32| &x[r as usize * d..(r as usize + 1) * d];
    let mut done = 0;
    while done < group.len {
        let count = ABREAST.min(group.len - done);
        let next = if done + count == group.len { group.next } else { group.w };
        // Spelt out: `array::from_fn` would be a call.
        let now = |i: usize| row(group.rows[done + i.min(count - 1)]);
        let rows: [&[f32]; ABREAST] = [now(0), now(1), now(2), now(3)];
        let later = |i: usize| group.rows.get(done + count + i).map_or(rows[0], |&r| row(r));
        let ahead: [&[f32]; ABREAST] = [later(0), later(1), later(2), later(3)];
        let out = &mut products[done..done + count];
        match count {
            1 => out.copy_from_slice(&dots(group.w, next, [rows[0]], [ahead[0]])),
            2 => out.copy_from_slice(&dots(group.w, next, [rows[0], rows[1]], [ahead[0], ahead[1]])),
            3 => out.copy_from_slice(&dots(
                group.w,
                next,
                [rows[0], rows[1], rows[2]],
                [ahead[0], ahead[1], ahead[2]],
            )),
            _ => out.copy_from_slice(&dots(group.w, next, rows, ahead)),
        }
        done += count;
    }
}

#[target_feature(enable = "avx512f")]
fn dots<const N: usize>(w: &[f32], next: &[f32], x: [&[f32]; N], ahead: [&[f32]; N]) -> [f64; N] {
    let mut sums = [[_mm512_setzero_pd(); LANES / 8]; N];
    let (w_steps, w_rest) = w.as_chunks::<LANES>();
    let steps = w_steps.len();
    let x_steps = x.map(|x| &x.as_chunks::<LANES>().0[..steps]);
    for (step, w) in w_steps.iter().enumerate() {
        fetch(next, step * LANES);
        fetch(next, step * LANES + LANES / 2);
        let quarters = w.as_chunks::<8>().0;
        let w = [widen(&quarters[0]), widen(&quarters[1]), widen(&quarters[2]), widen(&quarters[3])];
        for i in 0..N {
            // SAFETY: every row was cut to as many steps as `w` has. The compiler does not see it, and a check per row and
            // step would cost as much as the arithmetic.
            let x = unsafe { x_steps[i].get_unchecked(step) }.as_chunks::<8>().0;
            fetch(ahead[i], step * LANES);
            fetch(ahead[i], step * LANES + LANES / 2);
            for q in 0..LANES / 8 {
                sums[i][q] = _mm512_fmadd_pd(widen(&x[q]), w[q], sums[i][q]);
            }
        }
    }
    let mut totals = [0.0; N];
    for i in 0..N {
        let mut lanes = [0.0; LANES];
        for (lanes, sum) in lanes.as_chunks_mut::<8>().0.iter_mut().zip(sums[i]) {
            *lanes = spill(sum);
        }
        add_rest::<true>(&mut lanes, &x[i][w_steps.len() * LANES..], w_rest);
        totals[i] = pairwise(lanes);
    }
    totals
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen(from: &[f32; 8]) -> __m512d {
    // SAFETY: `from` is 32 readable bytes; the load has no alignment of its own.
    _mm512_cvtps_pd(unsafe { _mm256_loadu_ps(from.as_ptr()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn spill(from: __m512d) -> [f64; 8] {
    let mut to = [0.0; 8];
    // SAFETY: `to` is 64 writable bytes; the store has no alignment of its own.
    unsafe { _mm512_storeu_pd(to.as_mut_ptr(), from) };
    to
}

fn half<T>(columns: &[T; COLS], start: usize) -> &[T; HALF] {
    &columns.as_chunks::<HALF>().0[start / HALF]
}

fn half_mut<T>(columns: &mut [T; COLS], start: usize) -> &mut [T; HALF] {
    &mut columns.as_chunks_mut::<HALF>().0[start / HALF]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load<T: bytemuck::Pod>(from: &[T; HALF]) -> __m512i {
    const { assert!(size_of::<T>() == 4) }
    // SAFETY: `from` is 64 readable bytes; the load has no alignment of its own.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_ps(from: &[f32; HALF]) -> __m512 {
    _mm512_castsi512_ps(load(from))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32; HALF], from: __m512) {
    // SAFETY: `to` is 64 writable bytes; the store has no alignment of its own.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), from) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both types are 512 plain bits.
    unsafe { std::mem::transmute(words) }
}
