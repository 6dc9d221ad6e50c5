//! Arguments: a tensor crosses the boundary as `(address, dtype, shape, strides)`.
//!
//! Four plain values instead of a buffer protocol or DLPack: the same tuple serves torch, NumPy and
//! CuPy, costs a fraction of a microsecond to read, and needs no Python newer than the abi3 floor.
//! Python keeps every array alive for the duration of the call; nothing here outlives it.

use logitless_core::{DType, MAX_RANK, Memory, Strided, Tensor};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::errors::to_python;

/// A tensor read from its Python tuple.
#[derive(Clone, Copy)]
pub struct TensorArg(pub Tensor);

impl<'py> FromPyObject<'_, 'py> for TensorArg {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let [address, code, shape, strides] = parts(&object)?;
        let (rank, shape) = integers::<usize>(&shape)?;
        let (stride_rank, strides) = integers::<isize>(&strides)?;
        let dtype = dtype(code.extract()?)?;
        Tensor::new(address.extract()?, dtype, &shape[..rank], &strides[..stride_rank])
            .map(Self)
            .map_err(to_python)
    }
}

/// An array of any rank, read from the same tuple.
pub struct ArrayArg {
    /// Where it is.
    pub array: Strided,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl<'py> FromPyObject<'_, 'py> for ArrayArg {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let [address, code, shape, strides] = parts(&object)?;
        let (shape, strides): (Vec<usize>, Vec<isize>) = (shape.extract()?, strides.extract()?);
        let array =
            Strided { address: address.extract()?, dtype: dtype(code.extract()?)?, strides };
        Ok(Self { array, shape })
    }
}

/// The four elements of a tensor's tuple.
fn parts<'py>(object: &Bound<'py, PyAny>) -> PyResult<[Bound<'py, PyAny>; 4]> {
    let wrong = || {
        let message = format!("expected (address, dtype, shape, strides), got {object:?}");
        PyTypeError::new_err(message)
    };
    let tuple = object.cast::<PyTuple>().map_err(|_| wrong())?;
    if tuple.len() != 4 {
        return Err(wrong());
    }
    let item = |index| tuple.get_item(index);
    Ok([item(0)?, item(1)?, item(2)?, item(3)?])
}

/// The dtype behind a code of the boundary.
pub fn dtype(code: u8) -> PyResult<DType> {
    DType::from_code(code).ok_or_else(|| {
        PyValueError::new_err(format!("dtype code {code} is not one of the codes 0 to 5"))
    })
}

/// What `memory` stands for: -1 lean, -2 fast, else the bytes that may be kept.
pub fn memory(code: i64) -> PyResult<Memory> {
    match code {
        -1 => Ok(Memory::Lean),
        -2 => Ok(Memory::Fast),
        bytes => usize::try_from(bytes).map(Memory::Bytes).map_err(|_| {
            PyValueError::new_err(format!(
                "memory = {bytes}; expected -1 (lean), -2 (fast) or a number of bytes"
            ))
        }),
    }
}

/// Up to `MAX_RANK` integers of a tuple, without a heap allocation.
fn integers<'py, T>(object: &Bound<'py, PyAny>) -> PyResult<(usize, [T; MAX_RANK])>
where
    T: Copy + Default + for<'x> FromPyObject<'x, 'py>,
    for<'x> PyErr: From<<T as FromPyObject<'x, 'py>>::Error>,
{
    let tuple = object.cast::<PyTuple>()?;
    let rank = tuple.len();
    if rank > MAX_RANK {
        return Err(PyValueError::new_err(format!(
            "a tensor of {rank} axes reached the engine, which takes at most {MAX_RANK}"
        )));
    }
    let mut values = [T::default(); MAX_RANK];
    for (index, value) in values[..rank].iter_mut().enumerate() {
        *value = tuple.get_borrowed_item(index)?.extract()?;
    }
    Ok((rank, values))
}

/// A tuple of tensors, such as the outputs of a forward.
pub fn tensors(tuple: &Bound<'_, PyTuple>) -> PyResult<Vec<Tensor>> {
    tuple.iter_borrowed().map(|item| Ok(item.extract::<TensorArg>()?.0)).collect()
}

/// A tuple of tensors, each of which may be `None`, such as the cotangents of a backward.
pub fn optional_tensors(tuple: &Bound<'_, PyTuple>) -> PyResult<Vec<Option<Tensor>>> {
    tuple
        .iter_borrowed()
        .map(|item| Ok(item.extract::<Option<TensorArg>>()?.map(|tensor| tensor.0)))
        .collect()
}
