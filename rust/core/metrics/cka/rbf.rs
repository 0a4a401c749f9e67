//! CKA with the RBF kernel `exp(-|x_i - x_j|^2 / (2 sigma^2))`, sigma being a fraction of the median distance
//! (Kornblith et al., ICML 2019).

use super::dense::{Kernel, gram_matrices, hsic};
use super::{CkaMatrix, Estimator, Layer, Problem, pairs, ratios};
use crate::error::{Error, Result};
use crate::scan::{Context, fill_pieces};

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
    for kernel in &mut kernels {
        to_rbf(kernel, fraction, context)?;
    }
    let mut table = [[0.0; 2]; 2];
    for &(l, m) in &problem.pairs {
        table[l][m] = hsic(&problem, (&kernels[l], &kernels[m]), estimator, context)?;
    }
    Ok(ratios(1, Some(1), &|(l, m)| table[l][m]))
}

/// Turns a Gram matrix into the RBF kernel of its rows, less 1: no HSIC is changed by a constant, and rows that are all equal
/// leave exact zeros.
fn to_rbf(kernel: &mut Kernel, fraction: f64, context: &Context<'_>) -> Result<()> {
    let n = kernel.n;
    let norms: Vec<f64> = (0..n).map(|i| kernel.values[i * n + i]).collect();
    fill_pieces(&mut kernel.values, n, context, |i, row| {
        for (j, value) in row.iter_mut().enumerate() {
            // A rounded Gram matrix can put equal rows a little closer than 0.
            *value = if i == j { 0.0 } else { (norms[i] + norms[j] - 2.0 * *value).max(0.0) };
        }
        Ok(())
    })?;
    let sigma = fraction * median_distance(kernel);
    fill_pieces(&mut kernel.values, n, context, |_, row| {
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
