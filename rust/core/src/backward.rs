//! The backward engine: logits again, gradient tiles from them, gradients from those.
//!
//! Classes go in super-blocks and rows in groups; a *cell* is one of each. Its gradient tile
//! dz (group × super-block) is made by tasks that own a block of classes and with it the rows of dW;
//! then tasks that own features and panels add `Wᵀ dz` to theirs of dE. Two buffers of dz let the
//! next cell start while this one is finished:
//!
//! ```text
//! tiles(0)  tiles(1)  input(0)  tiles(2)  input(1)  tiles(3)  …
//! ```
//!
//! Every element of every gradient has one owner and one order of summation.

use crate::call::{Gradients, Problem};
use crate::element::{DType, Element, Real};
use crate::error::Result;
use crate::forward::{Guard, Left, Operands, in_place, left, product_depth, products};
use crate::gradient::{self, Coefficients, GradientTile, Point, Terms};
use crate::kernel::{Isa, Kernel, LANES, Product, Vectorize};
use crate::operands::{ClassVector, DensePanel, Input, Matrix};
use crate::plan::{Backward, Plan};
use crate::pool::{self, Stage};
use crate::rows::{Key, Rows, within};
use crate::scratch::{Scratch, Shared};
use crate::spec::Spec;
use crate::stats::{RowGradient, SavedRow, Statistic};
use crate::tensor::Tensor;

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
    let layout = &plan.backward;
    let operands = Operands::<K>::new(problem, store.as_ref());
    let scratch = Scratch::new(plan.backward_bytes + threads * plan.threads_bytes)?;
    let outputs = Outputs { spec, saved, cotangents, classes: plan.classes };
    // SAFETY: the region has room for every row; only this thread uses it now.
    let list = unsafe { Shared::new(scratch.at(layout.list, 0)).slice_mut(0, plan.rows) };
    // Stored tiles hold the forward's rows, so the backward has to keep to them.
    let as_stored = operands.store.is_some();
    let rows = Rows::new(plan.rows, list, |row| {
        operands.is_kept(row) && (as_stored || outputs.is_live(row))
    });
    let at = |region| scratch.at(region, 0);
    let pass = Pass {
        kernel,
        layout,
        gradients,
        outputs,
        terms: Terms::new(spec, |name| {
            spec.position(name).is_some_and(|place| cotangents[place].is_some())
        }),
        rows,
        coefficients: Shared::new(scratch.at(layout.coefficients, 0)),
        points: Shared::new(scratch.at(layout.point_list, 0)),
        point_counts: Shared::new(scratch.at(layout.point_counts, 0)),
        panels: Shared::new(at(layout.panels)),
        strips: Shared::new(at(layout.strip_panels)),
        dz: layout.dz.map(|region| Shared::new(at(region))),
        dz_pairs: layout.dz_pairs.map(|region| Shared::new(at(region))),
        weight: layout.weight.map(|region| Shared::new(at(region))),
        columns: layout.columns.map(|region| Shared::new(at(region))),
        d_input: Shared::new(scratch.at(layout.d_input, 0)),
        d_weight: Shared::new(scratch.at(layout.d_weight, 0)),
        d_bias: Shared::new(scratch.at(layout.d_bias, 0)),
        d_scale: Shared::new(scratch.at(layout.d_scale, 0)),
        operands,
    };
    pass.clear();
    let stages = pass.stages();
    pool::run(*threads, &stages.list, |thread| {
        let offset = plan.backward_bytes + thread * plan.threads_bytes;
        let space = Space {
            tile: scratch.at(layout.tile, offset),
            raw: scratch.at(layout.raw, offset),
            strip: scratch.at(layout.strip, offset),
            bias: scratch.at(layout.bias, offset),
            bias_lanes: scratch.at(layout.bias_lanes, offset),
        };
        let (pass, kinds) = (&pass, &stages.kinds);
        let guard = Guard::new(kernel);
        move |stage, task| {
            let _ = &guard;
            match kinds[stage] {
                Kind::Pack => pass.pack(task),
                Kind::Tiles(cell) => pass.tiles(cell, task, &space),
                Kind::Input(cell) => pass.input(cell, task),
                Kind::Write => pass.write(task),
            }
        }
    });
    pass.write_scale();
    Ok(())
}

