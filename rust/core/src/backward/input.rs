//! dE: features and panels of `dEᵀ[feature][32 rows] += Wᵀ dz`, cell after cell.

use super::{Cell, Pass, write};
use crate::head::{Left, in_place};
use crate::kernel::{Isa, Kernel, LANES, Product};

/// A left operand with its steps: columns of `W`.
struct Columns<T> {
    start: *const T,
    row: usize,
    k: usize,
    block: usize,
}

impl<K: Kernel> Pass<'_, K> {
    /// Adds `Wᵀ dz` of the cell to some features and panels.
    pub(super) fn input(&self, cell: Cell, task: usize) {
        let group = self.group(cell.group);
        let spans = group.len().div_ceil(self.layout.span);
        let first_feature = task / spans * self.layout.features;
        let features = self.layout.features.min(self.features() - first_feature);
        let first_panel = group.start + task % spans * self.layout.span;
        let panels = first_panel..(first_panel + self.layout.span).min(group.end);
        let dz = if K::GROUP > 1 { &self.dz_pairs } else { &self.dz }[cell.index % 2];
        let blocks = self.blocks(cell.super_block);
        let mut block = blocks.start;
        while block < blocks.end {
            let pieces = self.pieces(block, blocks.end);
            let columns = self.columns(cell, block, first_feature);
            let (_, classes) = self.classes(block);
            for panel in panels.clone() {
                let sums = (self.held(panel) * self.features() + first_feature) * LANES;
                let product = Product {
                    m: features,
                    pieces,
                    k: classes.next_multiple_of(K::K_STEP),
                    a: columns.start,
                    a_row: columns.row,
                    a_k: columns.k,
                    a_piece: columns.block,
                    b: dz.at(self.tile_offset(cell, block, panel)).cast_const(),
                    c: self.d_input.at(sums),
                    c_row: LANES,
                    accumulate: block > 0,
                };
                // SAFETY: the tiles and the packed weight are complete; dEᵀ here is this task's.
                unsafe { self.kernel.product(&product) }
            }
            block += pieces;
        }
    }

    /// How many blocks from `block` on go through one product: whole ones adjoin in dz.
    fn pieces(&self, block: usize, end: usize) -> usize {
        let whole = (block..end).take_while(|&block| self.classes(block).1 == self.tiling.block);
        whole.take(self.layout.pieces).count().max(1)
    }

    /// Columns of `W` from a feature on, for the classes of a block and those that follow.
    fn columns(&self, cell: Cell, block: usize, feature: usize) -> Columns<K::Operand> {
        let side = self.weight_side(cell);
        let place = block - self.blocks(cell.super_block).start;
        if !K::COLUMN_A {
            let row = self.tiling.padded_block;
            let block = self.features() * row;
            let start = self.columns[side].at(place * block + feature * row);
            return Columns { start, row, k: 1, block };
        }
        let (first, classes) = self.classes(block);
        let left = in_place::<K>(&self.operands, first, classes)
            .unwrap_or_else(|| self.packed_rows(side, place));
        let start = left.start.wrapping_add(feature);
        Columns { start, row: 1, k: left.row, block: self.tiling.block * left.row }
    }

    /// The packed rows of `W` of a block, by its place in the super-block.
    pub(super) fn packed_rows(&self, side: usize, place: usize) -> Left<K::Operand> {
        let row = self.tiling.weight_row;
        Left { start: self.weight[side].at(place * self.tiling.block * row), row }
    }

    /// Writes a panel of dE.
    pub(super) fn write(&self, panel: usize) {
        let Some(tensor) = &self.gradients.input else { return };
        let features = self.features();
        // SAFETY: the sums are complete.
        let sums = unsafe {
            let start = self.d_input.at(self.held(panel) * features * LANES).cast_const();
            std::slice::from_raw_parts(start.cast(), features)
        };
        let scale = self.operands.maps.scale();
        for (lane, row) in self.rows.panel(panel).enumerate() {
            let accumulate = self.gradients.accumulate_input;
            let work = write::InputRow { tensor, row, lane, sums, scale, accumulate };
            self.kernel.isa().vectorize(write::EachType(tensor.dtype(), work));
        }
    }
}
