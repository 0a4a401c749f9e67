//! How rows and features of one width are screened: the arithmetic, its rounding, and the kernel of a tile.
//!
//! | path | deterministic | dithered |
//! | --- | --- | --- |
//! | `amx` | bf16 | bf16 |
//! | `avx512vnni` | bytes up to width 1536, then words | bytes |
//! | `avx512bf16` | bf16 | bf16 |
//! | `avx512`, `avx2` | narrow bytes from width 320 to 1536, else words | narrow bytes from width 320, else words |
//! | `neondot` | bytes up to width 1536, then f32 | bytes |
//! | `neon`, `plain` | f32 | f32 |
//!
//! A screen without dithering is deterministic whatever was asked for.

use super::features::Packed;
use super::quantize::{self, Limits, Rounding};
use super::rotate::Rotation;
use super::strips::{LINE, Strips, TILED_STRIPS};
use super::tile::{COLS, Columns, Lines, ROWS, Tile};
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512};
use super::{dot as dots, narrow, tile};
use crate::error::Result;
use crate::kernels::isa::{Isa, Path};

/// Arithmetic of the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    /// Signed bytes after a rotation, exact integer sums of 32 bits.
    Bytes,
    /// Somewhat smaller bytes after a rotation, exact integer sums of 16 bits; see [`narrow`].
    NarrowBytes,
    /// Signed 16-bit words, exact integer sums.
    Words,
    /// bf16 with f32 sums.
    BrainFloats,
    /// f32.
    Floats,
}

