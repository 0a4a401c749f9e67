//! CKA with the RBF kernel `exp(-|x_i - x_j|^2 / (2 sigma^2))`, sigma being a fraction of the median distance
//! (Kornblith et al., ICML 2019).

use std::ops::Range;

use super::dense::{Kernel, gram_matrices, hsic};
use super::{CkaMatrix, Estimator, Layer, Problem, pairs, ratios};
use crate::error::{Error, Result};
use crate::kernels::gram::TILE;
use crate::kernels::residual::squared_error;
use crate::scan::{Buffer, Context, fill_pieces, grid};

/// Distances of less than this share of the squared norms they are left of are measured again.
const CANCELLED: f64 = 1.0 / 16.0;

/// RBF CKA of two layers, with sigma at `fraction` of each layer's median distance.
///
/// # Errors
/// As [`cka_matrix`](super::cka_matrix); [`Error::Shape`] when `fraction` is not positive; [`Error::Memory`] when the
/// kernel matrices exceed the budget.
pub fn rbf_cka(
    layers: &[Layer<'_>; 2],
    fraction: f64,
    estimator: Estimator,
    context: &Context<'_>,
) -> Result<CkaMatrix> {
    if !(fraction > 0.0 && fraction.is_finite()) {
        return Err(Error::shape(
            "sigma",
            "a positive fraction of the median distance",
            fraction.to_string(),
        ));
    }
    let problem = Problem::new(layers, pairs(1, Some(1)), estimator, estimator.min_rows(), context)?;
    let mut kernels = gram_matrices("RBF CKA", &problem, context)?;
    for (layer, kernel) in kernels.iter_mut().enumerate() {
        to_squares(&problem, layer, kernel, context)?;
        to_rbf(kernel, fraction, context)?;
    }
    let mut table = [[0.0; 2]; 2];
    for &(l, m) in &problem.pairs {
        table[l][m] = hsic(&problem, (&kernels[l], &kernels[m]), estimator, context)?;
    }
    Ok(ratios(1, Some(1), &|(l, m)| table[l][m]))
}

/// Turns a Gram matrix into the squared distances `|x|^2 + |y|^2 - 2 x'y` of its rows.
///
/// Products are sums in f32, and what cancels takes digits with it. Rows that lie close together and far from the others, as first
/// tokens do, are compared once more, as they are stored.
fn to_squares(problem: &Problem<'_>, layer: usize, kernel: &mut Kernel, context: &Context<'_>) -> Result<()> {
    let n = kernel.n;
    let norms: Vec<f64> = (0..n).map(|i| kernel.values[i * n + i]).collect();
    let source = problem.layers[layer].source;
    let unit = f64::from(problem.frames[layer].scale).powi(2);
    fill_pieces(&mut kernel.values, n * TILE, context, |tile, piece| {
        let own = tile * TILE..n.min((tile + 1) * TILE);
        let mut buffers = (Buffer::default(), Buffer::default());
        for others in grid(n, TILE) {
            let cancelled = subtract(piece, &norms, own.clone(), others.clone());
            if cancelled.is_empty() {
                continue;
            }
            let x = source.read(own.clone(), &mut buffers.0)?;
            let y = source.read(others.clone(), &mut buffers.1)?;
            for (i, j) in cancelled {
                piece[i * n + others.start + j] = unit * squared_error(x.slice(i..i + 1), y.slice(j..j + 1));
            }
        }
        Ok(())
    })
}

/// Turns products of the rows `own` with the rows `others` into squared distances; returns those, as numbers within either range,
/// that have lost digits.
fn subtract(
    products: &mut [f64],
    norms: &[f64],
    own: Range<usize>,
    others: Range<usize>,
) -> Vec<(usize, usize)> {
    let mut cancelled = Vec::new();
    for (row, i) in products.chunks_exact_mut(norms.len()).zip(own.clone()) {
        for j in others.clone() {
            let sum = norms[i] + norms[j];
            row[j] = if i == j { 0.0 } else { sum - 2.0 * row[j] };
            if i != j && row[j] < CANCELLED * sum {
                cancelled.push((i - own.start, j - others.start));
            }
        }
    }
    cancelled
}

/// Turns squared distances into the RBF kernel of the rows, less 1: no HSIC is changed by a constant, and rows that are all equal
/// leave exact zeros.
fn to_rbf(squares: &mut Kernel, fraction: f64, context: &Context<'_>) -> Result<()> {
    let sigma = fraction * median_distance(squares);
    let n = squares.n;
    fill_pieces(&mut squares.values, n, context, |_, row| {
        for value in row {
            *value = if *value == 0.0 { 0.0 } else { (-*value / (2.0 * sigma * sigma)).exp_m1() };
        }
        Ok(())
    })
}

/// Median of the distances between different rows, from their squares.
fn median_distance(squares: &Kernel) -> f64 {
    let mut above: Vec<f64> = (0..squares.n).flat_map(|i| &squares.row(i)[i + 1..]).copied().collect();
    let middle = above.len() / 2;
    let even = above.len().is_multiple_of(2);
    let (below, &mut upper, _) = above.select_nth_unstable_by(middle, f64::total_cmp);
    let lower = if even { below.iter().fold(0.0, |top: f64, v| top.max(*v)) } else { upper };
    f64::midpoint(lower.sqrt(), upper.sqrt())
}