/// What the forward put out, and the cotangents of it.
struct Outputs<'a> {
    spec: &'a Spec,
    saved: &'a [Tensor],
    cotangents: &'a [Option<Tensor>],
    classes: usize,
}

impl Outputs<'_> {
    /// Calls `visit` with each statistic and its part of a row.
    fn for_statistics(&self, row: usize, mut visit: impl FnMut(&Statistic, SavedRow<'_>)) {
        let whole = SavedRow {
            saved: self.saved,
            cotangents: self.cotangents,
            fields: self.spec.fields(),
            row,
            rest: 0.0,
            classes: self.classes,
        };
        let rest = self.spec.position("rest").map_or(0.0, |place| whole.value(place, 0));
        let mut first = 0;
        for statistic in &self.spec.statistics {
            let range = first..first + statistic.field_count();
            first = range.end;
            let part = SavedRow {
                saved: &self.saved[range.clone()],
                cotangents: &self.cotangents[range.clone()],
                fields: &self.spec.fields()[range],
                rest,
                ..whole
            };
            visit(statistic, part);
        }
    }

    /// Whether a row has a cotangent.
    fn is_live(&self, row: usize) -> bool {
        let mut live = false;
        self.for_statistics(row, |_, part| live |= part.is_live());
        live
    }

    /// The gradient of a row's logits; returns its `rest`.
    fn gradient(&self, row: usize, out: &mut RowGradient) -> f64 {
        out.clear();
        let mut rest = 0.0;
        self.for_statistics(row, |statistic, part| {
            rest = part.rest;
            if part.cotangents.iter().any(Option::is_some) {
                statistic.grad(&part, out);
            }
        });
        rest
    }
}

/// A thread's own memory.
struct Space<K: Kernel> {
    tile: *mut K::Acc,
    raw: *mut K::Acc,
    strip: *mut K::Acc,
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
    Pack,
    Tiles(Cell),
    Input(Cell),
    Write,
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
    gradients: &'a Gradients,
    outputs: Outputs<'a>,
    operands: Operands<K>,
    terms: Terms,
    rows: Rows<'a>,
    coefficients: Shared<K::Acc>,
    points: Shared<Point>,
    point_counts: Shared<usize>,
    panels: Shared<K::Operand>,
    strips: Shared<K::Operand>,
    dz: [Shared<K::Operand>; 2],
    dz_pairs: [Shared<K::Operand>; 2],
    weight: [Shared<K::Operand>; 2],
    columns: [Shared<K::Operand>; 2],
    d_input: Shared<K::Acc>,
    d_weight: Shared<K::Acc>,
    d_bias: Shared<f64>,
    d_scale: Shared<f64>,
}

