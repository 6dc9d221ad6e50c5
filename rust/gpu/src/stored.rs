//! The backward of the stored mode: exponentials of every class were kept (`keep`).
//!
//! A row's gradient of the logits is factor X off the target, with a factor that goes to the other
//! operand: the scaled input for dW, the rows of the result for dE. Where only some classes were kept,
//! or an entropy is involved, the backward is that of `backward.rs`.

use logitless_core::{DType, Gradients};

use crate::call::{Call, row_view};
use crate::error::Result;
use crate::frozen;
use crate::keep::{Exponentials, exponentials, kernel};
use crate::layout::{Arena, Geometry, StoreLayout, StoredBackwardLayout, padded, pitch};
use crate::params::{self, Fields, RowList};
use crate::product::{Matrix, Operands, Operation, Order, choose_sliced, tensor_cores};
use crate::scaled::Scaled;

/// A backward from the store.
pub(crate) struct Stored<'a> {
    pub call: &'a Call<'a>,
    pub g: &'a Geometry,
    pub gradients: &'a Gradients,
    pub accumulate_weight: bool,
    pub saved: Fields,
    pub grad: Fields,
}

impl Stored<'_> {
    /// dE, and beside it dW, whose tiles fill what dE's last wave leaves idle: both read the
    /// exponentials, and neither touches what the other writes; but where dE has no other place than
    /// over what dW reads. The targets' parts of both are added in float.
    pub unsafe fn backward(&self, store: usize, workspace: usize) -> Result<()> {
        let (call, g) = (self.call, self.g);
        let store = StoreLayout::lay(&mut Arena::at(store), g);
        let layout = StoredBackwardLayout::lay(&mut Arena::at(workspace), g);
        let list = if call.targets().has_ignore != 0 {
            call.live_rows(store.list)
        } else {
            call.all_rows()
        };
        let kept = Exponentials { first: 0, count: call.classes, x: exponentials(call, g, &store) };
        let scaled = Scaled {
            call,
            gradients: self.gradients,
            accumulate_weight: self.accumulate_weight,
            saved: self.saved,
            grad: self.grad,
            list,
            store: &store,
            buffers: layout.factors,
            input: self.packed(layout.packed),
            input_rows: padded(call.rows),
            largest: None,
            clear: self.in_place().filter(|_| list.slots != 0).map_or(0, |d_input| d_input.address),
        };
        // SAFETY: all of it: operands checked, buffers of the layouts.
        unsafe {
            scaled.make(call.classes)?;
            scaled.bias_gradient(&kept)?;
            if g.slices == 1 && self.in_place().is_none() {
                // dE packed over the scaled input, which dW has read.
                scaled.weight_gradient(Order::After, &kept)?;
                self.input_product(list, kept.x, &store, &layout)?;
            } else {
                let order = self.input_product(list, kept.x, &store, &layout)?;
                scaled.weight_gradient(order, &kept)?;
            }
            self.input_rows(list, &store, &layout)
        }
    }

    /// The product X W, and how that of the weight may follow. Few rows: sums of each slice of the
    /// classes. Else rows to their places, or packed over the scaled input.
    unsafe fn input_product(
        &self,
        list: RowList,
        x: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<Order> {
        let (call, slices) = (self.call, self.g.slices);
        if self.gradients.input.is_none() {
            return Ok(Order::After);
        }
        let shape = (call.rows, call.features, call.classes);
        let extents = params::Gemm {
            count: list.count,
            m: call.rows as i32,
            n: call.features as i32,
            k: call.classes as i32,
            scale: 1.0,
            ..params::Gemm::default()
        };
        let facts = &call.stream.device.facts;
        let (operation, choice, d, epilogue) = if slices > 1 {
            let (choice, _) =
                choose_sliced(facts, call.dtype, shape, slices).expect("the plan found it");
            let pitch = pitch(call.features, DType::F32);
            let sums = Matrix::packed(layout.sums, DType::F32, call.features, pitch);
            let epilogue = params::Gemm {
                slices: slices as i32,
                slice_rows: padded(call.rows) as i32,
                ..extents
            };
            (Operation::DeF32, choice, sums, epilogue)
        } else {
            let choice = kernel(call, Operation::De, call.rows, call.features);
            let in_place = self.in_place();
            let epilogue = params::Gemm {
                onehot_rows: in_place.map_or(0, |_| list.rows),
                target: store.target,
                coef: layout.factors.input_factor,
                onehot_w: call.weight.address,
                onehot_g: layout.factors.target_factor,
                onehot_ld: call.weight.row_stride,
                ld_row: padded(call.rows) as i32,
                ..extents
            };
            (Operation::De, choice, in_place.unwrap_or(self.packed(layout.packed)), epilogue)
        };
        let operands = Operands { a: x, b: call.weight, d: Some(d) };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { tensor_cores(call.stream, operation, &choice, &operands, epilogue)? };
        Ok(Order::beside(call.stream, &choice, shape, slices))
    }

    /// The gradient of the input where the product can write its rows, as one matrix.
    fn in_place(&self) -> Option<Matrix> {
        let (call, d_input) = (self.call, self.gradients.input.as_ref()?);
        let whole = Matrix::packed(d_input.address(), call.dtype, call.features, call.features);
        let direct = self.g.slices == 1
            && d_input.is_contiguous()
            && d_input.dtype() == call.dtype
            && !self.gradients.accumulate_input
            && whole.describable();
        direct.then_some(whole)
    }

    fn packed(&self, address: usize) -> Matrix {
        let Call { dtype, features, .. } = *self.call;
        Matrix::packed(address, dtype, features, pitch(features, dtype))
    }

    /// From the product to the rows' places: of sums as for a frozen head.
    unsafe fn input_rows(
        &self,
        list: RowList,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, slices) = (self.call, self.g.slices);
        let Some(d_input) = &self.gradients.input else { return Ok(()) };
        if slices > 1 {
            let (saved, grad) = (self.saved, self.grad);
            let slice = padded(call.rows) * pitch(call.features, DType::F32);
            let rows = params::Frozen {
                sums: layout.sums,
                slice: slice as i64,
                slices: slices as i32,
                ..frozen::rows(call, self.gradients, d_input, list, saved, grad, store.reference)
            };
            // SAFETY: operands checked, buffers of the layouts.
            return unsafe { frozen::launch(call, d_input, &rows) };
        }
        if self.in_place().is_some() {
            return Ok(());
        }
        let packed = self.packed(layout.packed);
        let params = params::Unpack {
            target: row_view(d_input),
            list,
            packed: packed.address,
            pitch: packed.row_stride,
            features: call.features as i32,
            accumulate: i32::from(self.gradients.accumulate_input),
        };
        let name = format!("unpack_rows_{}", crate::launch::suffix(d_input.dtype()));
        // SAFETY: as above.
        unsafe { call.stream.launch(&name, (call.rows.div_ceil(8), 1), 256, 0, &params) }
    }
}
