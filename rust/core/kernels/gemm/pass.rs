//! One screen over all features for one block of rows; see [`super::select`].

use std::ops::Range;

use super::dictionary::Dictionary;
use super::dot::{Group, dots_of};
use super::guess::sample_size;
use super::pairs::Pairs;
use super::quantize::up;
use super::select::{Effort, Wanted, Watch, finish};
use super::strips::Strips;
use super::tile::{COLS, ROWS, Tile};
use super::waiting::{Waiting, reaches};
use crate::kernels::caches::second_level_bytes;
use crate::kernels::isa::Isa;
use crate::kernels::topk::{Scored, keep_best};

/// Features of the first range; each further one ends four times as far.
const FIRST_RANGE: usize = 512;
/// Features of the first range where a sample is enough.
const FIRST_SAMPLE: usize = 128;
/// Space of a row, in candidates per member wanted.
const SPACE_PER_MEMBER: usize = 16;
/// Smallest space of a row.
const SMALLEST_SPACE: usize = 1280;
/// Scores that a row has room for at first, at most.
const MOST_RESERVED: usize = 1024;
/// Scores per member that a row collects before it keeps the best.
const SCORES_PER_MEMBER: usize = 4;

/// How rows are screened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// In the plan's arithmetic, against thresholds guessed from a sample.
    Guessing,
    /// In the plan's arithmetic, against thresholds that bounds and scores prove.
    Proving,
    /// In f32.
    Floats,
}

/// Rows that a pass could not decide.
#[derive(Debug, Default)]
pub(super) struct Undecided {
    /// Those whose threshold was guessed too high.
    pub(super) misjudged: Vec<usize>,
    /// Those that defeated the screen.
    pub(super) escaped: Vec<usize>,
}

/// Memory of one pass.
#[derive(Debug, Default)]
pub(super) struct Bench {
    pub(super) strips: Strips,
    /// Candidates of each row, at most `room`.
    pub(super) candidates: Vec<Waiting>,
    pub(super) escaped: Vec<bool>,
    /// The highest guess of each row's threshold; minus infinity where there is none.
    pub(super) guessed: Vec<f32>,
    pairs: Pairs,
    /// Features on their way from candidates to pairs.
    taken: Vec<u32>,
}

/// What is wanted, and what there is to find it with.
#[derive(Debug)]
pub(super) struct Means<'a> {
    pub(super) wanted: Wanted,
    pub(super) bench: &'a mut Bench,
    pub(super) effort: &'a mut Effort,
}

/// One screen over all features for one block of rows.
pub(super) struct Pass<'a> {
    pub(super) dictionary: &'a Dictionary,
    x: &'a [f32],
    wanted: Wanted,
    pub(super) attempt: Attempt,
    room: usize,
    pub(super) bench: &'a mut Bench,
    pub(super) found: &'a mut [Vec<Scored>],
    effort: &'a mut Effort,
}

impl Dictionary {
    /// One screen; returns the rows that it leaves undecided.
    pub(super) fn pass(
        &self,
        x: &[f32],
        attempt: Attempt,
        means: &mut Means<'_>,
        found: &mut [Vec<Scored>],
    ) -> Undecided {
        let Means { wanted, bench, effort } = means;
        let (wanted, mut watch, n) = (*wanted, Watch::start(), x.len() / self.plan.d());
        let wished = if let Wanted::Best { k, .. } = wanted { k * SPACE_PER_MEMBER } else { 0 };
        let room = wished.max(SMALLEST_SPACE).min(self.n_features) + COLS;
        bench.escaped.clear();
        bench.escaped.resize(n, false);
        bench.guessed.clear();
        bench.guessed.resize(n, f32::NEG_INFINITY);
        bench.candidates.resize_with(n.max(bench.candidates.len()), Waiting::default);
        bench.candidates.iter_mut().for_each(Waiting::clear);
        let floats = attempt == Attempt::Floats;
        for i in self.plan.strips(x, self.largest_norm, floats, &mut bench.strips) {
            bench.escaped[i] = true;
        }
        if let Wanted::Best { k, .. } = wanted {
            let scores = (SCORES_PER_MEMBER * k).min(MOST_RESERVED);
            for found in &mut *found {
                found.reserve(scores);
            }
        }
        watch.lap(&mut effort.rounding);
        let attempt = match attempt {
            Attempt::Guessing if !self.record.suggests_guessing() => Attempt::Proving,
            attempt => attempt,
        };
        let mut pass = Pass { dictionary: self, x, wanted, attempt, room, bench, found, effort };
        pass.run(watch);
        pass.undecided()
    }
}

