//! Metrics as folds over blocks of rows. A fold keeps partial results that merge; it opens no file and starts no thread.

pub mod circuit;
pub mod cka;
pub mod decode;
pub mod encode;
pub mod firing;
pub mod fvu;
pub mod similarity;
pub mod top;

use crate::error::{Error, Result};
pub use crate::scan::{FeatureFold, Fold, PIECE};

/// A group for every row, e.g. its token kind; or one group for all rows.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    of_rows: Option<&'a [u32]>,
    n: usize,
}

impl<'a> Groups<'a> {
    /// All rows in one group.
    pub const ONE: Self = Self { of_rows: None, n: 1 };

    /// Row `r` in group `of_rows[r]`, one of `n`.
    ///
    /// # Errors
    /// [`Error::Shape`] when a group is not below `n`.
    pub fn new(of_rows: &'a [u32], n: usize) -> Result<Self> {
        match of_rows.iter().position(|&g| g as usize >= n) {
            Some(row) => {
                Err(Error::shape("by", format!("groups below {n}"), format!("{} at row {row}", of_rows[row])))
            }
            None => Ok(Self { of_rows: Some(of_rows), n }),
        }
    }

    /// Number of groups.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The group of every row; `None` where all rows are in one.
    pub fn of_rows(&self) -> Option<&'a [u32]> {
        self.of_rows
    }

    /// The group of row `r`.
    pub fn of(&self, r: usize) -> usize {
        self.of_rows.map_or(0, |groups| groups[r] as usize)
    }
}
