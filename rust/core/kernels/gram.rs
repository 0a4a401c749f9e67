//! Gram tiles of centred rows, for CKA.
//!
//! Rows are widened to `f32`, a provisional mean is taken off, a power of two scales them, and the result is packed into
//! panels (see [`panel`](super::panel)) in one of two directions:
//!
//! * [`pack_columns`]: depth runs over rows. Products of such panels are tiles of `X^T Y`, the *feature form*.
//! * [`pack_rows`]: depth runs over columns. Products are tiles of `X X^T`, the *Gram form*.
//!
//! Both lay panels out in slabs of [`DEPTH`] steps, once for the left of a product and once for its right:
//! `[slab][side][panel][step][column]`. A slab is summed in `f32` registers and
//! then added to `f64`, so an entry of a tile is off by at most `DEPTH * 2^-24 * sum |x| |y| = 8e-6 * sum |x| |y|` and
//! typically by a hundredth of that, whatever the number of rows.

#![allow(clippy::inline_always)] // bodies of `per_isa`, which compiles each once per instruction set

use std::ops::Range;

use super::isa::{Isa, per_isa};
use super::panel::{Kernel, Side};
use super::residual::squared_distance;
use crate::rows::Rows;

/// Steps summed in `f32` before they are added in `f64`: a panel of every side fits into the first-level cache.
pub const DEPTH: usize = 128;
/// Edge of a tile of the product: whole panels of either side on every path, and a tile in `f64` beside the panels that it
/// comes from in the second-level cache.
pub const TILE: usize = 96;
/// Elements of a tile.
pub const TILE_LEN: usize = TILE * TILE;

/// Numbers that `columns` columns take on one side of a slab.
fn side_len(kernel: Kernel, side: Side, columns: usize) -> usize {
    columns.next_multiple_of(kernel.width(side)) * DEPTH
}

/// Numbers that `columns` columns take in a slab, left side first.
pub fn slab_len(kernel: Kernel, columns: usize) -> usize {
    side_len(kernel, Side::Left, columns) + side_len(kernel, Side::Right, columns)
}

/// Where one side of `columns`, which begin a tile, lies in a slab of `d` columns.
pub fn side_of(kernel: Kernel, side: Side, d: usize, columns: Range<usize>) -> Range<usize> {
    let before = if side == Side::Left { 0 } else { side_len(kernel, Side::Left, d) };
    let start = before + columns.start * DEPTH;
    start..start + side_len(kernel, side, columns.len())
}

/// Both sides of a slab of `d` columns, each with the width of its panels.
fn sides(kernel: Kernel, d: usize, slab: &mut [f32]) -> [(usize, &mut [f32]); 2] {
    let (left, right) = slab.split_at_mut(side_len(kernel, Side::Left, d));
    [(kernel.width(Side::Left), left), (kernel.width(Side::Right), right)]
}

/// Partial sums of norms and dot products: part of their definition.
const LANES: usize = 32;

/// Squared norm, in units of what is usual, from which a row is heavy.
const HEAVY: f64 = 64.0;
/// Rows that medians are taken from, at most twice as many.
const MEDIAN_ROWS: usize = 16;
/// Share of the sampled rows whose distances from the middle are usual.
const USUAL: f64 = 0.9;

/// What is taken off the rows of a matrix, and by which power of two they are multiplied, before anything is squared.
#[derive(Clone, Debug)]
pub struct Frame {
    /// A provisional mean, one number a column. Any vector gives the same debiased CKA in real arithmetic; one near the
    /// mean keeps the digits.
    pub shift: Vec<f32>,
    /// A power of two that brings the largest value near 1, so that squares neither overflow nor vanish.
    pub scale: f32,
    /// Squared norm, shifted and scaled, that nine of ten sampled rows keep to.
    usual: f64,
}

