//! One cell per feature, from sparse codes: the fold that statistics and top samples have in common, and its state while
//! codes arrive block by block.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::scan::{Context, fill_pieces, in_flight, map_ordered};

/// Cells that one thread merges at a time.
pub const PIECE: usize = 1024;

/// Sparse codes with what is known of their rows; a column that a fold does not read may be empty.
#[derive(Clone, Copy, Debug)]
pub struct Labelled<'a> {
    /// The codes.
    pub codes: Codes<'a>,
    /// Group of each row; all rows are in group 0 where missing.
    pub groups: Option<&'a [u32]>,
    /// Sample of each row.
    pub samples: &'a [u64],
    /// Position of each row in its sample.
    pub positions: &'a [u32],
}

impl<'a> From<Codes<'a>> for Labelled<'a> {
    fn from(codes: Codes<'a>) -> Self {
        Self { codes, groups: None, samples: &[], positions: &[] }
    }
}

impl Labelled<'_> {
    /// The group of row `r`.
    pub fn group(&self, r: usize) -> usize {
        self.groups.map_or(0, |groups| groups[r] as usize)
    }

    /// Refuses groups that are not below `n_groups`, or not one per row.
    fn check(&self, n_groups: usize) -> Result<()> {
        let Some(groups) = self.groups else { return Ok(()) };
        if groups.len() != self.codes.n() {
            return Err(Error::shape(
                "by",
                format!("{} groups", self.codes.n()),
                format!("{}", groups.len()),
            ));
        }
        match groups.iter().position(|&g| g as usize >= n_groups) {
            Some(row) => {
                let found = format!("{} at row {row}", groups[row]);
                Err(Error::shape("by", format!("groups below {n_groups}"), found))
            }
            None => Ok(()),
        }
    }
}

/// A computation over sparse codes whose result is one cell per feature, in each group of rows.
///
/// Blocks leave partial results behind; these are merged in block order, in parallel over pieces of [`PIECE`] cells.
pub trait FeatureFold: Sync {
    /// Result of one feature in one group.
    type Cell: Clone + Default + Send + Sync;
    /// What one block leaves behind.
    type Partial: Send + Sync;
    /// Number of groups.
    fn n_groups(&self) -> usize;
    /// Rows per block of the grid; a property of the fold, whatever the number of threads.
    fn block_rows(&self) -> usize;
    /// Number of cells: one for each feature, group by group.
    fn n_cells(&self) -> usize;
    /// An empty partial result.
    fn partial(&self) -> Self::Partial;
    /// Bytes that a partial result takes, about.
    fn partial_bytes(&self) -> usize;
    /// Adds `rows` of `block` to `partial`; `cells` is the state that earlier blocks have left, for screening.
    fn update(
        &self,
        partial: &mut Self::Partial,
        cells: &[Self::Cell],
        block: &Labelled<'_>,
        rows: Range<usize>,
    ) -> Result<()>;
    /// Adds the share of `partial` that concerns `cells`, the piece that begins at cell `first_cell`.
    fn merge(&self, first_cell: usize, cells: &mut [Self::Cell], partial: &Self::Partial);
}

/// A fold over codes that arrive in pieces of any size: the result is the same as for one piece, bit for bit.
#[derive(Debug)]
pub struct Accumulator<F: FeatureFold> {
    fold: F,
    /// Nothing before the first update, which knows the memory budget.
    cells: Vec<F::Cell>,
    /// The block of the grid that the rows so far have begun but not filled, and its number of rows.
    open: Option<(F::Partial, usize)>,
}

impl<F: FeatureFold> Accumulator<F> {
    /// No rows yet.
    pub fn new(fold: F) -> Self {
        Self { cells: Vec::new(), fold, open: None }
    }

    /// Adds the next rows. As many blocks are in flight as the pool has threads and the memory budget allows.
    ///
    /// # Errors
    /// [`Error::Memory`] when the cells, or one partial result, exceed the budget; [`Error::Cancelled`]; what the fold returns.
    /// The state is of no use afterwards.
    pub fn update(&mut self, block: &Labelled<'_>, context: &Context<'_>) -> Result<()> {
        block.check(self.fold.n_groups())?;
        let bytes = self.fold.n_cells().saturating_mul(size_of::<F::Cell>());
        in_flight("the cells of all features and groups", bytes, "Use fewer groups", context)?;
        self.open_cells();
        let (n, height) = (block.codes.n(), self.fold.block_rows());
        let bytes = self.fold.partial_bytes();
        let in_flight = in_flight("one block of feature cells", bytes, "Use fewer groups", context)?;
        let mut first = 0;
        if let Some((mut partial, rows)) = self.open.take() {
            first = n.min(height - rows);
            self.fold.update(&mut partial, &self.cells, block, 0..first)?;
            context.done.fetch_add(first as u64, Ordering::Relaxed);
            self.close(vec![(partial, rows + first)], context)?;
        }
        let blocks: Vec<_> = (first..n).step_by(height).map(|r| r..n.min(r + height)).collect();
        for wave in blocks.chunks(in_flight) {
            let partials = map_ordered(wave, context, |rows| {
                let mut partial = self.fold.partial();
                self.fold.update(&mut partial, &self.cells, block, rows.clone())?;
                context.done.fetch_add(rows.len() as u64, Ordering::Relaxed);
                Ok((partial, rows.len()))
            })?;
            self.close(partials, context)?;
        }
        Ok(())
    }

    /// The cells, group by group.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn finish(mut self, context: &Context<'_>) -> Result<(F, Vec<F::Cell>)> {
        self.open_cells();
        if let Some((partial, _)) = self.open.take() {
            self.merge(&[(partial, 0)], context)?;
        }
        Ok((self.fold, self.cells))
    }

    fn open_cells(&mut self) {
        self.cells.resize(self.fold.n_cells(), F::Cell::default());
    }

    /// Merges full blocks and keeps the last one open where it is not full.
    fn close(&mut self, mut partials: Vec<(F::Partial, usize)>, context: &Context<'_>) -> Result<()> {
        self.open = partials.pop_if(|(_, rows)| *rows < self.fold.block_rows());
        self.merge(&partials, context)
    }

    fn merge(&mut self, partials: &[(F::Partial, usize)], context: &Context<'_>) -> Result<()> {
        let fold = &self.fold;
        fill_pieces(&mut self.cells, PIECE, context, |i, piece| {
            for (partial, _) in partials {
                fold.merge(i * PIECE, piece, partial);
            }
            Ok(())
        })
    }
}
