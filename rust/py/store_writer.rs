//! `StoreWriter`: the core's writer under the columns of activations; and what it shares with the writer of codes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use microtome_core::store::fs::Os;
use microtome_core::store::{Column, Manifest, Nonfinite, Scalar, Table, Writer};
use microtome_core::{Dtype, Error, Result, with_elements};
use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::Matrix;
use crate::error::{dtype_error, forked, shape_error};
use crate::run::detached;

/// Columns of a row table of activations.
const ROW_COLUMNS: [(&str, Scalar); 5] = [
    ("sample", Scalar::U64),
    ("position", Scalar::U32),
    ("token_id", Scalar::U32),
    ("kind", Scalar::U8),
    ("special", Scalar::U8),
];

/// A writer that this process owns; `None` once closed.
pub(super) struct Owned {
    writer: Mutex<Option<Writer>>,
    path: PathBuf,
    pid: u32,
}

impl Owned {
    pub(super) fn open(
        py: Python<'_>,
        path: &str,
        manifest: Manifest,
        nonfinite: Nonfinite,
    ) -> PyResult<Self> {
        let path = PathBuf::from(path);
        let writer = detached(py, "open", || Writer::open(Arc::new(Os), &path, manifest, nonfinite))?;
        Ok(Self { writer: Mutex::new(Some(writer)), path, pid: std::process::id() })
    }

    /// Runs `work` on the open writer, detached; a forked child is refused before it touches the lock.
    pub(super) fn with<T: Send>(
        &self,
        py: Python<'_>,
        name: &'static str,
        work: impl FnOnce(&mut Writer) -> Result<T> + Send,
    ) -> PyResult<T> {
        if std::process::id() != self.pid {
            return Err(forked("StoreWriter"));
        }
        detached(py, name, || {
            let mut slot = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            let closed = || Error::Store { path: self.path.clone(), reason: "the writer is closed".into() };
            work(slot.as_mut().ok_or_else(closed)?)
        })
    }

    pub(super) fn close(&self, py: Python<'_>) -> PyResult<()> {
        if std::process::id() != self.pid {
            return Err(forked("StoreWriter"));
        }
        detached(py, "close", || {
            drop(self.writer.lock().unwrap_or_else(PoisonError::into_inner).take());
            Ok(())
        })
    }
}

/// The one writer of a store of activations: appends rows to an open step, commits it, resumes after any end.
#[pyclass(frozen, module = "microtome._core")]
pub struct StoreWriter {
    owned: Owned,
    spaces: Vec<String>,
}

#[pymethods]
impl StoreWriter {
    #[new]
    #[pyo3(signature = (path, *, hooks, dtype, facts, nonfinite = "error"))]
    fn new(
        py: Python<'_>,
        path: &str,
        hooks: Vec<(String, u64, String)>,
        dtype: &str,
        facts: &str,
        nonfinite: &str,
    ) -> PyResult<Self> {
        let scalar = Dtype::parse(dtype).filter(|d| d.name() == dtype).ok_or_else(|| {
            dtype_error("dtype", "'float32', 'float16' or 'bfloat16'", &format!("{dtype:?}"))
        })?;
        let nonfinite = match nonfinite {
            "error" => Nonfinite::Error,
            "keep" => Nonfinite::Keep,
            other => return Err(shape_error("nonfinite", "'error' or 'keep'", &format!("{other:?}"))),
        };
        if hooks.is_empty() {
            return Err(shape_error("hooks", "at least one hook", "none"));
        }
        let mut spaces: Vec<String> = Vec::new();
        for (_, _, space) in hooks.iter().filter(|(_, _, s)| !s.is_empty()) {
            if !spaces.contains(space) {
                spaces.push(space.clone());
            }
        }
        let columns: Vec<_> = ROW_COLUMNS.iter().map(|(name, s)| Column::vector(name, *s)).collect();
        let tables = hooks.iter().map(|(name, width, space)| {
            Table::hook(name, space, vec![Column::matrix("x", scalar.into(), *width)])
        });
        let manifest = Manifest::new(
            parse_facts(facts)?,
            tables.collect(),
            spaces.iter().map(|s| Table::rows_of(s, columns.clone())).collect(),
        );
        Ok(Self { owned: Owned::open(py, path, manifest, nonfinite)?, spaces })
    }

    /// Folder of the store.
    #[getter]
    fn path(&self) -> String {
        self.owned.path.display().to_string()
    }

    /// Number of committed steps.
    #[getter]
    fn steps(&self, py: Python<'_>) -> PyResult<usize> {
        self.owned.with(py, "steps", |w| Ok(w.manifest().steps.len()))
    }

    /// Committed rows per row space.
    #[getter]
    fn n_rows(&self, py: Python<'_>) -> PyResult<BTreeMap<String, u64>> {
        self.owned.with(py, "n_rows", |w| {
            Ok(self.spaces.iter().map(|s| (s.clone(), w.manifest().n_rows(s))).collect())
        })
    }

