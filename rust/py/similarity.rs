//! `microtome.metrics.similarity`: cosines between dictionaries.

use microtome_core::metrics::similarity::{match_rows as core_match_rows, row_cosines as core_row_cosines};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use crate::arrays::Matrix;
use crate::run::{Task, run};

/// `(indices, cosines, zero rows of a, zero rows of b)`.
type Matches<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f64>>, Vec<usize>, Vec<usize>);

/// Cosines of rows with equal index: float64.
#[pyfunction]
fn row_cosines<'py>(
    py: Python<'py>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    names: (String, String),
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let (a, b) = (Matrix::extract(a, &names.0)?, Matrix::extract(b, &names.1)?);
    let (a, b) = (a.rows(&names.0)?, b.rows(&names.1)?);
    let cosines = run(py, Task::named("decoder_cosine"), |context| {
        core_row_cosines(a, b, [&names.0, &names.1], context)
    })?;
    Ok(PyArray1::from_vec(py, cosines))
}

/// The `k` best matches in `b` of every row of `a`.
#[pyfunction]
fn match_rows<'py>(
    py: Python<'py>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    k: usize,
    names: (String, String),
    memory_budget: usize,
) -> PyResult<Matches<'py>> {
    let (a, b) = (Matrix::extract(a, &names.0)?, Matrix::extract(b, &names.1)?);
    let (a, b) = (a.rows(&names.0)?, b.rows(&names.1)?);
    let task = Task { memory_budget, ..Task::named("match_features") };
    let matches = run(py, task, |context| core_match_rows(a, b, k, [&names.0, &names.1], context))?;
    let shape = [a.n(), k];
    Ok((
        PyArray1::from_vec(py, matches.indices).reshape(shape)?,
        PyArray1::from_vec(py, matches.cosines).reshape(shape)?,
        matches.zero_a,
        matches.zero_b,
    ))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(row_cosines, m)?)?;
    m.add_function(wrap_pyfunction!(match_rows, m)?)
}
