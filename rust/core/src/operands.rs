//! Typed views of the caller's tensors, as the inner loops read and write them.
//!
//! All of them are built once a call from checked [`Tensor`]s; from then on the caller's promise that
//! every element is accessible is what their `unsafe` blocks rest on.

use crate::element::{DType, Element, Real};
use crate::kernel::{Block, Gather, LANES};
use crate::tensor::Tensor;
use half::{bf16, f16};
use std::marker::PhantomData;

/// The input: N rows of D features, rows addressed by (outer, inner).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<E> {
    start: *mut E,
    inner: usize,
    steps: [isize; 3],
    /// N.
    pub rows: usize,
    /// D.
    pub features: usize,
}

impl<E: Copy> Input<E> {
    /// A view of a checked tensor of three axes.
    pub(crate) fn new(tensor: &Tensor) -> Self {
        let [(outer, step0), (inner, step1), (features, step2)] =
            [0, 1, 2].map(|axis| tensor.axis(axis));
        let steps = [step0, step1, step2];
        Self { start: tensor.pointer(), inner: inner.max(1), steps, rows: outer * inner, features }
    }

    /// First element of a row.
    #[inline]
    pub(crate) fn row(&self, row: usize) -> *mut E {
        // Divisions are slow, and the outer axis mostly has size one.
        let (outer, inner) =
            if row < self.inner { (0, row) } else { (row / self.inner, row % self.inner) };
        self.start.wrapping_offset(outer as isize * self.steps[0] + inner as isize * self.steps[1])
    }

    /// Step between the features of a row.
    pub(crate) fn step(&self) -> isize {
        self.steps[2]
    }

    /// Features `first..first + len` of some rows.
    pub(crate) fn gather(
        &self,
        rows: impl ExactSizeIterator<Item = usize>,
        first: usize,
        len: usize,
    ) -> Gather<E> {
        let mut gather = Gather {
            start: [self.start.cast_const(); LANES],
            count: rows.len(),
            step: self.step(),
            len,
        };
        for (start, row) in gather.start.iter_mut().zip(rows) {
            *start = self.row(row).wrapping_offset(first as isize * self.step());
        }
        gather
    }
}

/// A matrix: the weight, or its gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<E> {
    start: *mut E,
    row: isize,
    col: isize,
}

impl<E: Copy> Matrix<E> {
    /// A view of a checked tensor of two axes.
    pub(crate) fn new(tensor: &Tensor) -> Self {
        Self { start: tensor.pointer(), row: tensor.axis(0).1, col: tensor.axis(1).1 }
    }

    /// Some rows and columns.
    pub(crate) fn block(&self, first: usize, rows: usize, column: usize, cols: usize) -> Block<E> {
        let start = self.at(first, column);
        Block { start, rows, cols, row: self.row, col: self.col }
    }

    /// Address of an element.
    #[inline]
    pub(crate) fn at(&self, row: usize, col: usize) -> *mut E {
        self.start.wrapping_offset(row as isize * self.row + col as isize * self.col)
    }

    /// Step between columns.
    pub(crate) fn col(&self) -> isize {
        self.col
    }
}

/// Class vectors: one number for each class and vector, in the accumulation type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vectors<A> {
    start: *const A,
    steps: [isize; 2],
}

impl<A: Real> Vectors<A> {
    /// A view of a checked (C, V) tensor; without one nothing may be read.
    pub(crate) fn new(tensor: Option<&Tensor>) -> Self {
        match tensor {
            Some(t) => Self { start: t.pointer(), steps: [t.axis(0).1, t.axis(1).1] },
            None => Self { start: std::ptr::null(), steps: [0; 2] },
        }
    }

    /// `vectors[vector][class]`.
    #[inline(always)]
    pub(crate) fn at(&self, vector: usize, class: usize) -> A {
        debug_assert!(!self.start.is_null());
        // SAFETY: the tensor was checked to have these axes, and the spec bounds both indices.
        unsafe {
            *self.start.offset(vector as isize * self.steps[0] + class as isize * self.steps[1])
        }
    }
}

/// A vector over classes: the bias or its gradient, in any float type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClassVector {
    address: *mut u8,
    dtype: DType,
    step: isize,
}

impl ClassVector {
    /// A view of a checked (V,) tensor.
    pub(crate) fn new(tensor: &Tensor) -> Self {
        Self { address: tensor.pointer(), dtype: tensor.dtype(), step: tensor.axis(0).1 }
    }

