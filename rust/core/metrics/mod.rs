//! Metrics as folds over blocks of rows. A fold keeps partial results that merge; it opens no file and starts no thread.

pub mod circuit;
pub mod cka;
pub mod decode;
pub mod firing;
pub mod fvu;
pub mod similarity;

use crate::error::Result;
use crate::rows::Rows;

/// A computation that a scan can run: one partial result per block, merged in block order.
///
/// `update` sees one block of every source of the scan, aligned row by row. Merging is done in the order of the
/// blocks, so the result has the same bits for any number of threads.
pub trait Fold: Sync {
    /// What one block leaves behind.
    type Partial: Send;
    /// An empty partial result.
    fn init(&self) -> Self::Partial;
    /// Adds a block to `partial`; `first_row` is the number of the block's first row within the scan.
    fn update(&self, partial: &mut Self::Partial, block: &[Rows<'_>], first_row: usize) -> Result<()>;
    /// Adds `later`, which comes from rows behind those of `into`.
    fn merge(&self, into: &mut Self::Partial, later: Self::Partial) -> Result<()>;
}
