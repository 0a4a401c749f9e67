//! The micro-kernel of 256-bit processors: 12 rows × 32 features of 16-bit products, summed exactly in 32 bits.
//!
//! VPMADDWD multiplies 16 pairs of words and adds them two by two: twice the products of an f32 multiply-add, in registers of
//! the same width, for one addition more, which other ports do. VPMADDUBSW would double that again, but its sums of two
//! byte products saturate at 16 bits: it is not exact, and not used.
//!
//! Four register tiles of 6 × 16 make a tile: 12 accumulators, two registers of the panel, one broadcast word of the strip.
//! They take the depth in slices that stay in the first-level cache, and keep the sums between slices in memory.
//! Norms bound the sums: see [`super::quantize::words`].
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256, __m256i, _CMP_NLT_UQ, _mm256_add_epi32, _mm256_cmp_ps, _mm256_cvtepi32_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_movemask_ps, _mm256_mul_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::tile::{COLS, Columns, Lines, ROWS, Tile};

/// Lanes of a register.
const LANES: usize = 8;
/// Rows of a register tile.
const HEIGHT: usize = 6;
/// Registers of a row of a register tile.
const WIDTH: usize = 2;
/// Steps of a slice: 16 KiB of the panel and 6 KiB of the strip.
const SLICE: usize = 128;

type Sums = [[[i32; LANES]; COLS / LANES]; ROWS];

/// Bounds of a tile from 16-bit words of rows and features.
///
/// `strip` holds [`ROWS`] pairs of words per step, `panel` [`COLS`]; both have the same number of steps.
///
/// # Safety
/// The processor has the target features of this function.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn words(strip: &[u32], panel: &[u32], lines: &Lines, columns: &Columns, tile: &mut Tile) {
    bounds(&products(strip, panel), lines, columns, tile);
}

/// The sums of products of a tile.
#[inline]
#[target_feature(enable = "avx2")]
fn products(strip: &[u32], panel: &[u32]) -> Sums {
    let (a_steps, b_steps) = (strip.as_chunks::<ROWS>().0, panel.as_chunks::<COLS>().0);
    debug_assert_eq!(a_steps.len(), b_steps.len());
    let mut sums = Sums::default();
    for (a, b) in a_steps.chunks(SLICE).zip(b_steps.chunks(SLICE)) {
        add_products::<0, 0>(a, b, &mut sums);
        add_products::<HEIGHT, 0>(a, b, &mut sums);
        add_products::<0, WIDTH>(a, b, &mut sums);
        add_products::<HEIGHT, WIDTH>(a, b, &mut sums);
    }
    sums
}

/// Adds the products of a register tile, from row `TOP` and register `LEFT` on, over one slice.
#[inline]
#[target_feature(enable = "avx2")]
fn add_products<const TOP: usize, const LEFT: usize>(a: &[[u32; ROWS]], b: &[[u32; COLS]], sums: &mut Sums) {
    let mut registers: [[__m256i; WIDTH]; HEIGHT] =
        std::array::from_fn(|r| std::array::from_fn(|v| load(&sums[TOP + r][LEFT + v])));
    for (a, b) in a.iter().zip(b) {
        let b = b.as_chunks::<LANES>().0;
        let b = [load(&b[LEFT]), load(&b[LEFT + 1])];
        for r in 0..HEIGHT {
            let a = _mm256_set1_epi32(a[TOP + r].cast_signed());
            for v in 0..WIDTH {
                registers[r][v] = _mm256_add_epi32(registers[r][v], _mm256_madd_epi16(a, b[v]));
            }
        }
    }
    for (r, row) in registers.iter().enumerate() {
        for (v, register) in row.iter().enumerate() {
            store_sums(&mut sums[TOP + r][LEFT + v], *register);
        }
    }
}

/// Turns sums into upper bounds, and marks those that reach the threshold of their row.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop)] // registers of sums, lines and tile run side by side
fn bounds(sums: &Sums, lines: &Lines, columns: &Columns, tile: &mut Tile) {
    tile.hits = [0; ROWS];
    for v in 0..COLS / LANES {
        let column = |of: &[f32; COLS]| load_ps(&of.as_chunks::<LANES>().0[v]);
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
    use super::super::Isa;
    use super::super::isa::Path;
    use super::*;

    #[test]
    fn sums_of_word_products_are_those_of_64_bit_arithmetic() {
        if Isa::new(Path::Avx2).is_none() {
            return;
        }
        let mut state = 5_u64;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 48) as i16 / 32
        };
        for steps in [1, 7, SLICE, SLICE + 1, 3 * SLICE - 1] {
            let strip: Vec<i16> = (0..steps * ROWS * 2).map(|_| word()).collect();
            let panel: Vec<i16> = (0..steps * COLS * 2).map(|_| word()).collect();
            // SAFETY: the processor was asked for AVX2 above.
            let sums = unsafe { products(bytemuck::cast_slice(&strip), bytemuck::cast_slice(&panel)) };
            for (r, c) in (0..ROWS).flat_map(|r| (0..COLS).map(move |c| (r, c))) {
                let terms = (0..steps * 2).map(|i| {
                    let (step, half) = (i / 2, i % 2);
                    let (a, b) = (strip[(step * ROWS + r) * 2 + half], panel[(step * COLS + c) * 2 + half]);
                    i64::from(a) * i64::from(b)
                });
                assert_eq!(i64::from(sums[r][c / LANES][c % LANES]), terms.sum::<i64>(), "{steps}: {r}, {c}");
            }
        }
    }
}
