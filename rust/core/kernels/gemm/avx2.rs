//! The micro-kernel of 256-bit processors: 12 rows × 32 features of exact sums, written once, instantiated for words and for
//! narrow bytes.
//!
//! VPMADDWD multiplies 16 pairs of words and adds them two by two in 32 bits: twice the products of an f32 multiply-add, in
//! registers of the same width, for one addition more, which other ports do. Norms bound the sums: see
//! [`super::quantize::words`]. VPMADDUBSW doubles that again, and adds in 16 bits: see [`narrow`].
//!
//! Four register tiles of 6 × 16 make a tile: 12 accumulators, two registers of the panel, one broadcast word of the strip.
//! They take the depth in slices that stay in the first-level cache, and keep sums of 32 bits between slices in memory.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256, __m256i, _CMP_NLT_UQ, _mm256_add_epi16, _mm256_add_epi32, _mm256_cmp_ps, _mm256_cvtepi32_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_movemask_ps, _mm256_mul_ps, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_si256, _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::narrow;
use super::tile::{COLS, Columns, Lines, ROWS, Tile};

/// Lanes of a register.
const LANES: usize = 8;
/// Rows of a register tile.
const HEIGHT: usize = 6;
/// Registers of a row of a register tile.
const WIDTH: usize = 2;
/// Steps of a slice of words: 16 KiB of the panel and 6 KiB of the strip.
const SLICE: usize = 128;

type Sums = [[[i32; LANES]; COLS / LANES]; ROWS];

/// One instance of the micro-kernel. A slice has `$slice` steps; in the panel `$starts` lines come before them, which its sums may
/// start from.
macro_rules! micro_kernel {
    (
        $(#[$doc:meta])* $name:ident, $products:ident, [$slice:expr, $starts:literal],
        |$begin:ident, $at:ident| $first:expr, |$sum:ident, $a:ident, $b:ident| $multiply_add:expr, |$done:ident| $widen:expr
    ) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The processor has the target features of this function.
        #[target_feature(enable = "avx2,fma")]
        pub unsafe fn $name(strip: &[u32], panel: &[u32], lines: &Lines, columns: &Columns, tile: &mut Tile) {
            bounds(&$products(strip, panel), lines, columns, tile);
        }

        /// The sums of products of a tile.
        #[inline]
        #[target_feature(enable = "avx2")]
        fn $products(strip: &[u32], panel: &[u32]) -> Sums {
            // Inlined, the sums of all four register tiles would become variables of one function, and be moved about.
            #[inline(never)]
            #[target_feature(enable = "avx2")]
            fn add<const TOP: usize, const LEFT: usize>(
                a: &[[u32; ROWS]], b: &[[u32; COLS]], sums: &mut Sums,
            ) {
                let ($begin, b) = b.split_at($starts);
                let mut registers = [[_mm256_setzero_si256(); WIDTH]; HEIGHT];
                for v in 0..WIDTH {
                    let $at = LEFT + v;
                    for row in &mut registers {
                        row[v] = $first;
                    }
                }
                for (a, b) in a.iter().zip(b) {
                    let b = [load(part(b, LEFT)), load(part(b, LEFT + 1))];
                    for r in 0..HEIGHT {
                        let $a = _mm256_set1_epi32(a[TOP + r].cast_signed());
                        for v in 0..WIDTH {
                            let ($sum, $b) = (registers[r][v], b[v]);
                            registers[r][v] = $multiply_add;
                        }
                    }
                }
                for (r, row) in registers.iter().enumerate() {
                    for (v, &$done) in row.iter().enumerate() {
                        let sum = &mut sums[TOP + r][LEFT + v];
                        store_sums(sum, _mm256_add_epi32(load(sum), $widen));
                    }
                }
            }
            let (a_steps, b_steps) = (strip.as_chunks::<ROWS>().0, panel.as_chunks::<COLS>().0);
            debug_assert_eq!(a_steps.len() + a_steps.len().div_ceil($slice) * $starts, b_steps.len());
            let mut sums = Sums::default();
            for (a, b) in a_steps.chunks($slice).zip(b_steps.chunks($slice + $starts)) {
                add::<0, 0>(a, b, &mut sums);
                add::<HEIGHT, 0>(a, b, &mut sums);
                add::<0, WIDTH>(a, b, &mut sums);
                add::<HEIGHT, WIDTH>(a, b, &mut sums);
            }
            sums
        }
    };
}

micro_kernel!(
    /// Bounds of a tile from 16-bit words of rows and features.
    ///
    /// `strip` holds [`ROWS`] pairs of words per step, `panel` [`COLS`]; both have the same number of steps.
    words, word_products, [SLICE, 0],
    |_starts, _at| _mm256_setzero_si256(),
    |sum, a, b| _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)),
    |done| done
);

micro_kernel!(
    /// Bounds of a tile from bytes as [`narrow`] packs them.
    ///
    /// `strip` holds [`ROWS`] words of four bytes per step, `panel` [`COLS`], and before every slice its starts.
    narrow_bytes, narrow_products, [narrow::SLICE, 1],
    |starts, at| load(part(&starts[0], at)),
    |sum, a, b| _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)),
    |done| _mm256_madd_epi16(done, _mm256_set1_epi16(1))
);

/// What a register holds of a number for each feature of a panel.
fn part<T>(line: &[T; COLS], at: usize) -> &[T; LANES] {
    &line.as_chunks::<LANES>().0[at]
}