impl Screen {
    /// The screens that have a kernel on a path of this processor, fastest first.
    pub fn available(isa: Isa) -> impl Iterator<Item = Self> {
        let path = isa.path();
        let has = |least: Path| path >= least && Isa::new(least).is_some();
        // VDPBF16PS is nowhere faster than VPDPWSSD, whose words leave fewer candidates, and four times slower on Intel.
        let words_first = path == Path::Avx512Vnni;
        [
            (Self::BrainFloats, has(Path::Avx512Bf16) && !words_first),
            (Self::Bytes, matches!(path, Path::Amx | Path::Avx512Vnni | Path::NeonDot)),
            (Self::NarrowBytes, has(Path::Avx2)),
            (Self::Words, has(Path::Avx2)),
            (Self::BrainFloats, has(Path::Avx512Bf16) && words_first),
            (Self::Floats, true),
        ]
        .into_iter()
        .filter_map(|(screen, available)| available.then_some(screen))
    }
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

/// The fastest screen for width `d` of those in bytes for widths from `narrowest` (where they are narrow) to `widest`, and of others.
fn fastest(isa: Isa, d: usize, narrowest: usize, widest: usize) -> Screen {
    let fits = |screen: Screen| match screen {
        Screen::Bytes => d <= widest,
        Screen::NarrowBytes => (narrowest..=widest).contains(&d),
        Screen::Words => d <= quantize::WIDEST_WORDS,
        Screen::BrainFloats | Screen::Floats => true,
    };
    Screen::available(isa).find(|&screen| fits(screen)).unwrap_or(Screen::Floats)
}

/// Width up to which byte sums fit into 32 bits: `65536 · 255 · 128 < 2^31`.
const WIDEST_BYTES: usize = 65_536;
/// Width up to which the deterministic byte screen leaves fewer candidates than it saves over bf16 or words.
const WIDEST_CERTAIN_BYTES: usize = 1_536;
/// Width from which the narrow screen saves more than scoring its candidates costs.
const NARROWEST_NARROW: usize = 320;
/// Width from which dithering bounds tighter than rounding to nearest.
const NARROWEST_DITHERED: usize = 256;
/// Rows of larger norm may leave the range of bf16.
pub(super) const LARGEST_NORM: f64 = 1e37;
/// Rounding of scales, products and sums in the epilogue, per unit of `|x| |w|`; see [`super::tile`].
pub(super) const EPILOGUE: f64 = 1.0 / (1_u32 << 19) as f64;
/// The same per unit of bias.
pub(super) const EPILOGUE_BIAS: f64 = 1.0 / (1_u32 << 21) as f64;
/// What a feature's scale below the range of f32 may lose, half of the least number, times the largest norm of its words, `2^15.5`.
pub(super) const SCALE_UNDERFLOW: f64 = 46_341.0 * LEAST;
/// The least f32 above zero.
const LEAST: f64 = 1.401_298_464_324_817e-45;
/// Rows and features whose product of norms leaves this range are scored in f64: f32 would over- or underflow.
pub(super) const SAFE_PRODUCTS: std::ops::Range<f64> = 1e-16..1e36;

/// Tiles of the strips that a screen takes at once.
#[derive(Debug)]
pub(super) struct Tiles {
    pub(super) of_strips: Vec<Tile>,
    #[cfg(target_arch = "x86_64")]
    registers: Option<(amx::Registers, amx::Sums)>,
}

/// How rows and features of one width are rounded.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(super) isa: Isa,
    pub(super) screen: Screen,
    pub(super) certificate: Certificate,
    pub(super) d: usize,
    pub(super) rotation: Rotation,
    pub(super) centre: Option<Vec<f32>>,
    pub(super) centre_norm: f64,
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
        let screen = fastest(isa, d, NARROWEST_NARROW, widest);
        Self::with_screen(isa, screen, d, certificate, centre)
    }

    /// The screen with most products a second, for thresholds far above most scores: there a coarse one leaves no more candidates.
    pub fn coarse(isa: Isa, d: usize) -> Self {
        Self::with_screen(isa, fastest(isa, d, 1, WIDEST_BYTES), d, Certificate::Deterministic, None)
    }

    /// The plans for width `d` of every path of this processor, each with every screen that it has.
    pub fn every(d: usize, certificate: Certificate, centre: Option<&[f32]>) -> Vec<Self> {
        let screens =
            Isa::available().flat_map(|isa| Screen::available(isa).map(move |screen| (isa, screen)));
        let plan =
            |(isa, screen)| Self::with_screen(isa, screen, d, certificate, centre.map(<[f32]>::to_vec));
        screens.map(plan).collect()
    }

    /// The plan with a given screen, one of [`Screen::available`].
    fn with_screen(
        isa: Isa,
        screen: Screen,
        d: usize,
        certificate: Certificate,
        centre: Option<Vec<f32>>,
    ) -> Self {
        let dithers = matches!(screen, Screen::Bytes | Screen::NarrowBytes) && d > NARROWEST_DITHERED;
        let certificate = if dithers { certificate } else { Certificate::Deterministic };
        let centre_norm = centre.as_deref().map_or(0.0, |centre| dots::dot(isa, centre, centre).sqrt());
        Self { isa, screen, certificate, d, rotation: Rotation::new(d), centre, centre_norm }
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

    /// Whether a screen reads rows and features as they are: where it was asked to, or knows no other way.
    pub(super) fn reads_floats(&self, floats: bool) -> bool {
        floats || self.screen == Screen::Floats
    }

    /// Bytes of a panel as a screen reads it.
    pub(super) fn panel_bytes(&self, floats: bool) -> usize {
        if self.reads_floats(floats) { self.d * COLS * 4 } else { self.panel_words() * 4 }
    }

    /// Words of 32 bits in a packed panel.
    pub(super) fn panel_words(&self) -> usize {
        let narrow = self.screen == Screen::NarrowBytes;
        COLS * if narrow { narrow::panel_steps(self.steps()) } else { self.steps() }
    }

    /// What is added to every byte of a row, because the screen takes rows unsigned.
    pub(super) fn offset(&self) -> u8 {
        match self.screen {
            Screen::Bytes if self.isa.path() != Path::NeonDot => 128,
            Screen::NarrowBytes => narrow::OFFSET,
            _ => 0,
        }
    }

    /// Words of 32 bits that a row or feature takes in the screen.
    pub(super) fn steps(&self) -> usize {
        match self.screen {
            Screen::Bytes | Screen::NarrowBytes => self.d.div_ceil(4),
            Screen::BrainFloats if self.tiled(false) => self.d.div_ceil(2).next_multiple_of(LINE),
            Screen::Words | Screen::BrainFloats => self.d.div_ceil(2),
            Screen::Floats => 0,
        }
    }

    /// Rounds `v` of norm `norm`, which it spoils, into words of the screen, zero-padded.
    pub(super) fn round(&self, v: &mut [f32], norm: f64, seed: u32, words: &mut [u32]) -> Rounding {
        words.fill(0);
        match self.screen {
            Screen::Bytes | Screen::NarrowBytes => {
                self.rotation.apply(self.isa, v);
                let dither = (self.certificate == Certificate::Dithered).then_some(seed);
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
                let limits = if self.screen == Screen::Bytes { Limits::FULL } else { Limits::NARROW };
                let mut rounding = quantize::bytes(self.isa, v, limits, dither, &mut bytes[..self.d]);
                if rounding.step == 0.0 {
                    // A vector too small for a grid may be too small for the rotation as well, which then leaves nothing to measure.
                    (rounding.residual, rounding.share) = (norm, norm);
                }
                let rotated = norm * (self.rotation.rounding() + EPILOGUE);
                rounding.residual += rotated;
                rounding.share += rotated;
                rounding
            }
            Screen::Words => {
                let pairs: &mut [i16] = bytemuck::cast_slice_mut(words);
                quantize::words(self.isa, v, norm, &mut pairs[..self.d])
            }
            Screen::BrainFloats => {
                let pairs: &mut [u16] = bytemuck::cast_slice_mut(words);
                quantize::brain_floats(self.isa, v, &mut pairs[..self.d])
            }
            Screen::Floats => Rounding::EXACT,
        }
    }

    /// Bound on the rounding of a sum of `d` products in f32, per unit of the product of norms.
    pub(super) fn accumulation(&self, floats: bool) -> f64 {
        if !floats && matches!(self.screen, Screen::Bytes | Screen::NarrowBytes | Screen::Words) {
            EPILOGUE
        } else {
            EPILOGUE + (self.d + 32) as f64 * 2.0_f64.powi(-24)
        }
    }

    /// Whether the screen runs in tile registers.
    pub(super) fn tiled(&self, floats: bool) -> bool {
        !floats && self.screen == Screen::BrainFloats && self.isa.path() == Path::Amx
    }

    /// Where the tiles of a sweep are made; tile registers are this thread's until it is dropped.
    pub(super) fn tiles(&self, floats: bool) -> Tiles {
        let tiled = self.tiled(floats);
        Tiles {
            of_strips: vec![Tile::default(); if tiled { TILED_STRIPS } else { 1 }],
            #[cfg(target_arch = "x86_64")]
            registers: tiled.then(|| (amx::Registers::shape(self.isa), amx::Sums::default())),
        }
    }

    /// Bounds of the scores with the features of `panel`, of strip `s` of `x` and those that `tiles` takes with it.
    pub(super) fn screen_strips(
        &self,
        x: &[f32],
        strips: &Strips,
        s: usize,
        Packed { panel, rows: features, words }: Packed<'_>,
        floats: bool,
        tiles: &mut Tiles,
    ) {
        #[cfg(target_arch = "x86_64")]
        if let Some((registers, sums)) = &mut tiles.registers {
            let rows = strips.n_rows().saturating_sub(s * ROWS).min(TILED_STRIPS * ROWS);
            registers.multiply(strips.words(s, TILED_STRIPS), rows, words, sums);
            for (i, (tile, sums)) in tiles.of_strips.iter_mut().zip(sums.strips()).enumerate() {
                // SAFETY: the path of tile registers stands above those of AVX-512, and asks for them; see `Path`.
                #[allow(unsafe_code)]
                unsafe {
                    avx512::bounds(sums, &strips.lines[s + i], &panel.columns, tile);
                }
            }
            return;
        }
        let (lines, tile) = (&strips.lines[s], &mut tiles.of_strips[0]);
        if self.reads_floats(floats) {
            let rows = &x[s * ROWS * self.d..x.len().min((s + 1) * ROWS * self.d)];
            dots::screen(self.isa, rows, features, self.d, &mut tile.upper);
            tile::bound(self.isa, lines, &panel.float_columns, tile);
        } else {
            self.packed_tile(strips.words(s, 1), words, lines, &panel.columns, tile);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    fn packed_tile(&self, strip: &[u32], panel: &[u32], lines: &Lines, columns: &Columns, tile: &mut Tile) {
        let kernel = match self.screen {
            Screen::Bytes => avx512::bytes,
            Screen::NarrowBytes => avx2::narrow_bytes,
            Screen::Words if self.isa.path() >= Path::Avx512Vnni => avx512::words,
            Screen::Words => avx2::words,
            _ => avx512::brain_floats,
        };
        // SAFETY: a plan has a screen only on a path that has the instructions of its kernel; see `Screen::available`.
        unsafe { kernel(strip, panel, lines, columns, tile) }
    }

    #[cfg(target_arch = "aarch64")]
    #[allow(unsafe_code)]
    fn packed_tile(&self, strip: &[u32], panel: &[u32], lines: &Lines, columns: &Columns, tile: &mut Tile) {
        // SAFETY: as above; there is one packed screen.
        unsafe { super::neon::bytes(strip, panel, lines, columns, tile) }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn packed_tile(&self, _: &[u32], _: &[u32], _: &Lines, _: &Columns, _: &mut Tile) {
        unreachable!("this processor has no packed screens")
    }
}
