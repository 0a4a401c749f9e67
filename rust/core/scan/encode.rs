//! Packs a dictionary and encodes a source, in parallel. A row's codes depend on that row alone (or, for Batch Top-K, on
//! all rows), so neither blocks nor threads show in the result.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use super::{Context, Source, fill_blocks, map_blocks, map_ordered, spread};
use crate::error::{Error, Result};
use crate::kernels::gemm::select::Effort;
use crate::kernels::gemm::{Certificate, Wanted};
use crate::memory::zeros;
use crate::metrics::encode::{
    Activation, Encoder, Packing, RaggedBlock, Weights, Workspace, batch_threshold, trim,
};
use crate::rows::Rows;

/// Rows per block with a fixed number of slots: enough to read the packed weights rarely.
const SLOT_ROWS: usize = 1024;
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
/// [`Error::Shape`], [`Error::NonFinite`]: bad weights; [`Error::Cancelled`].
pub fn pack(
    weights: Weights<'_>,
    activation: Activation,
    certificate: Certificate,
    context: &Context<'_>,
) -> Result<Encoder> {
    let packing = Packing::new(weights, activation, certificate)?;
    let numbers: Vec<usize> = (0..packing.n_panels()).collect();
    let panels = map_ordered(&numbers, context, |&p| packing.panel(p))?;
    Ok(packing.finish(panels))
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
        Activation::JumpRelu | Activation::Relu => ragged(run.list(Wanted::Above)?),
    };
    let effort = *run.effort.lock().unwrap_or_else(PoisonError::into_inner);
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
        let (mut indices, mut values) = (zeros(n * k), zeros(n * k));
        let block = spread(n, SLOT_ROWS);
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

    fn list<T: From<RaggedBlock> + Send>(&self, wanted: Wanted) -> Result<Vec<T>> {
        map_blocks(self.source, spread(self.source.n_rows(), RAGGED_ROWS), self.context, |rows, first| {
            self.with_workspace(rows, |work| self.encoder.list(rows, first, wanted, work)).map(T::from)
        })
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
        let least = batch_threshold(ranks, k * n);
        let mut blocks = self.list(Wanted::AtLeast(least))?;
        trim(&mut blocks, k * n);
        Ok(ragged(blocks.into_iter().map(Listed::from).collect()))
    }

    /// The ranks of the `depth` best positive features of every row.
    fn best_ranks(&self, depth: usize) -> Result<Vec<f64>> {
        let ranks =
            map_blocks(self.source, spread(self.source.n_rows(), SLOT_ROWS), self.context, |rows, first| {
                let wanted = Wanted::Best { k: depth, positive: true };
                let block = self.with_workspace(rows, |work| self.encoder.list(rows, first, wanted, work))?;
                Ok(block.entries.iter().map(|e| e.rank).collect::<Vec<_>>())
            })?;
        Ok(ranks.concat())
    }

    fn with_workspace<T>(&self, rows: Rows<'_>, work: impl FnOnce(&mut Workspace) -> Result<T>) -> Result<T> {
        let mut space = self.stash.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let outcome = work(&mut space);
        let spent = std::mem::take(&mut space.space.effort);
        self.effort.lock().unwrap_or_else(PoisonError::into_inner).add(spent);
        self.stash.lock().unwrap_or_else(PoisonError::into_inner).push(space);
        self.context.done.fetch_add(rows.n() as u64, Ordering::Relaxed);
        outcome
    }
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
