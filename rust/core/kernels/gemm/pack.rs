//! Packing: features into panels once, rows into strips block by block, each with the bounds of its rounding.

use super::dot::dot;
use super::isa::{Isa, Path};
use super::quantize::{self, Rounding};
use super::rotate::Rotation;
use super::tile::{COLS, Columns, Lines, ROWS, Tile};
use super::{dot as dots, tile};
use crate::error::Result;

/// Arithmetic of the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    /// Signed bytes after a rotation, exact integer sums.
    Bytes,
    /// bf16 with f32 sums.
    BrainFloats,
    /// f32.
    Floats,
}

/// What a screen's bound rests on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Certificate {
    /// Cauchy–Schwarz: holds always.
    #[default]
    Deterministic,
    /// Hoeffding over dithered rounding: fails with probability [`quantize::FAILURE`] per inner product.
    Dithered,
}

/// Width up to which byte sums fit into 32 bits: `65536 · 255 · 128 < 2^31`.
const WIDEST_BYTES: usize = 65_536;
/// Width up to which the deterministic byte screen leaves fewer candidates than it saves over bf16.
const WIDEST_CERTAIN_BYTES: usize = 1_536;
/// Width from which dithering bounds tighter than rounding to nearest.
const NARROWEST_DITHERED: usize = 256;
/// Width from which candidates of the deterministic byte screen are bounded again in bf16 before they are scored.
const NARROWEST_REFINED: usize = 1024;
/// Rows of larger norm may leave the range of bf16.
const LARGEST_NORM: f64 = 1e37;
/// Rounding of scales, products and sums in the epilogue, per unit of `|x| |w|`; see [`super::tile`].
const EPILOGUE: f64 = 1.0 / (1_u32 << 19) as f64;
/// The same per unit of bias.
const EPILOGUE_BIAS: f64 = 1.0 / (1_u32 << 21) as f64;
/// Rows and features whose product of norms leaves this range are scored in f64: f32 would over- or underflow.
const SAFE_PRODUCTS: std::ops::Range<f64> = 1e-16..1e36;

/// How rows and features of one width are rounded.
#[derive(Clone, Debug)]
pub struct Plan {
    isa: Isa,
    screen: Screen,
    certificate: Certificate,
    d: usize,
    rotation: Rotation,
    /// The path of the second bounds, where there are any.
    halves: Option<Isa>,
    centre: Option<Vec<f32>>,
}

/// Features `32 p .. 32 (p + 1)` of a dictionary.
#[derive(Debug)]
pub struct Panel {
    /// The features as they are, row-major, without padding.
    pub(super) rows: Vec<f32>,
    /// The features as the screen reads them.
    words: Vec<u32>,
    columns: Columns,
    /// Columns of the f32 screen.
    float_columns: Columns,
    /// The features in bf16, row-major, where the plan bounds twice; and what rounding took from them.
    halves: Vec<u16>,
    half_residual: [f32; COLS],
    /// What is added to the inner product of each feature.
    pub(super) bias: [f64; COLS],
    /// Scores are pre-activations times this.
    pub(super) weight: [f64; COLS],
    /// Pre-activation that a feature must exceed.
    pub(super) threshold: [f64; COLS],
    pub(super) largest_norm: f64,
}

/// The widest a bound can be, over the features of a panel or dictionary; see [`super::tile`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slack {
    norm: f64,
    residual: f64,
    bias: f64,
}

impl Halves {
    /// As [`Slack::gap`], for a row under the second bounds.
    pub(super) fn gap(&self, slack: Slack, row: usize) -> f64 {
        slack.gap(self.slack[row], self.norm[row], false)
    }
}

impl Slack {
    pub(super) fn or_larger(self, other: Self) -> Self {
        Self {
            norm: self.norm.max(other.norm),
            residual: self.residual.max(other.residual),
            bias: self.bias.max(other.bias),
        }
    }

