//! The frozen head: only the input's gradient is wanted, and the forward makes it but for factors.
//!
//! dE_i = s (v_i Σ_j X_ij W_j + g_target,i W_y) with X_ij = e^(z_ij − reference_i) over the classes
//! other than the target and v_i = g_rest,i e^(reference_i − rest_i): the sum needs no cotangent. So
//! the forward runs, for each chunk of classes, E Wᵀ into X and X W onto sums in float, which it keeps
//! with the references (the targets' logits); the backward is one pass over rows. Two products in all,
//! where recomputation takes three, and the target's part never passes through 16 bits.
//!
//! Rows whose rest lies more than 60 nats from their target are found on the device and their blocks
//! of 256 rows run again, as in `stored`; in the common case those launches find an empty list and end.

use logitless_core::{DType, Gradients, Memory, Spec, Tensor, wanted};

use crate::call::{Call, row_view};
use crate::driver::Facts;
use crate::error::Result;
use crate::forward::select;
use crate::launch::suffix;
use crate::layout::{Arena, Geometry, ListBuffers, padded, pitch};
use crate::params::{self, Fields, RowList, RowView};
use crate::plan::{Path, Plan};
use crate::product::{
    Choice, Matrix, Operands, Operation, choose, choose_gated, choose_sliced, exists, tensor_cores,
};
use crate::widths::widest;

/// Bytes of an accumulator.
const F32: usize = 4;

/// What the forward keeps.
#[derive(Clone, Copy, Debug)]
struct Store {
    list: ListBuffers,
    /// What a row's sums are relative to, in nats; +inf: the row has none.
    reference: usize,
    sums: usize,
}

impl Store {
    fn lay(arena: &mut Arena, g: &Geometry) -> Store {
        let rows = padded(g.rows);
        Store {
            list: ListBuffers::lay(arena, g.rows),
            reference: arena.take("targets", F32 * rows),
            sums: arena.take("input sums", g.sums_bytes()),
        }
    }
}

/// Buffers of the forward. The backward needs none.
#[derive(Clone, Copy, Debug)]
struct Layout {
    packed: usize,
    bias: usize,
    target: usize,
    /// The target's logits, where they are not an output.
    logits: usize,
    part: usize,
    /// Blocks of rows to run again: their number, their indices, a flag for each block.
    gate: usize,
    /// Sums of each slice of the classes; nothing where there is one.
    slices: usize,
    x: usize,
    x_bytes: usize,
}

impl Layout {
    fn lay(arena: &mut Arena, g: &Geometry, width: usize) -> Layout {
        let (rows, blocks) = (padded(g.rows), g.rows.div_ceil(256));
        let plane = F32 * g.classes.div_ceil(g.part_columns) * rows;
        // A repair's maxima and sums of all classes lie where X was.
        let x_bytes = (g.dtype.size() * rows * width).max(2 * plane);
        Layout {
            packed: arena.take("packed input", g.packed_bytes()),
            bias: arena.take("bias", F32 * g.classes),
            target: arena.take("targets", F32 * rows),
            logits: arena.take("targets", F32 * rows),
            part: arena.take("partials", plane),
            gate: arena.take("repair", F32 * (1 + 2 * blocks)),
            slices: arena
                .take("input sums", if g.slices > 1 { g.slices * g.sums_bytes() } else { 0 }),
            x: arena.take("exponentials", x_bytes),
            x_bytes,
        }
    }

    /// Classes a chunk that `bytes` allow, in whole columns of partials (0: not one).
    fn widest(g: &Geometry, bytes: usize) -> usize {
        let mut arena = Arena::at(0);
        let Layout { x_bytes, .. } = Layout::lay(&mut arena, g, 0);
        let left = (bytes + x_bytes).saturating_sub(arena.used);
        if left < x_bytes {
            return 0;
        }
        left / (g.dtype.size() * padded(g.rows).max(1)) / g.part_columns * g.part_columns
    }
}

