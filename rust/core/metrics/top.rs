//! Top-activating samples per feature, by bounded lists.
//!
//! 1. Screen: a block of rows is compared with the thresholds that earlier blocks left behind, one load per slot; nearly
//!    all slots fail it once the lists are full. Survivors go to the bucket of their piece of features.
//! 2. Insert: each piece of features takes its buckets, in any order: the best n under a total order (activation
//!    falling, then sample, then position rising) do not depend on the order of insertion.
//!
//! With `per_sample` a sample enters a list once, with its largest activation. That stays exact while streaming: a
//! sample that was pushed out had a maximum below the threshold, so only a later, larger value can bring it back.

use std::cmp::Ordering;
use std::ops::Range;

use super::features::{FeatureFold, Labelled, PIECE};
use crate::error::{Error, Result};
use crate::kernels::prefetch::fetch;
use crate::memory::try_zeros;

/// Rows screened before thresholds are raised again.
const BLOCK_ROWS: usize = 2048;

/// One entry of a feature's list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Activation h > 0.
    pub activation: f32,
    /// Position of the token in its sample.
    pub position: u32,
    /// The sample.
    pub sample: u64,
}

impl Hit {
    /// Best first: activation falling, then sample, then position rising.
    fn order(&self, other: &Self) -> Ordering {
        other
            .activation
            .total_cmp(&self.activation)
            .then(self.sample.cmp(&other.sample))
            .then(self.position.cmp(&other.position))
    }
}

/// The best hits of one feature, best first.
#[derive(Clone, Debug, Default)]
pub struct Best {
    /// Activation below which nothing can enter; 0 while the list has room.
    threshold: f32,
    hits: Vec<Hit>,
}

impl Best {
    fn insert(&mut self, hit: Hit, n: usize, per_sample: bool) {
        if hit.activation < self.threshold {
            return;
        }
        let same = if per_sample { self.hits.iter().position(|h| h.sample == hit.sample) } else { None };
        match same {
            Some(at) if hit.order(&self.hits[at]) != Ordering::Less => return,
            Some(at) => {
                self.hits.remove(at);
            }
            None if self.hits.len() == n => {
                if self.hits.last().is_some_and(|worst| hit.order(worst) != Ordering::Less) {
                    return;
                }
                self.hits.pop();
            }
            None => {}
        }
        let at = self.hits.partition_point(|h| h.order(&hit) == Ordering::Less);
        self.hits.insert(at, hit);
        if self.hits.len() == n {
            self.threshold = self.hits[n - 1].activation;
        }
    }
}

/// The best `n` hits of every feature, in every group of rows. One list per group and feature.
#[derive(Clone, Debug)]
pub struct TopSamples {
    d_sae: usize,
    n: usize,
    per_sample: bool,
    n_groups: usize,
    /// For each feature the number of its list, or `NO_LIST`; `None` means that all features have one.
    lists: Option<Vec<u32>>,
    n_lists: usize,
}

const NO_LIST: u32 = u32::MAX;

/// A slot that passed the screen, with the cell it goes to.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    cell: usize,
    hit: Hit,
}

/// All lists, row by row: groups, then lists, then ranks from 1.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Number of the group.
    pub group: Vec<u32>,
    /// Number of the list: of the feature, or of its place among the features asked for.
    pub list: Vec<u32>,
    /// Rank within the list, from 1.
    pub rank: Vec<u32>,
    /// The sample.
    pub sample: Vec<u64>,
    /// Position of the token in its sample.
    pub position: Vec<u32>,
    /// Activation.
    pub activation: Vec<f32>,
}

