//! The one way into the core: detach, compute in microtome's own pool, answer Ctrl-C, survive fork and panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use microtome_core::kernels::subnormals;
use microtome_core::scan::Context;
use microtome_core::{Error, Result};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{shape_error, to_py};

/// Wake-ups of the waiting thread: signals are answered and progress is reported this often.
const INTERVAL: Duration = Duration::from_millis(100);

struct Pool {
    pid: u32,
    threads: usize,
    workers: Arc<ThreadPool>,
}

/// Locked only while the GIL is held, so no other thread can hold it at the moment of a fork.
static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// Environment variable with the number of threads; 0, as where it is not set, means one per core.
const VARIABLE: &str = "MICROTOME_NUM_THREADS";
/// Threads that the variable may ask for, at most.
const MOST_THREADS: usize = 4096;

fn threads_from_environment() -> PyResult<usize> {
    let Some(told) = std::env::var_os(VARIABLE) else { return Ok(0) };
    let told = told.to_string_lossy();
    told.parse().ok().filter(|&threads| threads <= MOST_THREADS).ok_or_else(|| {
        let expected = format!("a whole number from 0 to {MOST_THREADS}");
        shape_error(VARIABLE, &expected, &format!("{told:?}"))
    })
}

/// The pool of this process. Threads do not survive a fork: a child leaks its parent's pool and builds its own.
fn pool(_py: Python<'_>, threads: Option<usize>) -> PyResult<Arc<ThreadPool>> {
    let pid = std::process::id();
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(current) = slot.as_ref() {
        if current.pid == pid && threads.is_none_or(|t| t == current.threads) {
            return Ok(Arc::clone(&current.workers));
        }
        if current.pid != pid {
            std::mem::forget(slot.take());
        }
    }
    let threads = threads.map_or_else(threads_from_environment, Ok)?;
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("microtome-{i}"))
        .start_handler(|_| subnormals::keep())
        .build()
        .map_err(|e| to_py(&Error::Internal(format!("thread pool: {e}"))))?;
    let pool = Arc::new(pool);
    *slot = Some(Pool { pid, threads, workers: Arc::clone(&pool) });
    Ok(pool)
}

/// How a computation is run: its name for messages, its memory budget, who hears of its progress.
pub struct Task<'py> {
    /// Name in messages.
    pub name: &'static str,
    /// Bytes the work may use beyond inputs and result.
    pub memory_budget: usize,
    /// Called with the number of rows done, about ten times a second.
    pub progress: Option<Bound<'py, PyAny>>,
}

impl Task<'_> {
    /// A task without a progress callback and with a budget of 1 GiB.
    pub fn named(name: &'static str) -> Self {
        Self { name, memory_budget: 1 << 30, progress: None }
    }
}

/// Runs `work` detached from the interpreter, in microtome's pool, while this thread polls signals.
///
/// # Errors
/// What `work` returns; `KeyboardInterrupt` within about 100 ms plus one block; an internal error when `work` panics.
pub fn run<T: Send>(
    py: Python<'_>,
    task: Task<'_>,
    work: impl FnOnce(&Context<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    let pool = pool(py, None)?;
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: task.memory_budget };
    let (name, progress) = (task.name, task.progress.map(Bound::unbind));
    py.detach(|| {
        let (sender, receiver) = channel();
        pool.in_place_scope(|scope| {
            scope.spawn(|_| {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(&context)));
                // The receiver lives until the scope ends.
                let _ = sender.send(outcome.unwrap_or_else(|_| Err(Error::Internal(name.to_owned()))));
            });
            let mut interrupted = None;
            let outcome = loop {
                match receiver.recv_timeout(INTERVAL) {
                    Ok(outcome) => break outcome,
                    Err(RecvTimeoutError::Disconnected) => break Err(Error::Internal(name.to_owned())),
                    Err(RecvTimeoutError::Timeout) => {
                        if let Err(error) = Python::attach(|py| poll(py, progress.as_ref(), &done)) {
                            cancel.store(true, Ordering::Relaxed);
                            interrupted = interrupted.or(Some(error));
                        }
                    }
                }
            };
            match interrupted {
                Some(error) => Err(error),
                None => outcome.map_err(|e| to_py(&e)),
            }
        })
    })
}

/// Runs `work` detached from the interpreter on this very thread: for calls that are short or wait for a disk, which
/// must not stand behind a scan in the pool. A panic becomes an internal error.
pub fn detached<T: Send>(
    py: Python<'_>,
    name: &'static str,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    py.detach(|| {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        outcome.unwrap_or_else(|_| Err(Error::Internal(name.to_owned()))).map_err(|e| to_py(&e))
    })
}

fn poll(py: Python<'_>, progress: Option<&Py<PyAny>>, done: &AtomicU64) -> PyResult<()> {
    py.check_signals()?;
    if let Some(callback) = progress {
        callback.call1(py, (done.load(Ordering::Relaxed),))?;
    }
    Ok(())
}

/// Sets the number of threads of microtome's own pool; 0 means one per core.
#[pyfunction]
fn set_num_threads(py: Python<'_>, n: usize) -> PyResult<()> {
    pool(py, Some(n)).map(|_| ())
}

/// Number of threads of microtome's own pool.
#[pyfunction]
fn num_threads(py: Python<'_>) -> PyResult<usize> {
    Ok(pool(py, None)?.current_num_threads())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(set_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(num_threads, m)?)
}
