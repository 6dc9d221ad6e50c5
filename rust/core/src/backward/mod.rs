//! The backward engine: logits again, gradient tiles from them, gradients from those.
//!
//! Classes go in super-blocks and rows in groups; a *cell* is one of each. Its gradient tiles
//! dz (group × super-block) are made by tasks that own a block of classes and with it the rows of dW
//! ([`tiles`]); then tasks that own features and panels add `Wᵀ dz` to theirs of dE ([`input`]). Two
//! buffers of dz let the next cell start while this one is finished:
//!
//! ```text
//! pack  tiles(0)  tiles(1)  input(0)  tiles(2)  input(1)  tiles(3)  …  write
//! ```
//!
//! Every element of every gradient has one owner and one order of summation.

mod input;
mod pack;
mod saved;
mod tiles;
mod write;

use crate::call::{Gradients, Problem};
use crate::error::Result;
use crate::gradient::{Point, Terms};
use crate::head::{Guard, Operands, in_place};
use crate::kernel::{Kernel, LANES};
use crate::layout::{Backward, Sizes};
use crate::plan::Plan;
use crate::pool::{self, Stage};
use crate::rows::Rows;
use crate::scratch::{Scratch, Shared};
use crate::spec::Spec;
use crate::tensor::Tensor;
use saved::Outputs;
use std::ops::Range;

/// A checked call.
pub(crate) struct Arguments<'a> {
    pub spec: &'a Spec,
    pub problem: &'a Problem,
    pub saved: &'a [Tensor],
    pub cotangents: &'a [Option<Tensor>],
    pub store: Option<Tensor>,
    pub gradients: &'a Gradients,
    pub plan: &'a Plan,
    pub threads: usize,
}

/// Runs a backward.
pub(crate) fn run<K: Kernel>(kernel: K, arguments: &Arguments<'_>) -> Result<()> {
    let Arguments { spec, problem, saved, cotangents, store, gradients, plan, threads } = arguments;
    let operands = Operands::<K>::new(problem, store.as_ref());
    let readable = in_place::<K>(&operands, 0, plan.sizes.tiling.block).is_some();
    let sizes = Sizes { in_place: plan.sizes.in_place && readable, ..plan.sizes };
    let layout = &Backward::new(&sizes, *threads);
    let scratch = Scratch::new(layout.shared_bytes + threads * layout.each_bytes)?;
    let outputs = Outputs { spec, saved, cotangents, classes: plan.classes };
    // SAFETY: the region has room for every row; only this thread uses it now.
    let list = unsafe { Shared::new(scratch.at(layout.list, 0)).slice_mut(0, plan.rows) };
    // Stored tiles hold the forward's rows, so the backward has to keep to them.
    let as_stored = operands.store.is_some();
    let rows = Rows::new(plan.rows, list, |row| {
        operands.is_kept(row) && (as_stored || outputs.is_live(row))
    });
    let operand = |region| Shared::new(scratch.at(region, 0));
    let acc = |region| Shared::new(scratch.at(region, 0));
    let pass = Pass {
        kernel,
        layout,
        tiling: &sizes.tiling,
        gradients,
        outputs,
        terms: Terms::new(spec, |name| {
            spec.position(name).is_some_and(|place| cotangents[place].is_some())
        }),
        rows,
        coefficients: acc(layout.coefficients),
        points: Shared::new(scratch.at(layout.points, 0)),
        point_counts: Shared::new(scratch.at(layout.point_counts, 0)),
        panels: operand(layout.panels),
        strips: operand(layout.strip_panels),
        dz: layout.dz.map(operand),
        dz_pairs: layout.dz_pairs.map(operand),
        weight: layout.weight.map(operand),
        columns: layout.columns.map(operand),
        d_input: acc(layout.d_input),
        d_weight: acc(layout.d_weight),
        d_bias: Shared::new(scratch.at(layout.d_bias, 0)),
        d_scale: Shared::new(scratch.at(layout.d_scale, 0)),
        operands,
    };
    pass.clear();
    let stages = pass.stages();
    pool::run(*threads, &stages.list, |thread| {
        let offset = layout.shared_bytes + thread * layout.each_bytes;
        let space = Space {
            tile: scratch.at(layout.tile, offset),
            raw: scratch.at(layout.raw, offset),
            strip: scratch.at(layout.strip, offset),
            strip_pieces: scratch.at(layout.strip_pieces, offset),
            bias: scratch.at(layout.bias, offset),
            bias_lanes: scratch.at(layout.bias_lanes, offset),
        };
        let (pass, kinds) = (&pass, &stages.kinds);
        let guard = Guard::new(kernel);
        move |stage, task| {
            let _ = &guard;
            match kinds[stage] {
                Kind::Pack { first } => pass.pack(first + task),
                Kind::Tiles(cell) => pass.tiles(cell, task, &space),
                Kind::Input(cell) => pass.input(cell, task),
                Kind::Write { first } => pass.write(first + task),
            }
        }
    });
    pass.write_scale();
    Ok(())
}

