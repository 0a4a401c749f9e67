//! Panics on purpose, for the tests of the promise that none of them reaches a user as one.

use std::ops::Range;

use microtome_core::metrics::words::WordSum;
use microtome_core::scan::{Buffer, Fold, Source, scan};
use microtome_core::{Data, Dtype, Error, Result, Rows};
use pyo3::prelude::*;

use crate::run::{Task, detached, run};

/// A fold with a bug.
struct Broken;

#[allow(clippy::panic, reason = "this is what it is for")]
impl Fold for Broken {
    type Partial = ();

    fn init(&self) {}

    fn update(&self, (): &mut (), _block: &[Rows<'_>], _first_row: usize) -> Result<()> {
        panic!("provoked in a fold");
    }

    fn merge(&self, (): &mut (), (): ()) -> Result<()> {
        Ok(())
    }
}

/// A source with a bug; as one that waits for a disk, it is read ahead.
struct BrokenSource;

#[allow(clippy::panic, reason = "this is what it is for")]
impl Source for BrokenSource {
    fn n_rows(&self) -> usize {
        64
    }

    fn d(&self) -> usize {
        1
    }

    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn read<'a>(&'a self, _range: Range<usize>, _buffer: &'a mut Buffer) -> Result<Rows<'a>> {
        panic!("provoked in a reader");
    }

    fn waits(&self) -> bool {
        true
    }
}

/// Panics at `place`: in the `worker` that a computation begins on, in a `fold` in the pool, in a `reader` ahead of a fold, or
/// in a `detached` call.
#[pyfunction]
#[allow(clippy::panic, reason = "this is what it is for")]
fn provoke_panic(py: Python<'_>, place: &str) -> PyResult<()> {
    let x = [0.0_f32; 64];
    match place {
        "worker" => run(py, Task::named("provoked"), |_| -> Result<()> { panic!("provoked in a worker") }),
        "fold" => run(py, Task::named("provoked"), |context| {
            scan(&[&Rows::new(Data::F32(&x), 1)?], &Broken, 8, context)
        }),
        "reader" => run(py, Task::named("provoked"), |context| {
            scan(&[&BrokenSource], &WordSum, 8, context).map(|_| ())
        }),
        "detached" => detached(py, "provoked", || -> Result<()> { panic!("provoked in a detached call") }),
        other => {
            let expected = "'worker', 'fold', 'reader' or 'detached'";
            Err(crate::error::to_py(&Error::shape("place", expected, other)))
        }
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(provoke_panic, m)?)
}
