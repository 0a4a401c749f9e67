//! Fraction of variance unexplained: `FVU = Σ_t ‖x_t − x̂_t‖² / Σ_t ‖x_t − x̄‖²`, sum over sum.
//!
//! Each block is centred on its own mean while it is in cache, and blocks are joined by Chan's rule
//! `M₂ = M₂ᵃ + M₂ᵇ + ‖x̄ᵃ − x̄ᵇ‖² nₐ n_b / (nₐ + n_b)`, so no digits are lost where the mean is far larger than the spread.
//! Chan, Golub, `LeVeque` 1983, "Algorithms for computing the sample variance".

use super::Fold;
use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::kernels::residual::{
    Decoder, centred_squares, first_non_finite, reconstruction_error, shifted_mean, squared_error,
};
use crate::rows::Rows;

/// Rows per block: small enough to be centred while in cache.
pub const BLOCK_ROWS: usize = 256;

/// Where the reconstructions come from.
#[derive(Clone, Copy, Debug)]
pub enum Reconstruction<'a> {
    /// The second source of the scan.
    Given,
    /// Decoded on the way, row by row.
    Decoded(Codes<'a>, Decoder<'a>),
}

/// The sums behind the FVU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Variance {
    /// Number of rows.
    pub n: u64,
    /// A row; empty before the first.
    pub shift: Vec<f64>,
    /// Mean of the rows minus `shift`: kept apart so that a large mean costs no digits.
    pub offset: Vec<f64>,
    /// Σ ‖x − x̄‖².
    pub centred: f64,
    /// Σ ‖x − x̂‖².
    pub error: f64,
}

impl Variance {
    /// The sums of one block of rows whose reconstruction error is `error`.
    pub fn of(x: Rows<'_>, error: f64) -> Self {
        let (shift, offset) = shifted_mean(x);
        let centre: Vec<f64> = shift.iter().zip(&offset).map(|(s, o)| s + o).collect();
        Self { n: x.n() as u64, centred: centred_squares(x, &centre), shift, offset, error }
    }

    /// Joins the sums of rows further behind.
    pub fn merge(&mut self, later: Self) {
        if self.n == 0 {
            *self = later;
            return;
        }
        let (a, b) = (self.n as f64, later.n as f64);
        let mut gap = 0.0;
        for (j, offset) in self.offset.iter_mut().enumerate() {
            let difference = (later.shift[j] - self.shift[j]) + (later.offset[j] - *offset);
            gap += difference * difference;
            *offset += difference * (b / (a + b));
        }
        self.centred += later.centred + gap * (a * b / (a + b));
        self.error += later.error;
        self.n += later.n;
    }

    /// The fraction of variance unexplained; NaN where the rows do not vary.
    pub fn fvu(&self) -> f64 {
        if self.centred > 0.0 { self.error / self.centred } else { f64::NAN }
    }
}

/// The fold over rows `x`, and reconstructions beside them.
#[derive(Clone, Copy, Debug)]
pub struct Fvu<'a> {
    /// Where the reconstructions come from.
    pub reconstruction: Reconstruction<'a>,
}

impl Fvu<'_> {
    fn error(&self, block: &[Rows<'_>], first_row: usize) -> Result<f64> {
        match &self.reconstruction {
            Reconstruction::Given => Ok(squared_error(block[0], block[1])),
            Reconstruction::Decoded(codes, decoder) => {
                let rows = first_row..first_row + block[0].n();
                reconstruction_error(block[0], codes, first_row, decoder).ok_or_else(|| codes.fault(rows))
            }
        }
    }

    /// The error that names what made a sum of this block NaN or infinite.
    fn fault(&self, block: &[Rows<'_>], first_row: usize) -> Error {
        for (rows, name) in block.iter().zip(["x", "x_hat"]) {
            if let Some((row, column, value)) = first_non_finite(*rows) {
                return Error::non_finite(name, value, first_row + row, column);
            }
        }
        match &self.reconstruction {
            Reconstruction::Given => Error::Internal("fvu".to_owned()),
            Reconstruction::Decoded(codes, decoder) => match first_non_finite(decoder.weights) {
                Some((row, column, value)) => Error::non_finite("W_dec", value, row, column),
                None => match decoder.bias.and_then(|b| b.iter().position(|v| !v.is_finite())) {
                    Some(column) => Error::non_finite("b_dec", f32::NAN, 0, column),
                    None => codes.fault(first_row..first_row + block[0].n()),
                },
            },
        }
    }
}

impl Fold for Fvu<'_> {
    type Partial = Variance;

    fn init(&self) -> Variance {
        Variance::default()
    }

    fn update(&self, partial: &mut Variance, block: &[Rows<'_>], first_row: usize) -> Result<()> {
        let sums = Variance::of(block[0], self.error(block, first_row)?);
        if !(sums.centred.is_finite() && sums.error.is_finite()) {
            return Err(self.fault(block, first_row));
        }
        partial.merge(sums);
        Ok(())
    }

    fn merge(&self, into: &mut Variance, later: Variance) -> Result<()> {
        into.merge(later);
        Ok(())
    }
}
