//! Packing a panel: operands from its rows of the input, coefficients from their cotangents.

use super::Pass;
use crate::gradient::{self, Point};
use crate::kernel::{Kernel, LANES};
use crate::rows::Key;
use crate::stats::RowGradient;

impl<K: Kernel> Pass<'_, K> {
    /// Packs a panel both ways and works out the coefficients of its rows.
    pub(super) fn pack(&self, panel: usize) {
        let rows = || self.rows.panel(panel);
        let gather = self.operands.input.gather(rows(), 0, self.features());
        // SAFETY: this task owns the panel's part of each region.
        unsafe { self.kernel.pack_panel(&gather, self.packed(panel)) };
        if self.gradients.weight.is_some() && self.layout.keeps_strips {
            for strip in 0..self.layout.strips {
                // SAFETY: as above.
                unsafe { self.pack_strip(strip, panel, self.strip(strip, panel)) };
            }
        }
        self.coefficients_of(panel);
    }

    /// The packed panel: right operand of the logits.
    pub(super) fn packed(&self, panel: usize) -> *mut K::Operand {
        self.panels.at(self.held(panel) * self.tiling.depth * LANES)
    }

    /// Where a panel's rows of a strip are kept; panels of a strip are adjacent.
    pub(super) fn strip(&self, strip: usize, panel: usize) -> *mut K::Operand {
        self.strips.at((strip * self.held_panels() + self.held(panel)) * LANES * LANES)
    }

    /// Packs a panel's rows of a strip: right operand of dW.
    ///
    /// # Safety
    /// `out` is writable for 32 · 32 operands.
    pub(super) unsafe fn pack_strip(&self, strip: usize, panel: usize, out: *mut K::Operand) {
        let first = strip * LANES;
        let width = LANES.min(self.features() - first);
        let gather = self.operands.input.gather(self.rows.panel(panel), first, width);
        // SAFETY: the gather names features of the input; the caller's promise for `out`.
        unsafe { self.kernel.pack_strip(&gather, out) }
    }

    /// Works out the coefficients and points of a panel's rows.
    fn coefficients_of(&self, panel: usize) {
        let spec = self.outputs.spec;
        let mut gradient = RowGradient::default();
        let coefficients = self.coefficients_mut(panel);
        let room = LANES * self.layout_points();
        // SAFETY: this task owns the panel's points.
        let points = unsafe { self.points.slice_mut(self.held(panel) * room, room) };
        let mut count = 0;
        let mut push = |class: usize, lane: usize, column: usize, value: f64| {
            points[count] = Point { key: Key::new(class, lane, column), value };
            count += 1;
        };
        for (lane, row) in self.rows.panel(panel).enumerate() {
            let rest = self.outputs.gradient(row, &mut gradient);
            gradient::fill(&gradient, rest, spec.vectors(), lane, coefficients);
            for (column, class) in self.operands.ids.iter().flat_map(|ids| ids.classes(row)) {
                let value = gradient.targets.get(column).copied().unwrap_or(0.0);
                push(class, lane, column, value);
            }
            for &(class, value) in &gradient.selected {
                push(class, lane, Point::SELECTED, value);
            }
        }
        for lane in self.rows.panel(panel).len()..LANES {
            gradient::fill_dead(lane, coefficients);
        }
        points[..count].sort_by_key(|point| point.key);
        // SAFETY: this task owns the panel's count.
        unsafe { *self.point_counts.at(self.held(panel)) = count };
    }

    /// Points of a row, at most.
    fn layout_points(&self) -> usize {
        gradient::points(self.outputs.spec)
    }

    /// The coefficients of a panel's rows, a lane each.
    #[allow(clippy::mut_from_ref)]
    pub(super) fn coefficients_mut(&self, panel: usize) -> &mut [[K::Acc; LANES]] {
        let lanes = gradient::lanes(self.outputs.spec);
        let start = self.coefficients.at(self.held(panel) * lanes * LANES);
        // SAFETY: written by the task that packs the panel, read by later stages only; any bits
        // are numbers.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), lanes) }
    }

    /// The points of a panel's rows, sorted.
    pub(super) fn points(&self, panel: usize) -> &[Point] {
        let room = LANES * self.layout_points();
        // SAFETY: written when the panel was packed.
        unsafe {
            let count = *self.point_counts.at(self.held(panel));
            self.points.slice(self.held(panel) * room, count)
        }
    }
}
