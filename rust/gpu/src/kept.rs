//! A backward's part for the classes whose exponentials were kept (`share`).
//!
//! They serve where enough of their rows carry a cotangent; where few do, making those rows again costs
//! less. Which it is, is known to the device alone: launches of both ways are enqueued, and those of
//! one do nothing.

use crate::backward::Backward;
use crate::error::Result;
use crate::layout::padded;
use crate::params::RowList;
use crate::product::Order;
use crate::scaled::Scaled;

impl Backward<'_> {
    /// Gradients of the first `made` classes. Leaves the live rows of the input packed.
    pub unsafe fn kept_chunks(&self, made: usize, bias: usize) -> Result<()> {
        let call = self.call;
        let (kept, again) = (self.among(self.layout.kept), self.among(self.layout.again));
        let scaled = kept.scaled();
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            if let Some(scaled) = &scaled {
                kept.scaled_chunks(scaled)?;
            }
            // In the place of the scaled input, which has been read.
            let readers = match scaled {
                Some(_) if made == call.classes => again.list,
                _ => self.list,
            };
            call.gather(readers, self.packed, self.packed_rows)?;
            if scaled.is_none() {
                kept.stored_chunks()?;
            }
            let width = self.again_width(made);
            Backward { pieces: &[], width, ..again }.chunks(0..made, bias)
        }
    }

    /// How many classes' exponentials were kept.
    pub fn kept_classes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.count).sum()
    }

    /// What products read beside kept exponentials, where those are a factor a row from the gradient.
    fn scaled(&self) -> Option<Scaled<'_>> {
        Some(Scaled {
            call: self.call,
            gradients: self.gradients,
            accumulate_weight: self.accumulate_weight,
            saved: self.saved,
            grad: self.grad,
            list: self.list,
            store: self.store?,
            buffers: self.layout.factors?,
            input: self.packed,
            input_rows: self.packed_rows,
            largest: Some(self.layout.scalars),
            clear: 0,
        })
    }

    /// Classes whose exponentials were kept, as they are. The targets' part of the input's gradient is
    /// added at the end (`scatter`).
    unsafe fn scaled_chunks(&self, scaled: &Scaled) -> Result<()> {
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            scaled.make(self.kept_classes())?;
            for kept in self.pieces {
                scaled.bias_gradient(kept)?;
                let weight = self.call.weight.rows_from(kept.first);
                let mut order = Order::After;
                if self.gradients.input.is_some() {
                    let factors = scaled.buffers.input_factor;
                    order = self.input_gradient(kept.x, factors, weight, kept.first, kept.count)?;
                }
                scaled.weight_gradient(order, kept)?;
            }
        }
        Ok(())
    }

    /// The same where an entropy's gradient is not a factor a row: a pass makes tiles of them first.
    unsafe fn stored_chunks(&self) -> Result<()> {
        for piece in self.pieces {
            let weight = self.call.weight.rows_from(piece.first);
            // SAFETY: operands checked, buffers of the layouts.
            unsafe {
                let tile = self.stored_tile(piece)?;
                self.products(tile, weight, piece.first, piece.count)?;
            }
        }
        Ok(())
    }

    /// The same over as many rows as the device says at `count`; none at all if that is negative.
    fn among(&self, count: usize) -> Self {
        Backward { list: RowList { count, ..self.list }, ..*self }
    }

    /// Width of the tiles that make `made` kept classes again: most often of no row at all, so as few
    /// launches as memory allows.
    fn again_width(&self, made: usize) -> usize {
        let (call, share) = (self.call, &self.call.plan.share);
        // Sums beside the tile have room for the others' width.
        if !share.overwrites() || self.unrounded() {
            return self.width;
        }
        let column = padded(call.rows) * call.dtype.size();
        let most = share.own_bytes(call.rows) / column.max(1) / 64 * 64;
        made.div_ceil(made.div_ceil(most.max(64))).next_multiple_of(64)
    }

    /// Share of live rows from which on kept exponentials of all rows cost less than the live rows'
    /// made again: two products of three are for all classes, the third for those that were not kept.
    pub fn least(&self) -> f64 {
        1.0 - self.kept_classes() as f64 / (3 * self.call.classes.max(1)) as f64
    }
}
