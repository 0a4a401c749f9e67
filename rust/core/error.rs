//! The one error type of the core. Its messages are part of the API: one line, with what was expected and what was found.

use std::path::PathBuf;

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, sorted by what the caller can do about it.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong shape or size.
    #[error("{argument}: expected {expected}, found {found}")]
    Shape {
        /// Name of the argument as the Python caller knows it.
        argument: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An argument has the wrong element type.
    #[error("{argument}: expected {expected}, found {found}")]
    Dtype {
        /// Name of the argument.
        argument: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// NaN or infinity where numbers are needed.
    #[error("{argument}: expected finite values, found {found}")]
    NonFinite {
        /// Name of the argument.
        argument: String,
        /// First offending value and where it stands.
        found: String,
    },
    /// The work would need more memory than its budget.
    #[error("{what} needs {needed} bytes, budget is {budget} bytes. {hint}")]
    Memory {
        /// The work.
        what: String,
        /// Bytes needed.
        needed: usize,
        /// Bytes allowed.
        budget: usize,
        /// What to do.
        hint: String,
    },
    /// The system does not give the memory that a result takes.
    #[error("{what} needs {needed} bytes, more than the system gives. {hint}")]
    Refused {
        /// The work.
        what: String,
        /// Bytes needed.
        needed: usize,
        /// What to do.
        hint: String,
    },
    /// A file of the store is damaged.
    #[error("{reason}: {}: expected {expected}, found {found}. Run microtome verify", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What kind of damage, e.g. `truncated shard`.
        reason: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The manifest is damaged or points where it must not.
    #[error("{reason}: {}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Written by a format this build does not read.
    #[error("unknown format: {}: written by format {found}, this build reads {supported}", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Version found.
        found: String,
        /// Versions readable.
        supported: String,
    },
    /// Another writer holds the store.
    #[error("store is locked: {} is being written by {}. Wait for it or stop it", path.display(), holder(pid))]
    Locked {
        /// The store.
        path: PathBuf,
        /// The process named in the lock file; information only, and empty where none is named.
        pid: String,
    },
    /// The store cannot do what was asked in its present state.
    #[error("{reason}: {}", path.display())]
    Store {
        /// The store or a file of it.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file that could run code when loaded.
    #[error("unsafe checkpoint: {}: {reason}", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// Why it is refused and what to do.
        reason: String,
    },
    /// The operating system refused.
    #[error("{op}: {}: {source}{}", path.display(), advice(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        op: &'static str,
        /// The reason given.
        source: std::io::Error,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A bug of this crate.
    #[error("internal error in {0}, please report")]
    Internal(String),
}

fn holder(pid: &str) -> String {
    if pid.is_empty() { "another process".to_owned() } else { format!("pid {pid}") }
}

/// Whether this process, or the system, has as many files open as it may.
pub fn out_of_files(source: &std::io::Error) -> bool {
    matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// What to do about a refusal of the system, where there is something; it follows the reason.
pub fn advice(source: &std::io::Error) -> &'static str {
    if out_of_files(source) {
        ". Raise the limit with ulimit -n, or open the store with backend=\"mmap\", which keeps no file open"
    } else {
        ""
    }
}

impl Error {
    /// [`Error::Shape`] from anything printable.
    pub fn shape(argument: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Shape { argument: argument.into(), expected: expected.into(), found: found.into() }
    }

    /// [`Error::NonFinite`] for the value at `(row, column)`.
    pub fn non_finite(argument: impl Into<String>, value: f32, row: usize, column: usize) -> Self {
        Self::NonFinite { argument: argument.into(), found: format!("{value} at row {row}, column {column}") }
    }
}
