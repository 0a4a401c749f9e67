//! One tile of the product: upper bounds of [`ROWS`] × [`COLS`] scores, and which of them reach their row's threshold.
//!
//! A screened score `s` of row `x` and feature `w` is within `ε = slack_x · |w| + |x_q| · |e_w|` of the real one (see
//! [`super::quantize`]). The tile keeps `u = s + ε`: a feature with `u` below the threshold cannot be a member.

use crate::kernels::isa::per_isa;

/// Rows of a tile.
pub const ROWS: usize = 12;
/// Features of a tile, and of a packed panel.
pub const COLS: usize = 32;

/// Upper bounds of a tile of scores.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Tile {
    /// Upper bound of each score.
    pub upper: [[f32; COLS]; ROWS],
    /// Bit `c` of entry `r`: score `(r, c)` may reach the threshold of row `r`.
    pub hits: [u32; ROWS],
}

impl Default for Tile {
    fn default() -> Self {
        Self { upper: [[0.0; COLS]; ROWS], hits: [0; ROWS] }
    }
}

/// What the screen knows of the rows of a strip.
#[derive(Clone, Debug, Default)]
#[repr(C, align(64))]
pub struct Lines {
    /// Step of the quantised row; 1 where the screen keeps floats.
    pub scale: [f32; ROWS],
    /// Bound on the row's share of the error, per unit of feature norm.
    pub slack: [f32; ROWS],
    /// Norm of the rounded row.
    pub norm: [f32; ROWS],
    /// Score that a feature must be able to reach.
    pub threshold: [f32; ROWS],
}

/// What the screen knows of the features of a panel.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Columns {
    /// Step of the quantised feature, or 1 where the screen keeps floats, times the feature's weight.
    pub scale: [f32; COLS],
    /// Bias less the feature's own threshold, times the feature's weight, rounded up. Minus infinity in padding.
    pub bias: [f32; COLS],
    /// Norm of the feature.
    pub norm: [f32; COLS],
    /// Norm of what rounding took from the feature.
    pub residual: [f32; COLS],
    /// Sum that undoes the offset of unsigned rows, where their products are added in 32 bits.
    pub offset: [i32; COLS],
}

impl Columns {
    /// Columns of a panel without features.
    pub(super) fn padding() -> Self {
        Self {
            scale: [0.0; COLS],
            bias: [f32::NEG_INFINITY; COLS],
            norm: [0.0; COLS],
            residual: [0.0; COLS],
            offset: [0; COLS],
        }
    }
}

#[inline(always)]
fn bound_body<const FUSED: bool>(lines: &Lines, columns: &Columns, tile: &mut Tile) {
    for r in 0..ROWS {
        let upper = &mut tile.upper[r];
        let (slack, norm, threshold) = (lines.slack[r], lines.norm[r], lines.threshold[r]);
        for (c, upper) in upper.iter_mut().enumerate() {
            let slack = slack * columns.norm[c] + (norm * columns.residual[c] + columns.bias[c]);
            *upper = *upper * columns.scale[c] + slack;
        }
        // Not a number counts as a hit: what cannot be bounded must not be dropped.
        let hit = |u: f32| u32::from(u >= threshold || u.is_nan());
        tile.hits[r] = (0..COLS).fold(0, |hits, c| hits | (hit(upper[c]) << c));
    }
}

per_isa! {
    /// Turns the plain f32 sums in `tile.upper` into bounds, and marks the hits.
    pub(super) fn bound(lines: &Lines, columns: &Columns, tile: &mut Tile) = bound_body;
}
