//! `StoreReader`, `Selection` and `Block`: the store on its way to arrays.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::f16;
use microtome_core::memory::try_zeros;
use microtome_core::metrics::words::WordSum;
use microtome_core::scan::{fill_pieces, map_ordered, scan};
use microtome_core::store::map::PrivateMap;
use microtome_core::store::{Backend, Column, Scalar, Selection as Rows, Store, Table, Verify};
use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::arrays::Input;
use crate::error::{shape_error, to_py};
use crate::run::{Task, detached, run};

/// From this size on, rows that lie side by side are mapped instead of copied.
const MAP_BYTES: usize = 64 << 10;
/// Up to this size a copy is made on the calling thread.
const COPY_BYTES: usize = 4 << 20;

/// What to do where memory has no room for rows or their numbers.
const LESS: &str = "Read in blocks(), or give the selection itself to a metric";

/// (name, row space, [(column, dtype, width)])
type TableFacts = (String, String, Vec<(String, &'static str, Option<u64>)>);

/// A store as its manifest described it at the moment of opening; files are opened and checked when first touched.
#[pyclass(frozen, module = "microtome._core")]
pub struct StoreReader {
    store: Arc<Store>,
}

#[pymethods]
impl StoreReader {
    #[new]
    #[pyo3(signature = (path, verify = "first", backend = "mmap"))]
    fn new(py: Python<'_>, path: &str, verify: &str, backend: &str) -> PyResult<Self> {
        let verify = match verify {
            "first" => Verify::First,
            "always" => Verify::Always,
            "never" => Verify::Never,
            other => {
                return Err(shape_error("verify", "'first', 'always' or 'never'", &format!("{other:?}")));
            }
        };
        let backend = match backend {
            "mmap" => Backend::Mmap,
            "pread" => Backend::Pread,
            "direct" => Backend::Direct,
            other => {
                return Err(shape_error("backend", "'mmap', 'pread' or 'direct'", &format!("{other:?}")));
            }
        };
        let store = detached(py, "open", || Store::open(Path::new(path), verify, backend))?;
        Ok(Self { store: Arc::new(store) })
    }

    /// Folder of the store.
    #[getter]
    fn path(&self) -> String {
        self.store.root().display().to_string()
    }

    /// How bytes are reached: `"pread"` where `"direct"` was asked for and the file system cannot.
    #[getter]
    fn backend(&self) -> &'static str {
        match self.store.backend() {
            Backend::Mmap => "mmap",
            Backend::Pread => "pread",
            Backend::Direct => "direct",
        }
    }

    /// Checksum of the manifest, which covers every byte of the store.
    #[getter]
    fn fingerprint(&self) -> String {
        format!("{:08x}", self.store.manifest().crc32c)
    }

    /// Facts of the run, as JSON.
    #[getter]
    fn facts(&self) -> String {
        self.store.manifest().facts.to_string()
    }

    /// Hooks: name, row space, columns.
    #[getter]
    fn hooks(&self) -> Vec<TableFacts> {
        self.store.manifest().hooks.iter().map(table_facts).collect()
    }

    /// Row spaces: name, itself, columns of its row table.
    #[getter]
    fn spaces(&self) -> Vec<TableFacts> {
        self.store.manifest().spaces.iter().map(table_facts).collect()
    }

    /// Rows per step and row space.
    #[getter]
    fn steps(&self) -> Vec<BTreeMap<String, u64>> {
        self.store.manifest().steps.iter().map(|s| s.rows.clone()).collect()
    }

    /// All rows of a column of a hook.
    #[pyo3(signature = (name, column = "x"))]
    fn hook(&self, name: &str, column: &str) -> PyResult<Selection> {
        self.store.hook(name, column).map(Selection::new).map_err(|e| to_py(&e))
    }

    /// All rows of a column of a row table.
    fn row_column(&self, space: &str, column: &str) -> PyResult<Selection> {
        self.store.row_column(space, column).map(Selection::new).map_err(|e| to_py(&e))
    }

    /// The table of samples of a step: the bytes of a parquet file.
    fn samples<'py>(&self, py: Python<'py>, step: usize) -> PyResult<Bound<'py, PyBytes>> {
        if step >= self.store.manifest().steps.len() {
            let expected = format!("below {}", self.store.manifest().steps.len());
            return Err(shape_error("step", &expected, &step.to_string()));
        }
        let bytes = detached(py, "samples", || self.store.samples(step))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Checks every byte of every file; one line per problem. `progress` hears the number of files done.
    #[pyo3(signature = (progress = None))]
    fn verify(&self, py: Python<'_>, progress: Option<Bound<'_, PyAny>>) -> PyResult<Vec<String>> {
        let files = self.store.tables() + 1;
        let all: Vec<_> = (0..self.n_files()).map(|i| (i / files, i % files)).collect();
        let task = Task { progress, ..Task::named("verify") };
        let problems = run(py, task, |context| {
            map_ordered(&all, context, |(step, file)| {
                let problems = self.store.problems(*step, *file, context)?;
                context.done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Ok(problems)
            })
        })?;
        Ok(problems.into_iter().flatten().collect())
    }

    /// Number of files that `verify` checks.
    #[getter]
    fn n_files(&self) -> usize {
        self.store.manifest().steps.len() * (self.store.tables() + 1)
    }
}

