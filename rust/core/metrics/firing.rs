//! Feature statistics from sparse codes: firing counts, sums, sums of squares and maxima, by group of rows.
//!
//! p = fires / n (firing frequency), E[h²] = Σh² / n (uncentred), E[h] = Σh / n, with n the number of tokens of the
//! group. Firing counts per sample count a sample once, however many of its tokens fire.

use std::ops::Range;

use super::{FeatureFold, Groups};
use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::kernels::moments::{Moments, accumulate};

/// Blocks that a scan of codes is cut into at most: each costs one pass over the accumulators to clear and to merge.
const BLOCKS: usize = 64;
/// Rows per block at least, for the same reason.
const MIN_BLOCK_ROWS: usize = 16_384;

/// Moments of every feature, in every group of rows.
#[derive(Clone, Copy, Debug)]
pub struct Firing<'a> {
    /// Number of features.
    pub d_sae: usize,
    /// Group of each row.
    pub groups: Groups<'a>,
}

impl FeatureFold for Firing<'_> {
    type Cell = Moments;
    type Partial = Vec<Moments>;

    fn cells(&self) -> Vec<Moments> {
        vec![Moments::default(); self.groups.n() * self.d_sae]
    }

    fn block_items(&self, n: usize) -> usize {
        n.div_ceil(BLOCKS).max(MIN_BLOCK_ROWS)
    }

    fn partial(&self) -> Vec<Moments> {
        self.cells()
    }

    fn partial_bytes(&self) -> usize {
        self.groups.n() * self.d_sae * size_of::<Moments>()
    }

    fn update(
        &self,
        partial: &mut Vec<Moments>,
        _cells: &[Moments],
        codes: &Codes<'_>,
        rows: Range<usize>,
    ) -> Result<()> {
        let sound = match self.groups.of_rows() {
            None => {
                let (indices, values) = codes.slots(rows.clone());
                accumulate(partial, indices, values)
            }
            Some(groups) => rows.clone().all(|r| {
                let (indices, values) = codes.row(r);
                let first = groups[r] as usize * self.d_sae;
                accumulate(&mut partial[first..first + self.d_sae], indices, values)
            }),
        };
        if sound { Ok(()) } else { Err(codes.fault(rows)) }
    }

    fn merge(&self, first_cell: usize, cells: &mut [Moments], partial: &Vec<Moments>) {
        for (cell, other) in cells.iter_mut().zip(&partial[first_cell..]) {
            cell.merge(other);
        }
    }
}

/// Number of samples of which at least one token fires, for every feature.
#[derive(Clone, Copy, Debug)]
pub struct SampleFires<'a> {
    d_sae: usize,
    order: &'a [u64],
    starts: &'a [u64],
}

impl<'a> SampleFires<'a> {
    /// `order[starts[s]..starts[s + 1]]` are the rows of sample `s`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `starts` does not run from 0 to the number of rows, or a row is not below that number.
    pub fn new(d_sae: usize, order: &'a [u64], starts: &'a [u64]) -> Result<Self> {
        let n = order.len() as u64;
        if (starts.first(), starts.last()) != (Some(&0), Some(&n)) || !starts.is_sorted() {
            return Err(Error::shape(
                "starts",
                format!("a rising sequence from 0 to {n}"),
                format!("{starts:?}"),
            ));
        }
        match order.iter().find(|&&row| row >= n) {
            Some(row) => Err(Error::shape("order", format!("rows below {n}"), format!("{row}"))),
            None => Ok(Self { d_sae, order, starts }),
        }
    }
}

/// Samples per block.
const BLOCK_SAMPLES: usize = 4096;

/// Counts of one block of samples.
#[derive(Debug)]
pub struct SampleCounts {
    fires: Vec<u32>,
    /// 1 + the sample in which the feature fired last, 0 for none.
    last: Vec<u32>,
}

impl FeatureFold for SampleFires<'_> {
    type Cell = u64;
    type Partial = SampleCounts;

    fn items(&self, _codes: &Codes<'_>) -> usize {
        self.starts.len() - 1
    }

    fn cells(&self) -> Vec<u64> {
        vec![0; self.d_sae]
    }

    fn block_items(&self, _n: usize) -> usize {
        BLOCK_SAMPLES
    }

    fn partial(&self) -> SampleCounts {
        SampleCounts { fires: vec![0; self.d_sae], last: vec![0; self.d_sae] }
    }

    fn partial_bytes(&self) -> usize {
        self.d_sae * 2 * size_of::<u32>()
    }

    fn update(
        &self,
        partial: &mut SampleCounts,
        _cells: &[u64],
        codes: &Codes<'_>,
        samples: Range<usize>,
    ) -> Result<()> {
        for (mark, sample) in (1..).zip(samples) {
            for &row in &self.order[self.starts[sample] as usize..self.starts[sample + 1] as usize] {
                let (indices, values) = codes.row(row as usize);
                for (&index, &h) in indices.iter().zip(values) {
                    if !h.is_finite() || (h != 0.0 && index as usize >= self.d_sae) {
                        return Err(codes.fault(row as usize..row as usize + 1));
                    }
                    if h > 0.0 && partial.last[index as usize] != mark {
                        partial.last[index as usize] = mark;
                        partial.fires[index as usize] += 1;
                    }
                }
            }
        }
        Ok(())
    }

    fn merge(&self, first_cell: usize, cells: &mut [u64], partial: &SampleCounts) {
        for (cell, &fires) in cells.iter_mut().zip(&partial.fires[first_cell..]) {
            *cell += u64::from(fires);
        }
    }
}
