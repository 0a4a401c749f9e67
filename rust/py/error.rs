//! The only place where a core error becomes a Python exception.

use microtome_core::Error;
use microtome_core::error::advice;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError};
use pyo3::prelude::*;

mod py {
    use pyo3::import_exception;
    import_exception!(microtome.errors, Error);
    import_exception!(microtome.errors, StoreError);
    import_exception!(microtome.errors, CorruptShardError);
    import_exception!(microtome.errors, ManifestError);
    import_exception!(microtome.errors, VersionError);
    import_exception!(microtome.errors, LockedError);
    import_exception!(microtome.errors, ShapeError);
    import_exception!(microtome.errors, DtypeError);
    import_exception!(microtome.errors, NonFiniteError);
    import_exception!(microtome.errors, UnsafeCheckpointError);
    import_exception!(microtome.errors, ForkedError);
}

/// The exception for `error`, with its one-line message.
pub fn to_py(error: &Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Shape { .. } => py::ShapeError::new_err(message),
        Error::Dtype { .. } => py::DtypeError::new_err(message),
        Error::NonFinite { .. } => py::NonFiniteError::new_err(message),
        Error::Memory { .. } | Error::Refused { .. } => PyMemoryError::new_err(message),
        Error::Corrupt { .. } => py::CorruptShardError::new_err(message),
        Error::Manifest { .. } => py::ManifestError::new_err(message),
        Error::Version { .. } => py::VersionError::new_err(message),
        Error::Locked { .. } => py::LockedError::new_err(message),
        Error::Store { .. } => py::StoreError::new_err(message),
        Error::Unsafe { .. } => py::UnsafeCheckpointError::new_err(message),
        Error::Io { path, op, source } => match source.raw_os_error() {
            Some(errno) => PyOSError::new_err((
                errno,
                format!("{op}: {source}{}", advice(source)),
                path.display().to_string(),
            )),
            None => PyOSError::new_err(message),
        },
        Error::Cancelled => PyKeyboardInterrupt::new_err(message),
        _ => py::Error::new_err(message),
    }
}

/// A forked child touched an object that only its parent may use.
pub fn forked(what: &str) -> PyErr {
    py::ForkedError::new_err(format!(
        "{what}: created in another process, found a forked child. Open a new one here"
    ))
}

/// An argument of the wrong element type.
pub fn dtype_error(argument: &str, expected: &str, found: &str) -> PyErr {
    py::DtypeError::new_err(format!("{argument}: expected {expected}, found {found}"))
}

/// An argument of the wrong shape.
pub fn shape_error(argument: &str, expected: &str, found: &str) -> PyErr {
    py::ShapeError::new_err(format!("{argument}: expected {expected}, found {found}"))
}
