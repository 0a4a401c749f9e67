//! Exact selection behind a screen: bounds in, the members and their f64 scores out.
//!
//! For a block of rows, over growing ranges of features:
//!
//! 1. screen the range: keep candidates whose upper bound reaches the row's threshold;
//! 2. raise the threshold: while the ranges are a sample, to a guess (`guess.rs`); where a sample says too little, for few
//!    members, or guesses were often wrong, to the k-th largest lower bound where few candidates remain above it, else to the k-th
//!    best real score, for which the most promising candidates are scored in f64;
//! 3. drop the candidates whose bound no longer reaches it.
//!
//! After the last range the candidates that are left are scored, the most promising ones first. Scoring goes feature by
//! feature, so that each feature is read once per block. A row whose guess was too high is screened again without one. A row
//! that fills its space although its threshold was raised has defeated the screen; it is screened again in f32, and in the last
//! resort scored against every feature.

use std::time::{Duration, Instant};

use super::dictionary::Dictionary;
use super::dot::dot;
use super::pass::{Attempt, Bench, Means, Undecided};
use super::quantize::down;
use super::tile::COLS;
pub use crate::kernels::topk::Scored;
use crate::kernels::topk::keep_best;

/// Which features of a row are wanted.
#[derive(Clone, Copy, Debug)]
pub enum Wanted {
    /// The `k` of highest rank, ties to the lower feature; with `positive`, only activations above zero.
    Best {
        /// How many.
        k: usize,
        /// Whether activations must be positive.
        positive: bool,
    },
    /// All whose activation is positive and exceeds the feature's own threshold.
    Above,
    /// All whose activation is positive and whose rank is at least this.
    AtLeast(f64),
}

/// What a selection did, and where its time went, added up over threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Rows seen.
    pub rows: u64,
    /// Pairs of row and feature scored in f64.
    pub scored: u64,
    /// Rows that were screened again because their threshold was guessed too high.
    pub misjudged: u64,
    /// Rows that took the f32 screen after another one had failed.
    pub escaped: u64,
    /// Rounding of rows.
    pub rounding: Duration,
    /// Screens, and taking their hits down.
    pub screening: Duration,
    /// Scores in f64, and thresholds.
    pub scoring: Duration,
}

impl Effort {
    /// Adds what another selection did.
    pub fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.scored += other.scored;
        self.misjudged += other.misjudged;
        self.escaped += other.escaped;
        self.rounding += other.rounding;
        self.screening += other.screening;
        self.scoring += other.scoring;
    }
}

/// Adds the time since the last lap to a phase.
#[derive(Debug)]
pub(super) struct Watch(Instant);

impl Watch {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn lap(&mut self, phase: &mut Duration) {
        let now = Instant::now();
        *phase += now - std::mem::replace(&mut self.0, now);
    }
}

/// Reusable memory of a selection, and its result.
#[derive(Debug, Default)]
pub struct Space {
    found: Vec<Vec<Scored>>,
    bench: Bench,
    /// What the selections through this space did.
    pub effort: Effort,
}

impl Space {
    /// Members of row `i` of the last block: for [`Wanted::Best`] best first, else in no particular order.
    pub fn found(&self, i: usize) -> &[Scored] {
        &self.found[i]
    }
}
impl Dictionary {
    /// Finds what is `wanted` of each row of `x` (row-major f32 of width [`Plan::d`](super::Plan::d), finite); see [`Space::found`].
    pub fn select(&self, x: &[f32], wanted: Wanted, space: &mut Space) {
        let d = self.plan.d();
        let Space { found, bench, effort } = space;
        reset(found, x.len() / d);
        effort.rows += (x.len() / d) as u64;
        let mut means = Means { wanted, bench, effort };
        let Undecided { misjudged, mut escaped } = self.pass(x, Attempt::Guessing, &mut means, found);
        means.effort.misjudged += misjudged.len() as u64;
        escaped.extend(self.pass_again(x, &misjudged, Attempt::Proving, &mut means, found));
        means.effort.escaped += escaped.len() as u64;
        let last = self.pass_again(x, &escaped, Attempt::Floats, &mut means, found);
        effort.scored += (last.len() * self.n_features) as u64;
        let mut watch = Watch::start();
        for i in last {
            self.score_all(&x[i * d..(i + 1) * d], wanted, &mut found[i]);
        }
        watch.lap(&mut effort.scoring);
    }

    /// Another pass over some of the rows of `x`; returns those that defeat it.
    fn pass_again(
        &self,
        x: &[f32],
        rows: &[usize],
        attempt: Attempt,
        means: &mut Means<'_>,
        found: &mut [Vec<Scored>],
    ) -> Vec<usize> {
        if rows.is_empty() {
            return Vec::new();
        }
        let d = self.plan.d();
        let x: Vec<f32> = rows.iter().flat_map(|&i| &x[i * d..(i + 1) * d]).copied().collect();
        let mut results = Vec::new();
        reset(&mut results, rows.len());
        let Undecided { escaped, .. } = self.pass(&x, attempt, means, &mut results);
        for (&i, result) in rows.iter().zip(results) {
            found[i] = result;
        }
        escaped.into_iter().map(|i| rows[i]).collect()
    }

    /// Scores every feature for one row.
    fn score_all(&self, x: &[f32], wanted: Wanted, found: &mut Vec<Scored>) {
        found.clear();
        for j in 0..self.n_features {
            found.extend(self.score(j, x, wanted));
            if let Wanted::Best { k, .. } = wanted
                && found.len() >= 2 * k + COLS
            {
                keep_best(found, k);
            }
        }
        finish(found, wanted);
    }

    /// The score of feature `j` for the row `x`, where it is wanted at all.
    pub fn score(&self, j: usize, x: &[f32], wanted: Wanted) -> Option<Scored> {
        self.admit(j, dot(self.plan.isa(), x, self.feature(j)), wanted)
    }

    /// The score of feature `j` given its inner product, where it is wanted at all.
    pub(super) fn admit(&self, j: usize, product: f64, wanted: Wanted) -> Option<Scored> {
        let (panel, c) = (&self.panels[j / COLS], j % COLS);
        let activation = product + panel.bias[c];
        let rank = activation * panel.weight[c];
        let fires = activation as f32 > 0.0;
        let wanted = match wanted {
            Wanted::Best { positive, .. } => fires || !positive,
            Wanted::Above => fires && activation > panel.threshold[c],
            Wanted::AtLeast(least) => fires && rank >= least,
        };
        wanted.then_some(Scored { rank, activation, feature: j as u32 })
    }

    /// What an upper bound must reach so that the real score may be `score`.
    pub(super) fn bar(&self, score: f64) -> f32 {
        down(score - self.underflow)
    }

    /// The bar of a row of which nothing is known yet; the bounds of an `exact` row, which is all zeros, are the biases.
    pub(super) fn lowest_bar(&self, wanted: Wanted, exact: bool) -> f32 {
        match wanted {
            Wanted::Best { positive: false, .. } => f32::MIN,
            Wanted::AtLeast(least) => self.bar(least),
            _ if exact => f32::from_bits(1),
            _ => self.bar(0.0),
        }
    }
}
fn reset(found: &mut Vec<Vec<Scored>>, n: usize) {
    found.resize_with(n, Vec::new);
    found.iter_mut().for_each(Vec::clear);
}

/// Puts a row's members into their final order.
pub(super) fn finish(found: &mut Vec<Scored>, wanted: Wanted) {
    if let Wanted::Best { k, .. } = wanted {
        keep_best(found, k);
        found.sort_unstable_by(Scored::order);
    }
}
