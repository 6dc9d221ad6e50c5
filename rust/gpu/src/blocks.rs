//! Many rows: a call is cut into blocks of rows, so that no buffer grows with all of them.
//!
//! Three buffers of a call are as long as its rows: partials of the forward (8 N V / 192 bytes), the
//! packed input, and the float sums of the input's gradient (4 N D bytes). At N = 131072, D = 1024 the
//! sums alone are twice lean's memory, and chunks of classes shrink to what is left. Blocks of rows end
//! that: a forward needs nothing between them; a backward adds up the weight's gradient in float (4 V D
//! bytes) and rounds it once at the end. Where that too is more than lean has, it is held all the same,
//! beside 256 MiB: one of the two gradients must have its sums somewhere.

use logitless_core::{DType, Gradients, Problem, Spec, Tensor, wanted};

use crate::call::vector;
use crate::driver::Facts;
use crate::error::Result;
use crate::launch::Stream;
use crate::layout::{Arena, BackwardLayout, ForwardLayout, Geometry, pitch};
use crate::params::{self, AnyMatrix};
use crate::plan::Plan;
use crate::product::{Matrix, write_sums};
use crate::share::RATE;
use crate::widths::{backward_cost, backward_width};

/// Fewest rows that fill the device in one wave.
const FEWEST: usize = 4096;

/// Counts of blocks that a plan tries.
const COUNTS: [usize; 10] = [2, 3, 4, 6, 8, 12, 16, 24, 32, 64];

/// Time that blocks must save where memory does not ask for them.
const WORTH: f64 = 0.9;

/// Rows a block, forward and backward; 0: all at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub forward: usize,
    pub backward: usize,
}

/// What lives through all blocks of a backward, in accumulators.
#[derive(Clone, Copy, Debug)]
struct Totals {
    /// (V, D), where the gradient itself is narrower.
    weight: usize,
    /// (2, V): the total, and a block's own.
    bias: usize,
    /// (2,).
    scale: usize,
}

impl Totals {
    fn lay(arena: &mut Arena, g: &Geometry) -> Totals {
        let acc = g.acc();
        let bytes = |bit, count: usize| if g.wants(bit) { count * acc.size() } else { 0 };
        let narrow = if g.dtype == acc { 0 } else { g.classes * pitch(g.features, acc) };
        Totals {
            weight: arena.take("weight sums", bytes(wanted::WEIGHT, narrow)),
            bias: arena.take("bias", bytes(wanted::BIAS, 2 * g.classes)),
            scale: arena.take("coefficients", bytes(wanted::SCALE, 2)),
        }
    }
}

/// Cuts the rows of a plan without a store, where `budget` or the clock asks for it.
pub(crate) fn plan(plan: &Plan, g: &Geometry, budget: usize, facts: &Facts) -> Option<Plan> {
    if g.rows < 2 * FEWEST {
        return None;
    }
    let of = |rows: usize| Geometry { rows, ..*g };
    let candidates = || {
        COUNTS
            .iter()
            .map(|count| g.rows.div_ceil(*count).next_multiple_of(256))
            .filter(|rows| *rows >= FEWEST)
    };
    let forward_arena = |rows: usize| {
        let mut arena = Arena::at(0);
        ForwardLayout::lay(&mut arena, &of(rows), plan.chunks.0);
        arena
    };
    let mut blocks = Blocks::default();
    if forward_arena(g.rows).used > budget {
        blocks.forward = candidates()
            .find(|rows| forward_arena(*rows).used <= budget)
            .or_else(|| candidates().next_back())?;
    }
    let width = |rows: usize, budget: usize| backward_width(&of(rows), budget, facts);
    let backward_arena = |rows: usize, totals: bool, width: usize| {
        let mut arena = Arena::at(0);
        if totals {
            Totals::lay(&mut arena, g);
        }
        BackwardLayout::lay(&mut arena, &of(rows), width, g.may_borrow());
        arena
    };
    let whole = if g.gradients == 0 { 0 } else { width(g.rows, budget) };
    let mut chosen = (whole, backward_arena(g.rows, false, whole));
    if g.gradients != 0 {
        let fits = chosen.1.used <= budget;
        let most =
            if fits { WORTH * backward_cost(g, facts, g.classes, whole) } else { f64::INFINITY };
        let totals = totals_bytes(g);
        let within = |room: usize| {
            candidates()
                .filter_map(|rows| {
                    let width = width(rows, room.saturating_sub(totals));
                    let arena = backward_arena(rows, true, width);
                    // Sums of dW are read and written once a block, at 3.5 TB/s.
                    let traffic = 2.0 * totals as f64 / 3.5e12 * RATE;
                    let cost = g.rows.div_ceil(rows) as f64
                        * (backward_cost(&of(rows), facts, g.classes, width) + traffic);
                    let serves = arena.used <= room && cost < most;
                    serves.then_some((rows, width, arena, cost))
                })
                .min_by(|a, b| a.3.total_cmp(&b.3))
        };
        let room = totals + (256 << 20);
        let best = within(budget)
            .or_else(|| (!fits && room < chosen.1.used).then(|| within(room)).flatten());
        if let Some((rows, width, arena, _)) = best {
            blocks.backward = rows;
            chosen = (width, arena);
        }
    }
    if blocks == Blocks::default() {
        return None;
    }
    let forward = forward_arena(if blocks.forward > 0 { blocks.forward } else { g.rows });
    let (width, backward) = chosen;
    let backward_bytes = if g.gradients == 0 { 0 } else { backward.used };
    Some(Plan {
        blocks,
        forward_bytes: forward.used,
        backward_bytes,
        parts: if backward_bytes > forward.used { backward.parts } else { forward.parts },
        chunks: (plan.chunks.0, width),
        ..plan.clone()
    })
}

