//! Dot products: the exact one that decides every result, and the f32 ones that screen where nothing faster fits.

use super::tile::{COLS, ROWS};
#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Path;
use crate::kernels::isa::{Isa, per_isa};
use crate::kernels::prefetch::fetch;

/// Partial sums of [`dot`]. Part of the definition of a score: changing it changes last bits.
pub(super) const LANES: usize = 32;

#[inline(always)]
fn dot_body<const FUSED: bool>(x: &[f32], w: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (x_whole, x_rest) = x.as_chunks::<LANES>();
    let (w_whole, w_rest) = w.as_chunks::<LANES>();
    for (x, w) in x_whole.iter().zip(w_whole) {
        for l in 0..LANES {
            lanes[l] = fused::<FUSED>(f64::from(x[l]), f64::from(w[l]), lanes[l]);
        }
    }
    add_rest::<FUSED>(&mut lanes, x_rest, w_rest);
    pairwise(lanes)
}

/// Adds the products of the last, incomplete step.
#[inline(always)]
pub(super) fn add_rest<const FUSED: bool>(lanes: &mut [f64; LANES], x: &[f32], w: &[f32]) {
    for (l, (&x, &w)) in x.iter().zip(w).enumerate() {
        lanes[l] = fused::<FUSED>(f64::from(x), f64::from(w), lanes[l]);
    }
}

/// Adds the lanes in halves: 16 to 16, 8 to 8, and so on.
#[inline(always)]
pub(super) fn pairwise(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `a * b + c`. A product of two f32 is exact in f64, so both forms give the same bits there.
#[inline(always)]
pub(crate) fn fused<const FUSED: bool>(a: f64, b: f64, c: f64) -> f64 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

per_isa! {
    /// `x · w` in f64, in one fixed order: lane `i mod 32` adds the exact products of its elements by rising `i`, then the
    /// lanes are added pairwise, halves first. The same bits on every instruction set.
    pub fn dot(x: &[f32], w: &[f32]) -> f64 = dot_body;
}

/// Pairs of one feature with some rows, in a list of such pairs.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// The feature.
    pub w: &'a [f32],
    /// The feature of the next group, worth fetching.
    pub next: &'a [f32],
    /// Rows of this group's pairs, then rows of later pairs, worth fetching.
    pub rows: &'a [u32],
    /// Pairs of this group.
    pub len: usize,
}

/// Rows that one reading of a feature serves.
const ABREAST: usize = 2;
/// Lanes that are added in one reading of the rows: with two rows they fit the registers of 256-bit processors. It is a cache
/// line of floats, so two readings touch no line twice.
const HALF: usize = LANES / 2;

#[inline(always)]
fn dots_of_body<const FUSED: bool>(group: Group<'_>, x: &[f32], products: &mut [f64]) {
    let d = group.w.len();
    let row = |i: usize| group.rows.get(i).map_or(group.w, |&r| &x[r as usize * d..(r as usize + 1) * d]);
    let (pairs, last) = products[..group.len].as_chunks_mut::<ABREAST>();
    let next = |end: usize| if end == group.len { group.next } else { group.w };
    for (p, out) in pairs.iter_mut().enumerate() {
        let i = p * ABREAST;
        let (rows, ahead) = ([row(i), row(i + 1)], [row(i + 2), row(i + 3)]);
        *out = dots_ahead::<FUSED, 2>(group.w, next(i + 2), rows, ahead);
    }
    if let [out] = last {
        let i = group.len - 1;
        [*out] = dots_ahead::<FUSED, 1>(group.w, group.next, [row(i)], [row(i + 1)]);
    }
}

/// [`dot`] of `w` with each row of `x`, while `next` and the rows `ahead` are fetched.
#[inline(always)]
fn dots_ahead<const FUSED: bool, const N: usize>(
    w: &[f32],
    next: &[f32],
    x: [&[f32]; N],
    ahead: [&[f32]; N],
) -> [f64; N] {
    let mut lanes = [[0.0_f64; LANES]; N];
    let (w_whole, w_rest) = w.as_chunks::<LANES>();
    let x_whole = x.map(|x| &x.as_chunks::<LANES>().0[..w_whole.len()]);
    for half in 0..LANES / HALF {
        let mut sums = [[0.0_f64; HALF]; N];
        for (step, w) in w_whole.iter().enumerate() {
            let at = step * LANES + half * HALF;
            let w = &w.as_chunks::<HALF>().0[half];
            fetch(next, at);
            for i in 0..N {
                fetch(ahead[i], at);
                let x = &x_whole[i][step].as_chunks::<HALF>().0[half];
                for l in 0..HALF {
                    sums[i][l] = fused::<FUSED>(f64::from(x[l]), f64::from(w[l]), sums[i][l]);
                }
            }
        }
        for (lanes, sums) in lanes.iter_mut().zip(sums) {
            lanes.as_chunks_mut::<HALF>().0[half] = sums;
        }
    }
    for (lanes, x) in lanes.iter_mut().zip(x) {
        add_rest::<FUSED>(lanes, &x[w_whole.len() * LANES..], w_rest);
    }
    lanes.map(pairwise)
}