impl<K: Kernel> Pass<'_, K> {
    /// Panels of a group.
    fn group(&self, group: usize) -> std::ops::Range<usize> {
        let first = group * self.layout.group;
        first..(first + self.layout.group).min(self.rows.panels())
    }

    fn groups(&self) -> usize {
        self.rows.panels().div_ceil(self.layout.group)
    }

    /// Class blocks of a super-block.
    fn blocks(&self, super_block: usize) -> std::ops::Range<usize> {
        let first = super_block * self.layout.chunk;
        first..(first + self.layout.chunk).min(self.layout.tiling.blocks)
    }

    fn features(&self) -> usize {
        self.operands.input.features
    }

    /// First class and number of classes of a block.
    fn classes(&self, block: usize) -> (usize, usize) {
        let first = block * self.layout.tiling.block;
        (first, self.layout.tiling.block.min(self.operands.classes - first))
    }

    fn stages(&self) -> Stages {
        let mut stages = Stages::default();
        let packed = stages.push(Kind::Pack, self.rows.panels(), [None; 3]);
        let supers = self.layout.tiling.blocks.div_ceil(self.layout.chunk);
        let groups = self.groups();
        let cells = (0..supers * groups).map(|index| Cell {
            index,
            super_block: index / groups,
            group: index % groups,
        });
        let (mut tiles, mut inputs) = (Vec::new(), Vec::new());
        let wants_input = self.gradients.input.is_some();
        let mut input = |stages: &mut Stages, tiles: &[usize], cell: Cell| {
            if wants_input {
                let panels = self.group(cell.group).len().div_ceil(self.layout.span);
                let features = self.features().div_ceil(self.layout.features);
                let after = [Some(tiles[cell.index]), inputs.last().copied(), None];
                inputs.push(stages.push(Kind::Input(cell), panels * features, after));
            }
        };
        let mut pending = None;
        for cell in cells {
            // The buffers of two cells ago are free when their dE is added up; accumulators of dW
            // pass from one row group to the next.
            let former = if groups > 1 { tiles.last().copied() } else { None };
            let two_ago = stages
                .kinds
                .iter()
                .rposition(|kind| matches!(kind, Kind::Input(old) if old.index + 2 == cell.index));
            let without_input =
                if wants_input { None } else { cell.index.checked_sub(2).map(|i| tiles[i]) };
            let after = [former.or(Some(packed)), two_ago, without_input];
            let tasks = self.blocks(cell.super_block).len();
            tiles.push(stages.push(Kind::Tiles(cell), tasks, after));
            if let Some(cell) = pending.replace(cell) {
                input(&mut stages, &tiles, cell);
            }
        }
        if let Some(cell) = pending {
            input(&mut stages, &tiles, cell);
        }
        if let Some(&last) = inputs.last() {
            stages.push(Kind::Write, self.rows.panels(), [Some(last), None, None]);
        }
        stages
    }

    /// Writes what no task will: gradients of rows that are not live, all gradients without any.
    fn clear(&self) {
        let rows = self.operands.input.rows;
        if self.rows.len() < rows {
            let mut live = (0..self.rows.panels()).flat_map(|panel| self.rows.panel(panel));
            let mut next = live.next();
            for row in 0..rows {
                if next == Some(row) {
                    next = live.next();
                } else {
                    self.clear_row(row);
                }
            }
        }
        if self.rows.len() > 0 {
            return;
        }
        let classes = self.operands.classes;
        if let Some(tensor) = &self.gradients.weight {
            for class in 0..classes {
                let features = self.features();
                each_type(tensor.dtype(), ClearRow { tensor, row: class, features });
            }
        }
        if let Some(tensor) = &self.gradients.bias {
            let bias = ClassVector::new(tensor);
            (0..classes).for_each(|class| bias.write(class, K::Acc::ZERO));
        }
    }

    fn clear_row(&self, row: usize) {
        if let Some(tensor) = self.gradients.input.filter(|_| !self.gradients.accumulate_input) {
            let features = self.features();
            each_type(tensor.dtype(), ClearInput { tensor: &tensor, row, features });
        }
        if let Some(tensor) = &self.gradients.dense {
            let panel = DensePanel::new(tensor, std::iter::once(row));
            (0..self.operands.classes).for_each(|class| panel.write(0, class, K::Acc::ZERO));
        }
    }

    /// Packs a panel both ways and works out its rows' coefficients.
    fn pack(&self, panel: usize) {
        let layout = self.layout;
        let (input, features) = (&self.operands.input, self.features());
        let rows = || self.rows.panel(panel);
        // SAFETY: this task owns the panel's part of each region.
        unsafe {
            let gather = input.gather(rows(), 0, features);
            self.kernel.pack_panel(&gather, self.panels.at(panel * layout.tiling.depth * LANES));
            if self.gradients.weight.is_some() {
                for strip in 0..layout.strips {
                    let first = strip * LANES;
                    let gather = input.gather(rows(), first, LANES.min(features - first));
                    self.kernel.pack_strip(&gather, self.strip(strip, panel));
                }
            }
        }
        let mut gradient = RowGradient::default();
        let coefficients = self.coefficients_mut(panel);
        // SAFETY: this task owns the panel's points.
        let points =
            unsafe { self.points.slice_mut(panel * LANES * layout.points, LANES * layout.points) };
        let mut count = 0;
        let mut push = |class: usize, lane: usize, column: usize, value: f64| {
            points[count] = Point { key: Key::new(class, lane, column), value };
            count += 1;
        };
        for (lane, row) in rows().enumerate() {
            let rest = self.outputs.gradient(row, &mut gradient);
            gradient::fill(&gradient, rest, self.outputs.spec.vectors(), lane, coefficients);
            for (column, class) in self.operands.ids.iter().flat_map(|ids| ids.classes(row)) {
                let value = gradient.targets.get(column).copied().unwrap_or(0.0);
                push(class, lane, column, value);
            }
            for &(class, value) in &gradient.selected {
                push(class, lane, Point::SELECTED, value);
            }
        }
        for lane in rows().len()..LANES {
            gradient::fill_dead(lane, coefficients);
        }
        points[..count].sort_by_key(|point| point.key);
        // SAFETY: this task owns the panel's count.
        unsafe { *self.point_counts.at(panel) = count };
    }

    /// A strip of the input's features for one panel's rows; panels of a strip are adjacent.
    fn strip(&self, strip: usize, panel: usize) -> *mut K::Operand {
        self.strips.at((strip * self.rows.panels() + panel) * LANES * LANES)
    }

    #[allow(clippy::mut_from_ref)]
    fn coefficients_mut(&self, panel: usize) -> &mut [[K::Acc; LANES]] {
        let lanes = self.layout.lanes;
        let start = self.coefficients.at(panel * lanes * LANES);
        // SAFETY: written by the task that packs the panel, read by later stages only.
        unsafe {
            // Lanes of statistics without a cotangent are never read, but they must be numbers.
            std::slice::from_raw_parts_mut(start.cast(), lanes)
        }
    }

    fn points(&self, panel: usize) -> &[Point] {
        // SAFETY: written when the panel was packed.
        unsafe {
            let count = *self.point_counts.at(panel);
            self.points.slice(panel * LANES * self.layout.points, count)
        }
    }

    /// Start of a block's gradient tile of a panel, in buffer `dz` or `dz_pairs`.
    fn tile_offset(&self, cell: Cell, block: usize, panel: usize) -> usize {
        let place = panel - self.group(cell.group).start;
        let offset = block - self.blocks(cell.super_block).start;
        place * self.layout.dz_panel + offset * self.layout.tiling.padded_block * LANES
    }

    /// Makes the gradient tiles of a class block for all panels of the cell, and its part of dW.
    fn tiles(&self, cell: Cell, task: usize, space: &Space<K>) {
        let layout = self.layout;
        let tiling = &layout.tiling;
        let block = self.blocks(cell.super_block).start + task;
        let (first, classes) = self.classes(block);
        let weight = self.weight_rows(cell, task, first, classes);
        // SAFETY: the thread's own space, sized for a block.
        let bias = unsafe {
            let bias = std::slice::from_raw_parts_mut(space.bias, classes);
            self.operands.bias(first, bias)
        };
        let wants_bias = self.gradients.bias.is_some();
        if wants_bias {
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts_mut(space.bias_lanes, classes * LANES) }
                .fill(K::Acc::ZERO);
        }
        let mut scale = 0.0;
        for panel in self.group(cell.group) {
            let offset = self.tile_offset(cell, block, panel);
            let dz = self.dz[cell.index % 2].at(offset);
            // A kernel that rounds its operands has the tile in memory of the thread.
            let tile: *mut K::Acc = if K::GROUP > 1 { space.tile } else { dz.cast() };
            let total = self.rows.panels();
            let stored = self.operands.stored(tiling, block, panel, total);
            // SAFETY: the panel was packed; the tile belongs to this task alone.
            unsafe {
                match stored {
                    Some(stored) => tile.copy_from_nonoverlapping(stored, classes * LANES),
                    None => {
                        let packed = self.panels.at(panel * tiling.depth * LANES);
                        products(self.kernel, weight, classes, tiling.depth, packed, tile);
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
            self.write_bias(cell, task, first, classes, space);
        }
        if let Some(tensor) = &self.gradients.weight {
            for strip in 0..layout.strips {
                let sums = self.weight_strip(cell, task, block, strip, classes, space);
                if cell.group + 1 == self.groups() {
                    let scale = self.operands.maps.scale();
                    each_type(
                        tensor.dtype(),
                        WriteStrip { tensor, first, strip, sums, scale, features: self.features() },
                    );
                }
            }
        }
    }

    /// The left operand of a block, packed by the first row group for itself and for dE.
    fn weight_rows(
        &self,
        cell: Cell,
        task: usize,
        first: usize,
        classes: usize,
    ) -> Left<K::Operand> {
        let tiling = &self.layout.tiling;
        let buffer = cell.super_block % 2;
        let space = self.weight[buffer].at(task * tiling.block * tiling.weight_row);
        if cell.group > 0 {
            return in_place::<K>(&self.operands, first, classes)
                .unwrap_or(Left { start: space, row: tiling.weight_row });
        }
        if !K::COLUMN_A && self.gradients.input.is_some() {
            let block = self.operands.weight.block(first, classes, 0, self.features());
            let columns = self.columns[buffer].at(task * self.features() * tiling.padded_block);
            // SAFETY: this task owns the block's part of the buffer.
            unsafe { self.kernel.pack_columns(&block, columns, tiling.padded_block) };
        }
        // SAFETY: as above.
        unsafe { left(self.kernel, &self.operands, first, classes, space, tiling.weight_row) }
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
        let points = self.points(panel);
        let wants = |wanted: bool| if wanted { classes } else { 0 };
        // SAFETY: tile and space belong to this task; the first `classes` lanes are initialised.
        let (tile, raw, bias_lanes) = unsafe {
            let lanes = |start: *mut K::Acc, wanted: bool| {
                std::slice::from_raw_parts_mut(start.cast(), wants(wanted))
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
                points: within(points, |point| point.key, first, first + classes),
            },
        })
    }

    /// dW of a block and strip over the rows of the cell, `[class][32]`.
    fn weight_strip(
        &self,
        cell: Cell,
        task: usize,
        block: usize,
        strip: usize,
        classes: usize,
        space: &Space<K>,
    ) -> &[[K::Acc; LANES]] {
        let layout = self.layout;
        let panels = self.group(cell.group);
        let tile = layout.tiling.padded_block * LANES;
        let (sums, kept) = if self.groups() > 1 {
            (self.d_weight.at((task * layout.strips + strip) * tile), cell.group > 0)
        } else {
            (space.strip, false)
        };
        let most = product_depth::<K::Operand>() / LANES;
        for panel in panels.clone().step_by(most) {
            let product = Product {
                m: classes,
                pieces: most.min(panels.end - panel),
                k: LANES,
                a: self.dz[cell.index % 2].at(self.tile_offset(cell, block, panel)).cast_const(),
                a_row: LANES,
                a_k: 1,
                a_piece: layout.dz_panel,
                b: self.strip(strip, panel).cast_const(),
                c: sums,
                c_row: LANES,
                accumulate: kept || panel > panels.start,
            };
            // SAFETY: the tiles were made by this task, the strips packed before.
            unsafe { self.kernel.product(&product) }
        }
        // SAFETY: just written; the sums belong to this task.
        unsafe { std::slice::from_raw_parts(sums.cast_const().cast(), classes) }
    }

    /// Adds the bias gradient of a block up over lanes and row groups.
    fn write_bias(&self, cell: Cell, task: usize, first: usize, classes: usize, space: &Space<K>) {
        let Some(tensor) = &self.gradients.bias else { return };
        // SAFETY: filled by this task; the sums of a block pass from group to group.
        let (lanes, sums) = unsafe {
            let lanes: &[[K::Acc; LANES]] =
                std::slice::from_raw_parts(space.bias_lanes.cast_const().cast(), classes);
            (lanes, self.d_bias.slice_mut(task * self.layout.tiling.block, classes))
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

    /// Adds `Wᵀ dz` of the cell to some features and panels of dEᵀ.
    fn input(&self, cell: Cell, task: usize) {
        let layout = self.layout;
        let tiling = &layout.tiling;
        let buffer = cell.index % 2;
        let group = self.group(cell.group);
        let spans = group.len().div_ceil(layout.span);
        let first_feature = task / spans * layout.features;
        let features = layout.features.min(self.features() - first_feature);
        let first_panel = group.start + task % spans * layout.span;
        let panels = first_panel..(first_panel + layout.span).min(group.end);
        let side = cell.super_block % 2;
        let dz = if K::GROUP > 1 { self.dz_pairs[buffer] } else { self.dz[buffer] };
        let blocks = self.blocks(cell.super_block);
        let mut block = blocks.start;
        while block < blocks.end {
            let (first, classes) = self.classes(block);
            // Whole blocks adjoin in dz, so that one product may run through several of them.
            let whole = (blocks.end - block).min((self.operands.classes - first) / tiling.padded_block);
            let most = product_depth::<K::Operand>() / tiling.padded_block;
            let pieces = whole.min(most).max(1);
            let place = block - blocks.start;
            let (a, a_row, a_k, a_piece) = if K::COLUMN_A {
                let packed = self.weight[side].at(place * tiling.block * tiling.weight_row);
                let left = in_place::<K>(&self.operands, first, classes)
                    .unwrap_or(Left { start: packed, row: tiling.weight_row });
                (left.start.wrapping_add(first_feature), 1, left.row, tiling.block * left.row)
            } else {
                let step = self.features() * tiling.padded_block;
                let start = self.columns[side].at(place * step + first_feature * tiling.padded_block);
                (start.cast_const(), tiling.padded_block, 1, step)
            };
            for panel in panels.clone() {
                let product = Product {
                    m: features,
                    pieces,
                    k: classes.next_multiple_of(K::K_STEP),
                    a,
                    a_row,
                    a_k,
                    a_piece,
                    b: dz.at(self.tile_offset(cell, block, panel)).cast_const(),
                    c: self.d_input.at((panel * self.features() + first_feature) * LANES),
                    c_row: LANES,
                    accumulate: block > 0,
                };
                // SAFETY: the tiles and the packed weight are complete; dEᵀ here is this task's.
                unsafe { self.kernel.product(&product) }
            }
            block += pieces;
        }
    }

    /// Writes a panel of dE.
    fn write(&self, panel: usize) {
        let Some(tensor) = &self.gradients.input else { return };
        let features = self.features();
        // SAFETY: the sums are complete.
        let sums = unsafe {
            let start = self.d_input.at(panel * features * LANES).cast_const();
            std::slice::from_raw_parts(start.cast(), features)
        };
        let accumulate = self.gradients.accumulate_input;
        let scale = self.operands.maps.scale();
        for (lane, row) in self.rows.panel(panel).enumerate() {
            each_type(tensor.dtype(), WriteInput { tensor, row, lane, sums, scale, accumulate });
        }
    }

    fn write_scale(&self) {
        let Some(tensor) = &self.gradients.scale else { return };
        let blocks = if self.rows.len() > 0 { self.layout.tiling.blocks } else { 0 };
        // SAFETY: all blocks are complete; the tensor has one element.
        unsafe {
            let sum: f64 = self.d_scale.slice(0, blocks).iter().sum();
            *tensor.pointer::<K::Acc>() = K::Acc::from_f64(sum);
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
        let GradientTile {
            tile,
            first,
            count,
            coefficients,
            maps,
            powers,
            vectors,
            dense,
            d_dense,
            points,
        } = self.gradient;
        if !self.raw.is_empty() {
            self.raw.copy_from_slice(tile);
        }
        maps.apply::<FMA>(tile, self.bias);
        GradientTile {
            tile: &mut *tile,
            first,
            count,
            coefficients,
            maps,
            powers,
            vectors,
            dense,
            d_dense,
            points,
        }
        .run::<FMA>();
        for (sums, dx) in self.bias_lanes.iter_mut().zip(&*tile) {
            for i in 0..LANES {
                sums[i] += dx[i];
            }
        }
        let mut scale = [A::ZERO; LANES];
        for (raw, dx) in self.raw.iter().zip(&*tile) {
            for i in 0..LANES {
                scale[i] = raw[i].mul_add::<FMA>(dx[i], scale[i]);
            }
        }
        scale.iter().map(|&sum| sum.to_f64()).sum()
    }
}

/// Work on a tensor of any float type whose values come in another.
trait ForType {
    fn run<T: Element>(self);
}

fn each_type(dtype: DType, work: impl ForType) {
    match dtype {
        DType::F32 => work.run::<f32>(),
        DType::F64 => work.run::<f64>(),
        DType::Bf16 => work.run::<half::bf16>(),
        DType::F16 => work.run::<half::f16>(),
        DType::I64 | DType::U8 => unreachable!("gradients are checked to be floats"),
    }
}

/// Rounds an accumulator to an element type.
#[inline(always)]
fn round<T: Element>(value: impl Real) -> T {
    T::narrow(T::Acc::from_f64(value.to_f64()))
}

/// Zeroes a row of a matrix.
struct ClearRow<'a> {
    tensor: &'a Tensor,
    row: usize,
    features: usize,
}

impl ForType for ClearRow<'_> {
    fn run<T: Element>(self) {
        let matrix = Matrix::<T>::new(self.tensor);
        for feature in 0..self.features {
            // SAFETY: inside the checked shape; nobody else writes the gradient.
            unsafe { *matrix.at(self.row, feature) = T::default() };
        }
    }
}

/// Zeroes a row of the input's gradient.
struct ClearInput<'a> {
    tensor: &'a Tensor,
    row: usize,
    features: usize,
}

