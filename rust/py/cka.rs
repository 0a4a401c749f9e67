//! `microtome.metrics.cka`: similarity of representations.

use microtome_core::metrics::cka::{Estimator, Layer, cka_matrix as core_matrix};
use microtome_core::scan::Source;
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use crate::arrays::Input;
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

/// Linear CKA of every layer of `xs` with every layer of `ys`: float64, and the layers without one.
#[pyfunction]
fn cka_matrix<'py>(
    py: Python<'py>,
    xs: Named<'py>,
    ys: Option<Named<'py>>,
    debiased: bool,
    memory_budget: usize,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyArray2<f64>>, Vec<usize>)> {
    let xs = Inputs::extract(xs)?;
    let ys = ys.map(Inputs::extract).transpose()?;
    let x_sources = xs.sources()?;
    let y_sources = ys.as_ref().map(Inputs::sources).transpose()?;
    let x_layers = layers(&xs.names, &x_sources);
    let y_layers = ys.as_ref().zip(y_sources.as_ref()).map(|(ys, sources)| layers(&ys.names, sources));
    let shape = [x_layers.len(), y_layers.as_ref().map_or(x_layers.len(), Vec::len)];
    let task = Task { name: "cka_matrix", memory_budget, progress };
    let matrix = run(py, task, |context| {
        core_matrix(&x_layers, y_layers.as_deref(), estimator(debiased), None, context)
    })?;
    Ok((PyArray1::from_vec(py, matrix.values).reshape(shape)?, matrix.undefined))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cka_matrix, m)?)
}