impl Pass<'_> {
    fn run(&mut self, mut watch: Watch) {
        for r in 0..self.found.len() {
            let line = &self.bench.strips.lines[r / ROWS];
            let exact = line.slack[r % ROWS] == 0.0;
            self.set_bar(r, self.dictionary.lowest_bar(self.wanted, exact));
        }
        let ranges = self.ranges();
        for (i, range) in ranges.iter().enumerate() {
            self.sweep(range.clone());
            watch.lap(&mut self.effort.screening);
            if let Wanted::Best { k, .. } = self.wanted {
                let last = i + 1 == ranges.len();
                match self.rank_in_sample(k, range.end) {
                    Some(rank) if !last => self.guess_bars(k, rank),
                    _ => self.raise_bars(k, last),
                }
                watch.lap(&mut self.effort.scoring);
            }
        }
        for r in 0..self.found.len() {
            self.list(r, f32::NEG_INFINITY);
        }
        self.score_listed();
        self.found.iter_mut().for_each(|found| finish(found, self.wanted));
        watch.lap(&mut self.effort.scoring);
    }

    /// The rows whose members this pass did not find.
    fn undecided(self) -> Undecided {
        let Bench { escaped, guessed, .. } = self.bench;
        let (mut undecided, mut guesses) = (Undecided::default(), 0);
        for (row, found) in self.found.iter().enumerate() {
            if escaped[row] {
                undecided.escaped.push(row);
            } else if let Wanted::Best { k, .. } = self.wanted
                && guessed[row] > f32::NEG_INFINITY
            {
                guesses += 1;
                if found.get(k - 1).is_none_or(|last| self.dictionary.bar(last.rank) < guessed[row]) {
                    undecided.misjudged.push(row);
                }
            }
        }
        self.dictionary.record.add(guesses, undecided.misjudged.len());
        undecided
    }

    /// Ranges of panels, by their place in the order, between which thresholds are raised.
    fn ranges(&self) -> Vec<Range<usize>> {
        let n = self.dictionary.panels.len();
        let Wanted::Best { k, .. } = self.wanted else { return std::iter::once(0..n).collect() };
        let sample = sample_size(n);
        let guesses = self.rank_in_sample(k, sample).is_some();
        let (first, end) = if guesses { (FIRST_SAMPLE, sample) } else { (FIRST_RANGE.max(4 * k), n) };
        let ends = std::iter::successors(Some(first / COLS), |end| Some(4 * end)).take_while(|&e| e < end);
        let mut ends: Vec<usize> = std::iter::once(0).chain(ends).chain([end, n]).collect();
        ends.dedup();
        ends.windows(2).map(|w| w[0]..w[1]).collect()
    }

    fn sweep(&mut self, range: Range<usize>) {
        let plan = &self.dictionary.plan;
        let floats = self.floats();
        // Panels that stay in the second-level cache while the strips pass.
        let group = (second_level_bytes() / 2 / plan.panel_bytes(floats)).max(1);
        let mut tiles = plan.tiles(floats);
        let abreast = tiles.of_strips.len();
        for start in range.clone().step_by(group) {
            for s in (0..self.bench.strips.lines.len()).step_by(abreast) {
                for &p in &self.dictionary.order[start..range.end.min(start + group)] {
                    let panel = self.dictionary.packed(p);
                    plan.screen_strips(self.x, &self.bench.strips, s, panel, floats, &mut tiles);
                    for (tile, s) in tiles.of_strips.iter().zip(s..) {
                        self.harvest(s, p, tile);
                    }
                }
            }
        }
    }

    /// Takes the hits of a tile into the rows' candidates.
    fn harvest(&mut self, s: usize, p: usize, tile: &Tile) {
        let isa = self.isa();
        let valid = self.dictionary.panels[p].valid;
        // Which rows have hits is as hard to foretell as the hits: one loop over those that have some.
        let mut rows = 0_u32;
        for (r, hits) in tile.hits.iter().enumerate() {
            rows |= u32::from(hits & valid != 0) << r;
        }
        rows &= !(u32::MAX << self.found.len().saturating_sub(s * ROWS).min(ROWS));
        while rows != 0 {
            let r = rows.trailing_zeros() as usize;
            rows &= rows - 1;
            let row = s * ROWS + r;
            if self.bench.escaped[row] {
                continue;
            }
            let candidates = &mut self.bench.candidates[row];
            candidates.push_hits(isa, &tile.upper[r], tile.hits[r] & valid, (p * COLS) as u32);
            if candidates.len() + COLS > self.room {
                self.relieve(row);
            }
        }
    }

    /// Makes room in a full row: scores candidates at once, or gives the row up.
    fn relieve(&mut self, row: usize) {
        let Wanted::Best { k, .. } = self.wanted else {
            return self.score_now(row, f32::NEG_INFINITY);
        };
        self.score_now(row, self.bench.candidates[row].threshold(self.isa(), k));
        self.raise_bar(row, k);
        if self.bench.candidates[row].len() > self.room - self.room / 4 {
            self.bench.escaped[row] = true;
            self.bench.candidates[row].clear();
            self.set_bar(row, f32::INFINITY);
        }
    }

    pub(super) fn floats(&self) -> bool {
        self.attempt == Attempt::Floats
    }

    /// Moves the candidates of a row that reach `bar` to the pairs to be scored.
    pub(super) fn list(&mut self, row: usize, bar: f32) {
        let isa = self.isa();
        let Bench { candidates, pairs, taken, .. } = &mut *self.bench;
        candidates[row].take_reaching(isa, bar, taken);
        pairs.listed.extend(taken.iter().map(|&feature| (feature, row as u32)));
    }

    /// Scores the candidates of one row that reach `bar`, and removes them.
    fn score_now(&mut self, row: usize, bar: f32) {
        let (dictionary, wanted, found) = (self.dictionary, self.wanted, &mut self.found[row]);
        let d = dictionary.plan.d();
        let x = &self.x[row * d..(row + 1) * d];
        let taken = &mut self.bench.taken;
        self.bench.candidates[row].take_reaching(dictionary.plan.isa(), bar, taken);
        for &feature in &*taken {
            found.extend(dictionary.score(feature as usize, x, wanted));
        }
        self.effort.scored += taken.len() as u64;
    }

    /// Scores the listed pairs, feature by feature.
    pub(super) fn score_listed(&mut self) {
        let (dictionary, pairs) = (self.dictionary, &mut self.bench.pairs);
        if pairs.listed.is_empty() {
            return;
        }
        pairs.sort(dictionary.n_features);
        let mut start = 0;
        while start < pairs.rows.len() {
            let (feature, end) = pairs.group(start);
            let next = if end < pairs.rows.len() { pairs.group(end).0 } else { feature };
            let group = Group {
                w: dictionary.feature(feature),
                next: dictionary.feature(next),
                rows: &pairs.rows[start..],
                len: end - start,
            };
            pairs.products.resize(group.len, 0.0);
            dots_of(dictionary.plan.isa(), group, self.x, &mut pairs.products);
            for (&row, &product) in group.rows.iter().zip(&pairs.products) {
                let (row, found) = (row as usize, &mut self.found[row as usize]);
                let bar = self.bench.strips.bar(row);
                // A bar is one of upper bounds: of a rank between two f32 the upper one counts.
                let scored = dictionary.admit(feature, product, self.wanted);
                found.extend(scored.filter(|scored| reaches(up(scored.rank), bar)));
                if let Wanted::Best { k, .. } = self.wanted
                    && found.len() >= SCORES_PER_MEMBER * k
                {
                    keep_best(found, k);
                }
            }
            start = end;
        }
        self.effort.scored += pairs.listed.len() as u64;
        pairs.listed.clear();
    }

    pub(super) fn isa(&self) -> Isa {
        self.dictionary.plan.isa()
    }

    pub(super) fn set_bar(&mut self, row: usize, bar: f32) {
        self.bench.strips.lines[row / ROWS].threshold[row % ROWS] = bar;
    }
}
