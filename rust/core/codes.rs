//! [`Codes`]: borrowed sparse codes, with a fixed number of slots per row or with row pointers.

use std::ops::Range;

use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug)]
enum Layout<'a> {
    Fixed { k: usize, n: usize },
    Ragged { indptr: &'a [u64] },
}

/// Sparse codes of `n` rows over `d_sae` features: per row a list of (feature, activation).
///
/// A slot with activation 0 is unfilled and its index means nothing.
///
/// ```
/// use microtome_core::Codes;
/// let codes = Codes::fixed(&[3, 1, 2, 0], &[0.5, 0.25, 1.0, 0.0], 2, 4).unwrap();
/// assert_eq!((codes.n(), codes.row(1).0), (2, &[2, 0][..]));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Codes<'a> {
    layout: Layout<'a>,
    indices: &'a [u32],
    values: &'a [f32],
    d_sae: usize,
}

impl<'a> Codes<'a> {
    /// Codes of exactly `k` slots per row, row after row.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths do not fit each other.
    pub fn fixed(indices: &'a [u32], values: &'a [f32], k: usize, d_sae: usize) -> Result<Self> {
        if k == 0 || !indices.len().is_multiple_of(k) {
            return Err(Error::shape(
                "codes",
                "rows of at least one slot",
                format!("{} slots in rows of {k}", indices.len()),
            ));
        }
        Self { layout: Layout::Fixed { k, n: indices.len() / k }, indices, values, d_sae }.checked()
    }

    /// Codes whose row `r` holds the slots `indptr[r]..indptr[r + 1]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `indptr` does not run from 0 to the number of slots without falling.
    pub fn ragged(indptr: &'a [u64], indices: &'a [u32], values: &'a [f32], d_sae: usize) -> Result<Self> {
        let ends = (indptr.first(), indptr.last());
        if ends != (Some(&0), Some(&(indices.len() as u64))) || !indptr.is_sorted() {
            return Err(Error::shape(
                "indptr",
                format!("a rising sequence from 0 to {}", indices.len()),
                format!("{} entries from {:?} to {:?}", indptr.len(), ends.0, ends.1),
            ));
        }
        Self { layout: Layout::Ragged { indptr }, indices, values, d_sae }.checked()
    }

    fn checked(self) -> Result<Self> {
        if self.indices.len() != self.values.len() {
            return Err(Error::shape(
                "values",
                format!("{} activations, as in indices", self.indices.len()),
                format!("{}", self.values.len()),
            ));
        }
        Ok(self)
    }

    /// Number of rows.
    pub fn n(&self) -> usize {
        match self.layout {
            Layout::Fixed { n, .. } => n,
            Layout::Ragged { indptr } => indptr.len() - 1,
        }
    }

    /// Number of features of the dictionary.
    pub fn d_sae(&self) -> usize {
        self.d_sae
    }

    /// All slots of the rows of `range`, side by side.
    pub fn slots(&self, range: Range<usize>) -> (&'a [u32], &'a [f32]) {
        let span = match self.layout {
            Layout::Fixed { k, .. } => range.start * k..range.end * k,
            Layout::Ragged { indptr } => indptr[range.start] as usize..indptr[range.end] as usize,
        };
        (&self.indices[span.clone()], &self.values[span])
    }

    /// The slots of row `r`.
    pub fn row(&self, r: usize) -> (&'a [u32], &'a [f32]) {
        self.slots(r..r + 1)
    }

    /// The row that holds slot `slot`.
    pub fn row_of(&self, slot: usize) -> usize {
        match self.layout {
            Layout::Fixed { k, .. } => slot / k,
            Layout::Ragged { indptr } => indptr.partition_point(|&p| p as usize <= slot) - 1,
        }
    }

    /// The error for the first slot of the rows of `range` that no metric can use: an index outside the dictionary or
    /// an activation that is not finite.
    pub fn fault(&self, range: Range<usize>) -> Error {
        for r in range {
            let (indices, values) = self.row(r);
            for (slot, (&index, &value)) in indices.iter().zip(values).enumerate() {
                if !value.is_finite() {
                    return Error::non_finite("codes.values", value, r, slot);
                }
                if value != 0.0 && index as usize >= self.d_sae {
                    return Error::shape(
                        "codes.indices",
                        format!("features below d_sae = {}", self.d_sae),
                        format!("{index} at row {r}, slot {slot}"),
                    );
                }
            }
        }
        Error::Internal("sparse codes".to_owned())
    }
}
