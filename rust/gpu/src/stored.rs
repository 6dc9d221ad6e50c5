//! The backward of the stored mode: exponentials of every class were kept (`keep`).
//!
//! A row's gradient of the logits is factor X off the target, with a factor that goes to the other
//! operand: the scaled input for dW, the rows of the result for dE. Where only some classes were kept,
//! or an entropy is involved, the backward is that of `backward.rs`.

use logitless_core::{DType, Gradients, Tensor};

use crate::call::{Call, row_view, value, vector};
use crate::error::Result;
use crate::frozen;
use crate::keep::{exponentials, kernel};
use crate::layout::{Arena, Geometry, StoreLayout, StoredBackwardLayout, padded, pitch};
use crate::params::{self, Fields, RowList};
use crate::product::{Matrix, Operands, Operation, Order, choose_sliced, ordered, tensor_cores};

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
    /// exponentials, and neither touches what the other writes. The targets' parts of both are added
    /// in float.
    pub unsafe fn backward(&self, store: usize, workspace: usize) -> Result<()> {
        let (call, g) = (self.call, self.g);
        let store = StoreLayout::lay(&mut Arena::at(store), g);
        let layout = StoredBackwardLayout::lay(&mut Arena::at(workspace), g);
        let list = if call.targets().has_ignore != 0 {
            call.live_rows(store.list)
        } else {
            call.all_rows()
        };
        let x = exponentials(call, g, &store);
        let scaled = self.packed(layout.packed);
        // SAFETY: all of it: operands checked, buffers of the layouts.
        unsafe {
            let epilogue = self.operands(list, scaled, &store, &layout)?;
            self.bias_gradient(list, x, &store, &layout)?;
            let order = self.input_product(list, x, &store, &layout)?;
            self.weight_product(order, x, scaled, epilogue)?;
            self.input_rows(list, &store, &layout)
        }
    }

    /// What the products read beside X: factors of its rows, the input scaled by them, and lists of the
    /// rows of each class. Returns the epilogue of dW.
    unsafe fn operands(
        &self,
        list: RowList,
        scaled: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<params::Gemm> {
        let (call, slots) = (self.call, padded(self.call.rows));
        let factors = params::Factors {
            list,
            targets: call.targets(),
            rest: self.saved.rest,
            logits: self.saved.target,
            g_rest: self.grad.rest,
            g_target: self.grad.target,
            reference: store.reference,
            factor: layout.factor,
            input_factor: layout.input_factor,
            target_factor: layout.target_factor,
            ratio: layout.ratio,
            scale: call.problem.logit_scale as f32,
            scale_at: call.scale_at,
            softcap: call.problem.softcap as f32,
            padded: slots as i32,
            reserved: 0,
        };
        let gather = params::Gather {
            source: call.input(),
            list,
            packed: scaled.address,
            pitch: scaled.row_stride,
            features: call.features as i32,
            padded: slots as i32,
        };
        // The input as it came, where rows can be read in pairs; else the scaled one: rounded twice.
        let paired = |m: &Matrix| {
            m.column_stride == 1 && m.row_stride % 2 == 0 && m.address.is_multiple_of(4)
        };
        let whole = call.input_matrix().filter(paired);
        let [start, rows, values] = layout.lists;
        let lists = self.gradients.weight.as_ref().map(|_| params::ListTargets {
            target: store.target,
            start,
            rows,
            values,
            classes: call.classes as i32,
            by_slot: i32::from(whole.is_none()),
        });
        let params = params::StoredOperands::new(factors, gather, lists);
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            call.stream.launch("stored_operands_bf16", (params.blocks(), 1), 256, 0, &params)?;
        }
        let source = whole.unwrap_or(scaled);
        Ok(params::Gemm {
            count: list.count,
            count_is_k: 1,
            onehot_w: source.address,
            onehot_ld: source.row_stride,
            onehot_g: values,
            onehot_start: start,
            onehot_rows: rows,
            m: call.classes as i32,
            n: call.features as i32,
            k: call.rows as i32,
            accumulate: i32::from(self.accumulate_weight),
            scale: 1.0,
            ..params::Gemm::default()
        })
    }

    unsafe fn weight_product(
        &self,
        order: Order,
        x: Matrix,
        scaled: Matrix,
        epilogue: params::Gemm,
    ) -> Result<()> {
        let (call, Some(d_weight)) = (self.call, &self.gradients.weight) else { return Ok(()) };
        let out = Matrix::of(d_weight);
        if !out.describable() {
            let expected = "adjacent features and rows of 16-byte multiples; or memory=\"lean\"";
            return Err(value(
                "d_weight",
                format!("strides {:?}", d_weight.strides()),
                expected.into(),
            ));
        }
        let operation = if out.dtype == call.dtype { Operation::Dw } else { Operation::DwF32 };
        let choice = kernel(call, operation, call.classes, call.features);
        let operands = Operands { a: x, b: scaled, d: Some(out) };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { ordered(call.stream, order, operation, &choice, &operands, epilogue) }
    }

    /// The targets' part in float: the exponentials cancel it.
    unsafe fn bias_gradient(
        &self,
        list: RowList,
        x: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, Some(d_bias)) = (self.call, &self.gradients.bias) else { return Ok(()) };
        let params = params::ColumnSum {
            tile: x.any(),
            out: vector(d_bias),
            count: list.count,
            factor: 0,
            weights: layout.factor,
            target: store.target,
            value: layout.ratio,
            rows: call.rows as i64,
            columns: call.classes as i64,
            group: 1,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { call.stream.launch("column_sum", (call.classes.div_ceil(32), 1), 256, 0, &params) }
    }

    /// The product X W, and how that of the weight may follow. Few rows: sums of each slice of the
    /// classes. Else in place where rows keep their places, or packed.
    unsafe fn input_product(
        &self,
        list: RowList,
        x: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<Order> {
        let (call, slices) = (self.call, self.g.slices);
        let Some(d_input) = &self.gradients.input else { return Ok(Order::After) };
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
            let d = self.in_place(list, d_input).unwrap_or_else(|| self.packed(layout.gradient));
            let epilogue = params::Gemm {
                target: store.target,
                coef: layout.input_factor,
                onehot_w: call.weight.address,
                onehot_g: layout.target_factor,
                onehot_ld: call.weight.row_stride,
                ld_row: padded(call.rows) as i32,
                ..extents
            };
            (Operation::De, choice, d, epilogue)
        };
        let operands = Operands { a: x, b: call.weight, d: Some(d) };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { tensor_cores(call.stream, operation, &choice, &operands, epilogue)? };
        Ok(Order::Beside(choice.idle(facts, shape, slices)))
    }

    /// The gradient of the input where the product can write it, as one matrix.
    fn in_place(&self, list: RowList, d_input: &Tensor) -> Option<Matrix> {
        let call = self.call;
        let whole = Matrix::packed(d_input.address(), call.dtype, call.features, call.features);
        let direct = list.slots == 0
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
        if self.in_place(list, d_input).is_some() {
            return Ok(());
        }
        let packed = self.packed(layout.gradient);
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
