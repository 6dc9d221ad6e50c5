//! The layout of a reduction: which elements belong together, and where they are.

use super::Strided;
use crate::error::{Error, Result};
use std::ops::Range;

/// Width of a block: kept elements side by side, or neighbours of one reduced run.
pub(super) const LANES: usize = 64;
/// Elements of a block: 16 KiB of f32.
pub(super) const BLOCK: usize = 4096;
/// Blocks of a chunk: what is reduced by one thread, and merged in a fixed order.
const BLOCKS: usize = 64;
/// Kept elements that a tile needs to become the lanes of a block.
const MIN_TILE: usize = 32;
/// Reductions shorter than this leave a block mostly empty unless lanes are kept elements.
const SHORT: usize = 512;
/// Elements of a task: enough to hide what starting one costs.
const TASK: usize = 1 << 16;

/// Element offsets into the array and its weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Offset {
    pub array: isize,
    pub weights: isize,
}

impl Offset {
    pub fn plus(self, step: Self, times: usize) -> Self {
        let times = times as isize;
        Self {
            array: self.array + step.array * times,
            weights: self.weights + step.weights * times,
        }
    }
}

/// One axis of both operands.
#[derive(Clone, Copy, Debug)]
struct Axis {
    len: usize,
    step: Offset,
}

/// Axes in row-major order, those of size one dropped and those that run on merged.
#[derive(Debug)]
struct Axes(Vec<Axis>);

impl Axes {
    fn new(axes: impl IntoIterator<Item = Axis>) -> Self {
        let mut merged: Vec<Axis> = Vec::new();
        for axis in axes.into_iter().filter(|axis| axis.len != 1) {
            match merged.last_mut() {
                Some(outer) if outer.step == Offset::default().plus(axis.step, axis.len) => {
                    *outer = Axis { len: outer.len * axis.len, step: axis.step };
                }
                _ => merged.push(axis),
            }
        }
        Self(merged)
    }

    fn len(&self) -> usize {
        self.0.iter().map(|axis| axis.len).product()
    }

    /// The innermost axis; one element where there is none.
    fn innermost(&self) -> Axis {
        self.0.last().copied().unwrap_or(Axis { len: 1, step: Offset::default() })
    }

    /// Where the element with this row-major index is.
    fn offset(&self, mut index: usize) -> Offset {
        self.0.iter().rev().fold(Offset::default(), |offset, axis| {
            let along = index % axis.len;
            index /= axis.len;
            offset.plus(axis.step, along)
        })
    }
}

/// Kept elements that are reduced together.
pub(super) struct Tile {
    /// Where the first of them is.
    pub start: Offset,
    /// Their positions in the outputs.
    pub outputs: Range<usize>,
}

/// What a call reduces and in which pieces: a function of shape and strides alone.
pub(super) struct Layout {
    kept: Axes,
    reduced: Axes,
    /// Kept elements of a tile: up to [`LANES`] where lanes are kept elements, else 1.
    pub lanes: usize,
}

impl Layout {
    pub fn new(
        array: &Strided,
        weights: Option<&Strided>,
        shape: &[usize],
        axes: &[usize],
    ) -> Result<Self> {
        for (argument, strides) in
            [("array", Some(&array.strides)), ("weights", weights.map(|w| &w.strides))]
        {
            if strides.is_some_and(|strides| strides.len() != shape.len()) {
                let expected = "a stride for each axis".into();
                return Err(Error::Shape { argument, shape: shape.to_vec(), expected });
            }
        }
        if let Some(axis) = axes.iter().find(|&&axis| axis >= shape.len()) {
            return Err(Error::Value {
                argument: "axis",
                value: axis.to_string(),
                expected: format!("axes of an array of {} dimensions", shape.len()),
            });
        }
        let axis = |axis: usize| Axis {
            len: shape[axis],
            step: Offset {
                array: array.strides[axis],
                weights: weights.map_or(0, |weights| weights.strides[axis]),
            },
        };
        let (reduced, kept): (Vec<usize>, Vec<usize>) =
            (0..shape.len()).partition(|axis| axes.contains(axis));
        // Reduced elements may come in any order that the layout fixes: that of the memory.
        let mut reduced: Vec<Axis> = reduced.into_iter().map(axis).collect();
        reduced.sort_by_key(|axis| std::cmp::Reverse(axis.step.array.unsigned_abs()));
        let (kept, reduced) = (Axes::new(kept.into_iter().map(axis)), Axes::new(reduced));
        let (side, run) = (kept.innermost(), reduced.innermost());
        let adjacent = side.step.array.unsigned_abs() < run.step.array.unsigned_abs();
        let across = side.len >= MIN_TILE && (adjacent || reduced.len() < SHORT);
        let lanes = if across { LANES } else { 1 };
        Ok(Self { kept, reduced, lanes })
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.kept.len()
    }

    /// Number of tiles: a tile stays within the innermost kept axis.
    pub fn tiles(&self) -> usize {
        let along = self.kept.innermost().len;
        self.kept.len().checked_div(along).unwrap_or(0) * along.div_ceil(self.lanes)
    }

    pub fn tile(&self, tile: usize) -> Tile {
        let along = self.kept.innermost().len;
        let each = along.div_ceil(self.lanes);
        let first = tile / each * along + tile % each * self.lanes;
        let end = (tile / each + 1) * along;
        Tile { start: self.kept.offset(first), outputs: first..end.min(first + self.lanes) }
    }

    /// Step from one kept element of a tile to the next.
    pub fn lane_step(&self) -> Offset {
        self.kept.innermost().step
    }

    /// Reduced elements of one block.
    fn block(&self) -> usize {
        BLOCK / self.lanes
    }

    /// Number of chunks that each tile is cut in: a chunk gives one pair a lane.
    pub fn chunks(&self) -> usize {
        self.reduced.len().div_ceil(self.block() * BLOCKS)
    }

    /// Chunks that one task works through.
    pub fn chunks_of_task(&self) -> usize {
        let elements = self.lanes * self.reduced.len().min(self.block() * BLOCKS);
        (TASK / elements.max(1)).max(1)
    }

    /// The blocks of a chunk, as ranges of reduced elements.
    pub fn blocks(&self, chunk: usize) -> impl Iterator<Item = Range<usize>> {
        let (block, len) = (self.block(), self.reduced.len());
        let start = chunk * block * BLOCKS;
        let end = len.min(start + block * BLOCKS);
        (start..end).step_by(block).map(move |first| first..end.min(first + block))
    }

    /// Calls `run(position, offset, count, step)` for each stretch of equally spaced elements of a
    /// range of reduced elements; `position` counts from the start of the range.
    pub fn runs(&self, range: Range<usize>, mut run: impl FnMut(usize, Offset, usize, Offset)) {
        let Axis { len, step } = self.reduced.innermost();
        let mut at = range.start;
        while at < range.end {
            let count = (len - at % len).min(range.end - at);
            run(at - range.start, self.reduced.offset(at), count, step);
            at += count;
        }
    }
}
