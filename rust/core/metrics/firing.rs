//! Feature statistics from sparse codes: firing counts, sums, sums of squares and maxima, by group of rows; and in how
//! many samples a feature fires.
//!
//! p = fires / n (firing frequency), E[h²] = Σh² / n (uncentred), E[h] = Σh / n, with n the number of tokens of the
//! group. Firing counts per sample count a sample once, however many of its tokens fire.

use std::ops::Range;

use super::features::{FeatureFold, Labelled};
use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::kernels::moments::{Moments, accumulate};
use crate::kernels::prefetch::fetch;
use crate::scan::{Context, grid, in_flight, map_ordered};

/// Blocks that the rows are cut into at most: each costs one pass over the accumulators to clear and to merge.
const BLOCKS: usize = 64;
/// Rows per block at least, for the same reason.
const MIN_BLOCK_ROWS: usize = 16_384;

/// Moments of every feature, in every group of rows.
#[derive(Clone, Copy, Debug)]
pub struct Firing {
    d_sae: usize,
    n_groups: usize,
    block_rows: usize,
}

impl Firing {
    /// Moments of `d_sae` features in `n_groups` groups of `n` rows in all. The grid depends on `n` and `d_sae` alone.
    pub fn new(d_sae: usize, n_groups: usize, n: usize) -> Self {
        Self { d_sae, n_groups, block_rows: n.div_ceil(BLOCKS).max(MIN_BLOCK_ROWS).max(d_sae / 2) }
    }
}

impl FeatureFold for Firing {
    type Cell = Moments;
    type Partial = Vec<Moments>;

    fn n_groups(&self) -> usize {
        self.n_groups
    }

    fn block_rows(&self) -> usize {
        self.block_rows
    }

    fn n_cells(&self) -> usize {
        self.n_groups.saturating_mul(self.d_sae)
    }

    fn partial(&self) -> Vec<Moments> {
        vec![Moments::default(); self.n_cells()]
    }

    fn partial_bytes(&self) -> usize {
        self.n_cells().saturating_mul(size_of::<Moments>())
    }

    fn update(
        &self,
        partial: &mut Vec<Moments>,
        _cells: &[Moments],
        block: &Labelled<'_>,
        rows: Range<usize>,
    ) -> Result<()> {
        let codes = &block.codes;
        let sound = match block.groups {
            None => {
                let (indices, values) = codes.slots(rows.clone());
                accumulate(&mut partial[..self.d_sae], indices, values)
            }
            Some(groups) => rows.clone().all(|r| {
                if r + 1 < rows.end {
                    let first = groups[r + 1] as usize * self.d_sae;
                    codes.row(r + 1).0.iter().for_each(|&index| fetch(partial, first + index as usize));
                }
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

/// Samples per block.
const BLOCK_SAMPLES: usize = 4096;

/// Number of samples of which at least one token fires, for every feature. `order` lists the rows sample by sample:
/// `order[starts[s]..starts[s + 1]]` are those of sample `s`.
///
/// # Errors
/// [`Error::Shape`] when `order` and `starts` do not describe the rows of `codes`; faults of the codes;
/// [`Error::Cancelled`].
pub fn sample_fires(
    codes: &Codes<'_>,
    order: &[u64],
    starts: &[u64],
    context: &Context<'_>,
) -> Result<Vec<u64>> {
    let n = codes.n() as u64;
    if n == 0 {
        return Err(Error::shape("codes", "at least one row", "no rows selected"));
    }
    if (starts.first(), starts.last()) != (Some(&0), Some(&n)) || !starts.is_sorted() {
        return Err(Error::shape(
            "starts",
            format!("a rising sequence from 0 to {n}"),
            format!("{starts:?}"),
        ));
    }
    if order.len() as u64 != n || order.iter().any(|&row| row >= n) {
        return Err(Error::shape("order", format!("the rows 0 to {n}"), format!("{} entries", order.len())));
    }
    let bytes = codes.d_sae() * 2 * size_of::<u32>();
    let in_flight = in_flight("firing counts of one block of samples", bytes, "", context)?;
    let mut fires = vec![0; codes.d_sae()];
    for wave in grid(starts.len() - 1, BLOCK_SAMPLES).collect::<Vec<_>>().chunks(in_flight) {
        let counts =
            map_ordered(wave, context, |samples| count_samples(codes, order, starts, samples.clone()))?;
        for block in counts {
            fires.iter_mut().zip(block).for_each(|(f, c): (&mut u64, u32)| *f += u64::from(c));
        }
    }
    Ok(fires)
}

fn count_samples(
    codes: &Codes<'_>,
    order: &[u64],
    starts: &[u64],
    samples: Range<usize>,
) -> Result<Vec<u32>> {
    let mut fires = vec![0; codes.d_sae()];
    let mut last = vec![0; codes.d_sae()]; // 1 + the sample of the block in which a feature fired last
    for (mark, sample) in (1_u32..).zip(samples) {
        for &row in &order[starts[sample] as usize..starts[sample + 1] as usize] {
            let (indices, values) = codes.row(row as usize);
            for (&index, &h) in indices.iter().zip(values) {
                if !h.is_finite() || (h != 0.0 && index as usize >= codes.d_sae()) {
                    return Err(codes.fault(row as usize..row as usize + 1));
                }
                if h > 0.0 && last[index as usize] != mark {
                    last[index as usize] = mark;
                    fires[index as usize] += 1;
                }
            }
        }
    }
    Ok(fires)
}
