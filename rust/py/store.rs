//! The store: writers of activations and of sparse codes, the reader, selections of rows.

use pyo3::prelude::*;

#[path = "store_codes.rs"]
mod codes;
#[path = "store_reader.rs"]
mod reader;
#[path = "store_writer.rs"]
mod writer;

pub use reader::Selection;

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("FAILPOINTS", cfg!(feature = "failpoints"))?;
    m.add_class::<writer::StoreWriter>()?;
    m.add_class::<codes::CodesWriter>()?;
    m.add_class::<reader::StoreReader>()?;
    m.add_class::<reader::Selection>()?;
    m.add_class::<reader::Block>()?;
    m.add_function(wrap_pyfunction!(reader::word_sum, m)?)
}
