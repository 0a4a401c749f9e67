//! Feature statistics, top samples and FVU: states that take rows block by block, and give one result.

#![allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value

use std::sync::{Mutex, PoisonError};

use microtome_core::kernels::moments::Moments;
use microtome_core::kernels::residual::Decoder;
use microtome_core::metrics::bootstrap::{Clustered, Resampling, frequency_gap as bootstrap_gap};
use microtome_core::metrics::features::{Accumulator, Labelled};
use microtome_core::metrics::firing::{Firing, sample_fires as count_samples};
use microtome_core::metrics::fvu::{BLOCK_ROWS, Fvu, Reconstruction, Variance};
use microtome_core::metrics::top::TopSamples;
use microtome_core::scan::{Context, scan_into};
use microtome_core::{Codes, Error, Result};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArrayDyn};
use pyo3::prelude::*;

use crate::arrays::{Input, Matrix, vector};
use crate::error::{shape_error, to_py};
use crate::run::{Task, run};

/// Sparse codes as they cross the border: `(slots per row, or row pointers; indices; values; d_sae)`.
#[derive(FromPyObject)]
pub struct CodesArgument<'py>(Pointers<'py>, PyReadonlyArray1<'py, u32>, PyReadonlyArray1<'py, f32>, usize);

#[derive(FromPyObject)]
enum Pointers<'py> {
    Fixed(usize),
    Ragged(PyReadonlyArray1<'py, u64>),
}

impl CodesArgument<'_> {
    /// The codes as the core sees them.
    pub fn codes(&self) -> PyResult<Codes<'_>> {
        let (indices, values) = (self.1.as_slice()?, self.2.as_slice()?);
        match &self.0 {
            Pointers::Fixed(k) => Codes::fixed(indices, values, *k, self.3),
            Pointers::Ragged(indptr) => Codes::ragged(indptr.as_slice()?, indices, values, self.3),
        }
        .map_err(|e| to_py(&e))
    }
}

/// A state behind a lock, taken out once by `finish`.
struct State<T>(Mutex<Option<T>>);

impl<T: Send> State<T> {
    fn new(state: T) -> Self {
        Self(Mutex::new(Some(state)))
    }

    /// Runs `work` on the state. A failed update leaves it half done, so it is dropped.
    fn update(
        &self,
        py: Python<'_>,
        task: Task<'_>,
        work: impl FnOnce(&mut T, &Context<'_>) -> Result<()> + Send,
    ) -> PyResult<()> {
        run(py, task, |context| {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let mut state = slot.take().ok_or_else(spent)?;
            work(&mut state, context)?;
            *slot = Some(state);
            Ok(())
        })
    }

    fn finish<R: Send>(
        &self,
        py: Python<'_>,
        name: &'static str,
        work: impl FnOnce(T, &Context<'_>) -> Result<R> + Send,
    ) -> PyResult<R> {
        run(py, Task::named(name), |context| {
            let state = self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(spent)?;
            work(state, context)
        })
    }
}

fn spent() -> Error {
    Error::shape("state", "a state that is neither finished nor failed", "a spent one")
}

/// The optional column `argument` as a slice of `n` entries.
fn column<'a, T: numpy::Element>(
    argument: Option<&'a PyReadonlyArray1<'_, T>>,
    n: usize,
    name: &str,
) -> PyResult<Option<&'a [T]>> {
    let Some(argument) = argument else { return Ok(None) };
    let values = argument.as_slice()?;
    if values.len() == n {
        return Ok(Some(values));
    }
    Err(shape_error(name, &format!("{n} entries, one per row of the codes"), &format!("{}", values.len())))
}

fn expect_width(codes: &Codes<'_>, d_sae: usize) -> PyResult<()> {
    if codes.d_sae() == d_sae {
        return Ok(());
    }
    Err(shape_error("codes", &format!("d_sae = {d_sae}"), &format!("{}", codes.d_sae())))
}

/// Counts, sums, sums of squares and maxima of every feature, by group.
#[pyclass(frozen)]
struct FiringState {
    d_sae: usize,
    state: State<Accumulator<Firing>>,
}

type MomentColumns<'py> = (
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f32>>,
);

#[pymethods]
impl FiringState {
    #[new]
    fn new(d_sae: usize, n_groups: usize, n_rows: usize) -> Self {
        Self { d_sae, state: State::new(Accumulator::new(Firing::new(d_sae, n_groups, n_rows))) }
    }

