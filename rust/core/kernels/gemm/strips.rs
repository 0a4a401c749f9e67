//! Rows packed into strips block by block, each with the bounds of its rounding.

use super::dot::dot;
use super::features::Slack;
use super::isa::Isa;
use super::plan::{LARGEST_NORM, Plan, SAFE_PRODUCTS, Screen};
use super::quantize::{self, Rounding, up};
use super::tile::{Lines, ROWS};

/// Rows of a block as a screen reads them.
#[derive(Debug, Default)]
pub struct Strips {
    pub(super) words: Vec<u32>,
    /// Bounds and thresholds, one entry per strip of [`ROWS`] rows.
    pub lines: Vec<Lines>,
    scratch: Vec<f32>,
    word: Vec<u32>,
}

impl Strips {
    /// What the upper bound of a score of row `row` must reach.
    pub(super) fn bar(&self, row: usize) -> f32 {
        self.lines[row / ROWS].threshold[row % ROWS]
    }
}

/// Rows in bf16 for the second bounds.
#[derive(Debug, Default)]
pub(super) struct Halves {
    pub(super) x: Vec<u16>,
    pub(super) slack: Vec<f32>,
    pub(super) norm: Vec<f32>,
}

impl Halves {
    /// As [`Slack::gap`], for a row under the second bounds.
    pub(super) fn gap(&self, slack: Slack, row: usize) -> f64 {
        slack.gap(self.slack[row], self.norm[row], false)
    }
}

impl Plan {
    /// Packs a block of rows (row-major f32) into `strips`; returns the rows that no f32 screen can take.
    ///
    /// With `floats` the strips serve the f32 screen, which reads the rows where they are.
    pub fn strips(&self, x: &[f32], largest_norm: f64, floats: bool, strips: &mut Strips) -> Vec<usize> {
        let floats = floats || self.screen == Screen::Floats;
        let (n, steps) = (x.len() / self.d, if floats { 0 } else { self.steps() });
        strips.lines.clear();
        strips.lines.resize(n.div_ceil(ROWS), Lines::default());
        strips.words.resize(n.div_ceil(ROWS) * ROWS * steps, 0);
        strips.scratch.resize(self.d, 0.0);
        strips.word.resize(steps, 0);
        let mut misfits = Vec::new();
        for (i, x) in x.chunks_exact(self.d).enumerate() {
            let (norm, rounding) = if floats {
                (dot(self.isa, x, x).sqrt(), Rounding::EXACT)
            } else {
                self.centred(x, &mut strips.scratch);
                let norm = dot(self.isa, &strips.scratch, &strips.scratch).sqrt();
                (norm, self.round(&mut strips.scratch, norm, i as u32, &mut strips.word))
            };
            if norm >= LARGEST_NORM || norm > 0.0 && !SAFE_PRODUCTS.contains(&(norm * largest_norm)) {
                misfits.push(i);
                continue;
            }
            let line = &mut strips.lines[i / ROWS];
            line.scale[i % ROWS] = rounding.step;
            // Half an ulp per element is what subtracting the centre may have cost.
            let accumulation = norm * (self.accumulation(floats) + 2.0_f64.powi(-23));
            line.slack[i % ROWS] = up(rounding.share + accumulation + self.scoring(norm));
            line.norm[i % ROWS] = up(norm + rounding.residual);
            let strip = &mut strips.words[i / ROWS * ROWS * steps..][..ROWS * steps];
            let offset = self.offset();
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut strips.word);
            for byte in bytes {
                *byte = byte.wrapping_add(offset);
            }
            for (step, &word) in strips.word.iter().enumerate() {
                strip[step * ROWS + i % ROWS] = word;
            }
        }
        misfits
    }

    /// Rounds the rows of a block to bf16 for the second bounds.
    pub(super) fn halve(&self, isa: Isa, x: &[f32], halves: &mut Halves) {
        halves.x.resize(x.len(), 0);
        halves.slack.clear();
        halves.norm.clear();
        for (x, to) in x.chunks_exact(self.d).zip(halves.x.chunks_exact_mut(self.d)) {
            let norm = dot(isa, x, x).sqrt();
            let rounding = quantize::brain_floats(isa, x, to);
            halves.slack.push(up(rounding.share + norm * self.accumulation(true) + self.scoring(norm)));
            halves.norm.push(up(norm + rounding.residual));
        }
    }

    /// What rounding in f64 may add to a score, per unit of the feature's norm; `norm` is that of the row, centred or not. It
    /// shows where a row and the centre are far larger than their difference.
    fn scoring(&self, norm: f64) -> f64 {
        (norm + 2.0 * self.centre_norm) * (self.d + 64) as f64 * 2.0_f64.powi(-52)
    }

    fn centred(&self, x: &[f32], to: &mut [f32]) {
        to.copy_from_slice(x);
        for (t, c) in to.iter_mut().zip(self.centre.as_deref().unwrap_or_default()) {
            *t -= c;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Certificate;
    use super::*;

    #[test]
    fn rows_beyond_the_range_of_f32_are_named_misfits() {
        let plan = Plan::with_isa(Isa::PLAIN, 2, Certificate::Deterministic, None);
        let x = [1e30, 1e30, 1.0, 1.0, 0.0, 0.0, 1e-30, 0.0];
        assert_eq!(plan.strips(&x, 1e10, true, &mut Strips::default()), [0, 3]);
    }
}