    /// How far an upper bound of a row can lie above the real score: twice its slack, and the rounding of the bound.
    pub(super) fn gap(self, slack: f32, norm: f32, floats: bool) -> f64 {
        let residual = if floats { 0.0 } else { self.residual };
        let width = f64::from(slack) * self.norm + f64::from(norm) * residual + self.bias;
        2.0 * (width + f64::from(norm) * self.norm * EPILOGUE)
    }
}

impl Panel {
    /// The features in bf16.
    pub(super) fn half(&self, c: usize, d: usize) -> &[u16] {
        &self.halves[c * d..(c + 1) * d]
    }

    /// The second upper bound of the score of feature `c` and row `row`, from their f32 sum of bf16 products.
    pub(super) fn refined(&self, c: usize, halves: &Halves, row: usize, sum: f32) -> f32 {
        let columns = &self.float_columns;
        let slack = halves.slack[row] * columns.norm[c] + halves.norm[row] * self.half_residual[c];
        sum * columns.scale[c] + (slack + columns.bias[c])
    }

    /// The widest slack of the panel's features under the second bounds.
    pub(super) fn largest_half_slack(&self) -> Slack {
        let residual = self.half_residual.iter().copied().fold(0.0, f32::max).into();
        Slack { residual, ..self.largest_slack() }
    }

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

/// Rows of a block as a screen reads them.
#[derive(Debug, Default)]
pub struct Strips {
    words: Vec<u32>,
    /// Bounds and thresholds, one entry per strip of [`ROWS`] rows.
    pub lines: Vec<Lines>,
    scratch: Vec<f32>,
    word: Vec<u32>,
}

/// Rows in bf16 for the second bounds.
#[derive(Debug, Default)]
pub(super) struct Halves {
    pub(super) x: Vec<u16>,
    slack: Vec<f32>,
    norm: Vec<f32>,
}

impl Plan {
    /// The fastest screen for width `d` on the processor's path.
    ///
    /// `centre` is subtracted from rows before they are rounded; it must already be part of every bias.
    ///
    /// # Errors
    /// As [`Isa::choose`].
    pub fn new(d: usize, certificate: Certificate, centre: Option<Vec<f32>>) -> Result<Self> {
        Ok(Self::with_isa(Isa::choose()?, d, certificate, centre))
    }

    /// The plan on a given path.
    pub fn with_isa(isa: Isa, d: usize, certificate: Certificate, centre: Option<Vec<f32>>) -> Self {
        let widest = if certificate == Certificate::Dithered { WIDEST_BYTES } else { WIDEST_CERTAIN_BYTES };
        let screen = match isa.path() {
            Path::Avx512Vnni if d <= widest => Screen::Bytes,
            Path::Avx512Vnni if Isa::new(Path::Avx512Bf16).is_some() => Screen::BrainFloats,
            Path::Avx512Bf16 => Screen::BrainFloats,
            _ => Screen::Floats,
        };
        let dithers = screen == Screen::Bytes && d > NARROWEST_DITHERED;
        let certificate = if dithers { certificate } else { Certificate::Deterministic };
        let refines = screen == Screen::Bytes && certificate == Certificate::Deterministic;
        let halves = if refines && d >= NARROWEST_REFINED && d.is_multiple_of(32) {
            Isa::new(Path::Avx512Bf16)
        } else {
            None
        };
        Self { isa, screen, certificate, d, rotation: Rotation::new(d), halves, centre }
    }

    /// The path taken.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Arithmetic of the screen.
    pub fn screen(&self) -> Screen {
        self.screen
    }

    /// The path of the second bounds, where the plan bounds twice.
    pub(super) fn refines(&self) -> Option<Isa> {
        self.halves
    }

    /// Width of rows and features.
    pub fn d(&self) -> usize {
        self.d
    }

    /// Bytes of one packed panel.
    pub(super) fn panel_bytes(&self, floats: bool) -> usize {
        let words = if floats { self.d } else { self.steps() };
        words * COLS * 4
    }

