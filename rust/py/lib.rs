//! `microtome._core`: registration only. One file per Python submodule; every computation goes through [`run::run`].
#![allow(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

mod arrays;
mod circuit;
mod cka;
mod encode;
mod error;
mod features;
mod fvu;
mod provoke;
mod run;
mod similarity;
mod state;
mod store;

use pyo3::prelude::*;

#[pymodule(gil_used = true)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("BUILD_PROFILE", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    run::register(m)?;
    store::register(m)?;
    encode::register(m)?;
    features::register(m)?;
    fvu::register(m)?;
    cka::register(m)?;
    similarity::register(m)?;
    circuit::register(m)?;
    provoke::register(m)
}
