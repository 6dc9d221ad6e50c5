//! The one place that turns an engine's error into a Python exception.

use logitless_core::Error;
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The exception that a torch or NumPy user expects for `error`, with its message.
pub fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Target { .. } => PyIndexError::new_err(message),
        Error::DType { .. } => PyTypeError::new_err(message),
        Error::Memory { .. } => PyMemoryError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}
