//! States that take blocks one after the other, and are finished once.

use std::sync::{Mutex, PoisonError};

use microtome_core::scan::Context;
use microtome_core::{Error, Result};
use pyo3::prelude::*;

use crate::run::{Task, run};

/// A state behind a lock, taken out once by `finish`.
pub struct State<T>(Mutex<Option<T>>);

impl<T: Send> State<T> {
    /// Before the first block.
    pub fn new(state: T) -> Self {
        Self(Mutex::new(Some(state)))
    }

    /// Runs `work` on the state. A failed update leaves it half done, so it is dropped.
    pub fn update(
        &self,
        py: Python<'_>,
        task: Task<'_>,
        work: impl FnOnce(&mut T, &Context<'_>) -> Result<()> + Send,
    ) -> PyResult<()> {
        run(py, task, |context| {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let mut state = slot.take().ok_or_else(spent)?;
            work(&mut state, context)?;
            *slot = Some(state);
            Ok(())
        })
    }

    /// Takes the state out, and makes of it what is asked for.
    pub fn finish<R: Send>(
        &self,
        py: Python<'_>,
        name: &'static str,
        work: impl FnOnce(T, &Context<'_>) -> Result<R> + Send,
    ) -> PyResult<R> {
        run(py, Task::named(name), |context| {
            let state = self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(spent)?;
            work(state, context)
        })
    }
}

fn spent() -> Error {
    Error::shape("state", "a state that is neither finished nor failed", "a spent one")
}