per_isa! {
    fn dots_of_any(group: Group<'_>, x: &[f32], products: &mut [f64]) = dots_of_body;
}

/// [`dot`] of a feature with each row of its group; `x` holds all rows, row-major.
pub fn dots_of(isa: Isa, group: Group<'_>, x: &[f32], products: &mut [f64]) {
    match isa.path() {
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        // SAFETY: an `Isa` exists only for a path whose features the processor was asked for.
        path if path >= Path::Avx512 => unsafe { super::avx512::dots_of(group, x, products) },
        _ => dots_of_any(isa, group, x, products),
    }
}

/// Features and rows whose accumulators stay in registers.
const BLOCK: usize = 4;
/// Elements of a row that are added side by side.
const SIDE: usize = 16;

#[inline(always)]
fn screen_body<const FUSED: bool>(x: &[f32], w: &[f32], d: usize, sums: &mut [[f32; COLS]; ROWS]) {
    for (c, w) in w.chunks(BLOCK * d).enumerate() {
        for (r, x) in x.chunks(BLOCK * d).enumerate() {
            let x: [&[f32]; BLOCK] = std::array::from_fn(|i| row_or_first(x, i, d));
            let w: [&[f32]; BLOCK] = std::array::from_fn(|j| row_or_first(w, j, d));
            let block = dots::<FUSED>(x, w);
            for i in 0..BLOCK {
                sums[r * BLOCK + i][c * BLOCK..(c + 1) * BLOCK].copy_from_slice(&block[i]);
            }
        }
    }
}

/// Row `i` of `rows`, or the first row where there are fewer: its sums land in padding that nobody reads.
#[inline(always)]
fn row_or_first(rows: &[f32], i: usize, d: usize) -> &[f32] {
    let i = if (i + 1) * d <= rows.len() { i } else { 0 };
    &rows[i * d..(i + 1) * d]
}

#[inline(always)]
fn dots<const FUSED: bool>(x: [&[f32]; BLOCK], w: [&[f32]; BLOCK]) -> [[f32; BLOCK]; BLOCK] {
    let mut sums = [[[0.0_f32; SIDE]; BLOCK]; BLOCK];
    let xs = x.map(|row| row.as_chunks::<SIDE>());
    let ws = w.map(|row| row.as_chunks::<SIDE>());
    let steps = xs[0].0.len();
    let (xc, wc) = (xs.map(|c| &c.0[..steps]), ws.map(|c| &c.0[..steps]));
    for step in 0..steps {
        let (x, w): ([[f32; SIDE]; BLOCK], [[f32; SIDE]; BLOCK]) = (xc.map(|c| c[step]), wc.map(|c| c[step]));
        for i in 0..BLOCK {
            for j in 0..BLOCK {
                for l in 0..SIDE {
                    let (a, b, s) = (x[i][l], w[j][l], sums[i][j][l]);
                    sums[i][j][l] = if FUSED { a.mul_add(b, s) } else { a * b + s };
                }
            }
        }
    }
    std::array::from_fn(|i| {
        std::array::from_fn(|j| {
            let rest: f32 = xs[i].1.iter().zip(ws[j].1).map(|(a, b)| a * b).sum();
            sums[i][j].iter().sum::<f32>() + rest
        })
    })
}

per_isa! {
    /// f32 sums of up to [`ROWS`] rows of `x` with up to [`COLS`] rows of `w`, both of width `d`, row-major.
    pub(super) fn screen(x: &[f32], w: &[f32], d: usize, sums: &mut [[f32; COLS]; ROWS]) = screen_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn dot_has_the_same_bits_on_every_instruction_set() {
        for d in [1, 31, 32, 33, 257, 1024] {
            let (x, w) = (numbers(d, 1), numbers(d, 2));
            let plain = dot(Isa::PLAIN, &x, &w);
            let naive: f64 = x.iter().zip(&w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((plain - naive).abs() < 1e-12 * d as f64);
            for isa in Isa::available() {
                assert_eq!(dot(isa, &x, &w).to_bits(), plain.to_bits(), "{} d={d}", isa.path().name());
            }
        }
    }

    #[test]
    fn products_of_a_group_have_the_bits_of_dot() {
        for (d, n) in [(1, 3), (31, 1), (33, 2), (64, 5), (257, 4)] {
            let (x, w) = (numbers(d * 6, 3), numbers(d, 4));
            let rows: Vec<u32> = [4, 0, 5, 2, 1].into_iter().take(n).collect();
            for len in 1..=n {
                let row = |r: u32| &x[r as usize * d..(r as usize + 1) * d];
                let expected: Vec<u64> =
                    rows[..len].iter().map(|&r| dot(Isa::PLAIN, row(r), &w).to_bits()).collect();
                for isa in Isa::available() {
                    let mut products = vec![0.0; len];
                    dots_of(isa, Group { w: &w, next: &w, rows: &rows, len }, &x, &mut products);
                    let found: Vec<u64> = products.iter().map(|p| p.to_bits()).collect();
                    assert_eq!(found, expected, "{} d={d} n={n} len={len}", isa.path().name());
                }
            }
        }
    }
}