    #[pyo3(signature = (codes, groups=None, progress=None))]
    fn update<'py>(
        &self,
        py: Python<'py>,
        codes: CodesArgument<'py>,
        groups: Option<PyReadonlyArray1<'py, u32>>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let codes = codes.codes()?;
        expect_width(&codes, self.d_sae)?;
        let groups = column(groups.as_ref(), codes.n(), "by")?;
        let block = Labelled { groups, ..codes.into() };
        let task = Task { progress, ..Task::named("feature_stats") };
        self.state.update(py, task, |state, context| state.update(&block, context))
    }

    /// (fires, sum, `sum_sq`, max), group by group.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<MomentColumns<'py>> {
        let columns = self.state.finish(py, "feature_stats", |state, context| {
            state.finish(context).map(|(_, cells)| Moments::columns(&cells))
        })?;
        Ok((
            columns.fires.into_pyarray(py),
            columns.sum.into_pyarray(py),
            columns.sum_sq.into_pyarray(py),
            columns.max.into_pyarray(py),
        ))
    }
}

/// The best hits of every feature, by group.
#[pyclass(frozen)]
struct TopState {
    d_sae: usize,
    state: State<Accumulator<TopSamples>>,
}

type TopColumns<'py> = (
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<f32>>,
);

#[pymethods]
impl TopState {
    #[new]
    #[pyo3(signature = (d_sae, n_groups, n, per_sample, features=None))]
    fn new(
        d_sae: usize,
        n_groups: usize,
        n: usize,
        per_sample: bool,
        features: Option<PyReadonlyArray1<'_, u32>>,
    ) -> PyResult<Self> {
        let features = features.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
        let fold = TopSamples::new(d_sae, n, per_sample, n_groups)
            .and_then(|fold| fold.features(features))
            .map_err(|e| to_py(&e))?;
        Ok(Self { d_sae, state: State::new(Accumulator::new(fold)) })
    }

    #[pyo3(signature = (codes, samples, positions, groups=None, progress=None))]
    fn update<'py>(
        &self,
        py: Python<'py>,
        codes: CodesArgument<'py>,
        samples: PyReadonlyArray1<'py, u64>,
        positions: PyReadonlyArray1<'py, u32>,
        groups: Option<PyReadonlyArray1<'py, u32>>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let codes = codes.codes()?;
        expect_width(&codes, self.d_sae)?;
        let groups = column(groups.as_ref(), codes.n(), "by")?;
        let block =
            Labelled { codes, groups, samples: samples.as_slice()?, positions: positions.as_slice()? };
        let task = Task { progress, ..Task::named("top_samples") };
        self.state.update(py, task, |state, context| state.update(&block, context))
    }

    /// (group, list, rank, sample, position, activation), list by list, best first.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<TopColumns<'py>> {
        let table = self.state.finish(py, "top_samples", |state, context| {
            state.finish(context).map(|(fold, cells)| fold.table(&cells))
        })?;
        Ok((
            table.group.into_pyarray(py),
            table.list.into_pyarray(py),
            table.rank.into_pyarray(py),
            table.sample.into_pyarray(py),
            table.position.into_pyarray(py),
            table.activation.into_pyarray(py),
        ))
    }
}

/// Number of samples in which each feature fires; `order` lists the rows sample by sample, `starts` their bounds.
#[pyfunction]
fn sample_fires<'py>(
    py: Python<'py>,
    codes: CodesArgument<'py>,
    order: PyReadonlyArray1<'py, u64>,
    starts: PyReadonlyArray1<'py, u64>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let codes = codes.codes()?;
    let (order, starts) = (order.as_slice()?, starts.as_slice()?);
    let fires =
        run(py, Task::named("sample_fires"), |context| count_samples(&codes, order, starts, context))?;
    Ok(fires.into_pyarray(py))
}

/// Σ ‖x − x̂‖² and Σ ‖x − x̄‖².
#[pyclass(frozen)]
struct FvuState {
    state: State<Variance>,
}

#[pymethods]
impl FvuState {
    #[new]
    fn new() -> Self {
        Self { state: State::new(Variance::default()) }
    }