/// Neighbouring rows: a range of the outer axis times a range of the inner one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    outer: (usize, usize),
    inner: (usize, usize),
    first: usize,
    rows: usize,
}

/// Blocks of at most `most` rows of (outer, inner), about equally many rows each.
fn cut(outer: usize, inner: usize, most: usize) -> Vec<Block> {
    let slices = |length: usize, most: usize| {
        let parts = length.div_ceil(most).max(1);
        let step = length.div_ceil(parts).next_multiple_of(256).clamp(1, most);
        (0..length).step_by(step).map(move |first| (first, step.min(length - first)))
    };
    let most = most.max(1);
    let (outer_step, inner_step) =
        if inner > most { (1, most) } else { (most / inner.max(1), inner.max(1)) };
    let mut blocks = Vec::new();
    for first in (0..outer).step_by(outer_step) {
        let count = outer_step.min(outer - first);
        for range in slices(inner, inner_step) {
            blocks.push(Block {
                outer: (first, count),
                inner: range,
                first: first * inner + range.0,
                rows: count * range.1,
            });
        }
    }
    blocks
}

/// `count` entries of an axis.
fn narrow(tensor: &Tensor, axis: usize, (first, count): (usize, usize)) -> Result<Tensor> {
    let mut shape = tensor.shape().to_vec();
    shape[axis] = count;
    let step = first as isize * tensor.axis(axis).1 * tensor.dtype().size() as isize;
    let address = tensor.address().wrapping_add_signed(step);
    Ok(Tensor::new(address, tensor.dtype(), &shape, tensor.strides())?)
}

impl Block {
    /// Rows of a tensor (N, ...).
    fn of(&self, tensor: &Tensor) -> Result<Tensor> {
        narrow(tensor, 0, (self.first, self.rows))
    }

    fn of_some(&self, tensor: Option<&Tensor>) -> Result<Option<Tensor>> {
        tensor.map(|tensor| self.of(tensor)).transpose()
    }

    /// Rows of a tensor (outer, inner, D).
    fn of_input(&self, tensor: &Tensor) -> Result<Tensor> {
        narrow(&narrow(tensor, 0, self.outer)?, 1, self.inner)
    }

    fn problem(&self, problem: &Problem) -> Result<Problem> {
        Ok(Problem {
            input: self.of_input(&problem.input)?,
            ids: self.of_some(problem.ids.as_ref())?,
            dense: self.of_some(problem.dense.as_ref())?,
            ..*problem
        })
    }

    /// The plan of this block alone, within the workspace of the largest.
    fn plan(&self, plan: &Plan, g: &Geometry) -> Plan {
        let mut forward = Arena::at(0);
        ForwardLayout::lay(&mut forward, &Geometry { rows: self.rows, ..*g }, plan.chunks.0);
        Plan {
            rows: self.rows,
            blocks: Blocks::default(),
            forward_bytes: forward.used,
            backward_bytes: plan.backward_bytes.saturating_sub(totals_bytes(g)),
            ..plan.clone()
        }
    }
}