    fn steps(&self) -> usize {
        match self.screen {
            Screen::Bytes => self.d.div_ceil(4),
            Screen::BrainFloats => self.d.div_ceil(2),
            Screen::Floats => 0,
        }
    }

    /// Packs up to [`COLS`] features, row-major; `number` is the panel's place in the dictionary.
    pub fn panel(&self, number: usize, rows: Vec<f32>, terms: &Terms) -> Panel {
        let mut words = vec![0; self.steps() * COLS];
        let (mut columns, mut float_columns) = (Columns::padding(), Columns::padding());
        let (mut scratch, mut word) = (vec![0.0; self.d], vec![0; self.steps()]);
        let mut largest_norm = 0.0_f64;
        let mut halves = vec![0; if self.halves.is_some() { rows.len() } else { 0 }];
        let mut half_residual = [0.0; COLS];
        for (c, w) in rows.chunks_exact(self.d).enumerate() {
            let norm = dot(self.isa, w, w).sqrt();
            largest_norm = largest_norm.max(norm * terms.weight[c].max(1.0));
            scratch.copy_from_slice(w);
            let seed = (number * COLS + c) as u32 ^ 0x5bd1_e995;
            let rounding = self.round(&mut scratch, norm, seed, &mut word);
            for (step, &word) in word.iter().enumerate() {
                words[step * COLS + c] = word;
            }
            let offset: i32 = bytemuck::cast_slice::<u32, i8>(&word).iter().map(|&b| i32::from(b)).sum();
            let (weight, bias) = (terms.weight[c], terms.bias[c]);
            let centred = bias + self.centre.as_ref().map_or(0.0, |centre| dot(self.isa, centre, w));
            let sides = [(&mut columns, centred, rounding), (&mut float_columns, bias, Rounding::EXACT)];
            for (columns, bias, rounding) in sides {
                columns.scale[c] = (f64::from(rounding.step) * weight) as f32;
                columns.norm[c] = up(norm * weight);
                columns.residual[c] = up(rounding.share * weight);
                let slack = (bias.abs() * weight + terms.threshold[c].abs()) * EPILOGUE_BIAS;
                columns.bias[c] = up(bias * weight - terms.threshold[c] + slack);
            }
            columns.offset[c] = -128 * offset;
            if let Some(isa) = self.halves {
                let rounding = quantize::brain_floats(isa, w, &mut halves[c * self.d..(c + 1) * self.d]);
                half_residual[c] = up(rounding.share * weight);
            }
        }
        let (bias, weight, threshold) = (terms.bias, terms.weight, terms.threshold);
        Panel {
            rows,
            words,
            columns,
            float_columns,
            halves,
            half_residual,
            bias,
            weight,
            threshold,
            largest_norm,
        }
    }

    /// Rounds `v` of norm `norm`, which it spoils, into words of the screen, zero-padded.
    fn round(&self, v: &mut [f32], norm: f64, seed: u32, words: &mut [u32]) -> Rounding {
        words.fill(0);
        match self.screen {
            Screen::Bytes => {
                self.rotation.apply(self.isa, v);
                let dither = (self.certificate == Certificate::Dithered).then_some(seed);
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
                let mut rounding = quantize::bytes(self.isa, v, dither, &mut bytes[..self.d]);
                let rotated = norm * (self.rotation.rounding() + EPILOGUE);
                rounding.residual += rotated;
                rounding.share += rotated;
                rounding
            }
            Screen::BrainFloats => {
                let pairs: &mut [u16] = bytemuck::cast_slice_mut(words);
                quantize::brain_floats(self.isa, v, &mut pairs[..self.d])
            }
            Screen::Floats => Rounding::EXACT,
        }
    }

