//! Gram tiles of centred rows, for CKA.
//!
//! Rows are widened to `f32`, a provisional mean is taken off, a power of two scales them, and the result is packed into
//! panels (see [`tile`](super::tile)) in one of two directions:
//!
//! * [`pack_columns`]: depth runs over rows. Products of such panels are tiles of `X^T Y`, the *feature form*.
//! * [`pack_rows`]: depth runs over columns. Products are tiles of `X X^T`, the *Gram form*.
//!
//! Both lay panels out in slabs of [`DEPTH`] steps: `[slab][panel][step][column]`. A slab is summed in `f32` registers and
//! then added to `f64`, so an entry of a tile is off by at most `DEPTH * 2^-24 * sum |x| |y| = 1.5e-5 * sum |x| |y|` and
//! typically by a hundredth of that, whatever the number of rows.

use super::tile::{Kernel, PANEL};
use crate::rows::Rows;

/// Steps summed in `f32` before they are added in `f64`.
pub const DEPTH: usize = 256;
/// Words of one panel of a slab.
pub const PANEL_WORDS: usize = DEPTH * PANEL;
/// Edge of a tile of the product, in panels.
pub const TILE_PANELS: usize = 4;
/// Edge of a tile of the product.
pub const TILE: usize = TILE_PANELS * PANEL;
/// Elements of a tile.
pub const TILE_LEN: usize = TILE * TILE;

/// Panels that hold `columns` columns.
pub fn panels(columns: usize) -> usize {
    columns.div_ceil(PANEL)
}

/// What is taken off the rows of a matrix, and by which power of two they are multiplied, before anything is squared.
#[derive(Clone, Debug)]
pub struct Frame {
    /// A provisional mean, one number a column. Any vector gives the same debiased CKA in real arithmetic; one near the
    /// mean keeps the digits.
    pub shift: Vec<f32>,
    /// A power of two that brings the largest value near 1, so that squares neither overflow nor vanish.
    pub scale: f32,
}

impl Frame {
    /// The frame of a sample of rows, given as `f32` row after row of width `d`.
    pub fn of(sample: &[f32], d: usize) -> Self {
        let n = (sample.len() / d).max(1) as f64;
        let mut mean = vec![0.0_f64; d];
        for row in sample.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / n);
        }
        let shift: Vec<f32> = mean.iter().map(|m| *m as f32).collect();
        let largest = sample
            .chunks_exact(d)
            .flat_map(|row| row.iter().zip(&shift).map(|(x, c)| (x - c).abs()))
            .fold(0.0_f32, f32::max);
        Self { scale: power_of_two_below_inverse(largest), shift }
    }

    /// Widens row `i` of `rows` into `out`, shifted and scaled.
    pub fn apply(&self, rows: &Rows<'_>, i: usize, out: &mut [f32]) {
        rows.widen(i..i + 1, out);
        for (x, c) in out.iter_mut().zip(&self.shift) {
            *x = (*x - c) * self.scale;
        }
    }
}

/// `2^-e` for a value in `[2^e, 2^(e+1))`; 1 for zero and for what is not finite.
fn power_of_two_below_inverse(value: f32) -> f32 {
    if value == 0.0 || !value.is_finite() {
        return 1.0;
    }
    (-f64::from(value).log2().floor()).exp2().clamp(f64::from(f32::MIN_POSITIVE), 2.0_f64.powi(127)) as f32
}

/// Column sums and squared row norms of packed rows.
#[derive(Clone, Debug, Default)]
pub struct Margins {
    /// Sum of every column.
    pub sums: Vec<f64>,
    /// Squared norm of every row.
    pub norms: Vec<f64>,
}

impl Margins {
    fn add(&mut self, row: &[f32]) {
        self.sums.resize(row.len(), 0.0);
        self.sums.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x));
        self.norms.push(squared_norm(row));
    }
}

/// `sum x^2` in `f64`, in eight lanes.
fn squared_norm(row: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; 8];
    let chunks = row.chunks_exact(8);
    let tail: f64 = chunks.remainder().iter().map(|x| f64::from(*x).powi(2)).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += f64::from(*x) * f64::from(*x));
    }
    lanes.iter().sum::<f64>() + tail
}

/// Packs at most [`DEPTH`] rows as one slab whose depth runs over the rows: `out` is `[panel][row][column]`.
pub fn pack_columns(rows: &Rows<'_>, frame: &Frame, out: &mut [u32]) -> Margins {
    let mut margins = Margins::default();
    let mut row = vec![0.0_f32; rows.d()];
    for i in 0..rows.n() {
        frame.apply(rows, i, &mut row);
        margins.add(&row);
        pack_step(&row, i, out);
    }
    margins
}

/// Writes `values` as step `i` of the panels of one slab; columns beyond the last are zero.
pub fn pack_step(values: &[f32], i: usize, out: &mut [u32]) {
    for (panel, values) in out.chunks_exact_mut(PANEL_WORDS).zip(values.chunks(PANEL)) {
        let step = &mut panel[i * PANEL..(i + 1) * PANEL];
        step[values.len()..].fill(0);
        step.iter_mut().zip(values).for_each(|(word, x)| *word = x.to_bits());
    }
}

/// Packs at most [`TILE`] rows with the depth running over the columns: `out` is `[slab][panel][column][row]`.
pub fn pack_rows(rows: &Rows<'_>, frame: &Frame, out: &mut [u32]) -> Margins {
    let mut margins = Margins::default();
    let d = rows.d();
    let mut block = vec![0.0_f32; PANEL * d];
    for panel in 0..TILE_PANELS {
        let first = (panel * PANEL).min(rows.n());
        let count = (rows.n() - first).min(PANEL);
        block.fill(0.0);
        for (i, row) in block.chunks_exact_mut(d).take(count).enumerate() {
            frame.apply(rows, first + i, row);
            margins.add(row);
        }
        for (slab, out) in out.chunks_exact_mut(TILE_PANELS * PANEL_WORDS).enumerate() {
            let steps = slab * DEPTH..d.min((slab + 1) * DEPTH);
            let out = out[panel * PANEL_WORDS..].chunks_exact_mut(PANEL);
            for (column, step) in steps.zip(out) {
                step.iter_mut().enumerate().for_each(|(i, word)| *word = block[i * d + column].to_bits());
            }
        }
    }
    margins
}

/// Adds `A^T B` over one slab of `depth` steps to `tile` (rows [`TILE`] apart); `a` and `b` hold whole panels.
///
/// With `upper`, where `a` and `b` are the same columns, panels below the diagonal are left out.
pub fn add_slab(kernel: Kernel, a: &[u32], b: &[u32], depth: usize, upper: bool, tile: &mut [f64]) {
    for (j, b) in b.chunks_exact(PANEL_WORDS).enumerate() {
        for (i, a) in a.chunks_exact(PANEL_WORDS).enumerate() {
            if !upper || i <= j {
                kernel.add_product(a, b, depth, tile, i * PANEL * TILE + j * PANEL, TILE);
            }
        }
    }
}

/// Copies the panels above the diagonal of a tile made with `upper` to their places below it.
pub fn mirror(tile: &mut [f64]) {
    for i in 0..TILE {
        for j in (i / PANEL + 1) * PANEL..TILE {
            tile[j * TILE + i] = tile[i * TILE + j];
        }
    }
}

/// `sum a b` in `f64`, in eight lanes: a fixed order, whatever the instruction set.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0_f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f64>() + tail
}