fn totals_bytes(g: &Geometry) -> usize {
    let mut arena = Arena::at(0);
    Totals::lay(&mut arena, g);
    arena.used
}

fn blocks_of(problem: &Problem, most: usize) -> Vec<Block> {
    cut(problem.input.axis(0).0, problem.input.axis(1).0, most)
}

/// The forward of every block, one after another in the same workspace.
#[expect(clippy::too_many_arguments, reason = "as the forward that it cuts")]
pub(crate) unsafe fn forward(
    spec: &Spec,
    problem: &Problem,
    outputs: &[Tensor],
    plan: &Plan,
    g: &Geometry,
    device: usize,
    stream: &Stream,
    workspace: &Tensor,
    scale: Option<&Tensor>,
) -> Result<()> {
    for block in blocks_of(problem, plan.blocks.forward) {
        let outputs: Vec<_> = outputs.iter().map(|field| block.of(field)).collect::<Result<_>>()?;
        let (problem, plan) = (block.problem(problem)?, block.plan(plan, g));
        // SAFETY: the caller's promise, for some of the rows.
        unsafe {
            crate::forward(
                spec,
                &problem,
                &outputs,
                &plan,
                device,
                stream.handle,
                workspace,
                None,
                scale,
                None,
            )?;
        }
    }
    Ok(())
}

/// The backward of every block; the weight's, the bias's and the scale's gradients add up.
#[expect(clippy::too_many_arguments, reason = "as the backward that it cuts")]
pub(crate) unsafe fn backward(
    spec: &Spec,
    problem: &Problem,
    saved: &[Tensor],
    cotangents: &[Option<Tensor>],
    gradients: &Gradients,
    accumulate_weight: bool,
    plan: &Plan,
    g: &Geometry,
    device: usize,
    stream: &Stream,
    workspace: &Tensor,
    scale: Option<&Tensor>,
) -> Result<()> {
    let mut arena = Arena::at(workspace.address());
    let totals = Totals::lay(&mut arena, g);
    let rest = [workspace.len() - arena.used];
    let workspace = Tensor::new(workspace.address() + arena.used, DType::U8, &rest, &[1])?;
    let acc = g.acc();
    let wide_pitch = pitch(g.features, acc);
    let sums = gradients.weight.filter(|d_weight| d_weight.dtype() != acc);
    let weight = match sums {
        None => gradients.weight,
        Some(_) => Some(Tensor::new(
            totals.weight,
            acc,
            &[g.classes, g.features],
            &[wide_pitch as isize, 1],
        )?),
    };
    // A block's own bias and scale: the first one's are the totals.
    let slot = |of: Option<&Tensor>, base: usize, length: usize, index: usize| {
        let address = base + usize::from(index > 0) * length * acc.size();
        of.map(|_| Tensor::new(address, acc, &[length], &[1])).transpose()
    };
    let run = Totalling { stream, acc };
    for (index, block) in blocks_of(problem, plan.blocks.backward).iter().enumerate() {
        let part = Gradients {
            input: gradients.input.as_ref().map(|d| block.of_input(d)).transpose()?,
            weight,
            bias: slot(gradients.bias.as_ref(), totals.bias, g.classes, index)?,
            scale: slot(gradients.scale.as_ref(), totals.scale, 1, index)?,
            dense: block.of_some(gradients.dense.as_ref())?,
            accumulate_input: gradients.accumulate_input,
        };
        let saved: Vec<_> = saved.iter().map(|field| block.of(field)).collect::<Result<_>>()?;
        let cotangents: Vec<_> =
            cotangents.iter().map(|field| block.of_some(field.as_ref())).collect::<Result<_>>()?;
        let (problem, plan) = (block.problem(problem)?, block.plan(plan, g));
        let accumulate = index > 0 || (accumulate_weight && sums.is_none());
        // SAFETY: the caller's promise, for some of the rows; totals lie before the workspace.
        unsafe {
            crate::backward(
                spec,
                &problem,
                &saved,
                &cotangents,
                &part,
                accumulate,
                &plan,
                device,
                stream.handle,
                &workspace,
                None,
                scale,
                None,
            )?;
            if index > 0 {
                run.add(part.bias.is_some(), totals.bias, g.classes)?;
                run.add(part.scale.is_some(), totals.scale, 1)?;
            }
        }
    }
    // SAFETY: outputs checked by the caller, totals of the layout.
    unsafe {
        if let Some(d_bias) = &gradients.bias {
            run.column_sum(totals.bias, 1, g.classes, vector(d_bias))?;
        }
        if let Some(d_scale) = &gradients.scale {
            run.column_sum(totals.scale, 1, 1, vector(d_scale))?;
        }
        if let Some(d_weight) = &sums {
            let sums = Matrix::packed(totals.weight, acc, g.features, wide_pitch);
            write_sums(stream, sums, Matrix::of(d_weight), g.classes, false)?;
        }
    }
    Ok(())
}