    /// Bound on the rounding of a sum of `d` products in f32, per unit of the product of norms.
    fn accumulation(&self, floats: bool) -> f64 {
        if !floats && self.screen == Screen::Bytes {
            EPILOGUE
        } else {
            EPILOGUE + (self.d + 32) as f64 * 2.0_f64.powi(-24)
        }
    }

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
            line.slack[i % ROWS] =
                up(rounding.share + norm * (self.accumulation(floats) + 2.0_f64.powi(-23)));
            line.norm[i % ROWS] = up(norm + rounding.residual);
            let strip = &mut strips.words[i / ROWS * ROWS * steps..][..ROWS * steps];
            let flip = if self.screen == Screen::Bytes { 0x8080_8080 } else { 0 };
            for (step, word) in strips.word.iter().enumerate() {
                strip[step * ROWS + i % ROWS] = word ^ flip;
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
            halves.slack.push(up(rounding.share + norm * self.accumulation(true)));
            halves.norm.push(up(norm + rounding.residual));
        }
    }

    fn centred(&self, x: &[f32], to: &mut [f32]) {
        to.copy_from_slice(x);
        for (t, c) in to.iter_mut().zip(self.centre.as_deref().unwrap_or_default()) {
            *t -= c;
        }
    }

    /// Bounds of the scores of strip `s` of `x` with the features of `panel`.
    pub(super) fn tile(
        &self,
        x: &[f32],
        strips: &Strips,
        s: usize,
        panel: &Panel,
        floats: bool,
        tile: &mut Tile,
    ) {
        let lines = &strips.lines[s];
        if floats || self.screen == Screen::Floats {
            let rows = &x[s * ROWS * self.d..x.len().min((s + 1) * ROWS * self.d)];
            dots::screen(self.isa, rows, &panel.rows, self.d, &mut tile.upper);
            tile::bound(self.isa, lines, &panel.float_columns, tile);
            return;
        }
        let words = self.steps() * ROWS;
        let strip = &strips.words[s * words..(s + 1) * words];
        self.packed_tile(strip, panel, lines, tile);
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    fn packed_tile(&self, strip: &[u32], panel: &Panel, lines: &Lines, tile: &mut Tile) {
        if self.screen == Screen::Bytes {
            // SAFETY: this screen is chosen only on a path with VNNI, see `with_isa`.
            unsafe { super::avx512::bytes(strip, &panel.words, lines, &panel.columns, tile) }
        } else {
            // SAFETY: this screen is chosen only where the bf16 path is available, see `with_isa`.
            unsafe { super::avx512::brain_floats(strip, &panel.words, lines, &panel.columns, tile) }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn packed_tile(&self, _: &[u32], _: &Panel, _: &Lines, _: &mut Tile) {
        unreachable!("packed screens are chosen on x86-64 alone")
    }
}

impl Columns {
    fn padding() -> Self {
        Self {
            scale: [0.0; COLS],
            bias: [f32::NEG_INFINITY; COLS],
            norm: [0.0; COLS],
            residual: [0.0; COLS],
            offset: [0; COLS],
        }
    }
}

/// The next f32 above `v`, or `v` where it is one.
pub(super) fn up(v: f64) -> f32 {
    let rounded = v as f32;
    if f64::from(rounded) < v { rounded.next_up() } else { rounded }
}

/// The next f32 below `v`, or `v` where it is one.
pub(super) fn down(v: f64) -> f32 {
    -up(-v)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number of mean zero and spread one, and the next state: enough of a Gaussian to test bounds.
    fn normal(state: &mut u64) -> f32 {
        let mut sum = 0.0;
        for _ in 0..4 {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (*state >> 40) as f32 / (1 << 24) as f32 - 0.5;
        }
        sum * 1.732
    }

    fn vectors(n: usize, d: usize, kind: usize, state: &mut u64) -> Vec<f32> {
        (0..n * d)
            .map(|i| match kind {
                0 => normal(state),
                1 if i % d % 61 == 3 => normal(state) * 1000.0,
                2 => normal(state) * 2.0_f32.powi((normal(state) * 8.0) as i32),
                3 => normal(state).round(),
                _ => normal(state) + 5.0,
            })
            .collect()
    }

    /// Compares bounds and real scores of `tiles` tiles per instruction set; the largest share of the slack in use.
    fn worst_pair(tiles: usize, certificate: Certificate) -> f64 {
        let mut worst = 0.0_f64;
        for isa in Isa::available() {
            let mut state = 7;
            for t in 0..tiles {
                let d = [16, 64, 100, 300, 513][t % 5];
                let w = vectors(COLS, d, t / 5 % 5, &mut state);
                let x = vectors(ROWS, d, t / 25 % 5, &mut state);
                let centre = (t % 3 == 0).then(|| vectors(1, d, 0, &mut state));
                let plan = Plan::with_isa(isa, d, certificate, centre);
                let panel = plan.panel(t, w.clone(), &Terms::default());
                let mut strips = Strips::default();
                assert!(plan.strips(&x, panel.largest_norm, false, &mut strips).is_empty());
                let mut tile = Tile::default();
                plan.tile(&x, &strips, 0, &panel, false, &mut tile);
                let line = &strips.lines[0];
                for (r, x) in x.chunks(d).enumerate() {
                    let gap = panel.largest_slack().gap(line.slack[r], line.norm[r], false);
                    for (c, w) in w.chunks(d).enumerate() {
                        let above = f64::from(tile.upper[r][c]) - dot(isa, x, w);
                        assert!(
                            (0.0..=gap).contains(&above),
                            "{isa:?} tile {t} ({r}, {c}): {above} of {gap}"
                        );
                        worst = worst.max((above / gap - 0.5).abs() * 2.0);
                    }
                }
            }
        }
        worst
    }

    #[test]
    fn a_million_random_pairs_keep_their_certificate() {
        let tiles = 1_000_000 / (ROWS * COLS) / Isa::available().count() / 2 + 1;
        for certificate in [Certificate::Deterministic, Certificate::Dithered] {
            assert!(worst_pair(tiles, certificate) < 1.0);
        }
    }

    #[test]
    #[ignore = "full tier: minutes"]
    fn a_hundred_million_random_pairs_keep_their_certificate() {
        let tiles = 100_000_000 / (ROWS * COLS) / Isa::available().count() / 2 + 1;
        for certificate in [Certificate::Deterministic, Certificate::Dithered] {
            assert!(worst_pair(tiles, certificate) < 1.0);
        }
    }

    #[test]
    fn second_bounds_keep_their_certificate() {
        for isa in Isa::available() {
            let (mut state, d) = (3, NARROWEST_REFINED);
            let plan = Plan::with_isa(isa, d, Certificate::Deterministic, None);
            let Some(halves_isa) = plan.refines() else { continue };
            for t in 0..25 {
                let (w, x) = (vectors(COLS, d, t / 5, &mut state), vectors(ROWS, d, t % 5, &mut state));
                let panel = plan.panel(t, w.clone(), &Terms::default());
                let mut halves = Halves::default();
                plan.halve(halves_isa, &x, &mut halves);
                let rows: Vec<u32> = (0..ROWS as u32).collect();
                let mut sums = [0.0; ROWS];
                for (c, w) in w.chunks(d).enumerate() {
                    let group =
                        dots::Group { w: panel.half(c, d), next: panel.half(c, d), rows: &rows, len: ROWS };
                    dots::half_dots_of(halves_isa, group, &halves.x, &mut sums);
                    for (r, x) in x.chunks(d).enumerate() {
                        let above = f64::from(panel.refined(c, &halves, r, sums[r])) - dot(isa, x, w);
                        let gap = halves.gap(panel.largest_half_slack(), r);
                        assert!((0.0..=gap).contains(&above), "tile {t} ({r}, {c}): {above} of {gap}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_beyond_the_range_of_f32_are_named_misfits() {
        let plan = Plan::with_isa(Isa::PLAIN, 2, Certificate::Deterministic, None);
        let x = [1e30, 1e30, 1.0, 1.0, 0.0, 0.0, 1e-30, 0.0];
        assert_eq!(plan.strips(&x, 1e10, true, &mut Strips::default()), [0, 3]);
    }
}
