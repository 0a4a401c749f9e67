//! The scan of a source that waits for a disk: a few threads read ahead while the pool folds.
//!
//! Reader `r` takes the batches `r`, `r + READERS`, ... and hands each over when it is asked for. So batches arrive in the
//! order of the rows, the blocks in them are those of the grid, and the result has the bits of any other scan; and memory
//! holds two batches per reader and the one that is folded.

use std::ops::Range;
use std::sync::mpsc::{channel, sync_channel};

use super::{
    Buffer, Context, Fold, Source, aligned_rows, grid, map_ordered, row_bytes, spaces, threads, update_block,
};
use crate::error::{Error, Result};
use crate::rows::Rows;

/// Reading threads: what a disk needs in its queue to show its bandwidth.
const READERS: usize = 4;
/// Bytes that one of them reads at a time.
const BATCH_BYTES: usize = 4 << 20;

/// As [`super::scan_into`].
pub fn scan_into<F: Fold>(
    total: &mut F::Partial,
    sources: &[&dyn Source],
    fold: &F,
    block_rows: usize,
    context: &Context<'_>,
) -> Result<()> {
    let n = aligned_rows(sources)?;
    let bytes = BATCH_BYTES.min(context.memory_budget / (2 * READERS + 1));
    let batch_rows = (bytes / (block_rows * row_bytes(sources))).max(1) * block_rows;
    let batches = || grid(n, batch_rows);
    std::thread::scope(|team| {
        let start = |reader: usize| {
            // With room for one batch: while that one waits for its turn, the disk is busy with the next.
            let (filled, ready) = sync_channel(1);
            let (recycle, used) = channel();
            let mine = batches().skip(reader).step_by(READERS);
            team.spawn(move || {
                for range in mine {
                    let mut buffers = used.try_recv().unwrap_or_else(|_| spaces(sources));
                    let outcome = fetch(sources, &range, &mut buffers);
                    let failed = outcome.is_err();
                    // Nobody listens once the scan has failed or has been cancelled.
                    if filled.send(outcome.map(|()| buffers)).is_err() || failed {
                        return;
                    }
                }
            });
            (ready, recycle)
        };
        let readers: Vec<_> = (0..READERS).map(start).collect();
        for (batch, (ready, recycle)) in batches().zip(readers.iter().cycle()) {
            context.check()?;
            let mut buffers = ready.recv().map_err(|_| Error::Internal("reading ahead".to_owned()))??;
            fold_batch(total, sources, fold, (batch, block_rows), &mut buffers, context)?;
            // A reader that has read its last batch takes no space back.
            let _ = recycle.send(buffers);
        }
        Ok(())
    })
}

/// Fills the buffers of the sources that wait.
fn fetch(sources: &[&dyn Source], range: &Range<usize>, buffers: &mut [Buffer]) -> Result<()> {
    let waiting = sources.iter().zip(buffers).filter(|(source, _)| source.waits());
    for (source, buffer) in waiting {
        source.read(range.clone(), buffer)?;
    }
    Ok(())
}

/// Folds the blocks of a batch whose waiting sources are in `buffers`.
fn fold_batch<F: Fold>(
    total: &mut F::Partial,
    sources: &[&dyn Source],
    fold: &F,
    (batch, block_rows): (Range<usize>, usize),
    buffers: &mut [Buffer],
    context: &Context<'_>,
) -> Result<()> {
    let rows = sources
        .iter()
        .zip(buffers)
        .map(|(source, buffer)| {
            if source.waits() {
                buffer.rows(source.dtype(), batch.len(), source.d())
            } else {
                source.read(batch.clone(), buffer)
            }
        })
        .collect::<Result<Vec<_>>>()?;
    let blocks: Vec<_> = grid(batch.len(), block_rows).collect();
    for wave in blocks.chunks(threads()) {
        let partials = map_ordered(wave, context, |block| {
            let rows: Vec<Rows<'_>> = rows.iter().map(|r| r.slice(block.clone())).collect();
            update_block(fold, &rows, batch.start + block.start, context)
        })?;
        partials.into_iter().try_for_each(|partial| fold.merge(total, partial))?;
    }
    Ok(())
}
