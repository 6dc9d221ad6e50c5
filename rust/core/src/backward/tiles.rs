//! Gradient tiles of a class block, and what one owner sums from them: dW, db, d logit_scale.

use super::{Cell, Pass, Space, write};
use crate::element::Real;
use crate::gradient::{Coefficients, GradientTile};
use crate::head::{Left, in_place, left, products};
use crate::kernel::{Isa, Kernel, LANES, Product, Vectorize, prefetch};
use crate::layout::depth;
use crate::operands::{ClassVector, DensePanel};
use crate::rows::within;
use crate::tensor::Tensor;

impl<K: Kernel> Pass<'_, K> {
    /// Makes the gradient tiles of a class block for all panels of the cell, and its part of dW.
    pub(super) fn tiles(&self, cell: Cell, task: usize, space: &Space<K>) {
        let block = self.blocks(cell.super_block).start + task;
        let (first, classes) = self.classes(block);
        let weight = self.weight_rows(cell, task, first, classes);
        let wants_bias = self.gradients.bias.is_some();
        // SAFETY: the thread's own space, sized for a block.
        let bias = unsafe {
            if wants_bias {
                let lanes = std::slice::from_raw_parts_mut(space.bias_lanes, classes * LANES);
                lanes.fill(K::Acc::ZERO);
            }
            let bias = std::slice::from_raw_parts_mut(space.bias, classes);
            self.operands.bias(first, bias)
        };
        let mut scale = 0.0;
        for panel in self.group(cell.group) {
            let offset = self.tile_offset(cell, block, panel);
            let dz = self.dz[cell.index % 2].at(offset);
            // A kernel that rounds its operands has the tile in memory of the thread.
            let tile: *mut K::Acc = if K::GROUP > 1 { space.tile } else { dz.cast() };
            let total = self.rows.panels();
            // SAFETY: the panel was packed; the tile belongs to this task alone.
            unsafe {
                match self.operands.stored(self.tiling, block, panel, total) {
                    Some(stored) => tile.copy_from_nonoverlapping(stored, classes * LANES),
                    None => {
                        let packed = self.packed(panel);
                        products(self.kernel, weight, classes, self.tiling.depth, packed, tile);
                    }
                }
            }
            scale += self.gradient_tile(panel, first, classes, bias, tile, space);
            if K::GROUP > 1 {
                let pairs = self.dz_pairs[cell.index % 2].at(offset);
                // SAFETY: both buffers have room for a padded block here.
                unsafe { self.kernel.store_dz(tile.cast_const(), classes, dz, pairs) };
            }
        }
        if self.gradients.scale.is_some() {
            // SAFETY: the block has one owner, group after group.
            unsafe {
                let sum = self.d_scale.at(block);
                *sum = if cell.group == 0 { scale } else { *sum + scale };
            }
        }
        if wants_bias {
            self.write_bias(cell, first, classes, space);
        }
        if let Some(tensor) = &self.gradients.weight {
            for strip in 0..self.layout.strips {
                self.weight_strip(cell, task, block, strip, tensor, space);
            }
        }
    }

    /// The left operand of a block: in place, or packed for its logits and for dE.
    fn weight_rows(
        &self,
        cell: Cell,
        place: usize,
        first: usize,
        classes: usize,
    ) -> Left<K::Operand> {
        let side = self.weight_side(cell);
        let space = self.packed_rows(side, place);
        if cell.group > 0 && !self.layout.rows_outer {
            // The first row group has packed it.
            return in_place::<K>(&self.operands, first, classes).unwrap_or(space);
        }
        let (features, row) = (self.features(), self.tiling.padded_block);
        if !K::COLUMN_A && self.gradients.input.is_some() {
            let block = self.operands.weight.block(first, classes, 0, features);
            let columns = self.columns[side].at(place * features * row);
            // SAFETY: this task owns the block's part of the buffer.
            unsafe { self.kernel.pack_columns(&block, columns, row) };
        }
        // SAFETY: as above.
        unsafe { left(self.kernel, &self.operands, first, classes, space) }
    }

    /// Turns the products in `tile` into gradients; returns the tile's part of the gradient of the
    /// logit scale.
    fn gradient_tile(
        &self,
        panel: usize,
        first: usize,
        classes: usize,
        bias: &[K::Acc],
        tile: *mut K::Acc,
        space: &Space<K>,
    ) -> f64 {
        let dense = |tensor: &Option<Tensor>| {
            tensor.as_ref().map(|tensor| DensePanel::new(tensor, self.rows.panel(panel)))
        };
        let (dense, d_dense) = (dense(&self.operands.dense), dense(&self.gradients.dense));
        // SAFETY: tile and space belong to this task; the first `classes` lanes are initialised.
        let (tile, raw, bias_lanes) = unsafe {
            let lanes = |start: *mut K::Acc, wanted: bool| {
                let count = if wanted { classes } else { 0 };
                std::slice::from_raw_parts_mut(start.cast(), count)
            };
            (
                lanes(tile, true),
                lanes(space.raw, self.gradients.scale.is_some()),
                lanes(space.bias_lanes, self.gradients.bias.is_some()),
            )
        };
        self.kernel.isa().vectorize(TileWork {
            bias,
            raw,
            bias_lanes,
            gradient: GradientTile {
                tile,
                first,
                count: self.rows.panel(panel).len(),
                coefficients: Coefficients {
                    lanes: self.coefficients_mut(panel),
                    terms: &self.terms,
                    vectors: self.outputs.spec.vectors(),
                },
                maps: &self.operands.maps,
                powers: self.outputs.spec.powers(),
                vectors: self.operands.vectors,
                dense: dense.as_ref(),
                d_dense: d_dense.as_ref(),
                points: within(self.points(panel), |point| point.key, first, first + classes),
            },
        })
    }

    /// dW of a block and strip over the rows of the cell; written when its sum is complete.
    fn weight_strip(
        &self,
        cell: Cell,
        place: usize,
        block: usize,
        strip: usize,
        tensor: &Tensor,
        space: &Space<K>,
    ) {
        let (first, classes) = self.classes(block);
        let panels = self.group(cell.group);
        // With classes outside, sums wait aside for the next row group; else in the output.
        let aside = !self.layout.rows_outer && self.groups() > 1;
        let sums = if aside {
            let tile = self.tiling.padded_block * LANES;
            self.d_weight.at((place * self.layout.strips + strip) * tile)
        } else {
            space.strip
        };
        let most = (depth(size_of::<K::Operand>()) / LANES).min(self.layout.group);
        for panel in panels.clone().step_by(most) {
            let pieces = most.min(panels.end - panel);
            let product = Product {
                m: classes,
                pieces,
                k: LANES,
                a: self.dz[cell.index % 2].at(self.tile_offset(cell, block, panel)).cast_const(),
                a_row: LANES,
                a_k: 1,
                a_piece: self.layout.dz_panel,
                b: self.strip_pieces(strip, panel, pieces, space),
                c: sums,
                c_row: LANES,
                accumulate: panel > panels.start || (aside && cell.group > 0),
            };
            // SAFETY: the tiles were made by this task, the strips packed before.
            unsafe { self.kernel.product(&product) }
        }
        if !aside || cell.group + 1 == self.groups() {
            // SAFETY: just written; the sums belong to this task.
            let sums = unsafe { std::slice::from_raw_parts(sums.cast_const().cast(), classes) };
            let work = write::WeightStrip {
                tensor,
                first,
                column: strip * LANES,
                width: LANES.min(self.features() - strip * LANES),
                sums,
                scale: self.operands.maps.scale(),
                accumulate: !aside && cell.group > 0,
            };
            self.kernel.isa().vectorize(write::EachType(tensor.dtype(), work));
        }
    }

    /// The right operand of dW for some panels: kept, or packed now.
    fn strip_pieces(
        &self,
        strip: usize,
        panel: usize,
        pieces: usize,
        space: &Space<K>,
    ) -> *const K::Operand {
        if self.layout.keeps_strips {
            return self.strip(strip, panel);
        }
        for piece in 0..pieces {
            let out = space.strip_pieces.wrapping_add(piece * LANES * LANES);
            // SAFETY: the thread's own space has room for a group of panels.
            unsafe { self.pack_strip(strip, panel + piece, out) };
        }
        if strip + 1 < self.layout.strips {
            // Rows lie far apart: have those of the next strip on their way meanwhile.
            for piece in 0..pieces {
                for row in self.rows.panel(panel + piece) {
                    let feature = ((strip + 1) * LANES) as isize * self.operands.input.step();
                    prefetch(self.operands.input.row(row).wrapping_offset(feature));
                }
            }
        }
        space.strip_pieces
    }

    /// Adds the bias gradient of a block up over lanes and row groups.
    fn write_bias(&self, cell: Cell, first: usize, classes: usize, space: &Space<K>) {
        let Some(tensor) = &self.gradients.bias else { return };
        // SAFETY: filled by this task; the sums of a class have one owner, group after group.
        let (lanes, sums) = unsafe {
            let lanes: &[[K::Acc; LANES]] =
                std::slice::from_raw_parts(space.bias_lanes.cast_const().cast(), classes);
            (lanes, self.d_bias.slice_mut(first, classes))
        };
        let output = ClassVector::new(tensor);
        for (class, (lanes, sum)) in lanes.iter().zip(sums).enumerate() {
            let part: f64 = lanes.iter().map(|&lane| lane.to_f64()).sum();
            *sum = if cell.group == 0 { part } else { *sum + part };
            if cell.group + 1 == self.groups() {
                output.write(first + class, K::Acc::from_f64(*sum));
            }
        }
    }
}

/// A tile of products into dx, with what is summed from it on the way.
struct TileWork<'a, A> {
    bias: &'a [A],
    /// Room for the products, where the gradient of the logit scale is wanted.
    raw: &'a mut [[A; LANES]],
    /// Sums of the bias gradient, where it is wanted.
    bias_lanes: &'a mut [[A; LANES]],
    gradient: GradientTile<'a, A>,
}

impl<A: Real> Vectorize for TileWork<'_, A> {
    type Output = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let Self { bias, raw, bias_lanes, mut gradient } = self;
        if !raw.is_empty() {
            raw.copy_from_slice(gradient.tile);
        }
        gradient.maps.apply::<FMA>(gradient.tile, bias);
        gradient.run::<FMA>();
        for (sums, dx) in bias_lanes.iter_mut().zip(&*gradient.tile) {
            for i in 0..LANES {
                sums[i] += dx[i];
            }
        }
        let mut scale = [A::ZERO; LANES];
        for (raw, dx) in raw.iter().zip(&*gradient.tile) {
            for i in 0..LANES {
                scale[i] = raw[i].mul_add::<FMA>(dx[i], scale[i]);
            }
        }
        scale.iter().map(|&sum| sum.to_f64()).sum()
    }
}