impl Frame {
    /// The frame of a sample of rows, given as `f32` row after row of width `d`.
    ///
    /// The mean is that of the rows that are not heavy: one row a thousand times larger than the others would take it far
    /// from all of them.
    pub fn of(sample: &[f32], d: usize) -> Self {
        let middle = medians(sample, d);
        let distance = |row| squared_distance(row, |c| middle[c].into());
        let distances: Vec<f64> = sample.chunks_exact(d).map(distance).collect();
        let usual = usual(&distances);
        let light = || sample.chunks_exact(d).zip(&distances).filter(|(_, at)| **at <= HEAVY * usual);
        let n = light().count().max(1) as f64;
        let mut sums = vec![0.0_f64; d];
        for (row, _) in light() {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        let shift: Vec<f32> = sums.iter().map(|sum| (sum / n) as f32).collect();
        let mut largest = vec![0.0_f32; d];
        for row in sample.chunks_exact(d) {
            for ((top, x), c) in largest.iter_mut().zip(row).zip(&shift) {
                *top = top.max((x - c).abs());
            }
        }
        let scale = power_of_two_below_inverse(largest.into_iter().fold(0.0, f32::max));
        Self { shift, scale, usual: usual * f64::from(scale) * f64::from(scale) }
    }

    /// Whether a row of this squared norm is so much larger than the others that sums of `f32` with it would lose theirs.
    pub fn is_heavy(&self, norm: f64) -> bool {
        norm > HEAVY * self.usual
    }

    /// Widens row `i` of `rows` into `out`, shifted and scaled; adds it to `sums` and returns its squared norm.
    pub fn apply(&self, isa: Isa, rows: &Rows<'_>, i: usize, out: &mut [f32], sums: &mut [f64]) -> f64 {
        rows.widen(i..i + 1, out);
        centre(isa, out, &self.shift, self.scale, sums)
    }

    /// `sum x w` over a widened row, shifted and scaled.
    pub fn project(&self, isa: Isa, row: &[f32], weights: &[f64]) -> f64 {
        weigh(isa, row, &self.shift, self.scale, weights)
    }
}

/// The median of every column, over rows spread evenly.
fn medians(sample: &[f32], d: usize) -> Vec<f32> {
    let step = (sample.len() / d / MEDIAN_ROWS).max(1);
    let mut column = Vec::with_capacity(2 * MEDIAN_ROWS);
    let median = |c: usize| {
        column.clear();
        column.extend(sample.chunks_exact(d).step_by(step).map(|row| row[c]));
        let middle = column.len() / 2;
        if column.is_empty() { 0.0 } else { *column.select_nth_unstable_by(middle, f32::total_cmp).1 }
    };
    (0..d).map(median).collect()
}

/// What [`USUAL`] of the squared distances keep to.
fn usual(distances: &[f64]) -> f64 {
    let mut sorted = distances.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(((sorted.len().max(1) - 1) as f64 * USUAL) as usize).copied().unwrap_or(0.0)
}

#[inline(always)]
fn weigh_body<const FUSED: bool>(row: &[f32], shift: &[f32], scale: f32, weights: &[f64]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let pieces = row.chunks(LANES).zip(shift.chunks(LANES)).zip(weights.chunks(LANES));
    for ((row, shift), weights) in pieces {
        for (((x, c), w), lane) in row.iter().zip(shift).zip(weights).zip(&mut lanes) {
            *lane += f64::from((x - c) * scale) * w;
        }
    }
    lanes.iter().sum()
}

per_isa! {
    /// `sum (x - c) scale w`, the same bits on every path.
    fn weigh(row: &[f32], shift: &[f32], scale: f32, weights: &[f64]) -> f64 = weigh_body;
}

/// Every path rounds products before it adds them: the same bits.
#[inline(always)]
fn centre_body<const FUSED: bool>(row: &mut [f32], shift: &[f32], scale: f32, sums: &mut [f64]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let pieces = row.chunks_mut(LANES).zip(shift.chunks(LANES)).zip(sums.chunks_mut(LANES));
    for ((row, shift), sums) in pieces {
        for (((x, c), sum), lane) in row.iter_mut().zip(shift).zip(sums).zip(&mut lanes) {
            *x = (*x - c) * scale;
            let x = f64::from(*x);
            *sum += x;
            *lane += x * x;
        }
    }
    lanes.iter().sum()
}

per_isa! {
    /// Shifts and scales `row`, adds it to `sums`, and returns its squared norm.
    fn centre(row: &mut [f32], shift: &[f32], scale: f32, sums: &mut [f64]) -> f64 = centre_body;
}

/// `2^-e` for a value in `[2^e, 2^(e+1))`; 1 for zero and for what is not finite.
fn power_of_two_below_inverse(value: f32) -> f32 {
    if value == 0.0 || !value.is_finite() {
        return 1.0;
    }
    (-f64::from(value).log2().floor()).exp2().clamp(f64::from(f32::MIN_POSITIVE), 2.0_f64.powi(127)) as f32
}

/// Column sums and squared row norms of packed rows.
#[derive(Clone, Debug)]
pub struct Margins {
    /// Sum of every column.
    pub sums: Vec<f64>,
    /// Squared norm of every row.
    pub norms: Vec<f64>,
}

impl Margins {
    /// Those of no rows.
    pub fn of_width(d: usize) -> Self {
        Self { sums: vec![0.0; d], norms: Vec::new() }
    }