impl ForType for ClearInput<'_> {
    fn run<T: Element>(self) {
        let input = Input::<T>::new(self.tensor);
        let start = input.row(self.row);
        for feature in 0..self.features as isize {
            // SAFETY: inside the checked shape; nobody else writes the gradient.
            unsafe { *start.offset(feature * input.step()) = T::default() };
        }
    }
}

/// Writes a strip of dW.
struct WriteStrip<'a, A> {
    tensor: &'a Tensor,
    first: usize,
    strip: usize,
    sums: &'a [[A; LANES]],
    scale: A,
    features: usize,
}

impl<A: Real> ForType for WriteStrip<'_, A> {
    fn run<T: Element>(self) {
        let matrix = Matrix::<T>::new(self.tensor);
        let column = self.strip * LANES;
        let width = LANES.min(self.features - column);
        for (class, sums) in self.sums.iter().enumerate() {
            let start = matrix.at(self.first + class, column);
            for (offset, &sum) in sums[..width].iter().enumerate() {
                // SAFETY: inside the checked shape; the class has one owner.
                unsafe { *start.offset(offset as isize * matrix.col()) = round(sum * self.scale) };
            }
        }
    }
}

/// Writes a row of dE from a lane of dEᵀ.
struct WriteInput<'a, A> {
    tensor: &'a Tensor,
    row: usize,
    lane: usize,
    sums: &'a [[A; LANES]],
    scale: A,
    accumulate: bool,
}

impl<A: Real> ForType for WriteInput<'_, A> {
    fn run<T: Element>(self) {
        let input = Input::<T>::new(self.tensor);
        let start = input.row(self.row);
        for (feature, sums) in self.sums.iter().enumerate() {
            let value = sums[self.lane] * self.scale;
            // SAFETY: inside the checked shape; the row has one owner.
            unsafe {
                let out = start.offset(feature as isize * input.step());
                *out = if self.accumulate {
                    round(A::from_f64((*out).widen().to_f64()) + value)
                } else {
                    round(value)
                };
            }
        }
    }
}
