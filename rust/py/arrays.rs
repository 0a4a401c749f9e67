//! `NumPy` in and out. bf16 crosses as `("bfloat16", uint16 array)`: an untagged integer array is refused.

use std::sync::Arc;

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use microtome_core::scan::Source;
use microtome_core::{Codes, Data, Rows};
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::error::{dtype_error, shape_error, to_py};
use crate::store::Selection;

const EXPECTED: &str = "float32, float16 or bfloat16";

/// A matrix argument: float32 or float16 array, or `("bfloat16", uint16 array)`; C-contiguous, two-dimensional.
pub enum Matrix<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F16(PyReadonlyArray2<'py, f16>),
    Bf16(PyReadonlyArray2<'py, u16>),
}

impl<'py> Matrix<'py> {
    /// Reads `object` as the matrix argument called `name`.
    pub fn extract(object: &Bound<'py, PyAny>, name: &str) -> PyResult<Self> {
        if let Ok((tag, words)) = object.extract::<(String, Bound<'py, PyAny>)>() {
            if tag != "bfloat16" {
                return Err(dtype_error(name, EXPECTED, &tag));
            }
            return Ok(Self::Bf16(two_dimensional(&words, name)?));
        }
        let Ok(array) = object.cast::<PyUntypedArray>() else {
            return Err(dtype_error(name, "an array or tensor", &type_name(object)));
        };
        let kind = array.dtype().str()?.to_string();
        match kind.as_str() {
            "float32" => Ok(Self::F32(two_dimensional(object, name)?)),
            "float16" => Ok(Self::F16(two_dimensional(object, name)?)),
            other => Err(dtype_error(name, EXPECTED, other)),
        }
    }

    /// The matrix as the core sees it.
    pub fn rows(&self, name: &str) -> PyResult<Rows<'_>> {
        let (data, shape) = match self {
            Self::F32(a) => (Data::F32(row_major(a, name)?), a.shape()),
            Self::F16(a) => (Data::F16(row_major(a, name)?), a.shape()),
            Self::Bf16(a) => (Data::Bf16(row_major(a, name)?.reinterpret_cast::<bf16>()), a.shape()),
        };
        if shape[1] == 0 {
            return Err(shape_error(name, "rows of at least one column", &format!("shape {shape:?}")));
        }
        Rows::new(data, shape[1]).map_err(|e| to_py(&e))
    }
}

/// An argument that a scan can read: a matrix, a selection of a store, or an object that has one as `_selection`.
pub enum Input<'py> {
    Matrix(Matrix<'py>),
    Stored(Arc<microtome_core::store::Selection>),
}

impl<'py> Input<'py> {
    /// Reads `object` as the argument called `name`.
    pub fn extract(object: &Bound<'py, PyAny>, name: &str) -> PyResult<Self> {
        let held = object.getattr_opt("_selection")?;
        if let Ok(selection) = held.as_ref().unwrap_or(object).cast::<Selection>() {
            return Ok(Self::Stored(selection.get().rows()));
        }
        Ok(Self::Matrix(Matrix::extract(object, name)?))
    }

    /// The source that a scan reads.
    pub fn source<'a>(&'a self, name: &str) -> PyResult<Box<dyn Source + 'a>> {
        match self {
            Self::Matrix(matrix) => Ok(Box::new(matrix.rows(name)?)),
            Self::Stored(selection) => Ok(Box::new(selection.activations().map_err(|e| to_py(&e))?)),
        }
    }
}

/// An optional vector argument of float32.
pub fn vector<'a>(
    array: Option<&'a PyReadonlyArrayDyn<'_, f32>>,
    len: usize,
    name: &str,
) -> PyResult<Option<&'a [f32]>> {
    let Some(array) = array else { return Ok(None) };
    if array.shape() != [len] {
        return Err(shape_error(name, &format!("shape ({len},)"), &format!("shape {:?}", array.shape())));
    }
    contiguous(array.as_slice(), name).map(Some)
}

fn two_dimensional<'py, T: numpy::Element>(
    object: &Bound<'py, PyAny>,
    name: &str,
) -> PyResult<PyReadonlyArray2<'py, T>> {
    object.extract::<PyReadonlyArray2<'py, T>>().map_err(|_| {
        let shape = object
            .getattr("shape")
            .and_then(|s| Ok(s.str()?.to_string()))
            .unwrap_or_else(|_| type_name(object));
        shape_error(name, "a matrix (n, d)", &format!("shape {shape}"))
    })
}

/// The elements of a matrix row by row; `as_slice` alone would take a Fortran-ordered one column by column.
fn row_major<'a, T: numpy::Element>(matrix: &'a PyReadonlyArray2<'_, T>, name: &str) -> PyResult<&'a [T]> {
    contiguous(if matrix.is_c_contiguous() { matrix.as_slice().ok() } else { None }.ok_or(()), name)
}

fn contiguous<'a, T, E>(slice: Result<&'a [T], E>, name: &str) -> PyResult<&'a [T]> {
    slice.map_err(|_| shape_error(name, "a C-contiguous, aligned array", "strided or misaligned memory"))
}

fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "an object".to_owned(), |n| n.to_string())
}

/// Sparse codes as they cross the border: `(slots per row, or row pointers; indices; values; d_sae)`.
#[derive(FromPyObject)]
pub struct CodesArgument<'py>(Pointers<'py>, PyReadonlyArray1<'py, u32>, PyReadonlyArray1<'py, f32>, usize);

#[derive(FromPyObject)]
enum Pointers<'py> {
    Fixed(usize),
    Ragged(PyReadonlyArray1<'py, u64>),
}

impl CodesArgument<'_> {
    /// The codes as the core sees them.
    pub fn codes(&self) -> PyResult<Codes<'_>> {
        let (indices, values) = (self.1.as_slice()?, self.2.as_slice()?);
        match &self.0 {
            Pointers::Fixed(k) => Codes::fixed(indices, values, *k, self.3),
            Pointers::Ragged(indptr) => Codes::ragged(indptr.as_slice()?, indices, values, self.3),
        }
        .map_err(|e| to_py(&e))
    }
}
