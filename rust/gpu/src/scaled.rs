//! Products of a backward over exponentials as they were kept.
//!
//! A row's gradient of the logits is factor X off the target, with a factor that goes to the other
//! operand: the scaled input for dW, the rows of the result for dE. X is 0 at the target; what belongs
//! there is added in float, to dW and the gradient of the bias here.

use std::mem::offset_of;

use logitless_core::Gradients;

use crate::call::{Call, value, vector};
use crate::error::Result;
use crate::keep::{Exponentials, kernel};
use crate::layout::{FactorBuffers, StoreLayout, padded};
use crate::params::{self, Fields, RowList, Scalars};
use crate::product::{Matrix, Operands, Operation, Order, ordered};

/// What the products read beside the exponentials.
pub(crate) struct Scaled<'a> {
    pub call: &'a Call<'a>,
    pub gradients: &'a Gradients,
    pub accumulate_weight: bool,
    pub saved: Fields,
    pub grad: Fields,
    pub list: RowList,
    pub store: &'a StoreLayout,
    pub buffers: FactorBuffers,
    /// Where the input goes, times factors; and the rows of that memory.
    pub input: Matrix,
    pub input_rows: usize,
    /// The device's scalars: factors are divided by the largest cotangent, and whoever uses them
    /// multiplies by it and by the logit scale. None: they contain both.
    pub largest: Option<usize>,
    /// The input's gradient, where the product writes the rows that have slots; 0: not it.
    pub clear: usize,
}

impl Scaled<'_> {
    /// The input as it came, where rows can be read in pairs.
    fn whole(&self) -> Option<Matrix> {
        let paired = |m: &Matrix| {
            m.column_stride == 1 && m.row_stride % 2 == 0 && m.address.is_multiple_of(4)
        };
        self.call.input_matrix().filter(paired)
    }

    /// The rows that lists name: of the input as it came, or else scaled.
    fn source(&self) -> Matrix {
        self.whole().unwrap_or(self.input)
    }

    /// A device scalar, where factors are divided by them.
    fn scalar(&self, field: usize) -> usize {
        self.largest.map_or(0, |scalars| scalars + field)
    }

    /// Makes the factors of the rows, the input scaled by them, and lists of the rows whose target is
    /// one of the first `classes` classes. Clears what no product writes.
    pub unsafe fn make(&self, classes: usize) -> Result<()> {
        let (call, buffers) = (self.call, self.buffers);
        let factors = params::Factors {
            list: self.list,
            targets: call.targets(),
            rest: self.saved.rest,
            logits: self.saved.target,
            g_rest: self.grad.rest,
            g_target: self.grad.target,
            reference: self.store.reference,
            factor: buffers.factor,
            input_factor: buffers.input_factor,
            target_factor: buffers.target_factor,
            ratio: buffers.ratio,
            scale: call.problem.logit_scale as f32,
            scale_at: call.scale_at,
            softcap: call.problem.softcap as f32,
            scalars: self.scalar(0),
            padded: padded(call.rows) as i32,
            reserved: 0,
        };
        let gather = params::Gather {
            source: call.input(),
            list: self.list,
            packed: self.input.address,
            pitch: self.input.row_stride,
            features: call.features as i32,
            padded: self.input_rows as i32,
        };
        let [start, rows, values] = buffers.lists;
        let lists = self.gradients.weight.as_ref().map(|_| params::ListTargets {
            target: self.store.target,
            start,
            rows,
            values,
            classes: classes as i32,
            // Else of the scaled input: rounded twice.
            by_slot: i32::from(self.whole().is_none()),
        });
        let params = params::StoredOperands {
            clear: self.clear,
            ..params::StoredOperands::new(factors, gather, lists)
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            call.stream.launch("stored_operands_bf16", (params.blocks(), 1), 256, 0, &params)?;
        }
        let Some(lists) = lists else { return Ok(()) };
        let source = self.source();
        let sums = params::SumLists {
            lists,
            ids: call.targets().ids,
            source: source.address,
            pitch: source.row_stride,
            sums: buffers.list_sums,
            features: call.features as i32,
            reserved: 0,
        };
        // SAFETY: as above.
        unsafe { call.stream.launch("sum_lists_bf16", sums.grid(call.rows), 256, 0, &sums) }
    }

    /// Rows of the weight's gradient: Xᵀ (factor E), and the targets' part.
    pub unsafe fn weight_gradient(&self, order: Order, kept: &Exponentials) -> Result<()> {
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
        let source = self.source();
        let [start, rows, values] = self.buffers.lists;
        let epilogue = params::Gemm {
            count: self.list.count,
            count_is_k: 1,
            alpha: self.scalar(offset_of!(Scalars, g_scale)),
            onehot_w: source.address,
            onehot_ld: source.row_stride,
            onehot_g: values,
            onehot_start: start + 4 * kept.first,
            onehot_rows: rows,
            onehot_sums: self.buffers.list_sums,
            m: kept.count as i32,
            n: call.features as i32,
            k: call.rows as i32,
            accumulate: i32::from(self.accumulate_weight),
            scale: 1.0,
            ..params::Gemm::default()
        };
        let choice = kernel(call, operation, kept.count, call.features);
        let operands = Operands { a: kept.x, b: self.input, d: Some(out.rows_from(kept.first)) };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { ordered(call.stream, order, operation, &choice, &operands, epilogue) }
    }

    /// Sums over the rows, the targets' part in float: the exponentials cancel it.
    pub unsafe fn bias_gradient(&self, kept: &Exponentials) -> Result<()> {
        let (call, Some(d_bias)) = (self.call, &self.gradients.bias) else { return Ok(()) };
        let params = params::ColumnSum {
            tile: kept.x.any(),
            out: vector(d_bias),
            count: self.list.count,
            factor: self.scalar(offset_of!(Scalars, g_wide)),
            weights: self.buffers.factor,
            target: self.store.target,
            value: self.buffers.ratio,
            rows: call.rows as i64,
            columns: kept.count as i64,
            group: 1,
            column0: kept.first as i64,
        };
        let grid = (kept.count.div_ceil(32), 1);
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { call.stream.launch("column_sum", grid, 256, 0, &params) }
    }
}
