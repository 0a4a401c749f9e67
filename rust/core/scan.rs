//! The parallel scan: a fixed grid of blocks, results in block order, a cancel flag, a progress counter.
//!
//! The grid depends on the number of rows and on nothing else: not on threads, shards or the order of completion. Each
//! block is computed by one thread, and partial results are merged in block order. That is all it takes for results that
//! are the same bit for bit on one thread and on sixty-four.

mod ahead;
pub mod encode;
pub mod pack;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rows::{Data, Rows};

/// Rows per block of the grid, unless the caller chooses another.
pub const BLOCK_ROWS: usize = 4096;

/// Where the rows of a scan come from: an array in memory or a selection of a store.
pub trait Source: Sync {
    /// Number of rows.
    fn n_rows(&self) -> usize;
    /// Width of a row.
    fn d(&self) -> usize;
    /// Element type.
    fn dtype(&self) -> Dtype;
    /// The rows of `range`: borrowed where they lie side by side, else gathered into `buffer`.
    fn read<'a>(&'a self, range: Range<usize>, buffer: &'a mut Buffer) -> Result<Rows<'a>>;
    /// Says that the rows of `range` will be read soon. Only a hint.
    fn will_need(&self, _range: Range<usize>) {}
    /// Whether reading leaves the processor idle while a disk works: a scan then reads ahead, on threads of its own. Such a
    /// source borrows nothing: [`Source::read`] always fills the buffer.
    fn waits(&self) -> bool {
        false
    }
}

impl Source for Rows<'_> {
    fn n_rows(&self) -> usize {
        self.n()
    }
    fn d(&self) -> usize {
        Rows::d(self)
    }
    fn dtype(&self) -> Dtype {
        Rows::dtype(self)
    }
    fn read<'a>(&'a self, range: Range<usize>, _buffer: &'a mut Buffer) -> Result<Rows<'a>> {
        Ok(self.slice(range))
    }
}

/// Reusable space for gathered rows, aligned for every element type.
#[derive(Default, Debug)]
pub struct Buffer {
    words: Vec<u64>,
}

impl Buffer {
    /// Space for `len` bytes; what it holds is unspecified.
    pub fn bytes(&mut self, len: usize) -> &mut [u8] {
        self.words.resize(len.div_ceil(8), 0);
        &mut bytemuck::cast_slice_mut(&mut self.words)[..len]
    }

    /// The first `n * d` elements as rows.
    pub fn rows(&self, dtype: Dtype, n: usize, d: usize) -> Result<Rows<'_>> {
        let bytes = &bytemuck::cast_slice::<u64, u8>(&self.words)[..n * d * dtype.size()];
        let data = match dtype {
            Dtype::F32 => Data::F32(bytemuck::cast_slice(bytes)),
            Dtype::F16 => Data::F16(bytemuck::cast_slice(bytes)),
            Dtype::Bf16 => Data::Bf16(bytemuck::cast_slice(bytes)),
        };
        Rows::new(data, d)
    }
}

/// What a running computation shares with the thread that waits for it.
#[derive(Debug)]
pub struct Context<'a> {
    /// Set by the waiting thread to stop the work; polled once per block.
    pub cancel: &'a AtomicBool,
    /// Rows done so far.
    pub done: &'a AtomicU64,
    /// Bytes of memory the work may use beyond its inputs and its result.
    pub memory_budget: usize,
}

impl Context<'_> {
    /// [`Error::Cancelled`] once the waiting thread has asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}

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

/// The fixed grid over `n` rows.
pub fn grid(n: usize, block_rows: usize) -> impl ExactSizeIterator<Item = Range<usize>> + Clone {
    let blocks = n.div_ceil(block_rows);
    (0..blocks).map(move |b| b * block_rows..n.min((b + 1) * block_rows))
}