    /// The element of a class.
    #[inline]
    pub(crate) fn read<A: Real>(&self, class: usize) -> A {
        // SAFETY: the caller of the engine promised V elements at this stride.
        unsafe { load(self.address, self.dtype, class as isize * self.step) }
    }

    /// Writes the element of a class.
    #[inline]
    pub(crate) fn write<A: Real>(&self, class: usize, value: A) {
        // SAFETY: as for `read`; each class has one writer.
        unsafe { store(self.address, self.dtype, class as isize * self.step, value) }
    }
}

/// The dense weights of a panel's rows, or their gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DensePanel {
    start: [*mut u8; LANES],
    dtype: DType,
    step: isize,
    /// Number of rows.
    pub count: usize,
}

impl DensePanel {
    /// Some rows of a checked (N, V) tensor.
    pub(crate) fn new(tensor: &Tensor, rows: impl ExactSizeIterator<Item = usize>) -> Self {
        let ((_, row_step), (_, step)) = (tensor.axis(0), tensor.axis(1));
        let size = tensor.dtype().size() as isize;
        let mut panel = Self {
            start: [tensor.pointer(); LANES],
            dtype: tensor.dtype(),
            step,
            count: rows.len(),
        };
        for (start, row) in panel.start.iter_mut().zip(rows) {
            *start = start.wrapping_offset(row as isize * row_step * size);
        }
        panel
    }

    /// `q[lane][class]`.
    #[inline(always)]
    pub(crate) fn read<A: Real>(&self, lane: usize, class: usize) -> A {
        // SAFETY: the caller of the engine promised N rows of V elements at these strides.
        unsafe { load(self.start[lane], self.dtype, class as isize * self.step) }
    }

    /// Writes `q[lane][class]`.
    #[inline]
    pub(crate) fn write<A: Real>(&self, lane: usize, class: usize, value: A) {
        // SAFETY: as for `read`; each element has one writer.
        unsafe { store(self.start[lane], self.dtype, class as isize * self.step, value) }
    }
}

/// Reads a float of any type.
///
/// # Safety
/// The element is readable.
#[inline(always)]
unsafe fn load<A: Real>(address: *const u8, dtype: DType, offset: isize) -> A {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::F32 => A::from_f64(f64::from(*address.cast::<f32>().offset(offset))),
            DType::F64 => A::from_f64(*address.cast::<f64>().offset(offset)),
            DType::Bf16 => A::from_f64(f64::from((*address.cast::<bf16>().offset(offset)).widen())),
            DType::F16 => A::from_f64(f64::from((*address.cast::<f16>().offset(offset)).widen())),
            other => unreachable!("floats are checked, got {}", other.name()),
        }
    }
}

/// Writes a float of any type.
///
/// # Safety
/// The element is writable and has no other user now.
#[inline(always)]
unsafe fn store<A: Real>(address: *mut u8, dtype: DType, offset: isize, value: A) {
    let value = value.to_f64();
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::F32 => *address.cast::<f32>().offset(offset) = value as f32,
            DType::F64 => *address.cast::<f64>().offset(offset) = value,
            DType::Bf16 => *address.cast::<bf16>().offset(offset) = bf16::narrow(value as f32),
            DType::F16 => *address.cast::<f16>().offset(offset) = f16::narrow(value as f32),
            other => unreachable!("floats are checked, got {}", other.name()),
        }
    }
}

/// Class ids of the rows: (N, K), contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids {
    start: *const i64,
    /// K.
    pub columns: usize,
    /// The id that stands for no class.
    padding: Option<i64>,
    lifetime: PhantomData<*const i64>,
}

impl Ids {
    /// A view of a checked tensor.
    pub(crate) fn new(tensor: &Tensor, padding: Option<i64>) -> Self {
        let columns = tensor.axis(1).0;
        Self { start: tensor.pointer(), columns, padding, lifetime: PhantomData }
    }

    /// The ids of a row, padding included.
    pub(crate) fn row(&self, row: usize) -> &[i64] {
        // SAFETY: the tensor is contiguous with N rows of K ids.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.columns), self.columns) }
    }

    /// The ids of a row that name classes, with their columns.
    pub(crate) fn classes(&self, row: usize) -> impl Iterator<Item = (usize, usize)> {
        let padding = self.padding;
        self.row(row)
            .iter()
            .enumerate()
            .filter(move |&(_, &id)| Some(id) != padding)
            .map(|(column, &id)| (column, id as usize))
    }
}
