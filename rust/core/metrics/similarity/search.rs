//! The best matches of many rows in one dictionary: by sketches where most rows have close ones, in full for the rest.

use std::ops::Range;

use super::sketch::{Sampled, Sketch, Turn};
use crate::error::Result;
use crate::kernels::gemm::dot::dot;
use crate::kernels::gemm::tile::COLS;
use crate::kernels::gemm::{Dictionary, Plan, Space, Terms, Wanted};
use crate::kernels::topk::Scored;
use crate::rows::Rows;
use crate::scan::pack::pack_features;
use crate::scan::{Context, grid, map_ordered_with, spread};

/// Most rows that are matched at once: strips of 12, and groups of four of them.
const MATCH_ROWS: usize = 528;
/// Rows of either side that stand for all when a sketch is chosen.
const SAMPLE: usize = 128;
/// Rows of either side from which a sample is worth its time.
const LEAST_ROWS: usize = 16 * SAMPLE;
/// Added to either side of a comparison of bounds: a selection by rank takes positive ranks alone.
const SHIFT: f64 = 0.5;

/// Rows that look for their `k` best matches in a dictionary that ranks by `x'w / |w|`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Search<'a> {
    pub(super) dictionary: &'a Dictionary,
    pub(super) rows: Rows<'a>,
    pub(super) lengths: &'a [f64],
    pub(super) k: usize,
    pub(super) context: &'a Context<'a>,
}

/// Matches of some rows, best first.
type Found = Vec<Vec<Scored>>;

impl Search<'_> {
    /// The best matches of every row; none of a row that is zero.
    pub(super) fn run(&self) -> Result<Found> {
        let n = self.rows.n();
        let mut found = vec![Vec::new(); n];
        let mut open: Vec<usize> = (0..n).filter(|&i| self.lengths[i] > 0.0).collect();
        if open.len().min(self.dictionary.n_features()) >= LEAST_ROWS {
            let sampled: Vec<usize> = open.iter().copied().step_by(open.len() / SAMPLE).collect();
            fill(&mut found, &sampled, self.in_full(&sampled)?);
            open.retain(|&i| found[i].is_empty());
            if let Some(sketch) = self.choose(&sampled, &found)? {
                self.settle(&sketch, &open, &mut found)?;
                open.retain(|&i| found[i].is_empty());
            }
        }
        fill(&mut found, &open, self.in_full(&open)?);
        Ok(found)
    }

    /// The best matches of the listed rows, however far they are.
    fn in_full(&self, listed: &[usize]) -> Result<Found> {
        let wanted = self.wanted();
        let found = map_ordered_with(&blocks(listed.len()), self.context, Space::default, |space, block| {
            self.dictionary.select(&self.gather(&listed[block.clone()]), wanted, space);
            Ok((0..block.len()).map(|i| space.found(i).to_vec()).collect::<Vec<_>>())
        })?;
        Ok(found.concat())
    }

    /// The sketch that sampled rows, whose matches are found, speak for.
    fn choose(&self, sampled: &[usize], found: &[Vec<Scored>]) -> Result<Option<Sketch>> {
        let (isa, d, n) = (self.dictionary.plan().isa(), self.rows.d(), self.dictionary.n_features());
        let turn = Turn::new(isa, d);
        let rows = self.gather(sampled);
        let a: Vec<Sampled> =
            rows.chunks(d).zip(sampled).map(|(x, &i)| turn.sampled(x, self.lengths[i])).collect();
        // Beside the places of the sampled rows: features of equal index are often matches, and pairs are to be strangers.
        let features = (n / SAMPLE / 2..n).step_by(n / SAMPLE).map(|j| self.dictionary.feature(j));
        let b: Vec<Sampled> = features.map(|w| turn.sampled(w, dot(isa, w, w).sqrt())).collect();
        let last = |&i: &usize| found[i].last().map_or(-1.0, |last| last.rank / self.lengths[i]);
        let last: Vec<f64> = sampled.iter().map(last).collect();
        Sketch::choose(&turn, &a, &b, &last, n, self.context)
    }

    /// Finds the best matches of those listed rows that have as many as are wanted above their floor.
    fn settle(&self, sketch: &Sketch, listed: &[usize], found: &mut [Vec<Scored>]) -> Result<()> {
        let sketches = self.sketches(sketch)?;
        let wanted = Wanted::AtLeast(sketch.bar + SHIFT);
        let init = || (Space::default(), Vec::new());
        let settled = map_ordered_with(&blocks(listed.len()), self.context, init, |(space, row), block| {
            let listed = &listed[block.clone()];
            let x = self.gather(listed);
            let (mut kept, mut floors) = (Vec::with_capacity(listed.len() * sketch.width), Vec::new());
            for (x, &i) in x.chunks(self.rows.d()).zip(listed) {
                let (of_row, rest) = sketch.of(x, self.lengths[i], row);
                kept.extend_from_slice(of_row);
                floors.push(sketch.floor(rest) * self.lengths[i]);
            }
            sketches.select(&kept, wanted, space);
            let rows = x.chunks(self.rows.d()).zip(floors).enumerate();
            Ok(rows.map(|(r, (x, floor))| self.best_of(space.found(r), x, floor)).collect::<Vec<_>>())
        })?;
        fill(found, listed, settled.concat());
        Ok(())
    }

    /// The best of some features, if as many as are wanted reach `floor`; else none.
    fn best_of(&self, features: &[Scored], x: &[f32], floor: f64) -> Vec<Scored> {
        let score = |s: &Scored| self.dictionary.score(s.feature as usize, x, self.wanted());
        let mut best: Vec<Scored> = features.iter().filter_map(score).filter(|s| s.rank >= floor).collect();
        if best.len() < self.k {
            return Vec::new();
        }
        best.sort_unstable_by(Scored::order);
        best.truncate(self.k);
        best
    }

    /// The features' sketches as a dictionary, which ranks by bounds of cosines less what the rows' sketches leave out.
    fn sketches(&self, sketch: &Sketch) -> Result<Dictionary> {
        let (isa, n) = (self.dictionary.plan().isa(), self.dictionary.n_features());
        let plan = Plan::coarse(isa, sketch.width);
        pack_features(&plan, n, self.context, |p, kept| {
            let (mut terms, mut space) = (Terms::default(), Vec::new());
            for ((kept, bias), j) in kept.chunks_mut(sketch.width).zip(&mut terms.bias).zip(p * COLS..) {
                let w = self.dictionary.feature(j);
                let (of_feature, rest) = sketch.of(w, dot(isa, w, w).sqrt(), &mut space);
                kept.copy_from_slice(of_feature);
                *bias = rest + SHIFT;
            }
            Ok(terms)
        })
    }

    fn wanted(&self) -> Wanted {
        Wanted::Best { k: self.k, positive: false }
    }

    /// The listed rows, one after the other.
    fn gather(&self, listed: &[usize]) -> Vec<f32> {
        let d = self.rows.d();
        let mut x = vec![0.0; listed.len() * d];
        x.chunks_mut(d).zip(listed).for_each(|(x, &i)| self.rows.widen(i..i + 1, x));
        x
    }
}