struct Totalling<'a> {
    stream: &'a Stream,
    acc: DType,
}

impl Totalling<'_> {
    /// Adds a block's own (second row) to the total (first row).
    unsafe fn add(&self, wanted: bool, base: usize, length: usize) -> Result<()> {
        if !wanted {
            return Ok(());
        }
        let out = AnyMatrix { data: base, row_stride: 1, column_stride: 0, dtype: self.acc as i64 };
        // SAFETY: buffers of the layout. A column's rows are read before its total is written.
        unsafe { self.column_sum(base, 2, length, out) }
    }

    unsafe fn column_sum(
        &self,
        base: usize,
        rows: usize,
        columns: usize,
        out: AnyMatrix,
    ) -> Result<()> {
        let tile = AnyMatrix {
            data: base,
            row_stride: columns as i64,
            column_stride: 1,
            dtype: self.acc as i64,
        };
        let params = params::ColumnSum {
            tile,
            out,
            rows: rows as i64,
            columns: columns as i64,
            group: 1,
            ..params::ColumnSum::default()
        };
        // SAFETY: the caller's promise.
        unsafe { self.stream.launch("column_sum", (columns.div_ceil(32), 1), 256, 0, &params) }
    }
}

#[cfg(test)]
mod tests {
    use logitless_core::Memory;

    use super::*;
    use crate::plan::plan_for;
    use crate::share::Outputs;

    fn lean(rows: usize, features: usize, classes: usize, dtype: DType, gradients: u32) -> Plan {
        let facts = Facts::h200();
        let spec = Spec::new(&["rest", "target"], &[], 0, 0, 1).unwrap();
        let (memory, outputs) = (Memory::Lean, Outputs::default());
        plan_for(&spec, rows, features, classes, dtype, memory, gradients, true, &facts, outputs)
            .unwrap()
    }

    #[test]
    fn blocks_are_the_rows_in_order() {
        for (outer, inner) in
            [(1, 1), (1, 10_000), (7, 4097), (300, 33), (2, 70_000), (0, 5), (5, 0)]
        {
            for most in [1, 256, 4096, 5000, 100_000] {
                let mut next = 0;
                for block in cut(outer, inner, most) {
                    assert_eq!(block.first, next);
                    assert_eq!(block.rows, block.outer.1 * block.inner.1);
                    assert!(block.rows <= most && block.rows > 0);
                    assert!(block.outer.1 == 1 || block.inner == (0, inner));
                    next += block.rows;
                }
                assert_eq!(next, outer * inner);
            }
        }
    }

    #[test]
    fn many_rows_keep_leans_promise() {
        for (rows, features, classes) in
            [(131_072, 1024, 32_768), (131_072, 4096, 32_768), (1 << 20, 256, 50_257)]
        {
            for dtype in [DType::Bf16, DType::F32] {
                for gradients in [0, 2, 3, 15] {
                    let plan = lean(rows, features, classes, dtype, gradients);
                    let size = |bit: u32, count: usize| {
                        if gradients & bit != 0 { count * features * dtype.size() } else { 0 }
                    };
                    let held = size(1, rows) + size(2, classes);
                    let lean = (held / 4).max(256 << 20);
                    assert!(plan.forward_bytes <= lean, "{plan:?}");
                    let sums = 4 * classes * features;
                    let within = if sums < lean / 2 { lean } else { lean.max(sums + (257 << 20)) };
                    assert!(plan.backward_bytes <= within, "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn ordinary_calls_stay_whole() {
        for (features, classes) in
            [(4096, 128_256), (2304, 256_000), (5120, 131_072), (1024, 65_536), (768, 50_257)]
        {
            for gradients in [0, 1, 3] {
                let plan = lean(8192, features, classes, DType::Bf16, gradients);
                assert_eq!(plan.blocks, Blocks::default());
            }
        }
    }
}