impl TopSamples {
    /// The best `n` samples of each of `d_sae` features, in `n_groups` groups of rows. With `per_sample` a sample enters
    /// a list once, with its largest activation.
    ///
    /// # Errors
    /// [`Error::Shape`] when `n` is zero.
    pub fn new(d_sae: usize, n: usize, per_sample: bool, n_groups: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::shape("n", "at least 1", "0"));
        }
        Ok(Self { d_sae, n, per_sample, n_groups, lists: None, n_lists: d_sae })
    }

    /// Lists for these features alone, in this order; `None` means all.
    ///
    /// # Errors
    /// [`Error::Shape`] for a feature outside the dictionary or one that is named twice.
    pub fn features(self, features: Option<&[u32]>) -> Result<Self> {
        let Some(features) = features else { return Ok(self) };
        let mut lists = try_zeros(self.d_sae, "a list of all features", "Check d_sae")?;
        lists.fill(NO_LIST);
        for (number, &feature) in (0..).zip(features) {
            match lists.get_mut(feature as usize) {
                Some(list) if *list == NO_LIST => *list = number,
                Some(_) => {
                    return Err(Error::shape("features", "each feature once", format!("{feature} twice")));
                }
                None => {
                    let expected = format!("features below d_sae = {}", self.d_sae);
                    return Err(Error::shape("features", expected, format!("{feature}")));
                }
            }
        }
        Ok(Self { lists: Some(lists), n_lists: features.len(), ..self })
    }

    /// The lists as columns.
    pub fn table(&self, cells: &[Best]) -> Table {
        let mut table = Table::default();
        for (cell, best) in cells.iter().enumerate() {
            for (rank, hit) in (1..).zip(&best.hits) {
                table.group.push((cell / self.n_lists) as u32);
                table.list.push((cell % self.n_lists) as u32);
                table.rank.push(rank);
                table.sample.push(hit.sample);
                table.position.push(hit.position);
                table.activation.push(hit.activation);
            }
        }
        table
    }

    fn list(&self, feature: u32) -> Option<usize> {
        match &self.lists {
            None => Some(feature as usize),
            Some(lists) => Some(lists[feature as usize]).filter(|&l| l != NO_LIST).map(|l| l as usize),
        }
    }
}

impl FeatureFold for TopSamples {
    type Cell = Best;
    type Partial = Vec<Vec<Candidate>>;

    fn n_cells(&self) -> usize {
        self.n_groups.saturating_mul(self.n_lists)
    }

    fn n_groups(&self) -> usize {
        self.n_groups
    }

    fn block_rows(&self) -> usize {
        BLOCK_ROWS
    }

    fn partial(&self) -> Self::Partial {
        vec![Vec::new(); (self.n_groups * self.n_lists).div_ceil(PIECE)]
    }

    fn partial_bytes(&self) -> usize {
        BLOCK_ROWS * 64 * size_of::<Candidate>()
    }

    fn update(
        &self,
        partial: &mut Self::Partial,
        cells: &[Best],
        block: &Labelled<'_>,
        rows: Range<usize>,
    ) -> Result<()> {
        let codes = &block.codes;
        if block.samples.len() != codes.n() || block.positions.len() != codes.n() {
            let found = format!("{} samples, {} positions", block.samples.len(), block.positions.len());
            return Err(Error::shape("rows", format!("{} of each", codes.n()), found));
        }
        for r in rows.clone() {
            if self.lists.is_none() && r + 1 < rows.end {
                let first = block.group(r + 1) * self.n_lists;
                codes.row(r + 1).0.iter().for_each(|&feature| fetch(cells, first + feature as usize));
            }
            let (indices, values) = codes.row(r);
            let first = block.group(r) * self.n_lists;
            for (&feature, &activation) in indices.iter().zip(values) {
                if !activation.is_finite() || (activation != 0.0 && feature as usize >= self.d_sae) {
                    return Err(codes.fault(r..r + 1));
                }
                if activation <= 0.0 {
                    continue;
                }
                let Some(list) = self.list(feature) else { continue };
                let cell = first + list;
                if activation >= cells[cell].threshold {
                    let hit = Hit { activation, position: block.positions[r], sample: block.samples[r] };
                    partial[cell / PIECE].push(Candidate { cell, hit });
                }
            }
        }
        Ok(())
    }

    fn merge(&self, first_cell: usize, cells: &mut [Best], partial: &Self::Partial) {
        for candidate in &partial[first_cell / PIECE] {
            cells[candidate.cell - first_cell].insert(candidate.hit, self.n, self.per_sample);
        }
    }
}
