//! Gradients that are sums over the gradient of the logits: those of the bias and of the scale.
//!
//! Both are what is left of terms that cancel, so they are summed before anything is rounded to 16 bits:
//! with the tile where a product makes it, from accumulators where a row kernel does.

use logitless_core::DType;

use crate::backward::Backward;
use crate::call::vector;
use crate::error::Result;
use crate::layout::padded;
use crate::params;
use crate::plan::Path;
use crate::product::{Matrix, Operation, choose};

impl Backward<'_> {
    /// Sums over the rows of a chunk's tile.
    pub unsafe fn bias_gradient(&self, tile: Matrix, first: usize, count: usize) -> Result<()> {
        let Some(d_bias) = &self.gradients.bias else { return Ok(()) };
        // Sums in float where there are some: of 16 rows, or the tile itself before it was rounded.
        // Kept exponentials have been.
        let float = |address| Matrix::packed(address, DType::F32, count, self.width);
        let kept = self.pieces.iter().any(|piece| piece.first == first);
        let fused = self.call.plan.path != Path::Tiled;
        let (tile, group) = if self.unrounded() && fused && !kept {
            (float(self.layout.columns), 16)
        } else if self.keeps() {
            (float(self.layout.z), 1)
        } else {
            (tile, 1)
        };
        let params = params::ColumnSum {
            tile: tile.any(),
            out: vector(d_bias),
            count: self.list.count,
            factor: self.factor,
            rows: self.call.rows as i64,
            columns: count as i64,
            group,
            column0: first as i64,
            ..params::ColumnSum::default()
        };
        // SAFETY: operands checked, buffers of the layout.
        unsafe { self.call.stream.launch("column_sum", (count.div_ceil(32), 1), 256, 0, &params) }
    }

    /// Adds the chunk's share of Σ dx (E Wᵀ) to each row's, where the tile came with its sums.
    pub unsafe fn scale_blocks(&self, first: usize, count: usize) -> Result<()> {
        let call = self.call;
        if self.gradients.scale.is_none() || !self.unrounded() || call.plan.path == Path::Tiled {
            return Ok(());
        }
        let facts = &call.stream.device.facts;
        let choice = choose(facts, Operation::GradientSums, call.dtype, true, call.rows, count)
            .expect("the plan found it");
        let params = params::AbsorbDots {
            part: self.layout.block_dots,
            count: self.list.count,
            partial: self.layout.dots,
            rows: call.rows as i64,
            ld_row: padded(call.rows) as i32,
            tiles: count.div_ceil(choice.part_columns()) as i32,
            first: i32::from(first == 0),
            reserved: 0,
        };
        // SAFETY: buffers of the layout.
        unsafe { call.stream.launch("absorb_dots", (call.rows.div_ceil(256), 1), 256, 0, &params) }
    }

    /// d(logit_scale) = Σ dx (E Wᵀ) = Σ over rows of E_i · (dx W)_i, where the rows have no sums yet.
    pub unsafe fn scale_gradient(&self) -> Result<()> {
        let (call, Some(d_scale)) = (self.call, &self.gradients.scale) else { return Ok(()) };
        let params = params::Dots {
            input: self.packed.any(),
            gradient: self.sums.any(),
            count: self.list.count,
            partial: self.layout.dots,
            out: d_scale.address(),
            factor: self.factor,
            rows: call.rows as i64,
            features: call.features as i32,
            is_double: i32::from(call.acc == DType::F64),
        };
        // SAFETY: operands checked, buffers of the layout.
        unsafe {
            if !self.unrounded() {
                call.stream.launch("row_dots", (call.rows.div_ceil(8), 1), 256, 0, &params)?;
            }
            call.stream.launch("fold_dots", (1, 1), 256, 0, &params)
        }
    }
}
