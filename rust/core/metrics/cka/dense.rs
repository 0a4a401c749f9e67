//! Whole kernel matrices, for what cannot do without: `n^2` numbers a layer.

use super::gram::{Layout, gram_tile, pack};
use super::{Estimator, Problem};
use crate::error::{Error, Result};
use crate::kernels::gram::{TILE, TILE_LEN, dot};
use crate::memory::zeros;
use crate::scan::{Context, map_ordered, reduce_ordered};

/// A symmetric kernel matrix.
pub struct Kernel {
    /// Number of rows.
    pub n: usize,
    /// `n x n`, row-major.
    pub values: Vec<f64>,
}

impl Kernel {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.n..(i + 1) * self.n]
    }
}

/// The Gram matrix of every layer, of shifted rows scaled by a power of two.
///
/// # Errors
/// [`Error::Memory`] when the budget does not hold them and half a matrix beside.
pub fn gram_matrices(what: &str, problem: &Problem<'_>, context: &Context<'_>) -> Result<Vec<Kernel>> {
    let (n, layers) = (problem.n, problem.layers.len());
    let layout = Layout::new(problem);
    let tiles = n.div_ceil(TILE);
    let matrix = n.saturating_mul(n).saturating_mul(size_of::<f64>());
    let needed = matrix.saturating_mul(layers).saturating_add(matrix / 2 + tiles * layout.tile_len() * 4);
    if needed > context.memory_budget {
        return Err(Error::Memory {
            what: format!("{what} of {n} rows"),
            needed,
            budget: context.memory_budget,
            hint: "Raise memory_budget or take fewer rows".to_owned(),
        });
    }
    let band = pack(problem, &layout, 0..tiles, context)?;
    let mut kernels: Vec<Kernel> = (0..layers).map(|_| Kernel { n, values: zeros(n * n) }).collect();
    let corners: Vec<(usize, usize)> = (0..tiles).flat_map(|i| (i..tiles).map(move |j| (i, j))).collect();
    let rows = |i: usize| band.tile(problem, &layout, i);
    let work = |&(i, j): &(usize, usize)| {
        let mut out = vec![0.0; layers * TILE_LEN];
        for (l, tile) in out.chunks_exact_mut(TILE_LEN).enumerate() {
            gram_tile(problem, &layout, l, (rows(i), rows(j)), tile);
        }
        Ok(out)
    };
    reduce_ordered(&corners, context, work, |&(i, j), out| {
        for (kernel, tile) in kernels.iter_mut().zip(out.chunks_exact(TILE_LEN)) {
            place(kernel, (i * TILE, j * TILE), tile);
        }
        Ok(())
    })?;
    Ok(kernels)
}

/// Writes a tile and its mirror image.
fn place(kernel: &mut Kernel, (row, column): (usize, usize), tile: &[f64]) {
    let n = kernel.n;
    for i in row..n.min(row + TILE) {
        for j in column..n.min(column + TILE) {
            let value = tile[(i - row) * TILE + j - column];
            kernel.values[i * n + j] = value;
            kernel.values[j * n + i] = value;
        }
    }
}

/// HSIC of two kernel matrices; the debiased estimator needs a diagonal of zeros.
///
/// # Errors
/// [`Error::Cancelled`].
pub fn hsic(
    problem: &Problem<'_>,
    (k, l): (&Kernel, &Kernel),
    estimator: Estimator,
    context: &Context<'_>,
) -> Result<f64> {
    let rows: Vec<usize> = (0..k.n).collect();
    let parts = map_ordered(&rows, context, |&i| {
        let (a, b) = (k.row(i), l.row(i));
        Ok((dot(problem.isa, a, b), a.iter().sum::<f64>(), b.iter().sum::<f64>()))
    })?;
    let (mut inner, mut cross, mut totals) = (0.0, 0.0, (0.0, 0.0));
    for (product, a, b) in parts {
        inner += product;
        cross += a * b;
        totals = (totals.0 + a, totals.1 + b);
    }
    Ok(estimator.hsic(k.n, inner, cross, totals.0 * totals.1))
}