/// Makes `plan` one of the frozen head, where that serves the call within its memory.
pub(crate) fn plan(
    plan: &mut Plan,
    g: &Geometry,
    spec: &Spec,
    memory: Memory,
    facts: &Facts,
) -> bool {
    // f16 overflows at e^11.
    let serves = g.path == Path::Fused { planes: 2 }
        && g.gradients == wanted::INPUT
        && g.dtype == DType::Bf16
        && spec.targets() == 1
        && g.direct_weight
        && [Operation::StoreExp, Operation::Repair, Operation::DeF32]
            .iter()
            .all(|&operation| exists(facts, operation, g.dtype));
    let mut store = Arena::at(0);
    Store::lay(&mut store, g);
    let gradient = g.rows * g.features * g.dtype.size();
    let lean = (gradient / 4).max(256 << 20);
    let budget = match memory {
        Memory::Lean => lean,
        Memory::Fast => lean.max(store.used + padded(g.rows) * 2 * widest(g.rows) + (256 << 20)),
        Memory::Bytes(bytes) if store.used > bytes => return false,
        Memory::Bytes(bytes) => lean.max(bytes),
    };
    if !serves || store.used > budget {
        return false;
    }
    // The forward runs before the gradient exists; the backward holds it beside the store.
    let Some(width) = width(g, (budget + gradient).saturating_sub(store.used), facts) else {
        return false;
    };
    let mut forward = Arena::at(0);
    Layout::lay(&mut forward, g, width);
    (plan.store_bytes, plan.forward_bytes, plan.backward_bytes) = (store.used, forward.used, 0);
    plan.parts = store.parts;
    plan.parts.extend(forward.parts);
    plan.chunks = (width, width);
    plan.mode = "frozen";
    plan.frozen = true;
    true
}

/// Classes a chunk: the cheapest by waves among those within `bytes`; none where chunks would be so
/// narrow that their launches cost more than a product saves.
fn width(g: &Geometry, bytes: usize, facts: &Facts) -> Option<usize> {
    const NARROWEST: usize = 2048;
    // A launch's tail and refill, about 30 µs of a multiprocessor's products.
    const LAUNCH: f64 = 2.0 * 30e-6 * 0.6e15 / 132.0 / 2.0;
    let all = g.classes.next_multiple_of(64);
    let most = Layout::widest(g, bytes).min(widest(g.rows) / g.part_columns * g.part_columns);
    if most >= all {
        return Some(all);
    }
    let choice = choose(facts, Operation::StoreExp, g.dtype, false, g.rows, most)?;
    let cost = |width: usize| {
        let chunk = |count: usize| choice.cost(facts, g.rows, count) * g.features as f64 + LAUNCH;
        let (whole, last) = (g.classes / width, g.classes % width);
        whole as f64 * chunk(width) + if last > 0 { chunk(last) } else { 0.0 }
    };
    (most / 2..=most)
        .filter(|width| *width >= NARROWEST && width.is_multiple_of(g.part_columns))
        .min_by(|&a, &b| cost(a).total_cmp(&cost(b)))
}

/// Outputs `rest` and `target`, and the store.
pub(crate) unsafe fn forward(
    call: &Call,
    g: &Geometry,
    out: Fields,
    store: usize,
    workspace: usize,
) -> Result<()> {
    let store = Store::lay(&mut Arena::at(store), g);
    let layout = Layout::lay(&mut Arena::at(workspace), g, call.plan.chunks.0);
    // SAFETY: all of it: operands checked, buffers of the layouts.
    unsafe {
        let (list, input, pack) = select(call, store.list, layout.packed, true, 0)?;
        let bias = call.widen_bias(layout.bias)?;
        let logits = if out.target == 0 { layout.logits } else { out.target };
        call.target_logits(list, logits, store.reference, layout.target, pack, layout.gate)?;
        let run = Forward { call, g, store, layout, list, input, bias, rest: out.rest };
        run.accumulate(0)?;
        run.finish()?;
        run.repair()?;
        run.fold()
    }
}

struct Forward<'a> {
    call: &'a Call<'a>,
    g: &'a Geometry,
    store: Store,
    layout: Layout,
    list: RowList,
    input: Matrix,
    bias: usize,
    rest: usize,
}