/// A thread's own memory.
struct Space<K: Kernel> {
    tile: *mut K::Acc,
    raw: *mut K::Acc,
    strip: *mut K::Acc,
    strip_pieces: *mut K::Operand,
    bias: *mut K::Acc,
    bias_lanes: *mut K::Acc,
}

/// A class super-block and a row group.
#[derive(Clone, Copy, Debug)]
struct Cell {
    /// Position in the order of cells.
    index: usize,
    super_block: usize,
    group: usize,
}

/// What the tasks of a stage do.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Pack the panels from `first` on.
    Pack { first: usize },
    /// Make the gradient tiles of a cell, and dW.
    Tiles(Cell),
    /// Add to dE.
    Input(Cell),
    /// Write the panels of dE from `first` on.
    Write { first: usize },
}

/// The stages of a call, with what they do.
#[derive(Default)]
struct Stages {
    list: Vec<Stage>,
    kinds: Vec<Kind>,
}

impl Stages {
    /// Adds a stage; returns its number.
    fn push(&mut self, kind: Kind, tasks: usize, after: [Option<usize>; 3]) -> usize {
        self.list.push(Stage { tasks, after });
        self.kinds.push(kind);
        self.list.len() - 1
    }
}

/// One backward, as its tasks see it.
struct Pass<'a, K: Kernel> {
    kernel: K,
    layout: &'a Backward,
    tiling: &'a crate::layout::Tiling,
    gradients: &'a Gradients,
    outputs: Outputs<'a>,
    operands: Operands<K>,
    terms: Terms,
    rows: Rows<'a>,
    // Of the panels in `Pass::held`, in order.
    coefficients: Shared<K::Acc>,
    points: Shared<Point>,
    point_counts: Shared<usize>,
    panels: Shared<K::Operand>,
    strips: Shared<K::Operand>,
    d_input: Shared<K::Acc>,
    // Of a cell.
    dz: [Shared<K::Operand>; 2],
    dz_pairs: [Shared<K::Operand>; 2],
    weight: [Shared<K::Operand>; 2],
    columns: [Shared<K::Operand>; 2],
    d_weight: Shared<K::Acc>,
    // Of all classes.
    d_bias: Shared<f64>,
    d_scale: Shared<f64>,
}

