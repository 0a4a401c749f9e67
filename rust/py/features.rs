//! Feature statistics, top samples and FVU.

use std::mem::take;

use microtome_core::kernels::moments::Moments;
use microtome_core::kernels::residual::Decoder;
use microtome_core::metrics::Groups;
use microtome_core::metrics::firing::{Firing, SampleFires};
use microtome_core::metrics::fvu::{BLOCK_ROWS, Fvu, Reconstruction};
use microtome_core::metrics::top::{Table, TopSamples};
use microtome_core::scan::{Source, scan, scan_codes};
use microtome_core::{Codes, Error};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArrayDyn};
use pyo3::prelude::*;

use crate::arrays::{Input, Matrix, vector};
use crate::error::{shape_error, to_py};
use crate::run::{Task, run};

/// Sparse codes as they cross the border: `(indptr, or slots per row; indices; values; d_sae)`.
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

/// Rows by group: the group of each row, and how many groups there are.
type GroupsArgument<'py> = Option<(PyReadonlyArray1<'py, u32>, usize)>;

fn groups<'a>(argument: &'a GroupsArgument<'_>, n: usize) -> PyResult<Groups<'a>> {
    let Some((of_rows, groups)) = argument else { return Ok(Groups::ONE) };
    expect_rows("by", of_rows.as_slice()?, n)?;
    Groups::new(of_rows.as_slice()?, *groups).map_err(|e| to_py(&e))
}

fn expect_rows<T>(name: &str, values: &[T], n: usize) -> PyResult<()> {
    if values.len() == n {
        return Ok(());
    }
    Err(shape_error(
        name,
        &format!("{n} entries, one for each row of the codes"),
        &format!("{}", values.len()),
    ))
}

type Columns<'py> = (
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f32>>,
);

/// (fires, sum, `sum_sq`, max) of every feature, group by group.
#[pyfunction]
#[pyo3(signature = (codes, by=None, progress=None))]
fn feature_moments<'py>(
    py: Python<'py>,
    codes: CodesArgument<'py>,
    by: GroupsArgument<'py>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Columns<'py>> {
    let codes = codes.codes()?;
    let fold = Firing { d_sae: codes.d_sae(), groups: groups(&by, codes.n())? };
    let task = Task { progress, ..Task::named("feature_stats") };
    let mut columns = run(py, task, |context| Ok(Moments::columns(&scan_codes(&codes, &fold, context)?)))?;
    Ok((
        take(&mut columns.fires).into_pyarray(py),
        take(&mut columns.sum).into_pyarray(py),
        take(&mut columns.sum_sq).into_pyarray(py),
        take(&mut columns.max).into_pyarray(py),
    ))
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
    expect_rows("rows", order, codes.n())?;
    let fold = SampleFires::new(codes.d_sae(), order, starts).map_err(|e| to_py(&e))?;
    let fires = run(py, Task::named("sample_fires"), |context| scan_codes(&codes, &fold, context))?;
    Ok(fires.into_pyarray(py))
}

type TopColumns<'py> = (
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<f32>>,
);

/// (group, list, rank, sample, position, activation) of the best `n` hits of every list.
#[pyfunction]
#[pyo3(signature = (codes, samples, positions, n, per_sample, features=None, by=None, progress=None))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
fn top_samples<'py>(
    py: Python<'py>,
    codes: CodesArgument<'py>,
    samples: PyReadonlyArray1<'py, u64>,
    positions: PyReadonlyArray1<'py, u32>,
    n: usize,
    per_sample: bool,
    features: Option<PyReadonlyArray1<'py, u32>>,
    by: GroupsArgument<'py>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<TopColumns<'py>> {
    let codes = codes.codes()?;
    let (samples, positions) = (samples.as_slice()?, positions.as_slice()?);
    expect_rows("rows.sample", samples, codes.n())?;
    expect_rows("rows.position", positions, codes.n())?;
    let features = features.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let fold = TopSamples::new(codes.d_sae(), n, samples, positions)
        .and_then(|fold| fold.per_sample(per_sample).features(features))
        .map_err(|e| to_py(&e))?
        .groups(groups(&by, codes.n())?);
    let task = Task { progress, ..Task::named("top_samples") };
    let table: Table = run(py, task, |context| Ok(fold.table(&scan_codes(&codes, &fold, context)?)))?;
    Ok((
        table.group.into_pyarray(py),
        table.list.into_pyarray(py),
        table.rank.into_pyarray(py),
        table.sample.into_pyarray(py),
        table.position.into_pyarray(py),
        table.activation.into_pyarray(py),
    ))
}

/// Σ ‖x − x̂‖² and Σ ‖x − x̄‖² of two matrices of one shape.
#[pyfunction]
#[pyo3(signature = (x, x_hat, progress=None))]
fn fvu<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    x_hat: &Bound<'py, PyAny>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(f64, f64)> {
    let (x, x_hat) = (Input::extract(x, "x")?, Input::extract(x_hat, "x_hat")?);
    let (x, x_hat) = (x.source("x")?, x_hat.source("x_hat")?);
    if (x.n_rows(), x.d()) != (x_hat.n_rows(), x_hat.d()) {
        return Err(shape_error(
            "x_hat",
            &format!("shape ({}, {}), as in x", x.n_rows(), x.d()),
            &format!("({}, {})", x_hat.n_rows(), x_hat.d()),
        ));
    }
    let fold = Fvu { reconstruction: Reconstruction::Given };
    let task = Task { progress, ..Task::named("fvu") };
    let sums = run(py, task, |context| scan(&[&*x, &*x_hat], &fold, BLOCK_ROWS, context))?;
    Ok((sums.error, sums.centred))
}

/// The same with x̂ decoded from codes on the way.
#[pyfunction]
#[pyo3(signature = (x, codes, w_dec, b_dec=None, progress=None))]
fn fvu_codes<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    codes: CodesArgument<'py>,
    w_dec: &Bound<'py, PyAny>,
    b_dec: Option<PyReadonlyArrayDyn<'py, f32>>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(f64, f64)> {
    let (x, codes) = (Input::extract(x, "x")?, codes.codes()?);
    let x: Box<dyn Source + '_> = x.source("x")?;
    let weights = Matrix::extract(w_dec, "W_dec")?;
    let weights = weights.rows("W_dec")?;
    let bias = vector(b_dec.as_ref(), x.d(), "b_dec")?;
    if x.n_rows() != codes.n() {
        let error = Error::shape("codes", format!("{} rows, as in x", x.n_rows()), format!("{}", codes.n()));
        return Err(to_py(&error));
    }
    if (weights.n(), weights.d()) != (codes.d_sae(), x.d()) {
        return Err(shape_error(
            "W_dec",
            &format!("shape ({}, {})", codes.d_sae(), x.d()),
            &format!("({}, {})", weights.n(), weights.d()),
        ));
    }
    let fold = Fvu { reconstruction: Reconstruction::Decoded(codes, Decoder { weights, bias }) };
    let task = Task { progress, ..Task::named("fvu") };
    let sums = run(py, task, |context| scan(&[&*x], &fold, BLOCK_ROWS, context))?;
    Ok((sums.error, sums.centred))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(feature_moments, m)?)?;
    m.add_function(wrap_pyfunction!(sample_fires, m)?)?;
    m.add_function(wrap_pyfunction!(top_samples, m)?)?;
    m.add_function(wrap_pyfunction!(fvu, m)?)?;
    m.add_function(wrap_pyfunction!(fvu_codes, m)?)
}