    /// Adds those of the rows behind.
    pub fn append(&mut self, later: &Self) {
        self.sums.iter_mut().zip(&later.sums).for_each(|(total, s)| *total += s);
        self.norms.extend_from_slice(&later.norms);
    }
}

/// Packs at most [`DEPTH`] rows as one slab whose depth runs over the rows; the column of a panel is a column of theirs.
pub fn pack_columns(isa: Isa, rows: &Rows<'_>, frame: &Frame, out: &mut [f32]) -> Margins {
    let mut margins = Margins::of_width(rows.d());
    let mut row = vec![0.0_f32; rows.d()];
    for i in 0..rows.n() {
        margins.norms.push(frame.apply(isa, rows, i, &mut row, &mut margins.sums));
        pack_step(Kernel::of(isa), &row, i, out);
    }
    margins
}

/// Writes `values` as step `i` of the panels of one slab; columns beyond the last are zero.
pub fn pack_step(kernel: Kernel, values: &[f32], i: usize, out: &mut [f32]) {
    for (width, out) in sides(kernel, values.len(), out) {
        for (panel, values) in out.chunks_exact_mut(width * DEPTH).zip(values.chunks(width)) {
            let step = &mut panel[i * width..(i + 1) * width];
            step[values.len()..].fill(0.0);
            step[..values.len()].copy_from_slice(values);
        }
    }
}

/// Packs at most [`TILE`] rows with the depth running over the columns; the column of a panel is a row of theirs. Every slab
/// holds a whole tile. `block` is a workspace.
pub fn pack_rows(isa: Isa, rows: &Rows<'_>, frame: &Frame, block: &mut Vec<f32>, out: &mut [f32]) -> Margins {
    let (kernel, d) = (Kernel::of(isa), rows.d());
    let mut margins = Margins::of_width(d);
    block.resize(TILE * d, 0.0);
    block[rows.n() * d..].fill(0.0);
    for (i, row) in block.chunks_exact_mut(d).take(rows.n()).enumerate() {
        margins.norms.push(frame.apply(isa, rows, i, row, &mut margins.sums));
    }
    for (slab, out) in out.chunks_exact_mut(slab_len(kernel, TILE)).enumerate() {
        let columns = slab * DEPTH..d.min((slab + 1) * DEPTH);
        for (width, out) in sides(kernel, TILE, out) {
            for (rows, panel) in block.chunks_exact(width * d).zip(out.chunks_exact_mut(width * DEPTH)) {
                transpose(rows, d, columns.clone(), panel);
            }
        }
    }
    margins
}

/// Numbers of a row in a cache line.
const LINE: usize = 16;

/// Writes `columns` of a block of rows as the steps of a panel as wide as there are rows. It goes line by line: rows whose
/// width is a power of two share their place in the cache, and column by column would load every line sixteen times.
fn transpose(block: &[f32], d: usize, columns: Range<usize>, panel: &mut [f32]) {
    let rows = block.len() / d;
    for (first, steps) in columns.clone().step_by(LINE).zip(panel.chunks_mut(LINE * rows)) {
        let width = (columns.end - first).min(LINE);
        for (i, row) in block.chunks_exact(d).enumerate() {
            for (step, x) in steps.chunks_exact_mut(rows).zip(&row[first..first + width]) {
                step[i] = *x;
            }
        }
    }
}

/// Adds `A^T B` over one slab of `depth` steps to `tile` (rows [`TILE`] apart); `left` and `right` hold whole panels.
///
/// With `upper`, where both are the same columns, what lies below the diagonal is left out where whole panels do, and has no
/// meaning elsewhere.
pub fn add_slab(kernel: Kernel, left: &[f32], right: &[f32], depth: usize, upper: bool, tile: &mut [f64]) {
    let (rows, columns) = (kernel.width(Side::Left), kernel.width(Side::Right));
    for (right, column) in right.chunks_exact(columns * DEPTH).zip((0..).step_by(columns)) {
        for (left, row) in left.chunks_exact(rows * DEPTH).zip((0..).step_by(rows)) {
            if upper && row >= column + columns {
                break;
            }
            kernel.add_product(left, right, depth, tile, row * TILE + column, TILE);
        }
    }
}

/// Copies what is above the diagonal of a tile made with `upper` below it.
pub fn mirror(tile: &mut [f64]) {
    for i in 0..TILE {
        for j in i + 1..TILE {
            tile[j * TILE + i] = tile[i * TILE + j];
        }
    }
}

#[inline(always)]
fn dot_body<const FUSED: bool>(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += a[l] * b[l];
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

per_isa! {
    /// `sum a b`, in an order that does not depend on the path.
    pub fn dot(a: &[f64], b: &[f64]) -> f64 = dot_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_holds_whole_panels_on_every_path() {
        for kernel in Isa::available().map(Kernel::of) {
            for side in [Side::Left, Side::Right] {
                assert_eq!(TILE % kernel.width(side), 0, "{kernel:?} {side:?}");
            }
        }
    }
}
