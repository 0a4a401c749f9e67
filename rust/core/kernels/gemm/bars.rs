//! How the thresholds of rows rise in a [`Pass`]: by guesses from a sample, by bounds, by scores.

use super::guess::safe_rank;
use super::pass::{Attempt, Pass};
use super::tile::{COLS, ROWS};
use crate::kernels::topk::{Scored, keep_best};

/// Candidates per member that may wait while bounds alone raise the threshold.
const WAITING_PER_MEMBER: usize = 6;

impl Pass<'_> {
    /// The rank in a sample of so many panels from which to guess, where guessing is asked for and the rank is better than `k`.
    pub(super) fn rank_in_sample(&self, k: usize, panels: usize) -> Option<usize> {
        let rank = safe_rank(k, panels * COLS, self.dictionary.n_features);
        (self.attempt == Attempt::Guessing && rank < k).then_some(rank)
    }

    /// Guesses the threshold of every row from the score of this rank in the sample.
    ///
    /// Bounds tell that score where the slack of all features is much the same. Where it is not they lower the guess until it drops
    /// hardly anything; then the candidates in question are scored.
    pub(super) fn guess_bars(&mut self, k: usize, rank: usize) {
        let rows = 0..self.found.len();
        rows.clone().for_each(|row| self.guess_by_bounds(row, rank));
        let is_vague = |row: &usize| {
            let waiting = self.bench.candidates[*row].len();
            waiting > WAITING_PER_MEMBER * rank && !self.bench.escaped[*row] && self.found[*row].len() < k
        };
        let vague: Vec<usize> = rows.filter(is_vague).collect();
        for &row in &vague {
            self.list(row, self.bench.candidates[row].threshold(self.isa(), rank));
        }
        self.score_listed();
        for row in vague {
            self.guess_by_scores(row, rank);
        }
    }

    /// Raises the threshold of a row to what the score of this rank most likely is, by bounds.
    fn guess_by_bounds(&mut self, row: usize, rank: usize) {
        let candidates = &self.bench.candidates[row];
        if candidates.len() < rank || self.bench.escaped[row] {
            return;
        }
        // A score lies in the middle of its bounds, give or take a little.
        let score = f64::from(candidates.threshold(self.isa(), rank)) - self.gap(row) / 2.0;
        let bar = self.dictionary.bar(score);
        self.guess(row, bar);
    }

    /// Raises the threshold of a row to the score of this rank, where so many are known.
    fn guess_by_scores(&mut self, row: usize, rank: usize) {
        let found = &mut self.found[row];
        if found.len() >= rank {
            let (_, last, _) = found.select_nth_unstable_by(rank - 1, Scored::order);
            let bar = self.dictionary.bar(last.rank);
            self.guess(row, bar);
        }
    }

    /// Takes `bar` for the threshold of a row, unless that is higher already.
    fn guess(&mut self, row: usize, bar: f32) {
        if bar > self.bench.strips.bar(row) {
            self.bench.guessed[row] = bar;
            self.drop_below(row, bar);
        }
    }

    /// Raises the threshold of every row by what is certain; after the last range always to a real score.
    pub(super) fn raise_bars(&mut self, k: usize, last: bool) {
        for row in 0..self.found.len() {
            let bound = self.bench.candidates[row].threshold(self.isa(), k);
            if last || !self.raise_bar_by_bounds(row, k, bound) {
                self.list(row, self.promising(row, k, bound));
            }
        }
        self.score_listed();
        (0..self.found.len()).for_each(|row| self.raise_bar(row, k));
    }

    /// Raises the threshold of a row to its k-th largest lower bound, if few candidates remain above that. `bound` is the k-th largest
    /// upper one.
    fn raise_bar_by_bounds(&mut self, row: usize, k: usize, bound: f32) -> bool {
        let candidates = &self.bench.candidates[row];
        if candidates.len() < k || !self.found[row].is_empty() {
            return false;
        }
        let bar = self.dictionary.bar(f64::from(bound) - self.gap(row));
        if candidates.reaching(self.isa(), bar) > WAITING_PER_MEMBER * k {
            return false;
        }
        self.drop_below(row, bar);
        true
    }

    /// The bound from which on candidates are scored at once: `bound`, that of rank `k`, lowered by two thirds of what it lies above its
    /// score, unless too many would be. What is left in between once the `k`-th best score is known is little.
    fn promising(&self, row: usize, k: usize, bound: f32) -> f32 {
        let likely = self.dictionary.bar(f64::from(bound) - self.gap(row) / 3.0);
        let reaching = self.bench.candidates[row].reaching(self.isa(), likely);
        if reaching > WAITING_PER_MEMBER * k { bound } else { likely }
    }

    /// Keeps the k best scores of a row, and drops the candidates that can no longer be among them.
    pub(super) fn raise_bar(&mut self, row: usize, k: usize) {
        let found = &mut self.found[row];
        keep_best(found, k);
        if found.len() < k || self.bench.escaped[row] {
            return;
        }
        let bar = self.dictionary.bar(found[k - 1].rank);
        self.drop_below(row, bar);
    }

    /// Sets the threshold of a row, unless it is higher already, and drops the candidates below it.
    fn drop_below(&mut self, row: usize, bar: f32) {
        let isa = self.isa();
        self.bench.candidates[row].drop_below(isa, bar);
        self.set_bar(row, bar.max(self.bench.strips.bar(row)));
    }

    /// How far upper bounds of a row can lie above its scores.
    fn gap(&self, row: usize) -> f64 {
        let line = &self.bench.strips.lines[row / ROWS];
        self.dictionary.largest_slack.gap(line.slack[row % ROWS], line.norm[row % ROWS], self.floats())
    }
}
