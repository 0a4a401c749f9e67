//! States that take blocks one after the other, and are finished once.

use std::sync::{Mutex, PoisonError};

use microtome_core::scan::Context;
use microtome_core::{Error, Result};
use pyo3::prelude::*;

use crate::error::to_py;
use crate::run::{Task, run};

/// A state behind a lock, taken out once by `finish`.
pub struct State<T>(Mutex<Option<T>>);

impl<T: Send> State<T> {
    /// Before the first block.
    pub fn new(state: T) -> Self {
        Self(Mutex::new(Some(state)))
    }

    /// Runs `work` on the state. A failed update leaves it half done, so it is dropped; meanwhile it counts as spent: no thread of the
    /// pool ever waits for it.
    pub fn update(
        &self,
        py: Python<'_>,
        task: Task<'_>,
        work: impl FnOnce(&mut T, &Context<'_>) -> Result<()> + Send,
    ) -> PyResult<()> {
        let mut state = self.take()?;
        let state = run(py, task, move |context| work(&mut state, context).map(|()| state))?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        Ok(())
    }

    /// Takes the state out, and makes of it what is asked for.
    pub fn finish<R: Send>(
        &self,
        py: Python<'_>,
        name: &'static str,
        work: impl FnOnce(T, &Context<'_>) -> Result<R> + Send,
    ) -> PyResult<R> {
        let state = self.take()?;
        run(py, Task::named(name), |context| work(state, context))
    }

    fn take(&self) -> PyResult<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(|| to_py(&spent()))
    }
}

fn spent() -> Error {
    Error::shape("state", "a state that is not finished, failed or in use", "a spent one")
}