fn fill(found: &mut [Vec<Scored>], listed: &[usize], matches: Found) {
    listed.iter().zip(matches).for_each(|(&i, matches)| found[i] = matches);
}

fn blocks(n: usize) -> Vec<Range<usize>> {
    grid(n, spread(n, MATCH_ROWS)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    use super::super::pack;
    use super::*;
    use crate::kernels::isa::Isa;
    use crate::rows::Data;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(number).take(n).collect()
    }

    #[test]
    fn sketches_settle_most_of_the_rows_that_have_close_matches_as_a_full_search_would() {
        let (n, d) = (LEAST_ROWS, 128);
        let (a, mut b) = (noise(n * d, 1), noise(n * d, 2));
        // Two of three rows have a close match, and every twelfth has two that are the same.
        for i in (0..n).filter(|i| i % 3 > 0) {
            for c in 0..d {
                b[(i * 7 % n) * d + c] = a[i * d + c] + 0.2 * b[i * d + c];
            }
        }
        for i in (0..n / 2).step_by(12) {
            b.copy_within((i + 1) * d..(i + 2) * d, (n - 1 - i) * d);
        }
        let lengths = |x: &[f32]| -> Vec<f64> { x.chunks(d).map(|x| dot(Isa::PLAIN, x, x).sqrt()).collect() };
        let (lengths_a, lengths_b) = (lengths(&a), lengths(&b));
        let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let context = &Context { cancel: &cancel, done: &done, memory_budget: 1 << 28 };
        let listed: Vec<usize> = (0..n).collect();
        for plan in Isa::available().map(|isa| Plan::coarse(isa, d)) {
            let [rows, others] = [&a, &b].map(|x| Rows::new(Data::F32(x), d).unwrap());
            let dictionary = &pack(&plan, others, &lengths_b, &listed, context).unwrap();
            for k in [1, 2] {
                let search = Search { dictionary, rows, lengths: &lengths_a, k, context };
                let expected = search.in_full(&listed).unwrap();
                assert_eq!(search.run().unwrap(), expected);
                let sampled: Vec<usize> = listed.iter().copied().step_by(n / SAMPLE).collect();
                let sketch = search.choose(&sampled, &expected).unwrap();
                // Second best matches are far for most rows: no sketch is worth its time.
                assert_eq!(sketch.is_some(), k == 1);
                let Some(sketch) = sketch else { continue };
                let mut found = vec![Vec::new(); n];
                search.settle(&sketch, &listed, &mut found).unwrap();
                let settled = found.iter().zip(&expected).filter(|(found, _)| !found.is_empty());
                assert!(settled.clone().count() > n / 2);
                settled.for_each(|(found, expected)| assert_eq!(found, expected));
            }
        }
    }
}
