//! Rows packed into strips block by block, each with the bounds of its rounding.

use super::dot::dot;
use super::plan::{LARGEST_NORM, Plan, SAFE_PRODUCTS};
use super::quantize::{Rounding, up};
use super::tile::{Lines, ROWS};
use crate::memory::Aligned;

/// Strips that tile registers take at once: four of 12 rows are three tiles of 16.
pub(super) const TILED_STRIPS: usize = 4;
/// Words of 32 bits in a line of a tile register.
pub(super) const LINE: usize = 16;

/// Words from row to row for tile registers, where a row has `words`, whole lines: one line more, so that the rows of a tile do
/// not compete for the same places of the cache where the width is a power of two.
pub(super) fn row_words(words: usize) -> usize {
    words + LINE
}

/// Rows of a block as a screen reads them.
#[derive(Debug, Default)]
pub struct Strips {
    /// Strip by strip: step by step a word of every row, or row by row for tile registers.
    words: Aligned<u32>,
    /// Bounds and thresholds, one entry per strip of [`ROWS`] rows.
    pub lines: Vec<Lines>,
    n_rows: usize,
    /// Words of a strip.
    strip: usize,
    scratch: Vec<f32>,
    word: Vec<u32>,
}

impl Strips {
    /// Rows that were packed.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The words of `count` strips from strip `s` on.
    pub(super) fn words(&self, s: usize, count: usize) -> &[u32] {
        &self.words[s * self.strip..(s + count) * self.strip]
    }

    /// What the upper bound of a score of row `row` must reach.
    pub(super) fn bar(&self, row: usize) -> f32 {
        self.lines[row / ROWS].threshold[row % ROWS]
    }
}

impl Plan {
    /// Packs a block of rows (row-major f32) into `strips`; returns the rows that no f32 screen can take.
    ///
    /// With `floats` the strips serve the f32 screen, which reads the rows where they are.
    pub fn strips(&self, x: &[f32], largest_norm: f64, floats: bool, strips: &mut Strips) -> Vec<usize> {
        let floats = self.reads_floats(floats);
        let (n, steps) = (x.len() / self.d, if floats { 0 } else { self.steps() });
        let tiled = self.tiled(floats);
        let (n_strips, row) = if tiled {
            (n.div_ceil(ROWS).next_multiple_of(TILED_STRIPS), row_words(steps))
        } else {
            (n.div_ceil(ROWS), steps)
        };
        (strips.n_rows, strips.strip) = (n, ROWS * row);
        strips.lines.clear();
        strips.lines.resize(n_strips, Lines::default());
        // What a former block left there is as good as zeros: no kernel mixes rows, and nobody reads the bounds of misfits and of
        // rows that are not there.
        if strips.words.len() < n_strips * ROWS * row {
            strips.words = Aligned::zeros(n_strips * ROWS * row);
        }
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
            let offset = self.offset();
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut strips.word);
            for byte in bytes {
                *byte = byte.wrapping_add(offset);
            }
            if tiled {
                strips.words[i * row..][..steps].copy_from_slice(&strips.word);
                continue;
            }
            let strip = &mut strips.words[i / ROWS * ROWS * row..][..ROWS * row];
            for (step, &word) in strips.word.iter().enumerate() {
                strip[step * ROWS + i % ROWS] = word;
            }
        }
        misfits
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
    use crate::kernels::isa::Isa;

    #[test]
    fn rows_beyond_the_range_of_f32_are_named_misfits() {
        let plan = Plan::with_isa(Isa::PLAIN, 2, Certificate::Deterministic, None);
        let x = [1e30, 1e30, 1.0, 1.0, 0.0, 0.0, 1e-30, 0.0];
        assert_eq!(plan.strips(&x, 1e10, true, &mut Strips::default()), [0, 3]);
    }
}
