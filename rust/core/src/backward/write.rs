//! Gradients into the caller's tensors, of any float type and stride.

use super::Pass;
use crate::element::{DType, Element, Real};
use crate::kernel::{Kernel, LANES, Vectorize};
use crate::operands::{ClassVector, DensePanel, Input, Matrix};
use crate::tensor::Tensor;

/// Work on a tensor of any float type.
pub(super) trait ForType {
    fn run<T: Element>(self);
}

#[inline(always)]
pub(super) fn each_type(dtype: DType, work: impl ForType) {
    match dtype {
        DType::F32 => work.run::<f32>(),
        DType::F64 => work.run::<f64>(),
        DType::Bf16 => work.run::<half::bf16>(),
        DType::F16 => work.run::<half::f16>(),
        DType::I64 | DType::U8 => unreachable!("gradients are checked to be floats"),
    }
}

/// [`each_type`] with the vector instructions of a level: for gradients as large as the weight.
pub(super) struct EachType<W>(pub DType, pub W);

impl<W: ForType> Vectorize for EachType<W> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        each_type(self.0, self.1);
    }
}

/// Rounds an accumulator to an element type.
#[inline(always)]
fn round<T: Element>(value: impl Real) -> T {
    T::narrow(T::Acc::from_f64(value.to_f64()))
}

impl<K: Kernel> Pass<'_, K> {
    /// Writes what no task will: gradients of rows that are not live, and of classes if none is.
    pub(super) fn clear(&self) {
        let rows = self.operands.input.rows;
        if self.rows.len() == rows && rows > 0 {
            return;
        }
        let mut live = (0..self.rows.panels()).flat_map(|panel| self.rows.panel(panel)).peekable();
        for row in 0..rows {
            if live.next_if_eq(&row).is_none() {
                self.clear_row(row);
            }
        }
        if self.rows.len() == 0 {
            self.clear_classes();
        }
    }

    fn clear_row(&self, row: usize) {
        if let Some(tensor) = self.gradients.input.filter(|_| !self.gradients.accumulate_input) {
            let features = self.features();
            each_type(tensor.dtype(), ZeroInput { tensor: &tensor, row, features });
        }
        if let Some(tensor) = &self.gradients.dense {
            let panel = DensePanel::new(tensor, std::iter::once(row));
            (0..self.operands.classes).for_each(|class| panel.write(0, class, K::Acc::ZERO));
        }
    }

    fn clear_classes(&self) {
        let classes = self.operands.classes;
        if let Some(tensor) = &self.gradients.weight {
            let features = self.features();
            each_type(tensor.dtype(), ZeroMatrix { tensor, rows: classes, features });
        }
        if let Some(tensor) = &self.gradients.bias {
            let bias = ClassVector::new(tensor);
            (0..classes).for_each(|class| bias.write(class, K::Acc::ZERO));
        }
    }

    /// Writes the gradient of the logit scale, summed in class order.
    pub(super) fn write_scale(&self) {
        let Some(tensor) = &self.gradients.scale else { return };
        let blocks = if self.rows.len() > 0 { self.tiling.blocks } else { 0 };
        // SAFETY: all blocks are complete; the tensor has one element.
        unsafe {
            let sum: f64 = self.d_scale.slice(0, blocks).iter().sum();
            *tensor.pointer::<K::Acc>() = K::Acc::from_f64(sum);
        }
    }
}

/// Zeroes a matrix.
struct ZeroMatrix<'a> {
    tensor: &'a Tensor,
    rows: usize,
    features: usize,
}

impl ForType for ZeroMatrix<'_> {
    fn run<T: Element>(self) {
        let matrix = Matrix::<T>::new(self.tensor);
        for row in 0..self.rows {
            for feature in 0..self.features {
                // SAFETY: inside the checked shape; nobody else writes the gradient.
                unsafe { *matrix.at(row, feature) = T::default() };
            }
        }
    }
}

/// Zeroes a row of the input's gradient.
struct ZeroInput<'a> {
    tensor: &'a Tensor,
    row: usize,
    features: usize,
}

impl ForType for ZeroInput<'_> {
    fn run<T: Element>(self) {
        let input = Input::<T>::new(self.tensor);
        let start = input.row(self.row);
        for feature in 0..self.features as isize {
            // SAFETY: inside the checked shape; nobody else writes the gradient.
            unsafe { *start.offset(feature * input.step()) = T::default() };
        }
    }
}

/// Writes a strip of dW, or adds it to what row groups before have written.
pub(super) struct WeightStrip<'a, A> {
    pub tensor: &'a Tensor,
    /// First class.
    pub first: usize,
    /// First feature.
    pub column: usize,
    /// Number of features.
    pub width: usize,
    pub sums: &'a [[A; LANES]],
    pub scale: A,
    pub accumulate: bool,
}

impl<A: Real> ForType for WeightStrip<'_, A> {
    #[inline(always)]
    fn run<T: Element>(self) {
        let matrix = Matrix::<T>::new(self.tensor);
        for (class, sums) in self.sums.iter().enumerate() {
            let start = matrix.at(self.first + class, self.column);
            let values = sums.map(|sum| sum * self.scale);
            // SAFETY: inside the checked shape; the class has one owner.
            unsafe { write(&values[..self.width], start, matrix.col(), self.accumulate) };
        }
    }
}

/// Writes a row of dE from a lane of dEᵀ.
pub(super) struct InputRow<'a, A> {
    pub tensor: &'a Tensor,
    pub row: usize,
    pub lane: usize,
    pub sums: &'a [[A; LANES]],
    pub scale: A,
    pub accumulate: bool,
}

impl<A: Real> ForType for InputRow<'_, A> {
    #[inline(always)]
    fn run<T: Element>(self) {
        let input = Input::<T>::new(self.tensor);
        for (block, sums) in self.sums.chunks(LANES).enumerate() {
            let mut values = [A::ZERO; LANES];
            for (value, sums) in values.iter_mut().zip(sums) {
                *value = sums[self.lane] * self.scale;
            }
            let start =
                input.row(self.row).wrapping_offset((block * LANES) as isize * input.step());
            // SAFETY: inside the checked shape; the row has one owner.
            unsafe { write(&values[..sums.len()], start, input.step(), self.accumulate) };
        }
    }
}

/// Rounds values into a strided vector, or adds them to it.
///
/// # Safety
/// The elements are inside the tensor and have no other user now.
#[inline(always)]
unsafe fn write<A: Real, T: Element>(values: &[A], start: *mut T, step: isize, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        if accumulate {
            for (i, &value) in values.iter().enumerate() {
                let out = start.offset(i as isize * step);
                *out = round(A::from_f64((*out).widen().to_f64()) + value);
            }
        } else if step == 1 {
            // The usual case, in a form that vectorises.
            for (i, &value) in values.iter().enumerate() {
                *start.add(i) = round(value);
            }
        } else {
            for (i, &value) in values.iter().enumerate() {
                *start.offset(i as isize * step) = round(value);
            }
        }
    }
}
