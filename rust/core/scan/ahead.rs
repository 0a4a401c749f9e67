//! The scan of a source that waits for a disk: a few threads read ahead while the pool folds.
//!
//! Reader `r` takes the batches `r`, `r + readers`, ... and hands each over when it is asked for. So batches arrive in the
//! order of the rows, the blocks in them are those of the grid, and the result has the bits of any other scan. Each reader
//! has space for two batches, one that it reads and one that waits or is folded. Where blocks are large beside the budget
//! there are fewer readers; the least is space for one block.

use std::ops::Range;
use std::sync::mpsc::channel;

use super::{
    Buffer, Context, Fold, Source, aligned_rows, grid, map_ordered, row_bytes, spaces, threads, update_block,
};
use crate::error::{Error, Result};
use crate::rows::Rows;

/// Reading threads at most: what a disk needs in its queue to show its bandwidth.
const READERS: usize = 4;
/// Bytes that one of them reads at a time, or one block where that is more.
const BATCH_BYTES: usize = 4 << 20;

/// How far a scan reads ahead.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Threads that read.
    readers: usize,
    /// Batches that each of them has space for.
    each: usize,
    /// Rows of a batch, in whole blocks.
    rows: usize,
}

impl Plan {
    fn new(block_rows: usize, row_bytes: usize, budget: usize) -> Self {
        let block = block_rows.saturating_mul(row_bytes).max(1);
        let blocks = (BATCH_BYTES.min(budget / (2 * READERS)) / block).max(1);
        let batches = budget / blocks.saturating_mul(block);
        Self {
            readers: (batches / 2).clamp(1, READERS),
            each: batches.clamp(1, 2),
            rows: blocks * block_rows,
        }
    }
}

/// As [`super::scan_into`].
pub fn scan_into<F: Fold>(
    total: &mut F::Partial,
    sources: &[&dyn Source],
    fold: &F,
    block_rows: usize,
    context: &Context<'_>,
) -> Result<()> {
    let n = aligned_rows(sources)?;
    let plan = Plan::new(block_rows, row_bytes(sources), context.memory_budget);
    let batches = || grid(n, plan.rows);
    std::thread::scope(|team| {
        let start = |reader: usize| {
            let (filled, ready) = channel();
            let (recycle, free) = channel();
            // Its receiver is here.
            (0..plan.each).for_each(|_| drop(recycle.send(spaces(sources))));
            let mine = batches().skip(reader).step_by(plan.readers);
            team.spawn(move || {
                for range in mine {
                    // Nobody gives space back, or listens, once the scan has failed or has been cancelled.
                    let Ok(mut buffers) = free.recv() else { return };
                    let outcome = fetch(sources, &range, &mut buffers);
                    let failed = outcome.is_err();
                    if filled.send(outcome.map(|()| buffers)).is_err() || failed {
                        return;
                    }
                }
            });
            (ready, recycle)
        };
        let readers: Vec<_> = (0..plan.readers).map(start).collect();
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

    use super::*;
    use crate::dtype::Dtype;
    use crate::metrics::words::WordSum;
    use crate::rows::Data;
    use crate::scan::scan;

    #[test]
    fn batches_in_memory_keep_to_the_budget_and_are_one_block_at_least() {
        for row in [1, 4096, 3 << 20, 164 << 20] {
            for budget in [0, 1, 20 << 20, 100 << 20, 1 << 30, 8 << 30] {
                let plan = Plan::new(16, row, budget);
                let bytes = plan.readers * plan.each * plan.rows * row;
                assert!(bytes <= budget.max(16 * row), "{row}, {budget}: {plan:?}");
            }
        }
        assert_eq!(Plan::new(4096, 256, 1 << 30), Plan { readers: READERS, each: 2, rows: 4 * 4096 });
        assert_eq!(Plan::new(1, 164 << 20, 1 << 30), Plan { readers: 3, each: 2, rows: 1 });
        assert_eq!(Plan::new(1, 1 << 30, 1 << 30), Plan { readers: 1, each: 1, rows: 1 });
    }

    /// A row of one word for each number below 1000, and how many buffers have been filled for the first time.
    struct Slow(Vec<f32>, AtomicUsize);

    impl Source for Slow {
        fn n_rows(&self) -> usize {
            self.0.len()
        }
        fn d(&self) -> usize {
            1
        }
        fn dtype(&self) -> Dtype {
            Dtype::F32
        }
        fn read<'a>(&'a self, range: Range<usize>, buffer: &'a mut Buffer) -> Result<Rows<'a>> {
            self.1.fetch_add(usize::from(buffer.words.is_empty()), Ordering::Relaxed);
            let n = range.len();
            buffer.bytes(n * 4).copy_from_slice(bytemuck::cast_slice(&self.0[range]));
            buffer.rows(Dtype::F32, n, 1)
        }
        fn waits(&self) -> bool {
            true
        }
    }

    #[test]
    fn small_budgets_take_fewer_buffers_to_the_same_sum() {
        let words: Vec<f32> = (0..1003).map(f32::from_bits).collect();
        for budget in [0, 40, 79, 80, 160, 281, 1 << 20] {
            let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
            let context = Context { cancel: &cancel, done: &done, memory_budget: budget };
            let rows = Rows::new(Data::F32(&words), 1).unwrap();
            let sum = scan(&[&rows], &WordSum, 10, &context).unwrap();
            let source = Slow(words.clone(), AtomicUsize::new(0));
            assert_eq!(scan(&[&source], &WordSum, 10, &context).unwrap(), sum);
            let plan = Plan::new(10, 4, budget);
            assert!(source.1.into_inner() <= plan.readers * plan.each, "{budget}: {plan:?}");
        }
    }
}
