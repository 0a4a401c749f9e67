//! Reconstruction from sparse codes: `x̂ = Σ_j z_j W_dec[j] + b_dec`, over the entries of each row alone.
//!
//! The terms are added in f32 in the order of the entries, multiplication and addition apart, so the bits do not
//! depend on instruction set, threads or block size.

use crate::Element;
use crate::error::{Error, Result};
use crate::rows::Rows;
use crate::with_elements;

/// Borrowed codes in CSR form: the entries of row `i` are those at `indptr[i]..indptr[i + 1]`.
#[derive(Clone, Copy, Debug)]
pub struct CsrCodes<'a> {
    /// Where each row begins and ends, `n + 1` numbers.
    pub indptr: &'a [i64],
    /// Feature of each entry.
    pub indices: &'a [u32],
    /// Activation of each entry.
    pub values: &'a [f32],
}

impl CsrCodes<'_> {
    /// Number of rows.
    pub fn n(&self) -> usize {
        self.indptr.len().saturating_sub(1)
    }

    /// Checks that the pointers rise from 0 to the number of entries and that features lie below `d_sae`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming what is wrong.
    pub fn check(&self, d_sae: usize) -> Result<()> {
        let entries = self.indices.len();
        let end = i64::try_from(entries).ok();
        let rising = self.indptr.windows(2).all(|w| w[0] <= w[1]);
        let ends = (self.indptr.first().copied(), self.indptr.last().copied());
        if !rising || ends != (Some(0), end) || self.values.len() != entries {
            let found = format!("{} values, pointers from {:?} to {:?}", self.values.len(), ends.0, ends.1);
            return Err(Error::shape("indptr", format!("to rise from 0 to {entries} entries"), found));
        }
        match self.indices.iter().max() {
            Some(&top) if top as usize >= d_sae => {
                Err(Error::shape("indices", format!("below d_sae = {d_sae}"), top.to_string()))
            }
            _ => Ok(()),
        }
    }
}

/// Writes the reconstruction of row `first_row + i` of `codes` into row `i` of `out`, which has the width of `w_dec`.
///
/// `codes` has passed [`CsrCodes::check`] against the rows of `w_dec`.
pub fn decode_rows(
    codes: &CsrCodes<'_>,
    first_row: usize,
    w_dec: Rows<'_>,
    b_dec: Option<&[f32]>,
    out: &mut [f32],
) {
    let d = w_dec.d();
    for (i, x_hat) in out.chunks_exact_mut(d).enumerate() {
        x_hat.fill(0.0);
        let span = codes.indptr[first_row + i] as usize..codes.indptr[first_row + i + 1] as usize;
        for (&feature, &value) in codes.indices[span.clone()].iter().zip(&codes.values[span]) {
            let start = feature as usize * d;
            with_elements!(w_dec.data(), w => add_scaled(x_hat, value, &w[start..start + d]));
        }
        for (x, b) in x_hat.iter_mut().zip(b_dec.unwrap_or_default()) {
            *x += b;
        }
    }
}

fn add_scaled<T: Element>(x_hat: &mut [f32], value: f32, direction: &[T]) {
    for (x, &w) in x_hat.iter_mut().zip(direction) {
        *x += value * w.widen();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::Data;

    #[test]
    fn decode_adds_the_scaled_directions_and_the_bias() {
        let w = [1.0_f32, 2.0, 10.0, 20.0, 100.0, 200.0];
        let codes = CsrCodes { indptr: &[0, 2, 2], indices: &[2, 0], values: &[0.5, 3.0] };
        codes.check(3).unwrap();
        let mut out = [f32::NAN; 4];
        decode_rows(&codes, 0, Rows::new(Data::F32(&w), 2).unwrap(), Some(&[1.0, -1.0]), &mut out);
        assert_eq!(out, [54.0, 105.0, 1.0, -1.0]);
    }

    #[test]
    fn codes_beyond_the_dictionary_are_refused() {
        let codes = CsrCodes { indptr: &[0, 1], indices: &[3], values: &[1.0] };
        assert!(codes.check(3).is_err());
        let torn = CsrCodes { indptr: &[0, 2], indices: &[1], values: &[1.0] };
        assert!(torn.check(3).is_err());
    }
}
