//! `microtome.metrics.encode` and `.codes`: sparse codes out of activations, and back.

use microtome_core::metrics::decode::{CsrCodes, decode_rows};
use microtome_core::scan::{BLOCK_ROWS, fill_pieces};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArrayDyn};
use pyo3::prelude::*;

use crate::arrays::{Matrix, vector};
use crate::error::shape_error;
use crate::run::{Task, run};

/// Reconstructs rows from codes in CSR form: float32 `(n, d_in)`.
#[pyfunction]
fn decode<'py>(
    py: Python<'py>,
    indptr: PyReadonlyArray1<'py, i64>,
    indices: PyReadonlyArray1<'py, u32>,
    values: PyReadonlyArray1<'py, f32>,
    w_dec: &Bound<'py, PyAny>,
    b_dec: Option<PyReadonlyArrayDyn<'py, f32>>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let matrix = Matrix::extract(w_dec, "W_dec")?;
    let rows = matrix.rows("W_dec")?;
    let bias = vector(b_dec.as_ref(), rows.d(), "b_dec")?;
    let strided = |_| shape_error("codes", "C-contiguous arrays", "strided memory");
    let codes = CsrCodes {
        indptr: indptr.as_slice().map_err(strided)?,
        indices: indices.as_slice().map_err(strided)?,
        values: values.as_slice().map_err(strided)?,
    };
    let (n, d) = (codes.n(), rows.d());
    let x_hat = run(py, Task::named("decode"), |context| {
        codes.check(rows.n())?;
        let mut out = vec![0.0_f32; n * d];
        let block = (BLOCK_ROWS / 16).max(1);
        fill_pieces(&mut out, block * d, context, |i, piece| {
            decode_rows(&codes, i * block, rows, bias, piece);
            Ok(())
        })?;
        Ok(out)
    })?;
    PyArray1::from_vec(py, x_hat).reshape([n, d])
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(decode, m)?)
}
