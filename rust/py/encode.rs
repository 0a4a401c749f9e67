//! `microtome.metrics.encode` and `.codes`: sparse codes out of activations, and back.
#![allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value

use microtome_core::kernels::gemm::{Certificate, Screen};
use microtome_core::memory::try_zeros;
use microtome_core::metrics::decode::{CsrCodes, decode_rows};
use microtome_core::metrics::encode::{Activation, Weights};
use microtome_core::scan::encode::{Codes, encode, pack};
use microtome_core::scan::{BLOCK_ROWS, fill_pieces};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::arrays::{Input, Matrix, vector};
use crate::error::shape_error;
use crate::run::{Task, run};

/// Codes as arrays, counts of the selection, and seconds of its phases.
type Encoded<'py> = (Bound<'py, PyTuple>, (u64, u64, u64, u64), (f64, f64, f64));

/// Packed weights and what of the pre-activations fires.
#[pyclass(frozen, module = "microtome._core")]
struct Encoder {
    inner: microtome_core::metrics::encode::Encoder,
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (w_enc, b_enc, b_dec, norms, threshold, activation, k, certificate))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        w_enc: &Bound<'_, PyAny>,
        b_enc: Option<PyReadonlyArrayDyn<'_, f32>>,
        b_dec: Option<PyReadonlyArrayDyn<'_, f32>>,
        norms: Option<PyReadonlyArrayDyn<'_, f32>>,
        threshold: Option<PyReadonlyArrayDyn<'_, f32>>,
        activation: &str,
        k: usize,
        certificate: &str,
    ) -> PyResult<Self> {
        let matrix = Matrix::extract(w_enc, "W_enc")?;
        let w_enc = matrix.rows("W_enc")?;
        let (d_in, d_sae) = (w_enc.n(), w_enc.d());
        let activation = activation_named(activation, k)?;
        let certificate = certificate_named(certificate)?;
        let weights = Weights {
            w_enc,
            b_enc: vector(b_enc.as_ref(), d_sae, "b_enc")?,
            b_dec: vector(b_dec.as_ref(), d_in, "b_dec")?,
            norms: vector(norms.as_ref(), d_sae, "norms")?,
            threshold: vector(threshold.as_ref(), d_sae, "threshold")?,
        };
        let inner = run(py, Task::named("pack"), |context| pack(weights, activation, certificate, context))?;
        Ok(Self { inner })
    }

    #[getter]
    fn d_in(&self) -> usize {
        self.inner.d_in()
    }

    #[getter]
    fn d_sae(&self) -> usize {
        self.inner.d_sae()
    }

    /// Instruction path, and arithmetic of the screen.
    #[getter]
    fn path(&self) -> (&'static str, &'static str) {
        let plan = self.inner.dictionary().plan();
        let screen = match plan.screen() {
            Screen::Bytes | Screen::NarrowBytes => "int8",
            Screen::Words => "int16",
            Screen::BrainFloats => "bfloat16",
            Screen::Floats => "float32",
        };
        (plan.isa().path().name(), screen)
    }

    /// `(indices, values)` for Top-K, else `(indptr, indices, values)`; then `(rows, scored pairs, misjudged rows, escaped rows)` and the
    /// seconds of `(rounding, screening, scoring)`.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Encoded<'py>> {
        let input = Input::extract(x, "x")?;
        let source = input.source("x")?;
        let task = Task { progress, ..Task::named("encode") };
        let (codes, effort) = run(py, task, |context| encode(&self.inner, source.as_ref(), context))?;
        let arrays = match codes {
            Codes::Slots { indices, values } => {
                let n = source.n_rows();
                let k = indices.len().checked_div(n).unwrap_or_else(|| self.k());
                let indices = PyArray1::from_vec(py, indices).reshape([n, k])?;
                let values = PyArray1::from_vec(py, values).reshape([n, k])?;
                PyTuple::new(py, [indices.into_any(), values.into_any()])?
            }
            Codes::Ragged { indptr, indices, values } => {
                let indptr = PyArray1::from_vec(py, indptr).into_any();
                let indices = PyArray1::from_vec(py, indices).into_any();
                PyTuple::new(py, [indptr, indices, PyArray1::from_vec(py, values).into_any()])?
            }
        };
        let [rounding, screening, scoring] =
            [effort.rounding, effort.screening, effort.scoring].map(|phase| phase.as_secs_f64());
        Ok((
            arrays,
            (effort.rows, effort.scored, effort.misjudged, effort.escaped),
            (rounding, screening, scoring),
        ))
    }
}

impl Encoder {
    fn k(&self) -> usize {
        match self.inner.activation() {
            Activation::TopK(k) | Activation::BatchTopK(k) => k,
            Activation::JumpRelu | Activation::Relu => 0,
        }
    }
}

fn activation_named(name: &str, k: usize) -> PyResult<Activation> {
    match name {
        "topk" => Ok(Activation::TopK(k)),
        "batch_topk" => Ok(Activation::BatchTopK(k)),
        "jump_relu" => Ok(Activation::JumpRelu),
        "relu" => Ok(Activation::Relu),
        other => Err(shape_error("activation", "topk, batch_topk, jump_relu or relu", other)),
    }
}

fn certificate_named(name: &str) -> PyResult<Certificate> {
    match name {
        "deterministic" => Ok(Certificate::Deterministic),
        "dithered" => Ok(Certificate::Dithered),
        other => Err(shape_error("certificate", "deterministic or dithered", other)),
    }
}

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
        let mut out = try_zeros::<f32>(n.saturating_mul(d), "decode", "Decode fewer rows at a time")?;
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
    m.add_class::<Encoder>()?;
    m.add_function(wrap_pyfunction!(decode, m)?)
}
