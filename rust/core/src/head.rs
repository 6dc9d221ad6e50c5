//! The linear head as both engines see it: typed operands, and the products that give logits.

use crate::call::Problem;
use crate::kernel::{Kernel, LANES, Product};
use crate::layout::{self, Tiling};
use crate::operands::{ClassVector, Ids, Input, Matrix, Vectors};
use crate::scratch::Shared;
use crate::tensor::Tensor;
use crate::transform::Maps;

/// The operands that both engines read, as typed views.
pub(crate) struct Operands<K: Kernel> {
    pub input: Input<K::Element>,
    pub weight: Matrix<K::Element>,
    pub bias: Option<ClassVector>,
    pub ids: Option<Ids>,
    pub vectors: Vectors<K::Acc>,
    pub dense: Option<Tensor>,
    pub maps: Maps<K::Acc>,
    pub classes: usize,
    /// Logits kept for the backward, tile by tile.
    pub store: Option<Shared<K::Acc>>,
}

// SAFETY: plain views; the engine's caller promised that the memory stays valid and unwritten.
unsafe impl<K: Kernel> Sync for Operands<K> {}

impl<K: Kernel> Operands<K> {
    pub(crate) fn new(problem: &Problem, store: Option<&Tensor>) -> Self {
        Self {
            input: Input::new(&problem.input),
            weight: Matrix::new(&problem.weight),
            bias: problem.bias.as_ref().map(ClassVector::new),
            ids: problem.ids.as_ref().map(|ids| Ids::new(ids, problem.ignore_index)),
            vectors: Vectors::new(problem.vectors.as_ref()),
            dense: problem.dense,
            maps: Maps::new(problem.logit_scale, problem.softcap),
            classes: problem.weight.shape()[0],
            store: store.filter(|store| !store.is_empty()).map(|s| Shared::new(s.pointer())),
        }
    }

    /// Whether a row has a class to look at: without targets all have.
    pub(crate) fn is_kept(&self, row: usize) -> bool {
        self.ids.as_ref().is_none_or(|ids| ids.classes(row).next().is_some())
    }

    /// The bias of some classes, in `space`; empty without a bias.
    pub(crate) fn bias<'s>(&self, first: usize, space: &'s mut [K::Acc]) -> &'s [K::Acc] {
        let Some(bias) = &self.bias else { return &[] };
        for (offset, value) in space.iter_mut().enumerate() {
            *value = bias.read(first + offset);
        }
        space
    }

    /// The stored tile of a class block and panel.
    pub(crate) fn stored(
        &self,
        tiling: &Tiling,
        block: usize,
        panel: usize,
        panels: usize,
    ) -> Option<*mut K::Acc> {
        let store = self.store.filter(|_| block < tiling.stored_blocks)?;
        Some(store.at((block * panels + panel) * tiling.block * LANES))
    }
}

/// A left operand: rows of `W`, in place or packed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left<T> {
    pub start: *const T,
    pub row: usize,
}

/// `z[class][32] = W Eᵀ` for some classes and one panel.
///
/// # Safety
/// The operands are packed for these sizes; `z` is writable for `classes · 32` values.
pub(crate) unsafe fn products<K: Kernel>(
    kernel: K,
    weight: Left<K::Operand>,
    classes: usize,
    depth: usize,
    panel: *const K::Operand,
    z: *mut K::Acc,
) {
    let most = layout::depth(size_of::<K::Operand>());
    for first in (0..depth).step_by(most) {
        let product = Product {
            m: classes,
            pieces: 1,
            k: most.min(depth - first),
            a: weight.start.wrapping_add(first),
            a_row: weight.row,
            a_k: 1,
            a_piece: 0,
            b: panel.wrapping_add(first * LANES),
            c: z,
            c_row: LANES,
            accumulate: first > 0,
        };
        // SAFETY: the caller's promise.
        unsafe { kernel.product(&product) }
    }
}

/// The left operand for some classes: in place where the kernel can, else packed into `space`.
///
/// # Safety
/// If the kernel cannot, `space` is writable for `classes` rows.
pub(crate) unsafe fn left<K: Kernel>(
    kernel: K,
    operands: &Operands<K>,
    first: usize,
    classes: usize,
    space: Left<K::Operand>,
) -> Left<K::Operand> {
    in_place::<K>(operands, first, classes).unwrap_or_else(|| {
        let block = operands.weight.block(first, classes, 0, operands.input.features);
        // SAFETY: the block lies inside the weight; the caller's promise for `space`.
        unsafe { kernel.pack_rows(&block, space.start.cast_mut(), space.row) };
        space
    })
}

/// The left operand in place, where the kernel can read it so.
pub(crate) fn in_place<K: Kernel>(
    operands: &Operands<K>,
    first: usize,
    classes: usize,
) -> Option<Left<K::Operand>> {
    let block = operands.weight.block(first, classes, 0, operands.input.features);
    if block.col != 1 || block.row < 0 {
        return None;
    }
    K::in_place(&block).map(|start| Left { start, row: block.row as usize })
}

/// Brackets a thread's use of a kernel.
pub(crate) struct Guard<K: Kernel>(K);

impl<K: Kernel> Guard<K> {
    pub(crate) fn new(kernel: K) -> Self {
        kernel.begin_thread();
        Self(kernel)
    }
}

impl<K: Kernel> Drop for Guard<K> {
    fn drop(&mut self) {
        self.0.end_thread();
    }
}
