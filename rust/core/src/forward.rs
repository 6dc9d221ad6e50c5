//! The forward engine: logits in tiles, folded into states, states into outputs.
//!
//! Row groups follow one another. For each, panels of the input are packed, then every chunk of
//! classes streams past them, then states merge in class order:
//!
//! ```text
//!            chunk 0      chunk 1      chunk 2
//!          ┌────────────┬────────────┬────────────┐
//! panel 0  │ tile tile …│ tile tile …│            │   one state for each panel and chunk,
//! panel 1  │            │            │            │   merged left to right, finished by row
//!          └────────────┴────────────┴────────────┘
//! ```

use crate::call::Problem;
use crate::element::Real;
use crate::error::Result;
use crate::head::{Guard, Left, Operands, in_place, left, products};
use crate::kernel::{Isa, Kernel, LANES, Vectorize};
use crate::layout::{Forward, Sizes, Tiling};
use crate::operands::{DensePanel, Vectors};
use crate::plan::Plan;
use crate::pool::{self, Stage};
use crate::rows::{Key, Rows, list_targets, within};
use crate::scratch::{Scratch, Shared};
use crate::spec::{Field, Spec};
use crate::stats::{Lane, Scope, Statistic, Tile, Writer, exps, peak};
use crate::tensor::Tensor;
use crate::transform::Maps;

/// A checked call.
pub(crate) struct Arguments<'a> {
    pub spec: &'a Spec,
    pub problem: &'a Problem,
    pub outputs: &'a [Tensor],
    pub store: Option<Tensor>,
    pub plan: &'a Plan,
    pub threads: usize,
}

/// Runs a forward.
pub(crate) fn run<K: Kernel>(kernel: K, arguments: &Arguments<'_>) -> Result<()> {
    let Arguments { spec, problem, outputs, store, plan, threads } = arguments;
    let operands = Operands::<K>::new(problem, store.as_ref());
    let readable = in_place::<K>(&operands, 0, plan.sizes.tiling.block).is_some();
    let sizes = Sizes { in_place: plan.sizes.in_place && readable, ..plan.sizes };
    let layout = &Forward::new(&sizes, *threads);
    let scratch = Scratch::new(layout.shared_bytes + threads * layout.each_bytes)?;
    // SAFETY: the region has room for every row; only this thread uses it now.
    let list = unsafe { Shared::new(scratch.at(layout.list, 0)).slice_mut(0, plan.rows) };
    let rows = Rows::new(plan.rows, list, |row| operands.is_kept(row));
    let forward = Pass {
        kernel,
        spec,
        outputs,
        layout,
        tiling: &sizes.tiling,
        rows,
        keys: Shared::new(scratch.at(layout.keys, 0)),
        key_counts: Shared::new(scratch.at(layout.key_counts, 0)),
        panels: Shared::new(scratch.at(layout.panels, 0)),
        states: Shared::new(scratch.at(layout.states, 0)),
        target: spec.position("target").map(|place| Shared::new(outputs[place].pointer())),
        operands,
    };
    forward.skip_rows();
    let stages = forward.stages();
    pool::run(*threads, &stages, |thread| {
        let offset = layout.shared_bytes + thread * layout.each_bytes;
        let space = Space {
            tile: scratch.at(layout.tile, offset),
            exps: scratch.at(layout.exps, offset),
            weight: scratch.at(layout.weight, offset),
            bias: scratch.at(layout.bias, offset),
        };
        let forward = &forward;
        let guard = Guard::new(kernel);
        move |stage, task| {
            let _ = &guard;
            let group = stage / 3;
            match stage % 3 {
                0 => forward.pack(group, task),
                1 => forward.stream(group, task, &space),
                _ => forward.finish(group, task),
            }
        }
    });
    Ok(())
}

/// A thread's own memory.
struct Space<K: Kernel> {
    tile: *mut K::Acc,
    exps: *mut K::Acc,
    weight: *mut K::Operand,
    bias: *mut K::Acc,
}

/// One forward, as its tasks see it.
struct Pass<'a, K: Kernel> {
    kernel: K,
    spec: &'a Spec,
    outputs: &'a [Tensor],
    layout: &'a Forward,
    tiling: &'a Tiling,
    operands: Operands<K>,
    rows: Rows<'a>,
    keys: Shared<Key>,
    key_counts: Shared<usize>,
    panels: Shared<K::Operand>,
    states: Shared<Lane>,
    /// The output of the target logits.
    target: Option<Shared<K::Acc>>,
}

