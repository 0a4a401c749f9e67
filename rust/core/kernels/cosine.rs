//! Cosines between the rows of two dictionaries: exact ones in `f64`, and a screen that says which are worth computing.
//!
//! Rows are scaled to unit length and rounded to what the fastest kernel of [`tile`](super::tile) multiplies: pairs of
//! `bf16` where there is an instruction for them, else `f32`. With `q` the rounded row, `e = |u - q|` its distance from the
//! true unit row, and `g = depth * 2^-24` for the sum in `f32`, Cauchy and Schwarz give
//!
//! ```text
//! |cos(a, b) - q_a q_b| <= e_a + (1 + e_a) e_b + g (1 + e_a)(1 + e_b)
//! ```
//!
//! for every pair, whatever the data. A pair whose screened value is lower than the k-th best of its row by more than twice
//! that is no match. The few others are scored again in `f64`.

use half::bf16;

use super::tile::{Kernel, PANEL, PRODUCT, Word, pair_words};

/// Lanes of the `f64` sums; part of the definition of a cosine's last bit.
const LANES: usize = 8;

/// `(a'b, a'a, b'b)` in `f64`. Products of `f32` are exact; lane `i mod 8` adds its terms in order.
pub fn dots(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let mut sums = [[0.0_f64; LANES]; 3];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (lane, (a, b)) in a.iter().zip(b).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(*b));
            sums[0][lane] += a * b;
            sums[1][lane] += a * a;
            sums[2][lane] += b * b;
        }
    }
    let [ab, aa, bb] = sums.map(|lanes| lanes.iter().sum());
    (ab, aa, bb)
}

/// The cosine of two rows; NaN when one of them is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let (ab, aa, bb) = dots(a, b);
    ab / (aa.sqrt() * bb.sqrt())
}

/// How rows are rounded for the screen.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    kernel: Kernel,
    word: Word,
    d: usize,
}

impl Screen {
    /// The fastest screen of this machine for rows of width `d`.
    pub fn best(d: usize) -> Self {
        Self::with(Word::Bf16Pair, d).unwrap_or(Self { kernel: Kernel::f32(), word: Word::F32, d })
    }

    /// The screen that rounds to `word`; `None` when this machine has no kernel for it.
    pub fn with(word: Word, d: usize) -> Option<Self> {
        Kernel::best(word).map(|kernel| Self { kernel, word, d })
    }

    /// Words of a packed row.
    pub fn depth(&self) -> usize {
        match self.word {
            Word::F32 => self.d,
            Word::Bf16Pair => self.d.div_ceil(2),
        }
    }

    /// Words of a panel of 32 rows.
    pub fn panel_words(&self) -> usize {
        self.depth() * PANEL
    }

    /// Packs up to 32 rows with their norms into a panel; returns the largest rounding error of a row.
    pub fn pack(&self, rows: &[f32], norms: &[f64], panel: &mut [u32]) -> f64 {
        panel.fill(0);
        let mut unit = vec![0.0_f32; self.d];
        let mut rounded = vec![bf16::ZERO; self.d.next_multiple_of(2)];
        let mut worst = 0.0_f64;
        for (i, (row, norm)) in rows.chunks_exact(self.d).zip(norms).enumerate() {
            let mut error = 0.0;
            for (u, x) in unit.iter_mut().zip(row) {
                let exact = f64::from(*x) / norm;
                *u = exact as f32;
                if self.word == Word::Bf16Pair {
                    *u = bf16::from_f32(*u).to_f32();
                }
                error += (exact - f64::from(*u)).powi(2);
            }
            worst = worst.max(error.sqrt());
            let column = panel.iter_mut().skip(i).step_by(PANEL);
            match self.word {
                Word::F32 => column.zip(&unit).for_each(|(word, u)| *word = u.to_bits()),
                Word::Bf16Pair => {
                    rounded.iter_mut().zip(&unit).for_each(|(r, u)| *r = bf16::from_f32(*u));
                    column.zip(rounded.chunks_exact(2)).for_each(|(word, r)| {
                        let mut one = [0];
                        pair_words(&r[..1], &r[1..], &mut one);
                        *word = one[0];
                    });
                }
            }
        }
        // The division and the square root above are themselves rounded, by far less than this.
        worst * (1.0 + 1e-6) + 1e-12
    }

    /// Distance at most between a screened and a true cosine, from the largest rounding errors of both sides.
    pub fn bound(&self, error_a: f64, error_b: f64) -> f64 {
        let steps = (2 * self.depth() + 2) as f64 * 2.0_f64.powi(-24);
        error_a + (1.0 + error_a) * error_b + steps * (1.0 + error_a) * (1.0 + error_b) + 1e-30
    }

    /// Screened cosines of the 32 rows of `a` with the 32 of `b`.
    pub fn product(&self, a: &[u32], b: &[u32], out: &mut [f32; PRODUCT]) {
        self.kernel.product(a, b, self.depth(), out);
    }
}

/// The best screened matches of one row so far, and every candidate that they leave open.
#[derive(Clone, Debug)]
pub struct Candidates {
    k: usize,
    /// Twice the bound of the screen.
    margin: f32,
    /// Screened values below it are no match.
    threshold: f32,
    /// `(screened cosine, index)`.
    open: Vec<(f32, u32)>,
    full: usize,
}

impl Candidates {
    /// No candidate yet.
    pub fn new(k: usize) -> Self {
        Self { k, margin: 0.0, threshold: f32::NEG_INFINITY, open: Vec::new(), full: 4 * k + 32 }
    }

    /// Announces values that may be off by `bound`, as [`Screen::bound`] gives it.
    pub fn allow(&mut self, bound: f64) {
        let margin = (2.0 * bound) as f32 * (1.0 + 1e-6) + f32::MIN_POSITIVE;
        if margin > self.margin {
            self.margin = margin;
            self.threshold = f32::NEG_INFINITY;
            self.prune();
        }
    }

    /// Looks at the screened cosines of rows `first..first + values.len()`.
    pub fn offer(&mut self, values: &[f32], first: usize) {
        let best = values.iter().fold(f32::NEG_INFINITY, |best, v| best.max(*v));
        if best < self.threshold {
            return;
        }
        for (i, &value) in values.iter().enumerate() {
            if value >= self.threshold {
                self.open.push((value, (first + i) as u32));
            }
        }
        if self.open.len() >= self.full {
            self.prune();
            self.full = 2 * self.open.len().max(2 * self.k + 16);
        } else if self.k == 1 {
            self.threshold = self.threshold.max(best - self.margin);
        }
    }

    /// Drops what the k-th best rules out.
    fn prune(&mut self) {
        if self.open.len() < self.k {
            return;
        }
        let (_, kth, _) = self.open.select_nth_unstable_by(self.k - 1, |a, b| b.0.total_cmp(&a.0));
        self.threshold = self.threshold.max(kth.0 - self.margin);
        let threshold = self.threshold;
        self.open.retain(|(value, _)| *value >= threshold);
    }

    /// Indices that may be among the k best, ascending.
    pub fn finish(&mut self) -> Vec<u32> {
        self.prune();
        let mut indices: Vec<u32> = self.open.iter().map(|(_, index)| *index).collect();
        indices.sort_unstable();
        indices
    }
}