impl<K: Kernel> Pass<'_, K> {
    /// Panels of a group.
    fn group(&self, group: usize) -> Range<usize> {
        let first = group * self.layout.group;
        first..(first + self.layout.group).min(self.rows.panels())
    }

    fn groups(&self) -> usize {
        self.rows.panels().div_ceil(self.layout.group)
    }

    /// Class blocks of a super-block.
    fn blocks(&self, super_block: usize) -> Range<usize> {
        let first = super_block * self.layout.chunk;
        first..(first + self.layout.chunk).min(self.tiling.blocks)
    }

    fn super_blocks(&self) -> usize {
        self.tiling.blocks.div_ceil(self.layout.chunk)
    }

    fn features(&self) -> usize {
        self.operands.input.features
    }

    /// First class and number of classes of a block.
    fn classes(&self, block: usize) -> (usize, usize) {
        let first = block * self.tiling.block;
        (first, self.tiling.block.min(self.operands.classes - first))
    }

    /// Place of a panel among those that are held packed: all, or those of its group.
    fn held(&self, panel: usize) -> usize {
        if self.layout.rows_outer { panel % self.layout.group } else { panel }
    }

    /// Number of panels that are held packed at once.
    fn held_panels(&self) -> usize {
        if self.layout.rows_outer { self.layout.group } else { self.rows.panels() }
    }

    /// Which of two weight buffers a cell uses: row groups of the inner loop share one.
    fn weight_side(&self, cell: Cell) -> usize {
        if self.layout.rows_outer { cell.index % 2 } else { cell.super_block % 2 }
    }

    /// Start of a block's gradient tile of a panel, in `dz` and `dz_pairs`.
    fn tile_offset(&self, cell: Cell, block: usize, panel: usize) -> usize {
        let place = panel - self.group(cell.group).start;
        let offset = block - self.blocks(cell.super_block).start;
        place * self.layout.dz_panel + offset * self.tiling.padded_block * LANES
    }

    fn stages(&self) -> Stages {
        let mut stages = Stages::default();
        if self.rows.len() == 0 {
            return stages;
        }
        let (groups, supers) = (self.groups(), self.super_blocks());
        let mut index = 0..;
        let mut cell = |super_block, group| {
            let index = index.next().unwrap_or_default();
            Cell { index, super_block, group }
        };
        if self.layout.rows_outer {
            for group in 0..groups {
                let cells: Vec<_> = (0..supers).map(|block| cell(block, group)).collect();
                self.sweep(&mut stages, self.group(group), &cells);
            }
        } else {
            let cells: Vec<_> =
                (0..supers * groups).map(|index| cell(index / groups, index % groups)).collect();
            self.sweep(&mut stages, 0..self.rows.panels(), &cells);
        }
        stages
    }

    /// The stages of some panels: pack them, go through all classes, write their dE.
    fn sweep(&self, stages: &mut Stages, panels: Range<usize>, cells: &[Cell]) {
        let last = |stages: &Stages, kind: fn(&Kind) -> bool| stages.kinds.iter().rposition(kind);
        let after = [
            last(stages, |kind| matches!(kind, Kind::Tiles(_))),
            last(stages, |kind| matches!(kind, Kind::Write { .. })),
            None,
        ];
        let packed = stages.push(Kind::Pack { first: panels.start }, panels.len(), after);
        let wants_input = self.gradients.input.is_some();
        // Sums of dW pass from one row group to the next.
        let in_turn = !self.layout.rows_outer && self.groups() > 1;
        let (mut tiles, mut inputs) = (Vec::new(), Vec::new());
        let add_input = |stages: &mut Stages, inputs: &mut Vec<usize>, made: usize, cell: Cell| {
            let spans = self.group(cell.group).len().div_ceil(self.layout.span);
            let tasks = spans * self.features().div_ceil(self.layout.features);
            let after = [Some(made), inputs.last().copied(), None];
            inputs.push(stages.push(Kind::Input(cell), tasks, after));
        };
        for (place, &cell) in cells.iter().enumerate() {
            let former = if in_turn { tiles.last().copied() } else { None };
            // The buffers of two cells ago are free when nothing reads them any more.
            let readers = if wants_input { &inputs } else { &tiles };
            let free = place.checked_sub(2).map(|place| readers[place]);
            let tasks = self.blocks(cell.super_block).len();
            tiles.push(stages.push(Kind::Tiles(cell), tasks, [Some(packed), former, free]));
            if wants_input && place > 0 {
                add_input(stages, &mut inputs, tiles[place - 1], cells[place - 1]);
            }
        }
        if wants_input && let (Some(&made), Some(&cell)) = (tiles.last(), cells.last()) {
            add_input(stages, &mut inputs, made, cell);
            let after = [inputs.last().copied(), None, None];
            stages.push(Kind::Write { first: panels.start }, panels.len(), after);
        }
    }
}
