//! Feature statistics and top samples: states that take codes block by block, and give one result; the frequency gap.

#![allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value

use microtome_core::kernels::moments::Moments;
use microtome_core::metrics::bootstrap::{Clustered, Resampling, frequency_gap as bootstrap_gap};
use microtome_core::metrics::features::{Accumulator, FeatureFold, Labelled};
use microtome_core::metrics::firing::{Firing, sample_fires as count_samples};
use microtome_core::metrics::top::TopSamples;
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::arrays::CodesArgument;
use crate::error::{shape_error, to_py};
use crate::run::{Task, run};
use crate::state::State;

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

/// One cell per feature and group, while codes arrive block by block.
struct Features<F: FeatureFold> {
    name: &'static str,
    d_sae: usize,
    state: State<Accumulator<F>>,
}

/// What is known of the rows of a block of codes.
#[derive(Default)]
struct RowColumns<'py> {
    groups: Option<PyReadonlyArray1<'py, u32>>,
    samples: Option<PyReadonlyArray1<'py, u64>>,
    positions: Option<PyReadonlyArray1<'py, u32>>,
}

impl<F: FeatureFold<Cell: Send, Partial: Send> + Send> Features<F> {
    fn new(name: &'static str, d_sae: usize, fold: F) -> Self {
        Self { name, d_sae, state: State::new(Accumulator::new(fold)) }
    }

    fn add<'py>(
        &self,
        py: Python<'py>,
        codes: &CodesArgument<'py>,
        rows: &RowColumns<'py>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let codes = codes.codes()?;
        if codes.d_sae() != self.d_sae {
            let expected = format!("d_sae = {}", self.d_sae);
            return Err(shape_error("codes", &expected, &format!("{}", codes.d_sae())));
        }
        let block = Labelled {
            codes,
            groups: column(rows.groups.as_ref(), codes.n(), "by")?,
            samples: column(rows.samples.as_ref(), codes.n(), "samples")?.unwrap_or_default(),
            positions: column(rows.positions.as_ref(), codes.n(), "positions")?.unwrap_or_default(),
        };
        let task = Task { progress, ..Task::named(self.name) };
        self.state.update(py, task, |state, context| state.update(&block, context))
    }

    /// What `table` makes of the fold and its cells.
    fn finish<R: Send>(
        &self,
        py: Python<'_>,
        table: impl FnOnce(F, Vec<F::Cell>) -> R + Send,
    ) -> PyResult<R> {
        self.state.finish(py, self.name, |state, context| {
            let (fold, cells) = state.finish(context)?;
            Ok(table(fold, cells))
        })
    }
}

/// Counts, sums, sums of squares and maxima of every feature, by group.
#[pyclass(frozen)]
struct FiringState(Features<Firing>);

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
        Self(Features::new("feature_stats", d_sae, Firing::new(d_sae, n_groups, n_rows)))
    }

    #[pyo3(signature = (codes, groups=None, progress=None))]
    fn update<'py>(
        &self,
        py: Python<'py>,
        codes: CodesArgument<'py>,
        groups: Option<PyReadonlyArray1<'py, u32>>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        self.0.add(py, &codes, &RowColumns { groups, ..RowColumns::default() }, progress)
    }

    /// (fires, sum, `sum_sq`, max), group by group.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<MomentColumns<'py>> {
        let columns = self.0.finish(py, |_, cells| Moments::columns(&cells))?;
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
struct TopState(Features<TopSamples>);

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
        Ok(Self(Features::new("top_samples", d_sae, fold)))
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
        let rows = RowColumns { groups, samples: Some(samples), positions: Some(positions) };
        self.0.add(py, &codes, &rows, progress)
    }

    /// (group, list, rank, sample, position, activation), list by list, best first.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<TopColumns<'py>> {
        let table = self.0.finish(py, |fold, cells| fold.table(&cells))?;
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
    m.add_class::<FiringState>()?;
    m.add_class::<TopState>()?;
    m.add_function(wrap_pyfunction!(frequency_gap, m)?)?;
    m.add_function(wrap_pyfunction!(sample_fires, m)?)
}