fn table_facts(table: &Table) -> TableFacts {
    let column = |c: &Column| (c.name.clone(), type_name(c.dtype), c.width);
    (table.name.clone(), table.row_space().to_owned(), table.columns.iter().map(column).collect())
}

fn type_name(scalar: Scalar) -> &'static str {
    match scalar {
        Scalar::F32 => "float32",
        Scalar::F16 => "float16",
        Scalar::Bf16 => "bfloat16",
        Scalar::U8 => "uint8",
        Scalar::U32 => "uint32",
        Scalar::U64 => "uint64",
    }
}

/// Rows of one column of a store, in any order.
#[pyclass(frozen, module = "microtome._core")]
pub struct Selection {
    rows: Arc<Rows>,
}

impl Selection {
    fn new(rows: Rows) -> Self {
        Self { rows: Arc::new(rows) }
    }

    /// The rows as the core reads them.
    pub fn rows(&self) -> Arc<Rows> {
        Arc::clone(&self.rows)
    }
}

#[pymethods]
impl Selection {
    fn __len__(&self) -> usize {
        self.rows.len()
    }

    /// Elements per row; `None` for a vector.
    #[getter]
    fn width(&self) -> Option<u64> {
        self.rows.column().width
    }

    /// Name of the element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        type_name(self.rows.column().dtype)
    }

    /// Whether these are all rows of the column, in order.
    #[getter]
    fn is_all(&self) -> bool {
        self.rows.is_all()
    }

    /// Row numbers in the store, one per row of this selection.
    fn indices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let index = self.rows.index();
        let mut rows = try_zeros::<u64>(index.len(), "row_numbers", LESS).map_err(|e| to_py(&e))?;
        rows.iter_mut().zip(index.rows()).for_each(|(number, row)| *number = row);
        Ok(rows.into_pyarray(py))
    }

    /// The places `start..stop` as a selection.
    fn slice(&self, start: usize, stop: usize) -> PyResult<Self> {
        self.check(start, stop)?;
        Ok(Self::new(self.rows.slice(start..stop)))
    }

    /// The places given, in their order.
    fn take(&self, places: PyReadonlyArray1<'_, u64>) -> PyResult<Self> {
        let places =
            places.as_slice().map_err(|_| shape_error("rows", "a contiguous vector", "a strided one"))?;
        self.rows.take(places).map(Self::new).map_err(|e| to_py(&e))
    }

    /// Row numbers of the column under damage, as a sorted list of (start, stop); every block is checked, step by step.
    fn damaged_rows(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        let rows = &*self.rows;
        let steps: Vec<usize> = (0..rows.steps()).collect();
        let damaged = run(py, Task::named("damaged_rows"), |context| {
            map_ordered(&steps, context, |step| rows.damaged_rows(*step, context))
        })?;
        Ok(damaged.into_iter().flatten().map(|r| (r.start, r.end)).collect())
    }

    /// Asks for the rows at the places `start..stop` to be fetched from disk. Only a hint.
    fn will_need(&self, py: Python<'_>, start: usize, stop: usize) -> PyResult<()> {
        self.check(start, stop)?;
        detached(py, "will_need", || {
            self.rows.will_need(start..stop);
            Ok(())
        })
    }

    /// The rows at the places `start..stop`: an array, or a block that `numpy.asarray` turns into one without a copy.
    fn read<'py>(&self, py: Python<'py>, start: usize, stop: usize) -> PyResult<Bound<'py, PyAny>> {
        self.check(start, stop)?;
        let rows = &*self.rows;
        let bytes = (stop - start).saturating_mul(rows.row_bytes());
        if bytes >= MAP_BYTES
            && let Some(map) = detached(py, "read", || rows.private_map(start..stop))?
        {
            let shape = std::iter::once(stop - start).chain(self.width().map(|w| w as usize)).collect();
            let block = Block { map, shape, scalar: rows.column().dtype };
            return Ok(Bound::new(py, block)?.into_any());
        }
        match rows.column().dtype {
            Scalar::F32 => self.gather::<f32>(py, start, stop),
            Scalar::F16 => self.gather::<f16>(py, start, stop),
            Scalar::Bf16 => self.gather::<u16>(py, start, stop),
            Scalar::U8 => self.gather::<u8>(py, start, stop),
            Scalar::U32 => self.gather::<u32>(py, start, stop),
            Scalar::U64 => self.gather::<u64>(py, start, stop),
        }
    }
}