/// Turns sums into upper bounds, and marks those that reach the threshold of their row.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop)] // registers of sums, lines and tile run side by side
fn bounds(sums: &Sums, lines: &Lines, columns: &Columns, tile: &mut Tile) {
    tile.hits = [0; ROWS];
    for v in 0..COLS / LANES {
        let column = |of: &[f32; COLS]| load_ps(part(of, v));
        let (scale, bias) = (column(&columns.scale), column(&columns.bias));
        let (norm, residual) = (column(&columns.norm), column(&columns.residual));
        for r in 0..ROWS {
            let slack = _mm256_fmadd_ps(_mm256_set1_ps(lines.norm[r]), residual, bias);
            let slack = _mm256_fmadd_ps(_mm256_set1_ps(lines.slack[r]), norm, slack);
            let scale = _mm256_mul_ps(_mm256_set1_ps(lines.scale[r]), scale);
            let upper = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load(&sums[r][v])), scale, slack);
            // Not less than: what is not a number counts as a hit.
            let mask = _mm256_cmp_ps::<_CMP_NLT_UQ>(upper, _mm256_set1_ps(lines.threshold[r]));
            tile.hits[r] |= _mm256_movemask_ps(mask).cast_unsigned() << (v * LANES);
            store(&mut tile.upper[r].as_chunks_mut::<LANES>().0[v], upper);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load<T: bytemuck::Pod>(from: &[T; LANES]) -> __m256i {
    const { assert!(size_of::<T>() == 4) }
    // SAFETY: `from` is 32 readable bytes; the load has no alignment of its own.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_ps(from: &[f32; LANES]) -> __m256 {
    // SAFETY: as in `load`.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [f32; LANES], from: __m256) {
    // SAFETY: `to` is 32 writable bytes; the store has no alignment of its own.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), from) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_sums(to: &mut [i32; LANES], from: __m256i) {
    // SAFETY: `to` is 32 writable bytes; the store has no alignment of its own.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), from) }
}

#[cfg(test)]
mod tests {
    use super::super::exact::{check, interleave, sequence};
    use super::super::quantize::{self, Limits};
    use super::*;
    use crate::kernels::isa::{Isa, Path};

    #[test]
    fn sums_of_word_products_are_those_of_64_bit_arithmetic() {
        if Isa::new(Path::Avx2).is_none() {
            return;
        }
        let mut word = sequence();
        for steps in [1, 7, SLICE, SLICE + 1, 3 * SLICE - 1] {
            let rows: Vec<i16> = (0..steps * ROWS * 2).map(|_| word() / 32).collect();
            let features: Vec<i16> = (0..steps * COLS * 2).map(|_| word() / 32).collect();
            let strip = interleave::<ROWS>(bytemuck::cast_slice(&rows));
            let panel = interleave::<COLS>(bytemuck::cast_slice(&features));
            // SAFETY: the processor was asked for AVX2 above.
            let sums = unsafe { word_products(&strip, &panel) };
            check(sums.as_flattened().as_flattened(), &rows, &features, steps * 2);
        }
    }

    /// Narrow bytes of `n` vectors: noise, equal elements, one of a slice's two lanes alone, magnitudes far apart.
    fn narrow_vectors(n: usize, d: usize, kind: usize, word: &mut impl FnMut() -> i16) -> Vec<i8> {
        let mut q = vec![0; n * d];
        for (number, to) in q.chunks_mut(d).enumerate() {
            let mut element = |i: usize| match kind {
                0 => f32::from(word()),
                1 => 1.0 - 2.0 * (number % 2) as f32,
                2 => f32::from(word()) * f32::from(u8::from(i % 4 < 2)),
                _ => (f32::from(word()) / 4000.0).exp2(),
            };
            let v: Vec<f32> = (0..d).map(&mut element).collect();
            quantize::bytes(Isa::PLAIN, &v, Limits::NARROW, None, bytemuck::cast_slice_mut(to));
        }
        q
    }

    #[test]
    fn sums_of_narrow_bytes_are_those_of_64_bit_arithmetic_up_to_the_largest_norms() {
        if Isa::new(Path::Avx2).is_none() {
            return;
        }
        let mut word = sequence();
        let steps = [1, 7, narrow::SLICE, narrow::SLICE + 1, 128];
        for (steps, kind) in steps.into_iter().flat_map(|steps| (0..4).map(move |kind| (steps, kind))) {
            let d = steps * 4;
            let rows = narrow_vectors(ROWS, d, kind, &mut word);
            let features = narrow_vectors(COLS, d, kind, &mut word);
            let unsigned: Vec<u8> =
                rows.iter().map(|q| q.cast_unsigned().wrapping_add(narrow::OFFSET)).collect();
            let strip = interleave::<ROWS>(&bytemuck::pod_collect_to_vec(&unsigned));
            let mut panel = vec![0; narrow::panel_steps(steps) * COLS];
            for (c, feature) in features.chunks(d).enumerate() {
                narrow::pack(&bytemuck::pod_collect_to_vec(feature), c, &mut panel);
            }
            // SAFETY: the processor was asked for AVX2 above.
            let sums = unsafe { narrow_products(&strip, &panel) };
            check(sums.as_flattened().as_flattened(), &rows, &features, d);
        }
    }
}