impl<K: Kernel> Pass<'_, K> {
    /// Number of panels of a group.
    fn group(&self, group: usize) -> usize {
        (self.rows.panels() - group * self.layout.group).min(self.layout.group)
    }

    fn chunks(&self) -> usize {
        self.tiling.blocks.div_ceil(self.layout.chunk)
    }

    /// Pack, stream, finish; group after group.
    fn stages(&self) -> Vec<Stage> {
        let groups = self.rows.panels().div_ceil(self.layout.group);
        let mut stages = Vec::with_capacity(3 * groups);
        for group in 0..groups {
            let panels = self.group(group);
            let first = stages.len();
            stages.push(Stage { tasks: panels, after: [first.checked_sub(1), None, None] });
            let tasks = self.chunks() * panels.div_ceil(self.layout.span);
            stages.push(Stage { tasks, after: [Some(first), None, None] });
            stages.push(Stage { tasks: panels, after: [Some(first + 1), None, None] });
        }
        stages
    }

    /// Writes the outputs of rows that are not live.
    fn skip_rows(&self) {
        let rows = self.operands.input.rows;
        if self.rows.len() < rows {
            for row in (0..rows).filter(|&row| !self.operands.is_kept(row)) {
                self.for_statistics(row, |_, mut out| out.skip());
            }
        }
    }

    /// Calls `visit` with each statistic and the writer of its fields in a row.
    fn for_statistics(&self, row: usize, mut visit: impl FnMut(&Statistic, Writer<'_>)) {
        let mut first = 0;
        for statistic in &self.spec.statistics {
            let count = statistic.field_count();
            let fields: &[Field] = &self.spec.fields()[first..first + count];
            // SAFETY: the outputs were checked against the fields; a row has one writer at a time.
            let writer = unsafe { Writer::new(&self.outputs[first..first + count], fields, row) };
            visit(statistic, writer);
            first += count;
        }
    }

    /// The sorted target classes of a panel.
    fn keys(&self, panel: usize) -> &[Key] {
        let room = LANES * self.spec.targets();
        // SAFETY: written by `pack`, which ended before.
        unsafe { self.keys.slice(panel * room, *self.key_counts.at(panel)) }
    }

    /// Packs a panel and sorts its targets.
    fn pack(&self, group: usize, panel: usize) {
        let rows = || self.rows.panel(group * self.layout.group + panel);
        let gather = self.operands.input.gather(rows(), 0, self.operands.input.features);
        let start = self.panels.at(panel * self.tiling.depth * LANES);
        // SAFETY: this task owns the panel's part of each region.
        unsafe {
            self.kernel.pack_panel(&gather, start);
            *self.key_counts.at(panel) = self.operands.ids.as_ref().map_or(0, |ids| {
                let room = LANES * ids.columns;
                list_targets(ids, rows(), self.keys.slice_mut(panel * room, room))
            });
        }
        if let (Some(target), Some(ids)) = (self.target, &self.operands.ids) {
            // Columns of padding keep this.
            for row in rows() {
                // SAFETY: this task owns the outputs of its rows.
                unsafe { target.slice_mut(row * ids.columns, ids.columns) }.fill(K::Acc::ZERO);
            }
        }
    }

    /// Streams the tiles of a class chunk past some panels.
    fn stream(&self, group: usize, task: usize, space: &Space<K>) {
        let layout = self.layout;
        let tiling = self.tiling;
        let spans = self.group(group).div_ceil(layout.span);
        let (chunk, span) = (task / spans, task % spans);
        let panels = span * layout.span..((span + 1) * layout.span).min(self.group(group));
        let blocks = chunk * layout.chunk..((chunk + 1) * layout.chunk).min(tiling.blocks);
        for panel in panels.clone() {
            let mut states = self.state(chunk, panel);
            for statistic in &self.spec.statistics {
                let (state, rest) = states.split_at_mut(statistic.lanes());
                statistic.start(state);
                states = rest;
            }
        }
        for block in blocks {
            let first = block * tiling.block;
            let classes = tiling.block.min(self.operands.classes - first);
            // SAFETY: the thread's own space, sized for a block.
            let (weight, bias) = unsafe {
                let bias = std::slice::from_raw_parts_mut(space.bias, classes);
                let packed = Left { start: space.weight, row: tiling.weight_row };
                (
                    left(self.kernel, &self.operands, first, classes, packed),
                    self.operands.bias(first, bias),
                )
            };
            for panel in panels.clone() {
                let place = group * layout.group + panel;
                let total = self.rows.panels();
                let stored = self.operands.stored(tiling, block, place, total);
                // SAFETY: the panel was packed; the tile and the states belong to this task alone.
                unsafe {
                    let packed = self.panels.at(panel * tiling.depth * LANES);
                    products(self.kernel, weight, classes, tiling.depth, packed, space.tile);
                    if let Some(stored) = stored {
                        stored.copy_from_nonoverlapping(space.tile, classes * LANES);
                    }
                }
                self.absorb(first, classes, chunk, panel, place, bias, space);
            }
        }
    }

    /// The states of a chunk and panel.
    #[allow(clippy::mut_from_ref)]
    fn state(&self, chunk: usize, panel: usize) -> &mut [Lane] {
        let lanes: usize = self.spec.statistics.iter().map(Statistic::lanes).sum();
        let first = (chunk * self.layout.group + panel) * lanes;
        // SAFETY: one task at a time works on a state: the one that streams it, then the one that
        // merges its panel.
        unsafe { self.states.slice_mut(first, lanes) }
    }

    /// Folds the tile in `space` into the states of its chunk and panel.
    #[allow(clippy::too_many_arguments)]
    fn absorb(
        &self,
        first: usize,
        classes: usize,
        chunk: usize,
        panel: usize,
        place: usize,
        bias: &[K::Acc],
        space: &Space<K>,
    ) {
        let dense = self
            .operands
            .dense
            .as_ref()
            .map(|tensor| DensePanel::new(tensor, self.rows.panel(place)));
        // SAFETY: the thread's own space, `classes` lanes of it initialised by the product.
        let (z, exps) = unsafe {
            let exps = if self.layout.exps.bytes == 0 { 0 } else { classes };
            (
                std::slice::from_raw_parts_mut(space.tile.cast(), classes),
                std::slice::from_raw_parts_mut(space.exps.cast(), exps),
            )
        };
        self.kernel.isa().vectorize(Absorb {
            z,
            exps,
            first,
            statistics: &self.spec.statistics,
            states: self.state(chunk, panel),
            maps: &self.operands.maps,
            bias,
            targets: within(self.keys(panel), |&key| key, first, first + classes),
            target: self.target.map(|start| (start, self.spec.targets())),
            rows: self.rows,
            place,
            vectors: self.operands.vectors,
            dense: dense.as_ref(),
        });
    }

    /// Merges the states of a panel in class order and writes its rows' outputs.
    fn finish(&self, group: usize, panel: usize) {
        let merged = self.state(0, panel);
        for chunk in 1..self.chunks() {
            let later = self.state(chunk, panel);
            let statistics = &self.spec.statistics;
            self.kernel.isa().vectorize(Merge { statistics, states: merged, later });
        }
        for (lane, row) in self.rows.panel(group * self.layout.group + panel).enumerate() {
            let mut states: &[Lane] = merged;
            self.for_statistics(row, |statistic, mut out| {
                let (state, rest) = states.split_at(statistic.lanes());
                statistic.finish(state, lane, &mut out);
                states = rest;
            });
        }
    }
}

