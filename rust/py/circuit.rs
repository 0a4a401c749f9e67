//! `microtome.metrics.circuit`: sets of nodes, their overlap and its chance level.

use microtome_core::metrics::circuit::{self, chance};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::error::{shape_error, to_py};
use crate::run::{Task, run};

fn slice<'a, T: numpy::Element>(array: &'a PyReadonlyArray1<'_, T>, name: &str) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| shape_error(name, "a contiguous array", "strided memory"))
}

/// Number of bits set.
#[pyfunction]
fn bitset_size(py: Python<'_>, words: PyReadonlyArray1<'_, u64>) -> PyResult<u64> {
    let words = slice(&words, "words")?;
    run(py, Task::named("bitset_size"), |context| circuit::size(words, context))
}

/// Sizes of intersection and union.
#[pyfunction]
fn bitset_overlap(
    py: Python<'_>,
    a: PyReadonlyArray1<'_, u64>,
    b: PyReadonlyArray1<'_, u64>,
) -> PyResult<(u64, u64)> {
    let (a, b) = (slice(&a, "a")?, slice(&b, "b")?);
    run(py, Task::named("bitset_overlap"), |context| circuit::intersection_and_union(a, b, context))
}

/// Words of the set of `indices` among `n` nodes.
#[pyfunction]
fn bitset_from_indices<'py>(
    py: Python<'py>,
    indices: PyReadonlyArray1<'py, i64>,
    n: usize,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let indices = slice(&indices, "indices")?;
    let words = run(py, Task::named("bitset_from_indices"), |_| circuit::from_nodes(indices, n))?;
    Ok(PyArray1::from_vec(py, words))
}

/// Nodes of a set, ascending.
#[pyfunction]
fn bitset_to_indices<'py>(
    py: Python<'py>,
    words: PyReadonlyArray1<'py, u64>,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let words = slice(&words, "words")?;
    let indices = run(py, Task::named("bitset_to_indices"), |context| circuit::to_nodes(words, context))?;
    Ok(PyArray1::from_vec(py, indices))
}

/// Nodes with the `n` largest scores, ascending.
#[pyfunction]
fn top_n<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray1<'py, f32>,
    n: usize,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let scores = slice(&scores, "scores")?;
    let nodes = run(py, Task::named("top_n"), |context| circuit::top::top_n(scores, n, context))?;
    Ok(PyArray1::from_vec(py, nodes))
}

/// `(mean, variance, p-value)` of the `IoU` of random circuits; strata are `(n, size_a, size_b)`.
#[pyfunction]
fn iou_chance(
    py: Python<'_>,
    strata: Vec<(u64, u64, u64)>,
    intersection: Option<u64>,
) -> PyResult<(f64, f64, f64)> {
    let strata: Vec<_> = strata.into_iter().map(|(n, a, b)| chance::Stratum { n, a, b }).collect();
    let law = run(py, Task::named("iou_chance"), |_| chance::chance(&strata, intersection))?;
    Ok((law.mean, law.variance, law.p_value))
}

/// Share of nodes that a random circuit contains at one of `positions` positions at least.
#[pyfunction]
fn inclusion_rate(n: u64, size: u64, positions: u64) -> PyResult<f64> {
    chance::inclusion_rate(n, size, positions).map_err(|e| to_py(&e))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(bitset_size, m)?)?;
    m.add_function(wrap_pyfunction!(bitset_overlap, m)?)?;
    m.add_function(wrap_pyfunction!(bitset_from_indices, m)?)?;
    m.add_function(wrap_pyfunction!(bitset_to_indices, m)?)?;
    m.add_function(wrap_pyfunction!(top_n, m)?)?;
    m.add_function(wrap_pyfunction!(iou_chance, m)?)?;
    m.add_function(wrap_pyfunction!(inclusion_rate, m)?)
}
