//! Fraction of variance unexplained: a state that takes rows, and reconstructions or codes, block by block.

#![allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value

use microtome_core::kernels::residual::Decoder;
use microtome_core::metrics::fvu::{BLOCK_ROWS, Fvu, Reconstruction, Variance};
use microtome_core::scan::scan_into;
use numpy::PyReadonlyArrayDyn;
use pyo3::prelude::*;

use crate::arrays::{CodesArgument, Input, Matrix, vector};
use crate::error::shape_error;
use crate::run::Task;
use crate::state::State;

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

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("FVU_BLOCK_ROWS", BLOCK_ROWS)?;
    m.add_class::<FvuState>()
}
