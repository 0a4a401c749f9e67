//! Cluster bootstrap of the gap between two firing frequencies, for every feature.
//!
//! `Δp_f = fires_f(A) / n(A) − fires_f(B) / n(B)`. Tokens of one image or sample are not independent, so whole clusters
//! are drawn with replacement, as many as there are, and the gap is taken again; the interval runs between percentiles
//! of the replicates (Efron and Tibshirani 1993, chapter 13). Sets that share their clusters are drawn together.
//!
//! 1. Firing tokens are listed by feature, as the numbers of their clusters.
//! 2. Replicates are drawn in columns of [`COLUMN`]: how often each cluster occurs, one byte each.
//! 3. For every feature, the bytes of its clusters are added up: all replicates of a column at once.

use std::ops::Range;

use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::scan::{Context, fill_pieces, grid, in_flight, map_ordered};

/// Replicates that are added up together.
const COLUMN: usize = 64;
/// Features that one thread takes at a time.
const FEATURES: usize = 64;

/// Firing tokens by feature, and tokens by cluster.
#[derive(Clone, Debug)]
pub struct Clustered {
    /// `clusters[starts[f]..starts[f + 1]]` are the clusters of the tokens on which feature `f` fires.
    starts: Vec<usize>,
    clusters: Vec<u32>,
    /// Tokens of each cluster, firing or not.
    tokens: Vec<u64>,
}

impl Clustered {
    /// The tokens of `codes`, where row `r` belongs to cluster `of_rows[r]`, one of `n_clusters`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is no row, or the clusters do not fit the rows; faults of the codes.
    pub fn new(codes: &Codes<'_>, of_rows: &[u32], n_clusters: usize) -> Result<Self> {
        let n = codes.n();
        if n == 0 || of_rows.len() != n || of_rows.iter().any(|&c| c as usize >= n_clusters) {
            let found = format!("{} for {n} rows", of_rows.len());
            return Err(Error::shape("clusters", format!("one per row, below {n_clusters}"), found));
        }
        let mut starts = vec![0; codes.d_sae() + 1];
        let (indices, values) = codes.slots(0..n);
        for (&f, &h) in indices.iter().zip(values) {
            if !h.is_finite() || (h != 0.0 && f as usize >= codes.d_sae()) {
                return Err(codes.fault(0..n));
            }
            if h > 0.0 {
                starts[f as usize + 1] += 1;
            }
        }
        for f in 0..codes.d_sae() {
            starts[f + 1] += starts[f];
        }
        let mut next = starts.clone();
        let mut clusters = vec![0; starts[codes.d_sae()]];
        let mut tokens = vec![0; n_clusters];
        for (r, &cluster) in of_rows.iter().enumerate() {
            tokens[cluster as usize] += 1;
            let (indices, values) = codes.row(r);
            for (&f, _) in indices.iter().zip(values).filter(|(_, h)| **h > 0.0) {
                clusters[next[f as usize]] = cluster;
                next[f as usize] += 1;
            }
        }
        Ok(Self { starts, clusters, tokens })
    }

    fn d_sae(&self) -> usize {
        self.starts.len() - 1
    }

    fn firing(&self, feature: usize) -> &[u32] {
        &self.clusters[self.starts[feature]..self.starts[feature + 1]]
    }

    fn frequency(&self, feature: usize) -> f64 {
        self.firing(feature).len() as f64 / self.tokens.iter().sum::<u64>() as f64
    }
}

/// How replicates are drawn and summed up.
#[derive(Clone, Copy, Debug)]
pub struct Resampling {
    /// Number of replicates.
    pub replicates: usize,
    /// Seed; replicate `r` depends on the seed and on `r` alone.
    pub seed: u64,
    /// Level of the interval, e.g. 0.95.
    pub level: f64,
    /// Whether cluster `c` is the same thing in both sets, and drawn for both at once.
    pub shared: bool,
}

/// The gap of one feature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gap {
    /// Δp.
    pub gap: f64,
    /// Standard deviation over replicates.
    pub standard_error: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// How often each cluster occurs in each replicate, and the tokens of each replicate.
struct Draws {
    /// `counts[(r / COLUMN * n_clusters + c) * COLUMN + r % COLUMN]`.
    counts: Vec<u8>,
    n_clusters: usize,
}

impl Draws {
    fn new(n_clusters: usize, plan: Resampling, stream: u64, context: &Context<'_>) -> Result<Self> {
        let columns = plan.replicates.div_ceil(COLUMN);
        let len = columns.saturating_mul(n_clusters).saturating_mul(COLUMN);
        in_flight("draws of the bootstrap", len, "Use fewer replicates", context)?;
        let mut counts = vec![0_u8; len];
        fill_pieces(&mut counts, n_clusters * COLUMN, context, |column, piece| {
            for lane in 0..COLUMN {
                let mut random = SplitMix::new(plan.seed, stream, (column * COLUMN + lane) as u64);
                for _ in 0..n_clusters {
                    let count = &mut piece[random.below(n_clusters) * COLUMN + lane];
                    *count = count.saturating_add(1);
                }
            }
            Ok(())
        })?;
        Ok(Self { counts, n_clusters })
    }

