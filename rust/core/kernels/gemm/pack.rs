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
const WIDEST_CERTAIN_BYTES: usize = 6_144;
/// Width from which dithering bounds tighter than rounding to nearest.
const NARROWEST_DITHERED: usize = 256;
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
    /// What is added to the inner product of each feature.
    pub(super) bias: [f64; COLS],
    /// Scores are pre-activations times this.
    pub(super) weight: [f64; COLS],
    /// Pre-activation that a feature must exceed.
    pub(super) threshold: [f64; COLS],
    pub(super) largest_norm: f64,
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
        Self { isa, screen, certificate, d, rotation: Rotation::new(d), centre }
    }

    /// The path taken.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Arithmetic of the screen.
    pub fn screen(&self) -> Screen {
        self.screen
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
        }
        let (bias, weight, threshold) = (terms.bias, terms.weight, terms.threshold);
        Panel { rows, words, columns, float_columns, bias, weight, threshold, largest_norm }
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
            if norm > 0.0 && !SAFE_PRODUCTS.contains(&(norm * largest_norm)) {
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
