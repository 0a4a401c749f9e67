//! The store: writers of activations and of sparse codes, the reader, selections of rows.

use pyo3::prelude::*;

#[path = "store_writer.rs"]
mod writer;

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<writer::StoreWriter>()
}
