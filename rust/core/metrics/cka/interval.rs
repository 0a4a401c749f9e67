//! How far the debiased CKA of two layers may be off: random half-sampling.
//!
//! A bootstrap draws rows with repetition, and a U-statistic takes a row paired with its own copy for similarity: its
//! replicates are biased upwards. Half of the rows drawn *without* repetition have no copies. For a statistic of `n`
//! independent rows, estimates from random subsets of `m` scatter around the full estimate as `sqrt((n - m) / m)` times what
//! the full estimate itself scatters around the truth (the delete-d jackknife, Shao and Wu, Annals of Statistics 1989); for
//! halves the factor is 1. Rows that hang together (tokens of one image) are drawn as groups.

use super::dense::{Kernel, gram_matrices};
use super::{Estimator, Layer, Problem, pairs};
use crate::error::{Error, Result};
use crate::scan::{Context, map_ordered};

/// Fewest groups (rows, where each is its own) that halves are drawn from.
const MIN_GROUPS: usize = 8;

/// Debiased CKA, and its estimates from random halves.
#[derive(Clone, Debug)]
pub struct Resampled {
    /// From all rows.
    pub estimate: f64,
    /// From the halves, in the order drawn; NaN where a half has no positive HSIC with itself.
    pub halves: Vec<f64>,
    /// What a deviation of a half counts: `sqrt(m / (n - m))` in groups.
    pub factor: f64,
}

/// Debiased CKA of two layers and of `resamples` random halves of their rows. `groups` numbers the group of every row.
///
/// # Errors
/// As [`cka_matrix`](super::cka_matrix); [`Error::Shape`] when there are fewer than 8 groups, or a group for other than
/// every row; [`Error::Memory`] when two `n x n` matrices exceed the budget.
pub fn half_samples(
    layers: &[Layer<'_>; 2],
    resamples: usize,
    seed: u64,
    groups: Option<&[u32]>,
    context: &Context<'_>,
) -> Result<Resampled> {
    let problem = Problem::new(layers, pairs(1, Some(1)), Estimator::Debiased, MIN_GROUPS, context)?;
    let members = members(groups, problem.n)?;
    if resamples == 0 {
        return Err(Error::shape("n_resamples", "at least 1", "0"));
    }
    let kernels = gram_matrices("the interval of CKA", &problem, context)?;
    let half = members.len() / 2;
    let draws: Vec<u64> = (0..resamples as u64).collect();
    let halves = map_ordered(&draws, context, |&draw| {
        let chosen = draw_half(members.len(), half, seed ^ draw.wrapping_mul(0xd1b5_4a32_d192_ed03));
        let mut rows: Vec<usize> = chosen.into_iter().flat_map(|g| members[g].iter().copied()).collect();
        rows.sort_unstable();
        Ok(subset_cka(&kernels, &rows))
    })?;
    let all: Vec<usize> = (0..problem.n).collect();
    let factor = (half as f64 / (members.len() - half) as f64).sqrt();
    Ok(Resampled { estimate: subset_cka(&kernels, &all), halves, factor })
}

/// The rows of every group.
fn members(groups: Option<&[u32]>, n: usize) -> Result<Vec<Vec<usize>>> {
    let Some(groups) = groups else { return Ok((0..n).map(|i| vec![i]).collect()) };
    if groups.len() != n {
        return Err(Error::shape(
            "groups",
            format!("one group for each of {n} rows"),
            groups.len().to_string(),
        ));
    }
    let mut members = std::collections::BTreeMap::<u32, Vec<usize>>::new();
    for (row, group) in groups.iter().enumerate() {
        members.entry(*group).or_default().push(row);
    }
    if members.len() < MIN_GROUPS {
        return Err(Error::shape(
            "groups",
            format!("at least {MIN_GROUPS} groups"),
            members.len().to_string(),
        ));
    }
    Ok(members.into_values().collect())
}

/// `half` of `n` numbers, uniformly: the first steps of a Fisher-Yates shuffle.
fn draw_half(n: usize, half: usize, seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut numbers: Vec<usize> = (0..n).collect();
    for i in 0..half {
        let j = i + ((u128::from(next()) * (n - i) as u128) >> 64) as usize;
        numbers.swap(i, j);
    }
    numbers.truncate(half);
    numbers
}

/// Debiased CKA of the listed rows.
fn subset_cka(kernels: &[Kernel], rows: &[usize]) -> f64 {
    // Inner products and row products of (K, L), (K, K), (L, L), and both totals.
    let (mut inner, mut cross, mut totals) = ([0.0; 3], [0.0; 3], [0.0; 2]);
    for &i in rows {
        let (k, l) = (kernels[0].row(i), kernels[1].row(i));
        // The diagonal is left out, not taken off: of a row far larger than the others it is all that would remain.
        let (mut sum_k, mut sum_l, mut products) = (0.0, 0.0, [0.0; 3]);
        for &j in rows.iter().filter(|&&j| j != i) {
            let (a, b) = (k[j], l[j]);
            sum_k += a;
            sum_l += b;
            products[0] += a * b;
            products[1] += a * a;
            products[2] += b * b;
        }
        inner.iter_mut().zip(products).for_each(|(total, p)| *total += p);
        cross
            .iter_mut()
            .zip([sum_k * sum_l, sum_k * sum_k, sum_l * sum_l])
            .for_each(|(total, p)| *total += p);
        totals = [totals[0] + sum_k, totals[1] + sum_l];
    }
    let products = [totals[0] * totals[1], totals[0] * totals[0], totals[1] * totals[1]];
    let hsic = |i: usize| Estimator::Debiased.hsic(rows.len(), inner[i], cross[i], products[i]);
    let scale = hsic(1).sqrt() * hsic(2).sqrt();
    if rows.len() >= 4 && scale > 0.0 { hsic(0) / scale } else { f64::NAN }
}