/// One tile into the states.
struct Absorb<'a, A> {
    z: &'a mut [[A; LANES]],
    exps: &'a mut [[A; LANES]],
    first: usize,
    statistics: &'a [Statistic],
    states: &'a mut [Lane],
    maps: &'a Maps<A>,
    bias: &'a [A],
    targets: &'a [Key],
    /// The output of the target logits, with its columns.
    target: Option<(Shared<A>, usize)>,
    rows: Rows<'a>,
    /// The panel.
    place: usize,
    vectors: Vectors<A>,
    dense: Option<&'a DensePanel>,
}

impl<A: Real> Absorb<'_, A> {
    /// Puts target logits out and takes their classes out of the tile.
    fn take_targets(&mut self) {
        if let Some((target, columns)) = self.target {
            for key in self.targets {
                // Read before anything is taken out: two columns may name one class.
                let value = self.z[key.class() - self.first][key.lane()];
                if let Some(row) = self.rows.panel(self.place).nth(key.lane()) {
                    // SAFETY: every target logit is written once, by the tile that holds it.
                    unsafe { *target.at(row * columns + key.column()) = value };
                }
            }
        }
        for key in self.targets {
            self.z[key.class() - self.first][key.lane()] = A::NEG_INFINITY;
        }
    }
}

impl<A: Real> Vectorize for Absorb<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(mut self) {
        self.maps.apply::<FMA>(self.z, self.bias);
        let mut top = [A::ZERO; LANES];
        // Statistics over all classes come first; then the targets leave the tile for the others.
        for scope in [Scope::All, Scope::Rest] {
            if scope == Scope::Rest {
                self.take_targets();
                if !self.exps.is_empty() {
                    top = peak(self.z);
                    exps::<A, FMA>(self.z, &top, self.exps);
                }
            }
            let tile = Tile {
                z: self.z,
                first: self.first,
                peak: &top,
                exps: self.exps,
                vectors: self.vectors,
                dense: self.dense,
            };
            let mut states = &mut *self.states;
            for statistic in self.statistics {
                let (state, rest) = states.split_at_mut(statistic.lanes());
                if statistic.scope() == scope {
                    statistic.absorb::<A, FMA>(&tile, state);
                }
                states = rest;
            }
        }
    }
}

/// The states of one class range into those of the range before.
struct Merge<'a> {
    statistics: &'a [Statistic],
    states: &'a mut [Lane],
    later: &'a [Lane],
}

impl Vectorize for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (mut states, mut later) = (self.states, self.later);
        for statistic in self.statistics {
            let (state, rest) = states.split_at_mut(statistic.lanes());
            let (next, rest_later) = later.split_at(statistic.lanes());
            statistic.merge::<FMA>(state, next);
            (states, later) = (rest, rest_later);
        }
    }
}