impl Forward<'_> {
    fn tiles(&self) -> usize {
        self.call.classes.div_ceil(self.g.part_columns)
    }

    fn ld_row(&self) -> usize {
        padded(self.call.rows)
    }

    /// What a product of E Wᵀ for classes `first .. first + count` shares with the others.
    fn logits(&self, first: usize, count: usize) -> params::Gemm {
        let (call, layout) = (self.call, &self.layout);
        params::Gemm {
            reference: self.store.reference,
            target: layout.target,
            part: layout.part + F32 * first / self.g.part_columns * self.ld_row(),
            part_plane: (self.tiles() * self.ld_row()) as i64,
            ..call.logit_product(self.list, self.bias, first, count)
        }
    }

    fn kernel(&self, operation: Operation, n: usize) -> Choice {
        let call = self.call;
        let mapped = call.mapped();
        choose(&call.stream.device.facts, operation, call.dtype, mapped, call.rows, n)
            .expect("the plan found it")
    }

    /// X and its product with W, chunk by chunk; of the blocks of 256 rows that `gate` lists, or of all.
    unsafe fn accumulate(&self, gate: usize) -> Result<()> {
        let (call, width, slices) = (self.call, self.call.plan.chunks.0, self.g.slices);
        let facts = &call.stream.device.facts;
        let (m, n) = (call.rows, call.features);
        let product = if gate != 0 && slices == 1 {
            choose_gated(facts, Operation::DeF32, call.dtype, false, m, n)
        } else {
            choose_sliced(facts, call.dtype, (m, n, call.classes), slices).map(|found| found.0)
        };
        let product = product.expect("the plan found it");
        let sums = if slices > 1 { self.layout.slices } else { self.store.sums };
        let sums = Matrix::packed(sums, DType::F32, n, pitch(n, DType::F32));
        for first in (0..call.classes).step_by(width) {
            let count = width.min(call.classes - first);
            let weight = call.weight.rows_from(first);
            let x = Matrix::packed(self.layout.x, call.dtype, count, width);
            let exponentials = params::Gemm { gate, ..self.logits(first, count) };
            let onto_sums = params::Gemm {
                gate,
                count: self.list.count,
                m: call.rows as i32,
                n: call.features as i32,
                k: count as i32,
                accumulate: i32::from(first > 0),
                scale: 1.0,
                slices: slices as i32,
                slice_rows: self.ld_row() as i32,
                ..params::Gemm::default()
            };
            // SAFETY: operands checked, buffers of the layouts.
            unsafe {
                tensor_cores(
                    call.stream,
                    Operation::StoreExp,
                    &self.kernel(Operation::StoreExp, count),
                    &Operands { a: self.input, b: weight, d: Some(x) },
                    exponentials,
                )?;
                tensor_cores(
                    call.stream,
                    Operation::DeF32,
                    &product,
                    &Operands { a: x, b: weight, d: Some(sums) },
                    onto_sums,
                )?;
            }
        }
        Ok(())
    }

    /// Rests from the sums of exponentials; lists the blocks with a row out of range.
    unsafe fn finish(&self) -> Result<()> {
        let (call, layout) = (self.call, &self.layout);
        let params = params::Finish {
            out: Fields { rest: self.rest, ..Fields::default() },
            list: self.list,
            part: layout.part,
            reference: self.store.reference,
            part_plane: 0,
            ld_row: self.ld_row() as i32,
            tiles: self.tiles() as i32,
            classes: call.classes as i64,
            tile_columns: self.g.part_columns as i32,
            planes: 1,
            chunk_columns: call.classes as i32,
            chunk_tiles: self.tiles() as i32,
            gate: layout.gate,
        };
        // SAFETY: outputs checked, buffers of the layouts.
        unsafe { call.stream.launch("finish_fixed", (call.rows.div_ceil(32), 1), 512, 0, &params) }
    }

    /// Runs listed blocks again: the rest with running maxima, then the sums against that.
    unsafe fn repair(&self) -> Result<()> {
        let (call, layout) = (self.call, &self.layout);
        let blocks = call.rows.div_ceil(256);
        // The sums have been taken from X; its memory holds maxima and sums of all classes.
        let online =
            params::Gemm { gate: layout.gate, part: layout.x, ..self.logits(0, call.classes) };
        let params = params::Repair {
            list: self.list,
            gate: layout.gate,
            part: layout.x,
            reference: self.store.reference,
            rest: self.rest,
            part_plane: online.part_plane,
            ld_row: self.ld_row() as i32,
            tiles: self.tiles() as i32,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            let operands = Operands { a: self.input, b: call.weight, d: None };
            let kernel = self.kernel(Operation::Repair, call.classes);
            tensor_cores(call.stream, Operation::Repair, &kernel, &operands, online)?;
            call.stream.launch("finish_repair", (blocks, 1), 256, 0, &params)?;
            self.accumulate(layout.gate)
        }
    }

    /// The slices' sums to the store's, in order.
    unsafe fn fold(&self) -> Result<()> {
        let (call, slices) = (self.call, self.g.slices);
        if slices == 1 {
            return Ok(());
        }
        let pitch = pitch(call.features, DType::F32) as i64;
        let params = params::Scatter {
            target: RowView {
                data: self.store.sums,
                outer_stride: pitch,
                inner_stride: 0,
                feature_stride: 1,
                inner: 1,
            },
            list: call.all_rows(),
            packed: self.layout.slices,
            pitch,
            slice: self.ld_row() as i64 * pitch,
            features: call.features as i32,
            slices: slices as i32,
            ..params::Scatter::default()
        };
        // SAFETY: buffers of the layouts.
        unsafe { call.stream.launch("scatter_rows_f32_f32", (params.blocks(), 1), 256, 0, &params) }
    }
}