impl Selection {
    fn check(&self, start: usize, stop: usize) -> PyResult<()> {
        if start <= stop && stop <= self.rows.len() {
            return Ok(());
        }
        Err(shape_error(
            "rows",
            &format!("a range within 0..{}", self.rows.len()),
            &format!("{start}..{stop}"),
        ))
    }

    /// A copy of the rows; in parallel when there are many bytes.
    fn gather<'py, T>(&self, py: Python<'py>, start: usize, stop: usize) -> PyResult<Bound<'py, PyAny>>
    where
        T: numpy::Element + bytemuck::Pod + Send,
    {
        let (rows, n) = (&*self.rows, stop - start);
        let width = self.width().map_or(1, |w| w as usize);
        let mut out = try_zeros::<T>(n.saturating_mul(width), "read", LESS).map_err(|e| to_py(&e))?;
        if size_of_val(out.as_slice()) <= COPY_BYTES {
            detached(py, "read", || rows.gather(start..stop, bytemuck::cast_slice_mut(&mut out)))?;
        } else {
            let piece = (COPY_BYTES / size_of::<T>()).div_ceil(width);
            run(py, Task::named("read"), |context| {
                fill_pieces(&mut out, piece * width, context, |i, part| {
                    let first = start + i * piece;
                    rows.gather(first..first + part.len() / width, bytemuck::cast_slice_mut(part))
                })
            })?;
        }
        let array = out.into_pyarray(py);
        match self.width() {
            Some(_) => Ok(array.reshape([n, width])?.into_any()),
            None => Ok(array.into_any()),
        }
    }
}

/// Sum of the words of `x`, modulo 2^64: a scan whose fold costs next to nothing.
#[pyfunction]
#[pyo3(signature = (x, progress = None))]
pub fn word_sum(py: Python<'_>, x: &Bound<'_, PyAny>, progress: Option<Bound<'_, PyAny>>) -> PyResult<u64> {
    let input = Input::extract(x, "x")?;
    let source = input.source("x")?;
    let rows = WordSum::block_rows(source.d(), source.dtype().size());
    let task = Task { progress, ..Task::named("word_sum") };
    run(py, task, |context| scan(&[&*source], &WordSum, rows, context))
}

/// Rows in a private map: an array over it may be written to, and changes nothing but itself.
#[pyclass(frozen, module = "microtome._core")]
pub struct Block {
    map: PrivateMap,
    shape: Vec<usize>,
    scalar: Scalar,
}

#[pymethods]
impl Block {
    /// The array interface, version 3: `numpy.asarray` makes a view that keeps this object alive.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", pyo3::types::PyTuple::new(py, &self.shape)?)?;
        interface.set_item("typestr", self.scalar.array_type())?;
        interface.set_item("data", (self.map.address(), false))?;
        Ok(interface)
    }
}
