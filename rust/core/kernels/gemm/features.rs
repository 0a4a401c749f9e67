//! Features packed into panels once, each with the bounds of its rounding.

use super::dot::dot;
use super::narrow;
use super::plan::{EPILOGUE, EPILOGUE_BIAS, Plan, SCALE_UNDERFLOW, Screen};
use super::quantize::{Rounding, up};
use super::tile::{COLS, Columns};

/// What is known of the features `32 p .. 32 (p + 1)` of a dictionary; by default of none.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) columns: Columns,
    /// Bits of the columns that have a feature.
    pub(super) valid: u32,
    /// Columns of the f32 screen.
    pub(super) float_columns: Columns,
    /// What is added to the inner product of each feature.
    pub(super) bias: [f64; COLS],
    /// Scores are pre-activations times this.
    pub(super) weight: [f64; COLS],
    /// Pre-activation that a feature must exceed.
    pub(super) threshold: [f64; COLS],
    pub(super) largest_norm: f64,
}

impl Default for Panel {
    fn default() -> Self {
        Self {
            columns: Columns::padding(),
            valid: 0,
            float_columns: Columns::padding(),
            bias: [0.0; COLS],
            weight: [1.0; COLS],
            threshold: [0.0; COLS],
            largest_norm: 0.0,
        }
    }
}

/// A panel with its features.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'a> {
    pub(super) panel: &'a Panel,
    /// The features as they are, row-major, without padding.
    pub(super) rows: &'a [f32],
    /// The features as the screen reads them, where it does not read them as they are.
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
    pub(super) words: &'a [u32],
}

/// The widest a bound can be, over the features of a panel or dictionary; see [`super::tile`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slack {
    norm: f64,
    residual: f64,
    bias: f64,
}

impl Slack {
    pub(super) fn or_larger(self, other: Self) -> Self {
        Self {
            norm: self.norm.max(other.norm),
            residual: self.residual.max(other.residual),
            bias: self.bias.max(other.bias),
        }
    }

    /// How far an upper bound of a row can lie above the real score: twice its slack, and the rounding of the bound. Infinite where
    /// that leaves the range of f32.
    pub(super) fn gap(self, slack: f32, norm: f32, floats: bool) -> f64 {
        let residual = if floats { 0.0 } else { self.residual };
        let width = f64::from(slack) * self.norm + f64::from(norm) * residual + self.bias;
        let gap = 2.0 * (width + f64::from(norm) * self.norm * EPILOGUE);
        if gap.is_nan() { f64::INFINITY } else { gap }
    }
}

impl Panel {
    /// The widest slack of the panel's features.
    pub(super) fn largest_slack(&self) -> Slack {
        let largest = |of: &[f32; COLS]| of.iter().copied().fold(0.0, f32::max).into();
        let bias =
            |c: usize| f64::from(self.columns.bias[c]).abs().max(f64::from(self.float_columns.bias[c]).abs());
        let used = 0..self.columns.bias.iter().filter(|b| **b > f32::NEG_INFINITY).count();
        Slack {
            norm: largest(&self.columns.norm),
            residual: largest(&self.columns.residual),
            bias: used.map(bias).fold(0.0, f64::max) * 4.0 * EPILOGUE_BIAS,
        }
    }
}

/// What belongs to each feature of a panel beside its direction.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Added to the inner product.
    pub bias: [f64; COLS],
    /// Factor of the pre-activation in its rank, positive.
    pub weight: [f64; COLS],
    /// Exclusive lower bound of the pre-activation, where one is asked for.
    pub threshold: [f64; COLS],
}

impl Default for Terms {
    fn default() -> Self {
        Self { bias: [0.0; COLS], weight: [1.0; COLS], threshold: [0.0; COLS] }
    }
}

impl Plan {
    /// Packs up to [`COLS`] features, row-major, into `words`, which are zero; `number` is the panel's place in the dictionary.
    pub(super) fn panel(&self, number: usize, rows: &[f32], words: &mut [u32], terms: &Terms) -> Panel {
        let (mut columns, mut float_columns) = (Columns::padding(), Columns::padding());
        let (mut scratch, mut word) = (vec![0.0; self.d], vec![0; self.steps()]);
        let mut largest_norm = 0.0_f64;
        for (c, w) in rows.chunks_exact(self.d).enumerate() {
            let norm = dot(self.isa, w, w).sqrt();
            largest_norm = largest_norm.max(norm * terms.weight[c].max(1.0));
            scratch.copy_from_slice(w);
            let seed = (number * COLS + c) as u32 ^ 0x5bd1_e995;
            let rounding = self.round(&mut scratch, norm, seed, &mut word);
            if self.screen == Screen::NarrowBytes {
                narrow::pack(&word, c, words);
            } else {
                words.chunks_mut(COLS).zip(&word).for_each(|(step, &word)| step[c] = word);
            }
            let sum: i32 = bytemuck::cast_slice::<u32, i8>(&word).iter().map(|&b| i32::from(b)).sum();
            let (weight, bias) = (terms.weight[c], terms.bias[c]);
            let centred = bias + self.centre.as_ref().map_or(0.0, |centre| dot(self.isa, centre, w));
            let sides = [(&mut columns, centred, rounding), (&mut float_columns, bias, Rounding::EXACT)];
            for (columns, bias, rounding) in sides {
                columns.scale[c] = (f64::from(rounding.step) * weight) as f32;
                columns.norm[c] = up(norm * weight);
                let lost = if rounding.share > 0.0 { SCALE_UNDERFLOW } else { 0.0 };
                columns.residual[c] = up(rounding.share * weight + lost);
                let slack = (bias.abs() + terms.threshold[c].abs()) * weight * EPILOGUE_BIAS;
                columns.bias[c] = up((bias - terms.threshold[c]) * weight + slack);
            }
            columns.offset[c] = -i32::from(self.offset()) * sum;
        }
        let (bias, weight, threshold) = (terms.bias, terms.weight, terms.threshold);
        let valid = u32::MAX >> (COLS - rows.len() / self.d);
        Panel { columns, valid, float_columns, bias, weight, threshold, largest_norm }
    }
}
