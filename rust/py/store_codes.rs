//! `CodesWriter`: the core's writer under the columns of sparse codes, with `k` slots per row or as many as fired.

use microtome_core::store::{Column, Manifest, Nonfinite, Scalar, Table};
use numpy::ndarray::Dimension;
use numpy::{Element, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::writer::{Owned, parse_facts};
use crate::error::shape_error;

/// Row space of the encoded rows; its row table holds their numbers in the store of activations.
const TOKENS: &str = "tokens";
/// Row space of the entries of ragged codes, row after row.
const ENTRIES: &str = "entries";

/// The one writer of a store of sparse codes.
#[pyclass(frozen, module = "microtome._core")]
pub struct CodesWriter {
    owned: Owned,
    hook: String,
    k: Option<usize>,
}

#[pymethods]
impl CodesWriter {
    /// `k` slots per row; without `k`, as many entries per row as fired.
    #[new]
    #[pyo3(signature = (path, *, hook, k, facts))]
    fn new(py: Python<'_>, path: &str, hook: String, k: Option<usize>, facts: &str) -> PyResult<Self> {
        let facts = parse_facts(facts)?;
        let (tables, rows) = match k {
            Some(k) => fixed_tables(&hook, k as u64),
            None => ragged_tables(&hook),
        };
        let owned = Owned::open(py, path, Manifest::new(facts, tables, rows), Nonfinite::Error)?;
        Ok(Self { owned, hook, k })
    }

    /// Committed rows.
    #[getter]
    fn n_rows(&self, py: Python<'_>) -> PyResult<u64> {
        self.owned.with(py, "n_rows", |w| Ok(w.manifest().n_rows(TOKENS)))
    }

    /// Appends codes `(n, k)` of the rows with these numbers.
    fn append(
        &self,
        py: Python<'_>,
        rows: PyReadonlyArray1<'_, u64>,
        indices: PyReadonlyArray2<'_, u32>,
        values: PyReadonlyArray2<'_, f32>,
    ) -> PyResult<()> {
        let Some(k) = self.k else {
            return Err(shape_error("codes", "as many entries per row as fired", "slots"));
        };
        let (n, shape) = (rows.len(), [rows.len(), k]);
        let columns = [bytes(&indices, &shape, "indices")?, bytes(&values, &shape, "values")?];
        let numbers = bytes(&rows, &[n], "rows")?;
        self.owned.with(py, "append", |writer| {
            writer.append(TOKENS, n, &[numbers], &[(&self.hook, columns.to_vec())])
        })
    }

    /// Appends ragged codes of the rows with these numbers: `fires` entries of each row, side by side.
    fn append_ragged(
        &self,
        py: Python<'_>,
        rows: PyReadonlyArray1<'_, u64>,
        fires: PyReadonlyArray1<'_, u32>,
        indices: PyReadonlyArray1<'_, u32>,
        values: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<()> {
        if let Some(k) = self.k {
            return Err(shape_error("codes", &format!("{k} slots in every row"), "ragged rows"));
        }
        let n = rows.len();
        let numbers = bytes(&rows, &[n], "rows")?;
        let counts = bytes(&fires, &[n], "fires")?;
        let entries = bytemuck::cast_slice::<u8, u32>(counts).iter().map(|&fires| fires as usize).sum();
        let indices = bytes(&indices, &[entries], "indices")?;
        let values = bytes(&values, &[entries], "values")?;
        self.owned.with(py, "append", |writer| {
            // Entries first: they alone can be refused (NaN), and a refusal leaves both spaces as they were.
            writer.append(ENTRIES, entries, &[indices], &[(&self.hook, vec![values])])?;
            writer.append(TOKENS, n, &[numbers, counts], &[])
        })
    }

    /// Commits the rows appended so far as a step.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.owned.with(py, "commit", |writer| writer.commit(&[]))
    }

    /// Drops what is not committed and releases the store. Closing twice is fine.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.owned.close(py)
    }
}

fn fixed_tables(hook: &str, k: u64) -> (Vec<Table>, Vec<Table>) {
    let columns = vec![Column::matrix("indices", Scalar::U32, k), Column::matrix("values", Scalar::F32, k)];
    let rows = Table::rows_of(TOKENS, vec![Column::vector("row", Scalar::U64)]);
    (vec![Table::hook(hook, TOKENS, columns)], vec![rows])
}

/// Indices and values lie in files of their own, so that neither waits in memory for the end of a step.
fn ragged_tables(hook: &str) -> (Vec<Table>, Vec<Table>) {
    let values = Table::hook(hook, ENTRIES, vec![Column::vector("values", Scalar::F32)]);
    let numbers = vec![Column::vector("row", Scalar::U64), Column::vector("fires", Scalar::U32)];
    let entries = Table::rows_of(ENTRIES, vec![Column::vector("indices", Scalar::U32)]);
    (vec![values], vec![Table::rows_of(TOKENS, numbers), entries])
}

/// The bytes of a C-contiguous array of this shape.
fn bytes<'a, T: Element + bytemuck::Pod, D: Dimension>(
    array: &'a PyReadonlyArray<'_, T, D>,
    shape: &[usize],
    name: &str,
) -> PyResult<&'a [u8]> {
    if array.shape() != shape {
        return Err(shape_error(name, &format!("shape {shape:?}"), &format!("shape {:?}", array.shape())));
    }
    let slice = if array.is_c_contiguous() { array.as_slice().ok() } else { None };
    slice
        .map(bytemuck::cast_slice)
        .ok_or_else(|| shape_error(name, "a C-contiguous, aligned array", "strided or misaligned memory"))
}
