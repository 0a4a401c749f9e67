//! Minibatch CKA: the debiased HSIC of every batch is averaged, then the ratio is taken (Nguyen et al., ICLR 2021).
//!
//! The full-batch form is exact and no slower; this one reproduces numbers that were published with batches.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{CkaMatrix, Estimator, Layer, Problem, gram, pairs, ratios};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rows::Rows;
use crate::scan::{Buffer, Context, Source, grid, in_flight, map_ordered};

/// The rows of a batch.
struct Window<'a> {
    source: &'a dyn Source,
    range: Range<usize>,
}

impl Source for Window<'_> {
    fn n_rows(&self) -> usize {
        self.range.len()
    }
    fn d(&self) -> usize {
        self.source.d()
    }
    fn dtype(&self) -> Dtype {
        self.source.dtype()
    }
    fn read<'a>(&'a self, range: Range<usize>, buffer: &'a mut Buffer) -> Result<Rows<'a>> {
        self.source.read(self.range.start + range.start..self.range.start + range.end, buffer)
    }
}

/// Minibatch CKA of every layer of `xs` with every layer of `ys`; without `ys`, of all pairs of `xs`. Batches are
/// neighbouring rows; a last batch of fewer than 4 rows is left out.
///
/// # Errors
/// As [`cka_matrix`](super::cka_matrix); [`Error::Shape`] when `batch` is below 4.
pub fn minibatch_cka(
    xs: &[Layer<'_>],
    ys: Option<&[Layer<'_>]>,
    batch: usize,
    context: &Context<'_>,
) -> Result<CkaMatrix> {
    let estimator = Estimator::Debiased;
    if batch < estimator.min_rows() {
        return Err(Error::shape(
            "batch",
            format!("at least {} rows", estimator.min_rows()),
            batch.to_string(),
        ));
    }
    let layers: Vec<Layer<'_>> = xs.iter().chain(ys.unwrap_or_default()).cloned().collect();
    let wanted = pairs(xs.len(), ys.map(<[_]>::len));
    let whole = Problem::new(&layers, wanted, estimator, estimator.min_rows(), context)?;
    let batches: Vec<Range<usize>> =
        grid(whole.n, batch).filter(|range| range.len() >= estimator.min_rows()).collect();
    let mut totals = vec![0.0; whole.pairs.len()];
    // As many batches at once as the budget has room for, each with its share of it; no bit depends on either.
    let bytes = gram::packed_bytes(&whole, batch.min(whole.n)).min(context.memory_budget);
    let at_once = in_flight("a batch of CKA", bytes, "", context)?;
    let share = Context { memory_budget: context.memory_budget / at_once, ..*context };
    for wave in batches.chunks(at_once) {
        let hsics = map_ordered(wave, context, |range| batch_hsic(&whole, range, &share))?;
        for (range, hsic) in wave.iter().zip(hsics) {
            totals.iter_mut().zip(hsic).for_each(|(total, h)| *total += h);
            context.done.store(range.end as u64, Ordering::Relaxed);
        }
    }
    let total =
        |pair: (usize, usize)| whole.pairs.iter().position(|p| *p == pair).map_or(f64::NAN, |i| totals[i]);
    let ordered = |(l, m): (usize, usize)| total((l.min(m), l.max(m)));
    Ok(ratios(xs.len(), ys.map(<[_]>::len), &ordered))
}

/// HSIC of every pair over one batch.
fn batch_hsic(whole: &Problem<'_>, range: &Range<usize>, context: &Context<'_>) -> Result<Vec<f64>> {
    let windows: Vec<Window<'_>> =
        whole.layers.iter().map(|layer| Window { source: layer.source, range: range.clone() }).collect();
    let layers: Vec<Layer<'_>> = whole
        .layers
        .iter()
        .zip(&windows)
        .map(|(layer, window)| Layer { name: layer.name.clone(), source: window })
        .collect();
    let problem = Problem {
        layers: &layers,
        frames: whole.frames.clone(),
        pairs: whole.pairs.clone(),
        n: range.len(),
        ..*whole
    };
    let uncounted = AtomicU64::new(0);
    let sums = gram::sums(&problem, &Context { done: &uncounted, ..*context })?;
    Ok(problem.pairs.iter().map(|&pair| sums.hsic(problem.estimator, problem.n, pair)).collect())
}