/// Runs `work` on every item in parallel and returns the results in item order. Runs in the current rayon pool.
pub fn map_ordered<I: Send + Sync, T: Send>(
    items: &[I],
    context: &Context<'_>,
    work: impl Fn(&I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    items
        .par_iter()
        .map(|item| {
            context.check()?;
            work(item)
        })
        .collect()
}

/// As [`map_ordered`], with memory that `work` may reuse from item to item; `init` makes it, once per worker and now and
/// then again.
pub fn map_ordered_with<I: Send + Sync, S, T: Send>(
    items: &[I],
    context: &Context<'_>,
    init: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, &I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    items
        .par_iter()
        .map_init(init, |space, item| {
            context.check()?;
            work(space, item)
        })
        .collect()
}

/// Runs `work` on disjoint pieces of `out`, `piece` elements each, in parallel; the piece's number comes first.
pub fn fill_pieces<T: Send>(
    out: &mut [T],
    piece: usize,
    context: &Context<'_>,
    work: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    out.par_chunks_mut(piece).enumerate().try_for_each(|(i, chunk)| {
        context.check()?;
        work(i, chunk)
    })
}

/// Runs `work` on consecutive parts of `out` of the given lengths, in parallel; the part's number comes first.
pub fn fill_parts<T: Send>(
    out: &mut [T],
    lengths: &[usize],
    context: &Context<'_>,
    work: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let mut rest = out;
    let parts: Vec<&mut [T]> = lengths.iter().filter_map(|&len| rest.split_off_mut(..len)).collect();
    parts.into_par_iter().enumerate().try_for_each(|(i, part)| {
        context.check()?;
        work(i, part)
    })
}

/// As [`fill_pieces`], and what `work` returns comes back in the order of the pieces.
pub fn map_pieces<T: Send, R: Send>(
    out: &mut [T],
    piece: usize,
    context: &Context<'_>,
    work: impl Fn(usize, &mut [T]) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    out.par_chunks_mut(piece)
        .enumerate()
        .map(|(i, chunk)| {
            context.check()?;
            work(i, chunk)
        })
        .collect()
}

/// Runs `work` on every item in parallel and hands the results to `merge` in item order, a few waves of threads at a
/// time: memory is bounded by threads, not by items.
pub fn reduce_ordered<I: Send + Sync, R: Send>(
    items: &[I],
    context: &Context<'_>,
    work: impl Fn(&I) -> Result<R> + Sync,
    mut merge: impl FnMut(&I, R) -> Result<()>,
) -> Result<()> {
    for wave in items.chunks(4 * rayon::current_num_threads().max(1)) {
        for (item, result) in wave.iter().zip(map_ordered(wave, context, &work)?) {
            merge(item, result)?;
        }
    }
    Ok(())
}

/// Threads of the pool that this runs in. For the use of memory: no result may depend on it.
pub fn threads() -> usize {
    rayon::current_num_threads().max(1)
}

/// Rows per block so that blocks are at most `most` rows and every thread of the pool has one of them.
///
/// For work whose result does not depend on the blocks; folds use the fixed grid.
pub fn spread(n: usize, most: usize) -> usize {
    let waves = n.div_ceil(most * rayon::current_num_threads()).max(1);
    n.div_ceil(waves * rayon::current_num_threads()).clamp(1, most)
}

/// Runs `work` on every block of rows in parallel, with the number of its first row; results in block order.
pub fn map_blocks<T: Send>(
    source: &dyn Source,
    block_rows: usize,
    context: &Context<'_>,
    work: impl Fn(Rows<'_>, usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let n = source.n_rows();
    // Not a list of blocks: a manifest may claim any number of rows, and the first block that is not there ends the scan.
    (0..n.div_ceil(block_rows))
        .into_par_iter()
        .map(|block| {
            context.check()?;
            let range = block * block_rows..n.min((block + 1) * block_rows);
            work(source.read(range.clone(), &mut Buffer::default())?, range.start)
        })
        .collect()
}

/// As [`map_blocks`], for work that writes `width` numbers per row into each of two results.
pub fn fill_blocks<A: Send, B: Send>(
    source: &dyn Source,
    block_rows: usize,
    out: (&mut [A], &mut [B]),
    width: usize,
    context: &Context<'_>,
    work: impl Fn(Rows<'_>, usize, &mut [A], &mut [B]) -> Result<()> + Sync,
) -> Result<()> {
    let n = source.n_rows();
    let (a, b) = out;
    let pieces = a.par_chunks_mut(block_rows * width).zip(b.par_chunks_mut(block_rows * width));
    pieces.enumerate().try_for_each(|(i, (a, b))| {
        context.check()?;
        let range = i * block_rows..n.min((i + 1) * block_rows);
        work(source.read(range.clone(), &mut Buffer::default())?, range.start, a, b)
    })
}

/// Folds aligned sources: one partial result per block of the grid, merged in block order.
///
/// At most as many blocks are in flight as the pool has threads (rounded to whole waves), so that partial results never
/// pile up: memory is bounded by threads, not by rows.
///
/// # Errors
/// [`Error::Shape`] when there is no row or the sources differ in rows; [`Error::Cancelled`]; whatever the fold returns.
pub fn scan<F: Fold>(
    sources: &[&dyn Source],
    fold: &F,
    block_rows: usize,
    context: &Context<'_>,
) -> Result<F::Partial> {
    let mut total = fold.init();
    scan_into(&mut total, sources, fold, block_rows, context)?;
    Ok(total)
}

/// As [`scan`], going on from `total`, which holds the rows before these.
///
/// Where rows come in pieces of whole blocks, the result is that of one scan over all of them, bit for bit.
pub fn scan_into<F: Fold>(
    total: &mut F::Partial,
    sources: &[&dyn Source],
    fold: &F,
    block_rows: usize,
    context: &Context<'_>,
) -> Result<()> {
    let n = aligned_rows(sources)?;
    if sources.iter().any(|s| s.waits()) {
        return ahead::scan_into(total, sources, fold, block_rows, context);
    }
    let mut blocks = grid(n, block_rows);
    let ahead = (AHEAD_BYTES / row_bytes(sources)).max(block_rows);
    let mut announced = 0;
    // Fresh memory costs as much as reading into it.
    let spare: Mutex<Vec<Vec<Buffer>>> = Mutex::default();
    loop {
        let wave: Vec<_> = blocks.by_ref().take(threads()).collect();
        let Some(last) = wave.last() else { return Ok(()) };
        let soon = n.min(last.end + ahead);
        for source in sources {
            source.will_need(announced..soon);
        }
        announced = soon;
        let partials = map_ordered(&wave, context, |range| {
            let mut buffers = locked(&spare).pop().unwrap_or_else(|| spaces(sources));
            let rows = read_all(sources, range.clone(), &mut buffers)?;
            let partial = update_block(fold, &rows, range.start, context)?;
            locked(&spare).push(buffers);
            Ok(partial)
        })?;
        partials.into_iter().try_for_each(|partial| fold.merge(total, partial))?;
    }
}

fn locked<T>(stash: &Mutex<T>) -> MutexGuard<'_, T> {
    stash.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of each row of all sources together.
fn row_bytes(sources: &[&dyn Source]) -> usize {
    sources.iter().map(|s| s.d() * s.dtype().size()).sum::<usize>().max(1)
}

fn spaces(sources: &[&dyn Source]) -> Vec<Buffer> {
    sources.iter().map(|_| Buffer::default()).collect()
}

/// The rows of `range` of every source.
fn read_all<'a>(
    sources: &[&'a dyn Source],
    range: Range<usize>,
    buffers: &'a mut [Buffer],
) -> Result<Vec<Rows<'a>>> {
    sources.iter().zip(buffers).map(|(source, buffer)| source.read(range.clone(), buffer)).collect()
}

fn update_block<F: Fold>(
    fold: &F,
    block: &[Rows<'_>],
    first_row: usize,
    context: &Context<'_>,
) -> Result<F::Partial> {
    let mut partial = fold.init();
    fold.update(&mut partial, block, first_row)?;
    context.done.fetch_add(block.first().map_or(0, Rows::n) as u64, Ordering::Relaxed);
    Ok(partial)
}

/// Bytes that a disk is asked for before they are read.
const AHEAD_BYTES: usize = 16 << 20;

/// Number of partial results of `bytes` each that may be in flight: at most one per thread, and within the budget.
///
/// # Errors
/// [`Error::Memory`] when one of them exceeds the budget.
pub fn in_flight(what: &str, bytes: usize, hint: &str, context: &Context<'_>) -> Result<usize> {
    let budget = context.memory_budget;
    if bytes > budget {
        let (what, hint) = (what.to_owned(), hint.to_owned());
        return Err(Error::Memory { what, needed: bytes, budget, hint });
    }
    Ok((budget / bytes.max(1)).clamp(1, rayon::current_num_threads().max(1)))
}

fn aligned_rows(sources: &[&dyn Source]) -> Result<usize> {
    let n = sources.first().map_or(0, |s| s.n_rows());
    if n == 0 {
        return Err(Error::shape("x", "at least one row", "no rows selected"));
    }
    match sources.iter().find(|s| s.n_rows() != n) {
        Some(other) => {
            Err(Error::shape("y", format!("{n} rows, as in x"), format!("{} rows", other.n_rows())))
        }
        None => Ok(n),
    }
}