    /// Appends the same rows to every hook of `space`; the arrays may be reused at once.
    fn append(
        &self,
        py: Python<'_>,
        space: &str,
        rows: &Bound<'_, PyDict>,
        arrays: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let rows = RowColumns::extract(rows)?;
        let mut matrices = Vec::with_capacity(arrays.len());
        for (hook, array) in arrays {
            let hook: String = hook.extract()?;
            let matrix = Matrix::extract(&array, &hook)?;
            matrices.push((hook, matrix));
        }
        let mut data = Vec::with_capacity(matrices.len());
        for (hook, matrix) in &matrices {
            let x = matrix.rows(hook)?;
            if x.n() != rows.n {
                let expected = format!("{} rows, as in rows['sample']", rows.n);
                return Err(shape_error(hook, &expected, &x.n().to_string()));
            }
            data.push((hook.as_str(), x));
        }
        let columns = rows.bytes()?;
        self.owned.with(py, "append", |writer| {
            let mut given = Vec::with_capacity(data.len());
            for (hook, x) in &data {
                check_width(writer.manifest(), hook, x.dtype(), x.d())?;
                given.push((*hook, vec![with_elements!(x.data(), s => bytemuck::cast_slice::<_, u8>(s))]));
            }
            writer.append(space, rows.n, &columns, &given)
        })
    }

    /// Seals the open step and commits it with its table of samples, the bytes of a parquet file.
    fn commit(&self, py: Python<'_>, samples_parquet: &[u8]) -> PyResult<()> {
        self.owned.with(py, "commit", |writer| writer.commit(samples_parquet))
    }

    /// Drops the rows appended since the last commit.
    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        self.owned.with(py, "discard", Writer::discard)
    }

    /// Drops what is not committed and releases the store. Closing twice is fine.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.owned.close(py)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }
}

/// The arrays of `rows`, one per column of a row table.
struct RowColumns<'py> {
    n: usize,
    sample: PyReadonlyArray1<'py, u64>,
    position: PyReadonlyArray1<'py, u32>,
    token_id: PyReadonlyArray1<'py, u32>,
    kind: PyReadonlyArray1<'py, u8>,
    special: PyReadonlyArray1<'py, u8>,
}

impl<'py> RowColumns<'py> {
    fn extract(rows: &Bound<'py, PyDict>) -> PyResult<Self> {
        for key in rows.keys() {
            let key: String = key.extract()?;
            if !ROW_COLUMNS.iter().any(|(name, _)| *name == key) {
                let expected = "sample, position, token_id, kind and special";
                return Err(shape_error("rows", expected, &format!("{key:?}")));
            }
        }
        let sample = row_column(rows, "sample")?;
        let n = sample.len();
        let columns = Self {
            n,
            sample,
            position: row_column(rows, "position")?,
            token_id: row_column(rows, "token_id")?,
            kind: row_column(rows, "kind")?,
            special: row_column(rows, "special")?,
        };
        for (name, len) in columns.lengths() {
            if len != n {
                return Err(shape_error(
                    &format!("rows[{name:?}]"),
                    &format!("{n} values, as in rows[\"sample\"]"),
                    &len.to_string(),
                ));
            }
        }
        Ok(columns)
    }

    fn lengths(&self) -> [(&'static str, usize); 4] {
        [
            ("position", self.position.len()),
            ("token_id", self.token_id.len()),
            ("kind", self.kind.len()),
            ("special", self.special.len()),
        ]
    }

    fn bytes(&self) -> PyResult<[&[u8]; 5]> {
        Ok([
            bytemuck::cast_slice(contiguous(&self.sample, "sample")?),
            bytemuck::cast_slice(contiguous(&self.position, "position")?),
            bytemuck::cast_slice(contiguous(&self.token_id, "token_id")?),
            contiguous(&self.kind, "kind")?,
            contiguous(&self.special, "special")?,
        ])
    }
}

fn row_column<'py, T: numpy::Element>(
    rows: &Bound<'py, PyDict>,
    name: &str,
) -> PyResult<PyReadonlyArray1<'py, T>> {
    let argument = format!("rows[{name:?}]");
    let Some(object) = rows.get_item(name)? else {
        return Err(shape_error("rows", &format!("a column {name:?}"), "none"));
    };
    object.extract().map_err(|_| {
        let wanted = T::get_dtype(rows.py()).str().map(|s| s.to_string()).unwrap_or_default();
        let found = match object.cast::<PyUntypedArray>() {
            Ok(array) => format!("{} of shape {:?}", array.dtype(), array.shape()),
            Err(_) => object.get_type().to_string(),
        };
        dtype_error(&argument, &format!("a vector of {wanted}"), &found)
    })
}

fn contiguous<'a, T: numpy::Element>(array: &'a PyReadonlyArray1<'_, T>, name: &str) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| {
        shape_error(
            &format!("rows[{name:?}]"),
            "a contiguous, aligned vector",
            "strided or misaligned memory",
        )
    })
}

/// Holds the matrix of a hook to the store's type and the hook's width; unknown hooks are left to the writer.
fn check_width(manifest: &Manifest, hook: &str, dtype: Dtype, d: usize) -> Result<()> {
    let Some(column) = manifest.hooks.iter().find(|h| h.name == hook).and_then(|h| h.columns.first()) else {
        return Ok(());
    };
    if column.dtype != Scalar::from(dtype) {
        let expected = column.dtype.dtype().map_or("another type", Dtype::name);
        return Err(Error::Dtype {
            argument: hook.to_owned(),
            expected: format!("{expected}, the type of the store"),
            found: dtype.name().to_owned(),
        });
    }
    if column.width != Some(d as u64) {
        let expected = format!("rows of width {}", column.width.unwrap_or(1));
        return Err(Error::shape(hook, expected, d.to_string()));
    }
    Ok(())
}

pub(super) fn parse_facts(facts: &str) -> PyResult<serde_json::Value> {
    serde_json::from_str(facts)
        .ok()
        .filter(serde_json::Value::is_object)
        .ok_or_else(|| shape_error("facts", "a JSON object", "something else"))
}