    fn column(&self, column: usize) -> &[u8] {
        let length = self.n_clusters * COLUMN;
        &self.counts[column * length..(column + 1) * length]
    }

    /// Tokens of every replicate.
    fn tokens(&self, tokens: &[u64]) -> Vec<u64> {
        let columns = self.counts.len() / (self.n_clusters * COLUMN);
        let mut sums = vec![0; columns * COLUMN];
        for (column, sums) in sums.chunks_exact_mut(COLUMN).enumerate() {
            for (counts, &n) in self.column(column).chunks_exact(COLUMN).zip(tokens) {
                for (s, &c) in sums.iter_mut().zip(counts) {
                    *s += u64::from(c) * n;
                }
            }
        }
        sums
    }
}

/// Vigna's splitmix64.
struct SplitMix(u64);

impl SplitMix {
    fn new(seed: u64, stream: u64, replicate: u64) -> Self {
        let mut state = Self(seed);
        state.0 = state.next() ^ stream;
        state.0 = state.next() ^ replicate;
        Self(state.next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// The gap in firing frequency of every feature, with its bootstrap interval.
///
/// Replicates in which one of the sets has no token are left out; with fewer than two the interval is NaN.
///
/// # Errors
/// [`Error::Shape`] when the sets differ in features, or in clusters although these are shared; [`Error::Memory`];
/// [`Error::Cancelled`].
pub fn frequency_gap(
    a: &Clustered,
    b: &Clustered,
    plan: Resampling,
    context: &Context<'_>,
) -> Result<Vec<Gap>> {
    if a.d_sae() != b.d_sae() {
        return Err(Error::shape("base", format!("d_sae = {}", a.d_sae()), format!("{}", b.d_sae())));
    }
    if plan.shared && a.tokens.len() != b.tokens.len() {
        let expected = format!("{} clusters, as in spatial", a.tokens.len());
        return Err(Error::shape("base", expected, format!("{}", b.tokens.len())));
    }
    let draws_a = Draws::new(a.tokens.len(), plan, 0, context)?;
    let separate = if plan.shared { None } else { Some(Draws::new(b.tokens.len(), plan, 1, context)?) };
    let draws_b = separate.as_ref().unwrap_or(&draws_a);
    let tokens = (draws_a.tokens(&a.tokens), draws_b.tokens(&b.tokens));
    let replicate = |feature: usize| {
        let (fires_a, fires_b) = (fires(a.firing(feature), &draws_a), fires(b.firing(feature), draws_b));
        let valid = |r: &usize| tokens.0[*r] > 0 && tokens.1[*r] > 0;
        let gap = |r| fires_a[r] as f64 / tokens.0[r] as f64 - fires_b[r] as f64 / tokens.1[r] as f64;
        (0..plan.replicates).filter(valid).map(gap).collect::<Vec<f64>>()
    };
    let blocks: Vec<Range<usize>> = grid(a.d_sae(), FEATURES).collect();
    let gaps = map_ordered(&blocks, context, |features| {
        let of = |f| summary(a.frequency(f) - b.frequency(f), replicate(f), plan.level);
        Ok(features.clone().map(of).collect::<Vec<_>>())
    })?;
    Ok(gaps.concat())
}

/// Firing tokens of one feature in every replicate.
fn fires(firing: &[u32], draws: &Draws) -> Vec<u64> {
    let columns = draws.counts.len() / (draws.n_clusters * COLUMN);
    let mut sums = vec![0; columns * COLUMN];
    for (column, sums) in sums.chunks_exact_mut(COLUMN).enumerate() {
        let counts = draws.column(column);
        for &cluster in firing {
            let first = cluster as usize * COLUMN;
            for (s, &c) in sums.iter_mut().zip(&counts[first..first + COLUMN]) {
                *s += u64::from(c);
            }
        }
    }
    sums
}

fn summary(gap: f64, mut replicates: Vec<f64>, level: f64) -> Gap {
    if replicates.len() < 2 {
        return Gap { gap, standard_error: f64::NAN, low: f64::NAN, high: f64::NAN };
    }
    let n = replicates.len() as f64;
    let mean = replicates.iter().sum::<f64>() / n;
    let squares: f64 = replicates.iter().map(|g| (g - mean) * (g - mean)).sum();
    replicates.sort_unstable_by(f64::total_cmp);
    let tail = (1.0 - level) / 2.0;
    Gap {
        gap,
        standard_error: (squares / (n - 1.0)).sqrt(),
        low: quantile(&replicates, tail),
        high: quantile(&replicates, 1.0 - tail),
    }
}

/// Quantile of sorted values, linear between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}
