//! `microtome.metrics.cka`: similarity of representations.

use microtome_core::Result;
use microtome_core::metrics::cka::interval::half_samples;
use microtome_core::metrics::cka::minibatch::minibatch_cka as core_minibatch;
use microtome_core::metrics::cka::rbf::rbf_cka as core_rbf;
use microtome_core::metrics::cka::{CkaMatrix, Estimator, Layer, cka_matrix as core_matrix};
use microtome_core::scan::{Context, Source};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::arrays::Input;
use crate::error::shape_error;
use crate::run::{Task, run};

/// Arguments and what messages call them.
type Named<'py> = Vec<(String, Bound<'py, PyAny>)>;

/// The arguments as sources of rows; both vectors live as long as the computation.
struct Inputs<'py> {
    names: Vec<String>,
    inputs: Vec<Input<'py>>,
}

impl<'py> Inputs<'py> {
    fn extract(named: Named<'py>) -> PyResult<Self> {
        let inputs = named.iter().map(|(name, x)| Input::extract(x, name)).collect::<PyResult<_>>()?;
        Ok(Self { names: named.into_iter().map(|(name, _)| name).collect(), inputs })
    }

    fn sources(&self) -> PyResult<Vec<Box<dyn Source + '_>>> {
        self.inputs.iter().zip(&self.names).map(|(input, name)| input.source(name)).collect()
    }
}

fn layers<'a>(names: &[String], sources: &'a [Box<dyn Source + 'a>]) -> Vec<Layer<'a>> {
    names.iter().zip(sources).map(|(name, source)| Layer { name: name.clone(), source: &**source }).collect()
}

fn estimator(debiased: bool) -> Estimator {
    if debiased { Estimator::Debiased } else { Estimator::Biased }
}

/// Values as a matrix, and the layers without any.
type Map<'py> = (Bound<'py, PyArray2<f64>>, Vec<usize>);

/// What CKA maps are made from: arguments in, a matrix out.
fn map<'py>(
    py: Python<'py>,
    (xs, ys): (Named<'py>, Option<Named<'py>>),
    task: Task<'py>,
    compute: impl FnOnce(&[Layer<'_>], Option<&[Layer<'_>]>, &Context<'_>) -> Result<CkaMatrix> + Send,
) -> PyResult<Map<'py>> {
    let xs = Inputs::extract(xs)?;
    let ys = ys.map(Inputs::extract).transpose()?;
    let x_sources = xs.sources()?;
    let y_sources = ys.as_ref().map(Inputs::sources).transpose()?;
    let x_layers = layers(&xs.names, &x_sources);
    let y_layers = ys.as_ref().zip(y_sources.as_ref()).map(|(ys, sources)| layers(&ys.names, sources));
    let shape = [x_layers.len(), y_layers.as_ref().map_or(x_layers.len(), Vec::len)];
    let matrix = run(py, task, |context| compute(&x_layers, y_layers.as_deref(), context))?;
    Ok((PyArray1::from_vec(py, matrix.values).reshape(shape)?, matrix.undefined))
}

/// Linear CKA of every layer of `xs` with every layer of `ys`: float64, and the layers without one.
#[pyfunction]
fn cka_matrix<'py>(
    py: Python<'py>,
    xs: Named<'py>,
    ys: Option<Named<'py>>,
    debiased: bool,
    memory_budget: usize,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Map<'py>> {
    let task = Task { name: "cka_matrix", memory_budget, progress };
    map(py, (xs, ys), task, |xs, ys, context| core_matrix(xs, ys, estimator(debiased), None, context))
}

/// CKA from debiased HSIC averaged over batches of neighbouring rows.
#[pyfunction]
fn minibatch_cka<'py>(
    py: Python<'py>,
    xs: Named<'py>,
    ys: Option<Named<'py>>,
    batch: usize,
    memory_budget: usize,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Map<'py>> {
    let task = Task { name: "minibatch_cka", memory_budget, progress };
    map(py, (xs, ys), task, |xs, ys, context| core_minibatch(xs, ys, batch, context))
}

/// CKA with the RBF kernel of `fraction` times the median distance.
#[pyfunction]
fn rbf_cka<'py>(
    py: Python<'py>,
    x: (String, Bound<'py, PyAny>),
    y: (String, Bound<'py, PyAny>),
    fraction: f64,
    debiased: bool,
    memory_budget: usize,
) -> PyResult<Map<'py>> {
    let task = Task { memory_budget, ..Task::named("rbf_cka") };
    map(py, (vec![x], Some(vec![y])), task, |xs, ys, context| {
        let both = [xs[0].clone(), ys.unwrap_or(xs)[0].clone()];
        core_rbf(&both, fraction, estimator(debiased), context)
    })
}

/// `(estimate, estimates from random halves, factor of their deviations)`.
#[pyfunction]
fn cka_halves<'py>(
    py: Python<'py>,
    x: (String, Bound<'py, PyAny>),
    y: (String, Bound<'py, PyAny>),
    n_resamples: usize,
    seed: u64,
    groups: Option<PyReadonlyArray1<'py, u32>>,
    memory_budget: usize,
) -> PyResult<(f64, Bound<'py, PyArray1<f64>>, f64)> {
    let inputs = Inputs::extract(vec![x, y])?;
    let sources = inputs.sources()?;
    let layers = layers(&inputs.names, &sources);
    let groups = groups.as_ref().map(PyReadonlyArray1::as_slice).transpose();
    let groups = groups.map_err(|_| shape_error("groups", "a contiguous array", "strided memory"))?;
    let both = [layers[0].clone(), layers[1].clone()];
    let task = Task { memory_budget, ..Task::named("cka_interval") };
    let found = run(py, task, |context| half_samples(&both, n_resamples, seed, groups, context))?;
    Ok((found.estimate, PyArray1::from_vec(py, found.halves), found.factor))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cka_matrix, m)?)?;
    m.add_function(wrap_pyfunction!(minibatch_cka, m)?)?;
    m.add_function(wrap_pyfunction!(rbf_cka, m)?)?;
    m.add_function(wrap_pyfunction!(cka_halves, m)?)
}
