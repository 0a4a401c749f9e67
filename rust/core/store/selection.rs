//! Rows of one column, in any order: what a scan reads from a store.

use std::ops::Range;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rows::{Data, Rows};
use crate::scan::{Buffer, Context, Source};
use crate::store::bytes::{Backend, Window};
use crate::store::format::{Column, Scalar};
use crate::store::map::PrivateMap;
use crate::store::reader::Store;
use crate::store::shard::SealedShard;

/// Row numbers in any order, held as runs of consecutive ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowIndex {
    runs: Vec<Range<u64>>,
    /// Rows in front of each run; one entry more than runs.
    before: Vec<usize>,
}

impl RowIndex {
    /// The rows `0..n`.
    pub fn all(n: u64) -> Self {
        let mut index = Self { runs: Vec::new(), before: vec![0] };
        index.push(0..n);
        index
    }

    /// The rows given, in their order.
    pub fn from_rows(rows: &[u64]) -> Self {
        let mut index = Self::all(0);
        for run in rows.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            index.push(run[0]..run[0].saturating_add(run.len() as u64));
        }
        index
    }

    fn push(&mut self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        let end = self.len() + (run.end - run.start) as usize;
        self.runs.push(run);
        self.before.push(end);
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.before.last().copied().unwrap_or(0)
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row numbers one after the other.
    pub fn rows(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().cloned().flatten()
    }

    /// The largest row number.
    pub fn max(&self) -> Option<u64> {
        self.runs.iter().map(|r| r.end - 1).max()
    }

    /// The runs that make up the places `range` of this index, cut to it.
    pub fn runs(&self, range: Range<usize>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.before.partition_point(|b| *b <= range.start).saturating_sub(1);
        let inside = self.runs.iter().zip(&self.before).skip(first);
        inside.take_while(move |(_, before)| **before < range.end).map(move |(run, before)| {
            let skip = range.start.saturating_sub(*before) as u64;
            let end = run.end.min(run.start + (range.end - before) as u64);
            run.start + skip..end
        })
    }

    /// The rows at `places` of this index.
    ///
    /// # Errors
    /// [`Error::Shape`] when a place lies outside.
    pub fn take(&self, places: &[u64]) -> Result<Self> {
        let row = |&place: &u64| {
            // `before` begins with 0, so there is a run at or before every place.
            let run = self.before.partition_point(|b| *b as u64 <= place) - 1;
            match self.runs.get(run) {
                Some(range) => Ok(range.start + (place - self.before[run] as u64)),
                None => Err(Error::shape("rows", format!("below {}", self.len()), place.to_string())),
            }
        };
        Ok(Self::from_rows(&places.iter().map(row).collect::<Result<Vec<_>>>()?))
    }

    /// The places `range` of this index.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let mut index = Self::all(0);
        for run in self.runs(range) {
            index.push(run);
        }
        index
    }
}

/// Rows of one column of a store.
#[derive(Clone, Debug)]
pub struct Selection {
    store: Arc<Store>,
    table: usize,
    column: usize,
    index: Arc<RowIndex>,
}

impl Selection {
    pub(crate) fn all(store: Arc<Store>, table: usize, column: usize) -> Self {
        let n = store.starts(table).last().copied().unwrap_or(0);
        Self { store, table, column, index: Arc::new(RowIndex::all(n)) }
    }

    /// The column these rows belong to.
    pub fn column(&self) -> &Column {
        &self.store.table(self.table).columns[self.column]
    }

    /// Whether these are all rows of the column, in order.
    pub fn is_all(&self) -> bool {
        let n = self.store.starts(self.table).last().copied().unwrap_or(0);
        *self.index == RowIndex::all(n)
    }

    /// Which rows these are.
    pub fn index(&self) -> &RowIndex {
        &self.index
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Bytes per row.
    pub fn row_bytes(&self) -> usize {
        self.column().row_bytes().unwrap_or(0) as usize
    }

    /// The same column at other rows: places of this selection.
    ///
    /// # Errors
    /// [`Error::Shape`] when a place lies outside.
    pub fn take(&self, places: &[u64]) -> Result<Self> {
        Ok(Self { index: Arc::new(self.index.take(places)?), ..self.clone() })
    }

    /// Ranges of row numbers of the column that lie under damage in step `step`: every block of its shard is checked.
    ///
    /// # Errors
    /// As [`Store::damaged_rows`].
    pub fn damaged_rows(&self, step: usize, context: &Context<'_>) -> Result<Vec<Range<u64>>> {
        self.store.damaged_rows(self.table, step, context)
    }

    /// Number of steps of the store.
    pub fn steps(&self) -> usize {
        self.store.manifest().steps.len()
    }

    /// The same column at the places `range`, which lies within this selection.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        Self { index: Arc::new(self.index.slice(range)), ..self.clone() }
    }

