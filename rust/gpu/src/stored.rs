//! The stored mode: exponentials of a cross entropy are kept from the forward to the backward.
//!
//! The forward writes X = bf16(e^(z − reference)), 0 at the target, where a row's reference is its
//! target's logit. Rows whose rest lies more than 60 nats from it are found on the device; their
//! blocks of 256 rows run again, first for the rest with running maxima, then for X against that.
//! In the common case these launches find an empty list and end.

use logitless_core::Gradients;

use crate::call::{Call, row_view, value, vector};
use crate::error::Result;
use crate::forward::select;
use crate::layout::{
    Arena, Geometry, StoreLayout, StoredBackwardLayout, StoredForwardLayout, padded, pitch,
};
use crate::params::{self, Fields, RowList};
use crate::product::{Choice, Matrix, Operands, Operation, choose, tensor_cores};

/// Bytes of an accumulator.
const F32: usize = 4;

fn kernel(call: &Call, operation: Operation, m: usize, n: usize) -> Choice {
    let mapped = call.mapped() && matches!(operation, Operation::StoreExp | Operation::Repair);
    choose(&call.stream.device.facts, operation, call.dtype, mapped, m, n)
        .expect("the plan found it")
}

fn exponentials(call: &Call, g: &Geometry, store: &StoreLayout) -> Matrix {
    Matrix::packed(store.x, call.dtype, call.classes, g.store_pitch())
}

