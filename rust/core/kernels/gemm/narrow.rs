//! Bytes whose products add up in 16 bits: what gives processors without a byte dot product its rate.
//!
//! VPMADDUBSW multiplies unsigned bytes of rows by signed bytes of features and adds two products: twice the multiplications of
//! VPMADDWD. Those sums of two saturate at 16 bits, so that of full bytes they are not exact. Here they are:
//!
//! 1. bytes `q` of magnitude up to [`TOP`] keep a sum of two products of `q + TOP` with a feature's bytes within 16 bits;
//! 2. such sums are added modulo 2^16, whatever they grow to, from a start that cancels the offset: `−TOP Σ w` over the lane's
//!    bytes of the feature;
//! 3. after [`SLICE`] steps the lane holds `Σ q w` over a *part* of the width, modulo 2^16. The norms of parts are at most
//!    [`PART_NORM`] before rounding on either side, so by Cauchy–Schwarz the sum is below `2^15`: it is the lane's value,
//!    and is added to a sum of 32 bits.
//!
//! Rotated vectors rarely have a part that is much larger than the others, so the grid is seldom coarser than [`TOP`] asks.

use super::tile::COLS;

/// Largest magnitude of a byte: `2 · 2 TOP · TOP < 2^15`. Even, as [`super::quantize`] wants it.
pub(super) const TOP: f32 = 90.0;
/// [`TOP`] as it is added to the bytes of rows.
pub(super) const OFFSET: u8 = TOP as u8;
/// Steps of four bytes that a lane of 16 bits adds up, two bytes of each. With more of them the norms of parts make the grid
/// coarser; with fewer, sums of 32 bits are added more often.
pub(super) const SLICE: usize = 12;
/// Largest norm of a part before rounding, which adds at most one to each of its 24 elements: `176 + √24 < √(2^15)`.
pub(super) const PART_NORM: f64 = 176.0;

/// Words of a packed panel per feature, for so many of a row: every slice begins with the starts of its lanes.
pub(super) const fn panel_steps(steps: usize) -> usize {
    steps + steps.div_ceil(SLICE)
}

/// Packs the words of feature `c` into a panel.
pub(super) fn pack(word: &[u32], c: usize, panel: &mut [u32]) {
    let slices = panel.chunks_mut((SLICE + 1) * COLS);
    for (word, slice) in word.chunks(SLICE).zip(slices) {
        slice[c] = starts(word);
        for (&word, step) in word.iter().zip(slice[COLS..].chunks_mut(COLS)) {
            step[c] = word;
        }
    }
}

/// What the two lanes of a feature begin with.
fn starts(word: &[u32]) -> u32 {
    let bytes = bytemuck::cast_slice::<u32, i8>(word).as_chunks::<4>().0;
    let lane = |pair: usize| {
        let sum: i16 = bytes.iter().map(|b| i16::from(b[pair]) + i16::from(b[pair + 1])).sum();
        sum.wrapping_mul(-i16::from(OFFSET))
    };
    bytemuck::cast([lane(0), lane(2)])
}

/// The largest norm of a part of `v`, in units of `top`, the largest magnitude of its elements.
#[inline(always)]
pub(super) fn largest_part(v: &[f32], top: f32) -> f32 {
    let inverse = 1.0 / top;
    let mut largest = 0.0_f32;
    for slice in v.chunks(SLICE * 4) {
        let mut squares = [0.0_f32; 16];
        let (whole, rest) = slice.as_chunks::<16>();
        for v in whole {
            for l in 0..16 {
                squares[l] += (v[l] * inverse) * (v[l] * inverse);
            }
        }
        for (square, v) in squares.iter_mut().zip(rest) {
            *square += (v * inverse) * (v * inverse);
        }
        for pair in [0, 2] {
            let part: f32 = squares.as_chunks::<4>().0.iter().map(|s| s[pair] + s[pair + 1]).sum();
            largest = if part > largest { part } else { largest };
        }
    }
    largest.sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::quantize::{self, Limits};
    use super::*;
    use crate::kernels::isa::Isa;

    /// Vectors that press against a limit: equal elements, single ones, whole parts, alternating signs.
    fn extremes(d: usize) -> Vec<Vec<f32>> {
        let kinds: [fn(usize) -> f32; 6] = [
            |_| 1.0,
            |i| if i == 5 { 1.0 } else { 0.0 },
            |i| if i % 64 < 4 { -1.0 } else { 0.01 },
            |i| if i % 2 == 0 { 1.0 } else { -1.0 },
            |i| if i / 2 % 2 == 0 { 1e20 } else { -1e17 },
            |i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0,
        ];
        kinds.map(|kind| (0..d).map(kind).collect()).into()
    }

    #[test]
    fn no_part_of_two_vectors_leaves_16_bits_and_no_pair_of_bytes_saturates() {
        for (d, dither) in [1, 2, 7, 64, 100, 512].into_iter().flat_map(|d| [(d, None), (d, Some(3))]) {
            for v in extremes(d) {
                let mut q = vec![0; d.next_multiple_of(4)];
                quantize::bytes(Isa::PLAIN, &v, Limits::NARROW, dither, &mut q[..d]);
                let q: Vec<i32> = q.into_iter().map(|q| i32::from(q.cast_signed())).collect();
                assert!(q.iter().all(|q| q.abs() <= i32::from(OFFSET)));
                for (slice, pair) in q.chunks(SLICE * 4).flat_map(|slice| [(slice, 0), (slice, 2)]) {
                    let part = slice.chunks(4).flat_map(|q| &q[pair..pair + 2]);
                    assert!(part.map(|q| q * q).sum::<i32>() < 1 << 15, "d={d} {dither:?}");
                }
            }
        }
        assert!(2 * (2 * i32::from(OFFSET)) * i32::from(OFFSET) < 1 << 15);
    }
}
