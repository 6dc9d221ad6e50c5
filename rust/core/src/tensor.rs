//! Tensors as callers hand them over: an address with a shape. All checks of them live here.

use crate::element::DType;
use crate::error::{Error, Result};

/// The most axes that a tensor of this crate has.
pub const MAX_RANK: usize = 4;

/// A strided array in somebody else's memory. Strides count elements and may be negative or zero.
///
/// It is only a description: whoever passes it to [`crate::forward`] or [`crate::backward`] promises
/// that every element of the shape is readable (outputs: writable) for the duration of the call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tensor {
    address: usize,
    dtype: DType,
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [isize; MAX_RANK],
}

impl Tensor {
    /// Describes an array.
    ///
    /// # Errors
    /// More than four axes, or as many strides as axes not given.
    pub fn new(address: usize, dtype: DType, shape: &[usize], strides: &[isize]) -> Result<Self> {
        let rank = shape.len();
        if rank > MAX_RANK || strides.len() != rank {
            return Err(Error::Shape {
                argument: "tensor",
                shape: shape.to_vec(),
                expected: format!("at most {MAX_RANK} axes, and a stride for each of them"),
            });
        }
        let mut tensor =
            Self { address, dtype, rank, shape: [1; MAX_RANK], strides: [0; MAX_RANK] };
        tensor.shape[..rank].copy_from_slice(shape);
        tensor.strides[..rank].copy_from_slice(strides);
        Ok(tensor)
    }

    /// The sizes of its axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// The element steps of its axes.
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.rank]
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of the first element, on whatever device it is.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Address of the first element.
    pub(crate) fn pointer<T>(&self) -> *mut T {
        std::ptr::with_exposed_provenance_mut(self.address)
    }

    /// The elements of a contiguous tensor, which may be empty and then lie nowhere.
    ///
    /// # Safety
    /// It was checked to be contiguous and of type `T`; its elements are readable, initialised, and
    /// unchanged for as long as the slice lives.
    pub(crate) unsafe fn slice<'a, T>(&self) -> &'a [T] {
        if self.is_empty() {
            return &[];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len()) }
    }

    /// Size and step of an axis.
    pub fn axis(&self, axis: usize) -> (usize, isize) {
        (self.shape[axis], self.strides[axis])
    }

    /// Whether its elements follow one another in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape().iter().zip(self.strides()).rev().all(|(&size, &stride)| {
            let fits = size <= 1 || stride == expected;
            expected *= size as isize;
            fits
        }) || self.is_empty()
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// Any other shape.
    pub fn expect_shape(&self, argument: &'static str, shape: &[usize]) -> Result<()> {
        if self.shape() == shape {
            return Ok(());
        }
        Err(self.misshapen(argument, format!("{shape:?}")))
    }

    /// Checks the shape up to axes of size one: `(N,)` also fits `(N, 1)`, `()` also fits `(1,)`.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn expect_len(&self, argument: &'static str, len: usize) -> Result<()> {
        if self.len() == len {
            return Ok(());
        }
        Err(self.misshapen(argument, format!("{len} elements")))
    }

    /// The error of a wrong shape.
    pub fn misshapen(&self, argument: &'static str, expected: String) -> Error {
        Error::Shape { argument, shape: self.shape().to_vec(), expected }
    }

    /// Checks the element type.
    ///
    /// # Errors
    /// Any other type.
    pub fn expect_dtype(&self, argument: &'static str, allowed: &[DType]) -> Result<()> {
        if allowed.contains(&self.dtype) {
            return Ok(());
        }
        let mut names: Vec<_> = allowed.iter().map(|dtype| dtype.name()).collect();
        names.dedup();
        let expected = names.join(" or ");
        Err(Error::DType { argument, dtype: self.dtype.name(), expected })
    }

    /// Checks that elements are adjacent.
    ///
    /// # Errors
    /// Any gap between them.
    pub fn expect_contiguous(&self, argument: &'static str) -> Result<()> {
        if self.is_contiguous() {
            return Ok(());
        }
        Err(self.misshapen(
            argument,
            format!("contiguous memory, got strides {:?}; make it contiguous", self.strides()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguity_ignores_axes_of_one_and_empty_tensors() {
        let tensor = |shape: &[usize], strides: &[isize]| {
            Tensor::new(0, DType::F32, shape, strides).unwrap().is_contiguous()
        };
        assert!(tensor(&[2, 3], &[3, 1]));
        assert!(tensor(&[2, 1, 3], &[3, 99, 1]));
        assert!(tensor(&[0, 3], &[7, 7]));
        assert!(!tensor(&[2, 3], &[1, 2]));
        assert!(!tensor(&[2, 3], &[4, 1]));
    }

    #[test]
    fn refuses_five_axes() {
        assert!(Tensor::new(0, DType::F32, &[1; 5], &[1; 5]).is_err());
    }
}