/// Outputs `rest` and `target`, and the store.
pub(crate) unsafe fn forward(
    call: &Call,
    g: &Geometry,
    out: Fields,
    store: usize,
    workspace: usize,
) -> Result<()> {
    let store = StoreLayout::lay(&mut Arena::at(store), g);
    let layout = StoredForwardLayout::lay(&mut Arena::at(workspace), g);
    let (rows, blocks) = (call.rows, call.rows.div_ceil(256));
    let tiles = call.classes.div_ceil(g.part_columns);
    let ld_row = padded(rows);
    // SAFETY: all of it: operands checked, buffers of the layouts.
    unsafe {
        let (list, input) = select(call, store.list, layout.packed)?;
        let bias = call.widen_bias(layout.bias)?;
        if list.slots != 0 && out.target != 0 {
            call.stream.zero(out.target, rows * F32)?;
        }
        let logits = if out.target == 0 { layout.logits } else { out.target };
        call.target_logits(list, logits, store.reference, store.target)?;
        call.stream.zero(layout.flags, F32 * blocks)?;

        let product = params::Gemm {
            count: list.count,
            reference: store.reference,
            target: store.target,
            bias,
            part: layout.part,
            part_plane: (tiles * ld_row) as i64,
            m: rows as i32,
            n: call.classes as i32,
            k: call.features as i32,
            ld_row: ld_row as i32,
            scale: call.problem.logit_scale as f32,
            scale_at: call.scale_at,
            softcap: call.problem.softcap as f32,
            ..params::Gemm::default()
        };
        let store_exp = kernel(call, Operation::StoreExp, rows, call.classes);
        let operands =
            Operands { a: input, b: call.weight, d: Some(exponentials(call, g, &store)) };
        tensor_cores(call.stream, Operation::StoreExp, &store_exp, &operands, product)?;
        let finish = params::Finish {
            out: Fields { rest: out.rest, ..Fields::default() },
            list,
            part: layout.part,
            reference: store.reference,
            part_plane: product.part_plane,
            ld_row: ld_row as i32,
            tiles: tiles as i32,
            classes: call.classes as i64,
            tile_columns: g.part_columns as i32,
            planes: 1,
            chunk_columns: call.classes as i32,
            chunk_tiles: tiles as i32,
            flags: layout.flags,
        };
        call.stream.launch("finish_fixed", (rows.div_ceil(32), 1), 512, 0, &finish)?;

        let gate = params::Gate { flags: layout.flags, gate: layout.gate, blocks: blocks as i64 };
        call.stream.launch("gate_blocks", (1, 1), 256, 0, &gate)?;
        let gated = params::Gemm { gate: layout.gate, ..product };
        let repair_rest = kernel(call, Operation::Repair, rows, call.classes);
        let without_store = Operands { a: input, b: call.weight, d: None };
        tensor_cores(call.stream, Operation::Repair, &repair_rest, &without_store, gated)?;
        let repair = params::Repair {
            list,
            gate: layout.gate,
            part: layout.part,
            reference: store.reference,
            rest: out.rest,
            part_plane: product.part_plane,
            ld_row: ld_row as i32,
            tiles: tiles as i32,
        };
        call.stream.launch("finish_repair", (blocks, 1), 256, 0, &repair)?;
        tensor_cores(call.stream, Operation::StoreExp, &store_exp, &operands, gated)
    }
}

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
    /// dW first, while X holds the targets' part; then dE, whose targets' part is added in float.
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
        let packed = Matrix::packed(
            layout.packed,
            call.dtype,
            call.features,
            pitch(call.features, call.dtype),
        );
        // SAFETY: all of it: operands checked, buffers of the layouts.
        unsafe {
            self.factors(list, &store, &layout)?;
            self.set_targets(list, &store, layout.ratio)?;
            self.scaled_input(list, packed, layout.factor)?;
            self.weight_gradient(list, x, packed)?;
            self.bias_gradient(list, x, layout.factor)?;
            self.set_targets(list, &store, 0)?;
            self.input_gradient(list, x, packed, &store, &layout)
        }
    }

    unsafe fn factors(
        &self,
        list: RowList,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, rows) = (self.call, padded(self.call.rows));
        let params = params::Factors {
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
            padded: rows as i32,
            reserved: 0,
        };
        // SAFETY: buffers of the layouts.
        unsafe { call.stream.launch("store_factors", (rows.div_ceil(256), 1), 256, 0, &params) }
    }

    unsafe fn set_targets(&self, list: RowList, store: &StoreLayout, value: usize) -> Result<()> {
        let pitch = self.g.store_pitch() as i64;
        let params = params::SetTargets { list, target: store.target, value, x: store.x, pitch };
        // SAFETY: buffers of the layouts.
        unsafe {
            self.call.stream.launch(
                "set_targets_bf16",
                (self.call.rows.div_ceil(256), 1),
                256,
                0,
                &params,
            )
        }
    }

    unsafe fn scaled_input(&self, list: RowList, packed: Matrix, factor: usize) -> Result<()> {
        let (call, rows) = (self.call, padded(self.call.rows));
        let gather = params::Gather {
            source: call.input(),
            list,
            packed: packed.address,
            pitch: packed.row_stride,
            features: call.features as i32,
            padded: rows as i32,
        };
        let params = params::Scale {
            gather,
            factor,
            scale_at: call.scale_at,
            scale: call.problem.logit_scale as f32,
            reserved: 0,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { call.stream.launch("scale_rows_bf16", (rows, 1), 256, 0, &params) }
    }

    unsafe fn weight_gradient(&self, list: RowList, x: Matrix, scaled: Matrix) -> Result<()> {
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
        let epilogue = params::Gemm {
            count: list.count,
            count_is_k: 1,
            m: call.classes as i32,
            n: call.features as i32,
            k: call.rows as i32,
            accumulate: i32::from(self.accumulate_weight),
            scale: 1.0,
            ..params::Gemm::default()
        };
        let choice = kernel(call, operation, call.classes, call.features);
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            tensor_cores(
                call.stream,
                operation,
                &choice,
                &Operands { a: x, b: scaled, d: Some(out) },
                epilogue,
            )
        }
    }

    unsafe fn bias_gradient(&self, list: RowList, x: Matrix, factor: usize) -> Result<()> {
        let (call, Some(d_bias)) = (self.call, &self.gradients.bias) else { return Ok(()) };
        let params = params::ColumnSum {
            tile: x.any(),
            out: vector(d_bias),
            count: list.count,
            factor: 0,
            weights: factor,
            rows: call.rows as i64,
            columns: call.classes as i64,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { call.stream.launch("column_sum", (call.classes.div_ceil(32), 1), 256, 0, &params) }
    }

    unsafe fn input_gradient(
        &self,
        list: RowList,
        x: Matrix,
        packed: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, Some(d_input)) = (self.call, &self.gradients.input) else { return Ok(()) };
        // In place where rows keep their places, else packed over the scaled input, which dW has read.
        let in_place = Matrix::packed(d_input.address(), call.dtype, call.features, call.features);
        let direct = list.slots == 0
            && d_input.is_contiguous()
            && d_input.dtype() == call.dtype
            && !self.gradients.accumulate_input
            && in_place.describable();
        let epilogue = params::Gemm {
            count: list.count,
            target: store.target,
            coef: layout.input_factor,
            onehot_w: call.weight.address,
            onehot_g: layout.target_factor,
            onehot_ld: call.weight.row_stride,
            m: call.rows as i32,
            n: call.features as i32,
            k: call.classes as i32,
            ld_row: padded(call.rows) as i32,
            scale: 1.0,
            ..params::Gemm::default()
        };
        let choice = kernel(call, Operation::De, call.rows, call.features);
        let d = Some(if direct { in_place } else { packed });
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            tensor_cores(
                call.stream,
                Operation::De,
                &choice,
                &Operands { a: x, b: call.weight, d },
                epilogue,
            )?;
        }
        if direct {
            return Ok(());
        }
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
        unsafe { call.stream.launch(&name, (call.rows, 1), 256, 0, &params) }
    }
}
