//! Packs a dictionary and encodes a source, in parallel. A row's codes depend on that row alone (or, for Batch Top-K, on
//! all rows), so neither blocks nor threads show in the result.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::pack::pack_features;
use super::{Buffer, Context, Source, fill_blocks, grid, locked, map_blocks, reduce_ordered, spread};
use crate::error::{Error, Result};
use crate::kernels::gemm::select::Effort;
use crate::kernels::gemm::{Certificate, Wanted};
use crate::memory::try_zeros;
use crate::metrics::encode::{
    Activation, Encoder, Packing, RaggedBlock, Weights, Workspace, batch_threshold, trim,
};
use crate::rows::Rows;

/// Most rows per block with a fixed number of slots: enough to read the packed weights rarely.
const SLOT_ROWS: usize = 1024;
/// Slots of a block, whose candidates take some 200 bytes each.
const BLOCK_SLOTS: usize = SLOT_ROWS * 128;
/// Rows per block where a row may have any number of entries: strips of 12, and groups of four of them.
const RAGGED_ROWS: usize = 144;
/// Ranks per row and member of the batch that the first pass of Batch Top-K looks at, and how much deeper it looks where those are too
/// few.
const BATCH_DEPTH: usize = 2;

/// Codes of all rows.
#[derive(Debug, PartialEq)]
pub enum Codes {
    /// `k` slots per row.
    Slots {
        /// Feature of each slot.
        indices: Vec<u32>,
        /// Activation of each slot.
        values: Vec<f32>,
    },
    /// As many entries per row as fired.
    Ragged {
        /// Where each row begins and ends.
        indptr: Vec<i64>,
        /// Feature of each entry.
        indices: Vec<u32>,
        /// Activation of each entry.
        values: Vec<f32>,
    },
}

/// Packs the weights of an encoder.
///
/// # Errors
/// [`Error::Shape`], [`Error::NonFinite`]: bad weights; [`Error::Refused`] when the system has less memory than they take packed;
/// [`Error::Cancelled`].
pub fn pack(
    weights: Weights<'_>,
    activation: Activation,
    certificate: Certificate,
    context: &Context<'_>,
) -> Result<Encoder> {
    let packing = Packing::new(weights, activation, certificate)?;
    let (plan, n_features) = packing.shape();
    let dictionary = pack_features(plan, n_features, context, |p, features| packing.fill(p, features))?;
    Ok(packing.finish(dictionary))
}

/// Encodes all rows of `source`.
///
/// # Errors
/// [`Error::Shape`] when the source has another width than the encoder; [`Error::NonFinite`]; [`Error::Cancelled`].
pub fn encode(encoder: &Encoder, source: &dyn Source, context: &Context<'_>) -> Result<(Codes, Effort)> {
    if source.d() != encoder.d_in() {
        let expected = format!("rows of width d_in = {}, as W_enc", encoder.d_in());
        return Err(Error::shape("x", expected, format!("width {}", source.d())));
    }
    let run = Run { encoder, source, context, stash: Mutex::default(), effort: Mutex::default() };
    let codes = match encoder.activation() {
        Activation::TopK(k) => run.slots(k)?,
        Activation::BatchTopK(k) => run.batch(k)?,
        Activation::JumpRelu | Activation::Relu => ragged(run.list()?),
    };
    let effort = *locked(&run.effort);
    Ok((codes, effort))
}

struct Run<'a> {
    encoder: &'a Encoder,
    source: &'a dyn Source,
    context: &'a Context<'a>,
    /// Workspaces that no block is using.
    stash: Mutex<Vec<Workspace>>,
    effort: Mutex<Effort>,
}

