//! Tiles of gradients of the logits: the three ways in which a backward makes them.
//!
//! From a product's epilogue (*fused*), from a tile of logits in memory (*tiled*), or from exponentials
//! that the forward kept (*stored*). All are divided by the largest cotangent.

use crate::backward::Backward;
use crate::call::matrix;
use crate::error::Result;
use crate::forward::logits;
use crate::keep::Exponentials;
use crate::launch::suffix;
use crate::layout::padded;
use crate::params;
use crate::plan::Path;
use crate::product::{LogitMap, Matrix, Operands, Operation, choose, tensor_cores};
use crate::share::Lends;

impl Backward<'_> {
    /// The gradient tile of kept classes: in place where the exponentials may go.
    pub unsafe fn stored_tile(&self, piece: &Exponentials) -> Result<Matrix> {
        let tile = match self.call.plan.share.lends {
            Lends::Nothing => self.dx(),
            _ => piece.x,
        };
        let params = params::StoredTile {
            list: self.list,
            coef: self.layout.coef,
            rest: self.layout.reference,
            reference: self.store.map_or(0, |store| store.reference),
            target: self.layout.target,
            logits: self.saved.target,
            x: piece.x.address,
            tile: tile.address,
            x_pitch: piece.x.row_stride,
            tile_pitch: tile.row_stride,
            ld_row: padded(self.call.rows) as i32,
            column0: piece.first as i32,
            width: piece.count as i32,
            shift: flush_shift(self.call.classes),
            softcap: self.call.problem.softcap as f32,
            moments: i32::from(self.grad.entropy != 0),
        };
        // A block a row and 8192 classes.
        let grid = (self.call.rows, piece.count.div_ceil(8192));
        // SAFETY: buffers of the layouts.
        unsafe { self.call.stream.launch("stored_gradient_bf16", grid, 256, 0, &params)? };
        Ok(tile)
    }

    /// Whether gradients of bias and scale are summed in float while tiles are made.
    pub fn unrounded(&self) -> bool {
        self.call.plan.unrounded
    }

    /// The tile of logit gradients.
    pub fn dx(&self) -> Matrix {
        Matrix::packed(self.layout.dx, self.call.dtype, self.width, self.width)
    }

    pub unsafe fn fused_tile(
        &self,
        weight: Matrix,
        bias: usize,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let call = self.call;
        let g = &self.grad;
        // Cross entropy needs a and e alone.
        let others = [g.entropy, g.sum, g.sum_sq, g.mean, g.variance];
        let operation = if self.unrounded() {
            Operation::GradientSums
        } else if others.iter().all(|&field| field == 0) {
            Operation::GradientCe
        } else {
            Operation::Gradient
        };
        let facts = &call.stream.device.facts;
        let mapped = call.mapped() || self.unrounded();
        let choice = choose(facts, operation, call.dtype, mapped, call.rows, count)
            .expect("the plan found it");
        let wanted = |gradient: bool, buffer| if gradient { buffer } else { 0 };
        let epilogue = params::Gemm {
            columns: wanted(self.gradients.bias.is_some(), self.layout.columns),
            dots: wanted(self.gradients.scale.is_some(), self.layout.block_dots),
            reference: self.layout.reference,
            target: self.layout.target,
            coef: self.layout.coef,
            // Sums are of everything.
            shift: if self.unrounded() { 0.0 } else { flush_shift(call.classes) },
            ..call.logit_product(self.list, bias, first, count)
        };
        let operands = Operands { a: self.packed, b: weight, d: Some(self.dx()) };
        // SAFETY: operands checked, buffers of the layout.
        unsafe { tensor_cores(call.stream, operation, &choice, &operands, epilogue)? };
        if self.grad.max == 0 {
            return Ok(());
        }
        let params = params::AddMaximum {
            saved: self.saved,
            grad: self.grad,
            list: self.list,
            tile: self.dx().any(),
            scalars: self.layout.scalars,
            softcap: call.problem.softcap,
            column0: first as i64,
            width: count as i64,
        };
        // SAFETY: as above.
        unsafe { call.stream.launch("add_maximum", (call.rows.div_ceil(256), 1), 256, 0, &params) }
    }

    pub unsafe fn tiled_tile(
        &self,
        weight: Matrix,
        bias: usize,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let call = self.call;
        let z = Matrix::packed(self.layout.z, call.acc, self.width, self.width);
        let params = params::Tile {
            saved: self.saved,
            grad: self.grad,
            list: self.list,
            z: z.address,
            dx: self.layout.dx,
            z_pitch: self.width as i64,
            dx_pitch: self.width as i64,
            d_dense: self.gradients.dense.as_ref().map_or_else(params::AnyMatrix::default, matrix),
            scalars: self.layout.scalars,
            column0: first as i64,
            width: count as i32,
            padded: padded(call.rows) as i32,
            keep: i32::from(self.keeps()),
            ..call.tile_params()
        };
        // Where the scale's gradient reads the products, they are stored and the kernel maps them.
        let products = self.gradients.scale.is_some() && self.unrounded();
        let params = if products {
            params::Tile {
                bias: if bias == 0 { 0 } else { bias + call.acc.size() * first },
                scale: call.problem.logit_scale,
                scale_at: call.scale_at,
                dots: self.layout.dots,
                first: i32::from(first == 0),
                ..params
            }
        } else {
            params
        };
        let map =
            if products { LogitMap { scale: 1.0, ..LogitMap::default() } } else { call.map(bias) };
        let name = format!("tile_gradient_{}", suffix(call.dtype));
        // SAFETY: operands checked, buffers of the layout.
        unsafe {
            logits(call, self.list, self.packed, weight, z, map, (first, count))?;
            call.stream.launch(&name, (padded(call.rows), 1), 256, 0, &params)
        }
    }

    /// Whether gradients on the tiled path stay in the logits' memory, in accumulators.
    pub fn keeps(&self) -> bool {
        let call = self.call;
        call.plan.path == Path::Tiled && call.dtype != call.acc && self.gradients.bias.is_some()
    }
}

/// Shares below 2^(shift - 126) become exact zeros, which the products' power budget repays (measured:
/// 2 to 7% of a backward). A row drops less than 2^-10 of its probability in all.
fn flush_shift(classes: usize) -> f32 {
    (116 - classes.next_power_of_two().trailing_zeros() as i32) as f32
}