    /// The places `range` as rows of shards: step, and rows counted in the step.
    fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let starts = self.store.starts(self.table);
        self.index.runs(range).flat_map(move |run| {
            // The last step that begins at or before the run; empty steps lie before it.
            let first = starts.partition_point(|s| *s <= run.start) - 1;
            let steps = first..starts.len() - 1;
            let end = run.end;
            steps.take_while(move |s| starts[*s] < end).filter_map(move |s| {
                let piece = run.start.max(starts[s])..end.min(starts[s + 1]);
                (!piece.is_empty()).then(|| (s, piece.start - starts[s]..piece.end - starts[s]))
            })
        })
    }

    fn only_piece(&self, range: Range<usize>) -> Option<(usize, Range<u64>)> {
        let mut pieces = self.pieces(range);
        pieces.next().filter(|_| pieces.next().is_none())
    }

    fn shard(&self, step: usize) -> Result<&SealedShard> {
        let shard = self.store.shard(step, self.table)?;
        shard.unchanged(self.store.fs())?;
        Ok(shard)
    }

    /// Copies the rows at the places `range` into `out`, which has their size.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a block under the rows is damaged, [`Error::Store`] when a shard was truncated.
    pub fn gather(&self, range: Range<usize>, out: &mut [u8]) -> Result<()> {
        let width = self.row_bytes();
        let mut open: Option<(usize, &SealedShard)> = None;
        let (mut filled, mut window) = (0, Window::default());
        for (step, rows) in self.pieces(range) {
            let shard = match open {
                Some((same, shard)) if same == step => shard,
                _ => self.shard(step)?,
            };
            let bytes = (rows.end - rows.start) as usize * width;
            shard.copy(self.column, rows, &mut out[filled..filled + bytes], &mut window)?;
            filled += bytes;
            open = Some((step, shard));
        }
        Ok(())
    }

    /// Asks for the rows at the places `range` to be fetched from disk. Only a hint: an error waits for the read.
    pub fn will_need(&self, range: Range<usize>) {
        for (step, rows) in self.pieces(range) {
            if let Ok(shard) = self.store.shard(step, self.table) {
                shard.will_need(self.column, rows);
            }
        }
    }

    /// A private map of the rows at the places `range`, where they lie side by side in one mapped shard.
    ///
    /// # Errors
    /// As [`Selection::gather`].
    pub fn private_map(&self, range: Range<usize>) -> Result<Option<PrivateMap>> {
        match self.only_piece(range) {
            Some((step, rows)) => self.shard(step)?.private_map(self.store.fs(), self.column, rows),
            None => Ok(None),
        }
    }

    /// These rows as a source of activations.
    ///
    /// # Errors
    /// [`Error::Dtype`] for a column that holds none.
    pub fn activations(&self) -> Result<Activations<'_>> {
        let Column { name, dtype, width, .. } = self.column();
        match (dtype.dtype(), width) {
            (Some(dtype), Some(d)) => Ok(Activations { selection: self, dtype, d: *d as usize }),
            _ => Err(Error::Dtype {
                argument: name.clone(),
                expected: "a matrix of float32, float16 or bfloat16".to_owned(),
                found: format!("{} of width {width:?}", dtype.code()),
            }),
        }
    }
}

/// A selection of activations as the scan reads it.
#[derive(Debug)]
pub struct Activations<'s> {
    selection: &'s Selection,
    dtype: Dtype,
    d: usize,
}

impl Source for Activations<'_> {
    fn n_rows(&self) -> usize {
        self.selection.len()
    }

    fn d(&self) -> usize {
        self.d
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn read<'a>(&'a self, range: Range<usize>, buffer: &'a mut Buffer) -> Result<Rows<'a>> {
        let Self { selection, dtype, d } = *self;
        if let Some((step, rows)) = selection.only_piece(range.clone())
            && let Some(bytes) = selection.shard(step)?.borrow(selection.column, rows)?
        {
            return Rows::new(typed(bytes, dtype), d);
        }
        selection.gather(range.clone(), buffer.bytes(range.len() * selection.row_bytes()))?;
        buffer.rows(dtype, range.len(), d)
    }

    fn will_need(&self, range: Range<usize>) {
        self.selection.will_need(range);
    }

    fn waits(&self) -> bool {
        self.selection.store.backend() == Backend::Direct
    }
}

fn typed(bytes: &[u8], dtype: Dtype) -> Data<'_> {
    match dtype {
        Dtype::F32 => Data::F32(bytemuck::cast_slice(bytes)),
        Dtype::F16 => Data::F16(bytemuck::cast_slice(bytes)),
        Dtype::Bf16 => Data::Bf16(bytemuck::cast_slice(bytes)),
    }
}

/// Names an element type for messages and arrays.
impl Scalar {
    /// Type string of an array of this scalar; bf16 has none of its own and crosses as 16-bit words.
    pub const fn array_type(self) -> &'static str {
        match self {
            Self::F32 => "<f4",
            Self::F16 => "<f2",
            Self::Bf16 => "<u2",
            Self::U8 => "|u1",
            Self::U32 => "<u4",
            Self::U64 => "<u8",
        }
    }
}