    /// Adds rows and their reconstructions.
    #[pyo3(signature = (x, x_hat, progress=None))]
    fn update<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        x_hat: &Bound<'py, PyAny>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (x, x_hat) = (Input::extract(x, "x")?, Input::extract(x_hat, "x_hat")?);
        let (x, x_hat) = (x.source("x")?, x_hat.source("x_hat")?);
        if (x.n_rows(), x.d()) != (x_hat.n_rows(), x_hat.d()) {
            let expected = format!("shape ({}, {}), as in x", x.n_rows(), x.d());
            return Err(shape_error("x_hat", &expected, &format!("({}, {})", x_hat.n_rows(), x_hat.d())));
        }
        let fold = Fvu { reconstruction: Reconstruction::Given };
        let task = Task { progress, ..Task::named("fvu") };
        self.state
            .update(py, task, |total, context| scan_into(total, &[&*x, &*x_hat], &fold, BLOCK_ROWS, context))
    }

    /// Adds rows and codes, which are decoded on the way.
    #[pyo3(signature = (x, codes, w_dec, b_dec=None, progress=None))]
    fn update_codes<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        codes: CodesArgument<'py>,
        w_dec: &Bound<'py, PyAny>,
        b_dec: Option<PyReadonlyArrayDyn<'py, f32>>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (x, codes) = (Input::extract(x, "x")?, codes.codes()?);
        let x = x.source("x")?;
        let weights = Matrix::extract(w_dec, "W_dec")?;
        let weights = weights.rows("W_dec")?;
        let bias = vector(b_dec.as_ref(), x.d(), "b_dec")?;
        if x.n_rows() != codes.n() {
            return Err(shape_error(
                "codes",
                &format!("{} rows, as in x", x.n_rows()),
                &format!("{}", codes.n()),
            ));
        }
        if (weights.n(), weights.d()) != (codes.d_sae(), x.d()) {
            let expected = format!("shape ({}, {})", codes.d_sae(), x.d());
            return Err(shape_error("W_dec", &expected, &format!("({}, {})", weights.n(), weights.d())));
        }
        let fold = Fvu { reconstruction: Reconstruction::Decoded(codes, Decoder { weights, bias }) };
        let task = Task { progress, ..Task::named("fvu") };
        self.state.update(py, task, |total, context| scan_into(total, &[&*x], &fold, BLOCK_ROWS, context))
    }

    /// (Σ ‖x − x̂‖², Σ ‖x − x̄‖²).
    fn finish(&self, py: Python<'_>) -> PyResult<(f64, f64)> {
        self.state.finish(py, "fvu", |total, _| Ok((total.error, total.centred)))
    }
}

type GapColumns<'py> = (
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
);

/// (gap, standard error, low, high) of every feature between two sets of rows, each with the cluster of every row and
/// the number of clusters.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn frequency_gap<'py>(
    py: Python<'py>,
    spatial: CodesArgument<'py>,
    spatial_clusters: (PyReadonlyArray1<'py, u32>, usize),
    base: CodesArgument<'py>,
    base_clusters: (PyReadonlyArray1<'py, u32>, usize),
    replicates: usize,
    level: f64,
    seed: u64,
    shared: bool,
) -> PyResult<GapColumns<'py>> {
    let (a, b) = (spatial.codes()?, base.codes()?);
    let (of_a, of_b) = (spatial_clusters.0.as_slice()?, base_clusters.0.as_slice()?);
    let (n_a, n_b) = (spatial_clusters.1, base_clusters.1);
    let plan = Resampling { replicates, seed, level, shared };
    let gaps = run(py, Task::named("frequency_gap"), |context| {
        let (a, b) = (Clustered::new(&a, of_a, n_a)?, Clustered::new(&b, of_b, n_b)?);
        bootstrap_gap(&a, &b, plan, context)
    })?;
    Ok((
        PyArray1::from_iter(py, gaps.iter().map(|g| g.gap)),
        PyArray1::from_iter(py, gaps.iter().map(|g| g.standard_error)),
        PyArray1::from_iter(py, gaps.iter().map(|g| g.low)),
        PyArray1::from_iter(py, gaps.iter().map(|g| g.high)),
    ))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("FVU_BLOCK_ROWS", BLOCK_ROWS)?;
    m.add_class::<FiringState>()?;
    m.add_class::<TopState>()?;
    m.add_class::<FvuState>()?;
    m.add_function(wrap_pyfunction!(frequency_gap, m)?)?;
    m.add_function(wrap_pyfunction!(sample_fires, m)?)
}