impl Run<'_> {
    fn slots(&self, k: usize) -> Result<Codes> {
        let n = self.source.n_rows();
        let slots = n.saturating_mul(k);
        let hint = "Encode some rows at a time, or into a store";
        let (mut indices, mut values) =
            (try_zeros(slots, "encode", hint)?, try_zeros(slots, "encode", hint)?);
        let block = spread(n, slot_rows(k));
        fill_blocks(
            self.source,
            block,
            (&mut indices, &mut values),
            k,
            self.context,
            |rows, first, indices, values| {
                self.with_workspace(rows, |work| self.encoder.fill(rows, first, k, work, indices, values))
            },
        )?;
        Ok(Codes::Slots { indices, values })
    }

    fn list(&self) -> Result<Vec<Listed>> {
        map_blocks(self.source, self.ragged_rows(), self.context, |rows, first| {
            self.with_workspace(rows, |work| self.encoder.list(rows, first, Wanted::Above, work))
                .map(Listed::from)
        })
    }

    fn ragged_rows(&self) -> usize {
        spread(self.source.n_rows(), RAGGED_ROWS)
    }

    /// Two passes: the first finds a rank that at least `k · n` features reach, the second all that reach it.
    ///
    /// Where some rows have hardly any positive features the others must make up for them, and the first pass looks deeper; it
    /// holds as many ranks as the result has entries, times what one step is deeper than the last.
    fn batch(&self, k: usize) -> Result<Codes> {
        let (n, d_sae) = (self.source.n_rows(), self.encoder.d_sae());
        let mut depth = (k * BATCH_DEPTH).min(d_sae);
        let ranks = loop {
            let ranks = self.best_ranks(depth)?;
            self.context.done.store(0, Ordering::Relaxed);
            if ranks.len() >= k * n || depth == d_sae {
                break ranks;
            }
            depth = (depth * BATCH_DEPTH).min(d_sae);
        };
        let blocks = self.best_of_batch(batch_threshold(ranks, k * n), k * n)?;
        Ok(ragged(blocks.into_iter().map(Listed::from).collect()))
    }

    /// The `budget` best of the entries of all rows, all of which have a rank of at least `least`.
    ///
    /// Where a few rows hold most of them, `least` lets far more than `budget` through: what is held is trimmed as it grows. What that
    /// drops is no member, since `budget` entries of rows before it rank as high, and none that ranks lower can be one later.
    fn best_of_batch(&self, least: f64, budget: usize) -> Result<Vec<RaggedBlock>> {
        let grid: Vec<_> = grid(self.source.n_rows(), self.ragged_rows()).collect();
        let (mut blocks, mut held) = (Vec::new(), 0);
        let least = Mutex::new(least);
        reduce_ordered(
            &grid,
            self.context,
            |range| {
                let wanted = Wanted::AtLeast(*locked(&least));
                let mut buffer = Buffer::default();
                let rows = self.source.read(range.clone(), &mut buffer)?;
                self.with_workspace(rows, |work| self.encoder.list(rows, range.start, wanted, work))
            },
            |_, block| {
                held += block.entries.len();
                blocks.push(block);
                if held > budget + budget / 2 {
                    *locked(&least) = trim(&mut blocks, budget);
                    held = budget;
                }
                Ok(())
            },
        )?;
        trim(&mut blocks, budget);
        Ok(blocks)
    }

    /// The ranks of the `depth` best positive features of every row.
    fn best_ranks(&self, depth: usize) -> Result<Vec<f64>> {
        let ranks = map_blocks(
            self.source,
            spread(self.source.n_rows(), slot_rows(depth)),
            self.context,
            |rows, first| {
                let wanted = Wanted::Best { k: depth, positive: true };
                let block = self.with_workspace(rows, |work| self.encoder.list(rows, first, wanted, work))?;
                Ok(block.entries.iter().map(|e| e.rank).collect::<Vec<_>>())
            },
        )?;
        Ok(ranks.concat())
    }

    fn with_workspace<T>(&self, rows: Rows<'_>, work: impl FnOnce(&mut Workspace) -> Result<T>) -> Result<T> {
        let mut space = locked(&self.stash).pop().unwrap_or_default();
        let outcome = work(&mut space);
        let spent = std::mem::take(&mut space.space.effort);
        locked(&self.effort).add(spent);
        locked(&self.stash).push(space);
        self.context.done.fetch_add(rows.n() as u64, Ordering::Relaxed);
        outcome
    }
}

/// Rows per block with `k` slots each.
fn slot_rows(k: usize) -> usize {
    (BLOCK_SLOTS / k).clamp(RAGGED_ROWS, SLOT_ROWS)
}

/// What is kept of a block until all are there: 8 bytes an entry, a third of a [`RaggedBlock`].
struct Listed {
    counts: Vec<u32>,
    indices: Vec<u32>,
    values: Vec<f32>,
}

impl From<RaggedBlock> for Listed {
    fn from(block: RaggedBlock) -> Self {
        Self {
            indices: block.entries.iter().map(|e| e.feature).collect(),
            values: block.entries.iter().map(|e| e.activation as f32).collect(),
            counts: block.counts,
        }
    }
}

/// Joins blocks; each is dropped as soon as it is copied.
fn ragged(blocks: Vec<Listed>) -> Codes {
    let entries = blocks.iter().map(|b| b.indices.len()).sum();
    let rows: usize = blocks.iter().map(|b| b.counts.len()).sum();
    let mut indptr = Vec::with_capacity(rows + 1);
    let (mut indices, mut values) = (Vec::with_capacity(entries), Vec::with_capacity(entries));
    indptr.push(0);
    let mut end = 0;
    for block in blocks {
        for count in &block.counts {
            end += i64::from(*count);
            indptr.push(end);
        }
        indices.extend_from_slice(&block.indices);
        values.extend_from_slice(&block.values);
    }
    Codes::Ragged { indptr, indices, values }
}
