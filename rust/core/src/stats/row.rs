//! One row's outputs, cotangents and gradient terms.

use crate::element::DType;
use crate::spec::Field;
use crate::tensor::Tensor;

/// Writes a contiguous value of an output: floats in their own type, ids as i64.
///
/// # Safety
/// `index` lies inside the tensor and nobody else accesses that element now.
unsafe fn write(tensor: &Tensor, index: usize, value: f64) {
    // SAFETY: the caller's promise.
    unsafe {
        match tensor.dtype() {
            DType::F32 => *tensor.pointer::<f32>().add(index) = value as f32,
            DType::F64 => *tensor.pointer::<f64>().add(index) = value,
            DType::I64 => *tensor.pointer::<i64>().add(index) = value as i64,
            other => unreachable!("outputs are checked, got {}", other.name()),
        }
    }
}

/// Reads a contiguous value.
///
/// # Safety
/// `index` lies inside the tensor.
unsafe fn read(tensor: &Tensor, index: usize) -> f64 {
    // SAFETY: the caller's promise.
    unsafe {
        match tensor.dtype() {
            DType::F32 => f64::from(*tensor.pointer::<f32>().add(index)),
            DType::F64 => *tensor.pointer::<f64>().add(index),
            DType::I64 => *tensor.pointer::<i64>().add(index) as f64,
            other => unreachable!("saved tensors are checked, got {}", other.name()),
        }
    }
}

/// Where a statistic writes the outputs of one row.
pub(crate) struct Writer<'a> {
    /// Outputs of this statistic, with their fields.
    outputs: &'a [Tensor],
    fields: &'a [Field],
    row: usize,
}

impl<'a> Writer<'a> {
    /// # Safety
    /// The tensors are checked against the fields; this row of theirs has no other user now.
    pub(crate) unsafe fn new(outputs: &'a [Tensor], fields: &'a [Field], row: usize) -> Self {
        Self { outputs, fields, row }
    }

    /// Writes column `column` of the statistic's field number `field`.
    pub(crate) fn set(&mut self, field: usize, column: usize, value: f64) {
        let width = self.fields[field].width();
        debug_assert!(column < width);
        // SAFETY: the constructor's promise; row and column are inside the checked shape.
        unsafe { write(&self.outputs[field], self.row * width + column, value) }
    }

    /// Writes the outputs of a skipped row.
    pub(crate) fn skip(&mut self) {
        for (field, Field { integer, .. }) in self.fields.iter().enumerate() {
            for column in 0..self.fields[field].width() {
                self.set(field, column, if *integer { -1.0 } else { 0.0 });
            }
        }
    }
}

/// Outputs of one row and their cotangents, as the backward reads them.
pub(crate) struct SavedRow<'a> {
    /// Outputs and cotangents of one statistic, with their fields.
    pub saved: &'a [Tensor],
    /// A missing cotangent is zero.
    pub cotangents: &'a [Option<Tensor>],
    /// Their fields.
    pub fields: &'a [Field],
    /// The row.
    pub row: usize,
    /// `rest` of the row, for the statistics that share its probabilities.
    pub rest: f64,
    /// V.
    pub classes: usize,
}

impl SavedRow<'_> {
    /// The output.
    pub(crate) fn value(&self, field: usize, column: usize) -> f64 {
        let width = self.fields[field].width();
        // SAFETY: tensors are checked against the fields, the row is below N.
        unsafe { read(&self.saved[field], self.row * width + column) }
    }

    /// Its cotangent.
    pub(crate) fn cotangent(&self, field: usize, column: usize) -> f64 {
        let width = self.fields[field].width();
        self.cotangents[field].map_or(0.0, |tensor| {
            // SAFETY: tensors are checked against the fields, the row is below N.
            unsafe { read(&tensor, self.row * width + column) }
        })
    }

    /// Whether any cotangent of the statistic is nonzero in this row.
    pub(crate) fn is_live(&self) -> bool {
        self.fields.iter().enumerate().any(|(field, f)| {
            self.cotangents[field].is_some()
                && (0..f.width()).any(|column| self.cotangent(field, column) != 0.0)
        })
    }
}

/// The gradient of one row's logits, as the terms of a sum: with r = e^(z − rest),
///
/// ```text
/// dz = [j ∈ R] r (a + b (z − center) + Σ_c rest_vectors_c c_j) + [j ∈ R] Σ_m h_m e^(m z − shift_m)
///    + constant + linear z + spread (z − mean) + Σ_c vectors_c c_j + dense q_j
///    + Σ_k targets_k [j = y_k] + Σ selected [j = class]
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RowGradient {
    pub a: f64,
    pub b: f64,
    pub center: f64,
    pub rest_vectors: Vec<f64>,
    /// `(h_m, shift_m)`.
    pub powers: Vec<(f64, f64)>,
    pub constant: f64,
    pub linear: f64,
    pub spread: f64,
    pub mean: f64,
    pub vectors: Vec<f64>,
    pub dense: f64,
    /// Cotangents of the target logits, by column; empty where all are zero.
    pub targets: Vec<f64>,
    /// Class and cotangent of logits that were selected: the maximum, the k largest.
    pub selected: Vec<(usize, f64)>,
}

impl RowGradient {
    /// Empties it for the next row, keeping its memory.
    pub(crate) fn clear(&mut self) {
        let mut old = std::mem::take(self);
        old.rest_vectors.clear();
        old.powers.clear();
        old.vectors.clear();
        old.targets.clear();
        old.selected.clear();
        let Self { rest_vectors, powers, vectors, targets, selected, .. } = old;
        *self = Self { rest_vectors, powers, vectors, targets, selected, ..Self::default() };
    }
}
