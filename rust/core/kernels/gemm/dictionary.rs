//! A packed dictionary: features as they are, features as the screen reads them, and what belongs to each panel of them.
//!
//! Either form of the features is one array on large pages. Scores read features here and there, and a screen reads panels
//! that need not lie side by side: with pages of 4 KiB an array each, the encoder took 1.04 to 1.07 times as long.

use super::features::{Packed, Panel, Slack, Terms};
use super::guess::{Record, sample_first};
use super::plan::Plan;
use super::tile::COLS;
use crate::error::Result;
use crate::memory::{Aligned, try_zeros};

/// Sums of products below the range of f32 lose at most this, per unit of the largest feature weight.
const UNDERFLOW: f64 = 1e-32;

/// Features ready to be searched; see [`super::select`].
#[derive(Debug)]
pub struct Dictionary {
    pub(super) plan: Plan,
    pub(super) n_features: usize,
    rows: Vec<f32>,
    words: Aligned<u32>,
    pub(super) panels: Vec<Panel>,
    /// Panels in the order in which they are visited.
    pub(super) order: Vec<usize>,
    pub(super) largest_norm: f64,
    pub(super) largest_slack: Slack,
    pub(super) underflow: f64,
    pub(super) record: Record,
}

/// A dictionary whose features are still to come.
#[derive(Debug)]
pub struct Blank {
    plan: Plan,
    n_features: usize,
    rows: Vec<f32>,
    words: Aligned<u32>,
    panels: Vec<Panel>,
}

/// Where the features of a panel go, 32 of them or, at the end, those that are left.
#[derive(Debug)]
pub struct Slot<'a> {
    plan: &'a Plan,
    number: usize,
    rows: &'a mut [f32],
    words: &'a mut [u32],
    panel: &'a mut Panel,
}

impl Blank {
    /// Room for so many features.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when the system has less memory than they take.
    pub fn new(plan: Plan, n_features: usize) -> Result<Self> {
        let n_panels = n_features.div_ceil(COLS);
        let hint = "Free some, or take fewer features";
        let rows = try_zeros(n_features.saturating_mul(plan.d()), "a packed dictionary", hint)?;
        let words =
            Aligned::try_zeros(n_panels.saturating_mul(plan.panel_words()), "a packed dictionary", hint)?;
        let panels = (0..n_panels).map(|_| Panel::default()).collect();
        Ok(Self { plan, n_features, rows, words, panels })
    }

    /// The panels' slots, in order.
    pub fn slots(&mut self) -> Vec<Slot<'_>> {
        let (plan, words) = (&self.plan, self.plan.panel_words());
        let (mut rest, rows) = (&mut self.words[..], self.rows.chunks_mut(COLS * plan.d()));
        let slots = rows.zip(&mut self.panels).enumerate().map(|(number, (rows, panel))| {
            let (words, others) = std::mem::take(&mut rest).split_at_mut(words);
            rest = others;
            Slot { plan, number, rows, words, panel }
        });
        slots.collect()
    }

    /// The dictionary, once every slot is packed.
    pub fn finish(self) -> Dictionary {
        let Self { plan, n_features, rows, words, panels } = self;
        let largest_norm = panels.iter().map(|p| p.largest_norm).fold(0.0, f64::max);
        let largest_slack = panels.iter().map(Panel::largest_slack).fold(Slack::default(), Slack::or_larger);
        let underflow = UNDERFLOW * panels.iter().flat_map(|p| p.weight).fold(1.0, f64::max);
        let order = sample_first(panels.len());
        Dictionary {
            plan,
            n_features,
            rows,
            words,
            panels,
            order,
            largest_norm,
            largest_slack,
            underflow,
            record: Record::default(),
        }
    }
}

impl Slot<'_> {
    /// The features, row-major: zeros, until they are written.
    pub fn features(&mut self) -> &mut [f32] {
        self.rows
    }

    /// Packs the features.
    pub fn pack(&mut self, terms: &Terms) {
        *self.panel = self.plan.panel(self.number, self.rows, self.words, terms);
    }
}

impl Dictionary {
    /// The dictionary of `features` (row-major f32 of width [`Plan::d`]), packed by the calling thread; `terms` belong to each panel
    /// of 32.
    ///
    /// # Errors
    /// As [`Blank::new`].
    ///
    /// # Panics
    /// When the last feature is incomplete.
    pub fn of(plan: &Plan, features: &[f32], terms: impl Fn(usize) -> Terms) -> Result<Self> {
        assert!(features.len().is_multiple_of(plan.d()), "features of width {}", plan.d());
        let mut blank = Blank::new(plan.clone(), features.len() / plan.d())?;
        for (slot, features) in blank.slots().iter_mut().zip(features.chunks(COLS * plan.d())) {
            slot.features().copy_from_slice(features);
            slot.pack(&terms(slot.number));
        }
        Ok(blank.finish())
    }

    /// How features and rows are rounded.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Number of features.
    pub fn n_features(&self) -> usize {
        self.n_features
    }

    /// Feature `j` as it was given.
    pub fn feature(&self, j: usize) -> &[f32] {
        let d = self.plan.d();
        &self.rows[j * d..(j + 1) * d]
    }

    /// Panel `p`.
    pub(super) fn packed(&self, p: usize) -> Packed<'_> {
        let (rows, words) = (COLS * self.plan.d(), self.plan.panel_words());
        Packed {
            panel: &self.panels[p],
            rows: &self.rows[p * rows..self.rows.len().min((p + 1) * rows)],
            words: &self.words[p * words..(p + 1) * words],
        }
    }
}