/// The input's gradient from the store: sums times the rows' factors, and the targets' part.
pub(crate) unsafe fn backward(
    call: &Call,
    g: &Geometry,
    gradients: &Gradients,
    saved: Fields,
    grad: Fields,
    store: usize,
) -> Result<()> {
    let Some(d_input) = &gradients.input else { return Ok(()) };
    let store = Store::lay(&mut Arena::at(store), g);
    let list =
        if call.targets().has_ignore != 0 { call.live_rows(store.list) } else { call.all_rows() };
    let params = params::Frozen {
        sums: store.sums,
        ..rows(call, gradients, d_input, list, saved, grad, store.reference)
    };
    // SAFETY: operands checked, the store is the layout's.
    unsafe { launch(call, d_input, &params) }
}

/// What makes rows of the input's gradient of sums, but for the sums.
pub(crate) fn rows(
    call: &Call,
    gradients: &Gradients,
    d_input: &Tensor,
    list: RowList,
    saved: Fields,
    grad: Fields,
    reference: usize,
) -> params::Frozen {
    params::Frozen {
        out: row_view(d_input),
        list,
        targets: call.targets(),
        weight: call.weight.address,
        weight_pitch: call.weight.row_stride,
        rest: saved.rest,
        logits: saved.target,
        g_rest: grad.rest,
        g_target: grad.target,
        reference,
        pitch: pitch(call.features, DType::F32) as i64,
        scale_at: call.scale_at,
        scale: call.problem.logit_scale as f32,
        softcap: call.problem.softcap as f32,
        features: call.features as i32,
        accumulate: i32::from(gradients.accumulate_input),
        ..params::Frozen::default()
    }
}

/// Runs them.
pub(crate) unsafe fn launch(call: &Call, d_input: &Tensor, params: &params::Frozen) -> Result<()> {
    let name = format!("frozen_rows_{}", suffix(d_input.dtype()));
    // SAFETY: the caller's promise.
    unsafe { call.stream.launch(&name, (call.rows, 1), 256, 0, params) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan_for;
    use crate::share::Outputs;

    fn make(rows: usize, features: usize, classes: usize, memory: Memory, gradients: u32) -> Plan {
        let spec = Spec::new(&["rest", "target"], &[], 0, 0, 1).unwrap();
        let dtype = DType::Bf16;
        plan_for(
            &spec,
            rows,
            features,
            classes,
            dtype,
            memory,
            gradients,
            true,
            &Facts::h200(),
            Outputs::default(),
        )
        .unwrap()
    }

    #[test]
    fn a_frozen_head_keeps_sums_within_the_lean_promise() {
        if !exists(&Facts::h200(), Operation::StoreExp, DType::Bf16) {
            return;
        }
        for (n, d, v) in [(8192, 4096, 128_256), (8192, 1024, 65_536), (7, 33, 151), (1, 8, 1)] {
            let plan = make(n, d, v, Memory::Lean, 1);
            assert_eq!(plan.mode, "frozen", "{plan:?}");
            let (gradient, lean) = (n * d * 2, (n * d / 2).max(256 << 20));
            assert!(plan.store_bytes + plan.forward_bytes <= gradient + lean, "{plan:?}");
            assert!(plan.store_bytes + plan.backward_bytes <= lean, "{plan:?}");
        }
        assert_eq!(make(8192, 4096, 128_256, Memory::Bytes(0), 1).mode, "fused");
        assert_eq!(make(8192, 4096, 128_256, Memory::Lean, 3).mode, "fused");
        // Sums that the promise has no room for.
        assert_eq!(make(65_536, 8192, 128_256, Memory::Lean, 1).mode, "fused");
        let wide = make(8192, 4096, 128_256, Memory::Fast, 1).chunks.0;
        assert!(wide >= 16_896, "{wide}");
    }
}
