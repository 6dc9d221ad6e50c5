//! Forward: the composition of launches that makes the statistics.

use logitless_core::{DType, Problem, Spec, Tensor};

use crate::blocks;
use crate::call::{Call, value};
use crate::error::Result;
use crate::frozen;
use crate::keep;
use crate::launch::{Stream, suffix};
use crate::layout::{Arena, ForwardLayout, Geometry, ListBuffers, padded, pitch};
use crate::params::{self, RowList};
use crate::plan::{Path, Plan, partials};
use crate::product::{
    Choice, LogitMap, Matrix, Operands, Operation, PlainEpilogue, choose, plain, tensor_cores,
};

/// Computes the statistics of `spec` for every row and writes them to `outputs`.
///
/// `lent` is the memory of the weight's gradient, where the plan was told of it.
///
/// Enqueues work on `stream` and returns; all tensors are on `device`. A row with an id out of
/// range is nan.
///
/// # Errors
/// Anything about the arguments that does not fit, found before any work; the driver's refusals.
///
/// # Safety
/// Every tensor describes device memory that stays valid until the stream has passed the call, and
/// outputs and workspace overlap nothing.
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub unsafe fn forward(
    spec: &Spec,
    problem: &Problem,
    outputs: &[Tensor],
    plan: &Plan,
    device: usize,
    stream: usize,
    workspace: &Tensor,
    store: Option<&Tensor>,
    scale: Option<&Tensor>,
    lent: Option<&Tensor>,
) -> Result<()> {
    let stream = Stream::enter(device, stream)?;
    let call = Call::new(spec, problem, scale, plan, &stream)?;
    problem.check_fields("outputs", spec, outputs.iter().map(Some))?;
    let g = Geometry::new(spec, plan, &stream.device.facts);
    check_workspace("workspace", workspace, plan.forward_bytes)?;
    if call.rows == 0 {
        return Ok(());
    }
    if plan.blocks.forward > 0 {
        // SAFETY: the caller's promise.
        return unsafe {
            blocks::forward(spec, problem, outputs, plan, &g, device, &stream, workspace, scale)
        };
    }
    if plan.frozen {
        let fields = call.fields(outputs.iter().map(Some));
        let (store, workspace) = (check_store(store, plan)?, workspace.address());
        // SAFETY: the caller's promise.
        return unsafe { frozen::forward(&call, &g, fields, store, workspace) };
    }
    if plan.stored || g.share.classes() > 0 {
        let fields = call.fields(outputs.iter().map(Some));
        let store = check_store(store, plan)?;
        let lent = keep::check_lent(lent, &call, &g)?;
        // SAFETY: the caller's promise.
        return unsafe { keep::forward(&call, &g, fields, store, lent, workspace.address()) };
    }
    let mut arena = Arena::at(workspace.address());
    let layout = ForwardLayout::lay(&mut arena, &g, plan.chunks.0);
    debug_assert_eq!(arena.used, plan.forward_bytes);
    let run = Forward { call: &call, g: &g, layout: &layout, outputs };
    // SAFETY: the caller's promise, and buffers laid out for this geometry.
    unsafe {
        let (targets, made) = (run.wants_targets(), run.makes_targets());
        let whole = call.input_matrix().filter(|input| made && input.describable());
        let stay = whole.map_or(0, |_| layout.list.in_place);
        let (list, input, pack) = select(&call, layout.list, layout.packed, targets, stay)?;
        let stay = if list.slots == 0 { 0 } else { stay };
        let bias = call.widen_bias(layout.bias)?;
        if made {
            call.target_classes(list, layout.reference, layout.target, pack, stay)?;
        } else if targets {
            run.targets(list, pack)?;
        }
        match plan.path {
            Path::Fused { planes } => {
                let whole = whole.filter(|_| stay != 0);
                let input = Input { product: input, whole, stay, made };
                run.fused(planes, list, input, bias)
            }
            Path::Tiled => run.tiled(list, input, bias),
        }
    }
}

/// A workspace holds what the plan says, or more.
pub(crate) fn check_workspace(
    argument: &'static str,
    workspace: &Tensor,
    bytes: usize,
) -> Result<()> {
    workspace.expect_dtype(argument, &[DType::U8])?;
    if workspace.len() < bytes || !workspace.address().is_multiple_of(256) {
        let found = format!("{} bytes at {:#x}", workspace.len(), workspace.address());
        return Err(value(argument, found, format!("{bytes} bytes, aligned to 256: the plan's")));
    }
    Ok(())
}

/// The address of the store of a plan that has one.
pub(crate) fn check_store(store: Option<&Tensor>, plan: &Plan) -> Result<usize> {
    let Some(store) = store else {
        let expected = format!(
            "the plan's {} bytes; a plan without a store has memory=\"lean\"",
            plan.store_bytes
        );
        return Err(logitless_core::Error::Missing { argument: "store", expected }.into());
    };
    check_workspace("store", store, plan.store_bytes)?;
    Ok(store.address())
}

/// The input as products read it.
struct Input {
    product: Matrix,
    /// As it came, where the device says at `stay` whether products read that instead.
    whole: Option<Matrix>,
    stay: usize,
    /// The products make the targets' logits.
    made: bool,
}

struct Forward<'a> {
    call: &'a Call<'a>,
    g: &'a Geometry,
    layout: &'a ForwardLayout,
    outputs: &'a [Tensor],
}

impl Forward<'_> {
    fn fields(&self) -> params::Fields {
        self.call.fields(self.outputs.iter().map(Some))
    }

    /// Whether `targets` has something to do: the logits are asked for, or the products want the
    /// classes of one target a row.
    fn wants_targets(&self) -> bool {
        let columns = self.call.targets().columns;
        let fused = self.g.path != Path::Tiled;
        columns > 0 && (self.fields().target != 0 || (fused && columns == 1))
    }

    /// Whether the products make the targets' logits on their way, and may read rows in their places. Not
    /// with a softcap: theirs is good enough for a sum of exponentials only.
    fn makes_targets(&self) -> bool {
        let call = self.call;
        matches!(self.g.path, Path::Fused { planes: 2 | 3 })
            && call.targets().columns == 1
            && call.dtype.size() == 2
            && call.problem.softcap == 0.0
            && self.choice(call.plan.chunks.0.min(call.classes)).by_maps()
    }

    /// The kernel that makes statistics of so many classes.
    fn choice(&self, classes: usize) -> Choice {
        let (call, operation) = (self.call, partials(self.g.path));
        let facts = &call.stream.device.facts;
        choose(facts, operation, call.dtype, call.mapped(), call.rows, classes)
            .expect("the plan found it")
    }

    /// Logits of the targets. Ignored rows of the output are 0.
    unsafe fn targets(&self, list: RowList, pack: usize) -> Result<()> {
        let call = self.call;
        let mut out = self.fields().target;
        if out == 0 {
            // Not asked for; the classes are. The partials' buffer takes the logits of one column.
            out = self.layout.part;
        }
        let fused = self.g.path != Path::Tiled;
        let lists = if fused { (self.layout.reference, self.layout.target) } else { (0, 0) };
        // SAFETY: buffers of the layout.
        unsafe { call.target_logits(list, out, lists.0, lists.1, pack, 0) }
    }

    /// Partials from the epilogue of E Wᵀ, then their fold.
    unsafe fn fused(&self, planes: usize, list: RowList, input: Input, bias: usize) -> Result<()> {
        let (call, layout, rows) = (self.call, self.layout, self.call.rows);
        // Where the targets' logits go to, if the products make them.
        let target = if input.made { self.fields().target } else { 0 };
        let target_z = if target == 0 { 0 } else { layout.reference };
        let operation = partials(self.g.path);
        let width = call.plan.chunks.0;
        let chunk_tiles = width.div_ceil(self.g.part_columns);
        let tiles = call.classes.div_ceil(width) * chunk_tiles;
        let (ld_row, part_plane) = (padded(rows), tiles * padded(rows));
        for (index, first) in (0..call.classes).step_by(width).enumerate() {
            let count = width.min(call.classes - first);
            let copy = layout.copy.map(|address| {
                Matrix::packed(address, call.dtype, call.features, pitch(call.features, call.dtype))
            });
            let choice = self.choice(count);
            let epilogue = params::Gemm {
                target_z,
                in_place: input.stay,
                reference: layout.reference,
                target: if call.targets().columns == 1 { layout.target } else { 0 },
                part: layout.part + 4 * index * chunk_tiles * ld_row,
                part_plane: part_plane as i64,
                ..call.logit_product(list, bias, first, count)
            };
            // SAFETY: operands checked, buffers of the layout.
            unsafe {
                let weight = call.weight_rows(first, count, copy)?;
                tensor_cores(
                    call.stream,
                    operation,
                    &choice,
                    &Operands { a: input.product, b: weight, d: input.whole },
                    epilogue,
                )?;
            }
        }
        let last = call.classes - (call.classes - 1) / width * width;
        let finish = params::Finish {
            out: params::Fields { target, ..self.fields() },
            list,
            part: layout.part,
            reference: target_z,
            part_plane: part_plane as i64,
            ld_row: ld_row as i32,
            tiles: (tiles - chunk_tiles + last.div_ceil(self.g.part_columns)) as i32,
            classes: call.classes as i64,
            tile_columns: self.g.part_columns as i32,
            planes: planes as i32,
            chunk_columns: width as i32,
            chunk_tiles: chunk_tiles as i32,
            gate: 0,
        };
        let (name, block) = if planes == 7 { ("finish_full", 256) } else { ("finish_online", 512) };
        // SAFETY: outputs checked, buffers of the layout.
        unsafe { call.stream.launch(name, (rows.div_ceil(32), 1), block, 0, &finish) }
    }

    /// Tiles of logits, folded into each row's state.
    unsafe fn tiled(&self, list: RowList, input: Matrix, bias: usize) -> Result<()> {
        let (call, layout) = (self.call, self.layout);
        let width = call.plan.chunks.0;
        let copy = layout.copy.map(|address| {
            Matrix::packed(address, call.dtype, call.features, pitch(call.features, call.dtype))
        });
        let z = Matrix::packed(layout.z, call.acc, width, width);
        let common = params::Tile {
            saved: params::Fields { target: 0, ..self.fields() },
            list,
            z: layout.z,
            z_pitch: width as i64,
            state: layout.state,
            state_size: self.g.state as i32,
            ..call.tile_params()
        };
        let name = format!("tile_statistics_{}", suffix(call.acc));
        for first in (0..call.classes).step_by(width) {
            let count = width.min(call.classes - first);
            let params = params::Tile {
                column0: first as i64,
                width: count as i32,
                first: i32::from(first == 0),
                last: i32::from(first + count == call.classes),
                ..common
            };
            // SAFETY: operands checked, buffers of the layout.
            unsafe {
                let weight = call.weight_rows(first, count, copy)?;
                logits(call, list, input, weight, z, call.map(bias), (first, count))?;
                call.stream.launch(&name, (call.rows, 1), 256, 16 * params.topk as u32, &params)?;
            }
        }
        Ok(())
    }
}

/// The rows that take part, and the input as products read it.
///
/// With `later`, the third value is where [`Call::target_logits`] still has to pack the live rows,
/// on its way over them, or 0. `stay`: 0, or where the device says whether that would save nothing,
/// so that rows stay where they are.
pub(crate) unsafe fn select(
    call: &Call,
    buffers: ListBuffers,
    packed: usize,
    later: bool,
    stay: usize,
) -> Result<(RowList, Matrix, usize)> {
    let packed =
        Matrix::packed(packed, call.dtype, call.features, pitch(call.features, call.dtype));
    let all = call.targets().has_ignore == 0;
    let readable = |input: &Matrix| call.dtype == DType::F64 || input.describable();
    if all && let Some(input) = call.input_matrix().filter(readable) {
        return Ok((call.all_rows(), input, 0));
    }
    let list = if all { call.all_rows() } else { call.live_rows(buffers) };
    // SAFETY: buffers of the layout.
    unsafe {
        if !all {
            let select = params::Select {
                targets: call.targets(),
                rows: buffers.rows,
                slots: buffers.slots,
                count: buffers.count,
                total: call.rows as i64,
                in_place: stay,
                ..params::Select::default()
            };
            call.stream.launch("select_rows", (select.blocks(), 1), 1024, 0, &select)?;
        }
        if !later {
            call.gather(list, packed, padded(call.rows))?;
        }
    }
    Ok((list, packed, if later { packed.address } else { 0 }))
}

/// A tile of logits of live rows and classes `chunk.0 .. chunk.0 + chunk.1`.
pub(crate) unsafe fn logits(
    call: &Call,
    list: RowList,
    input: Matrix,
    weight: Matrix,
    z: Matrix,
    map: LogitMap,
    chunk: (usize, usize),
) -> Result<()> {
    let (first, count) = chunk;
    let bias = if map.bias == 0 { 0 } else { map.bias + call.acc.size() * first };
    let mapped = bias != 0 || map.softcap > 0.0;
    let operands = Operands { a: input, b: weight, d: Some(z) };
    let choice =
        choose(&call.stream.device.facts, Operation::Logits, call.dtype, mapped, call.rows, count);
    match choice.filter(|_| input.describable() && weight.describable()) {
        Some(choice) => {
            let epilogue = params::Gemm {
                count: list.count,
                bias,
                m: call.rows as i32,
                n: count as i32,
                k: call.features as i32,
                ld_row: padded(call.rows) as i32,
                col0: first as i32,
                scale: map.scale as f32,
                scale_at: map.scale_at,
                softcap: map.softcap as f32,
                ..params::Gemm::default()
            };
            // SAFETY: the caller's promise.
            unsafe { tensor_cores(call.stream, Operation::Logits, &choice, &operands, epilogue) }
        }
        None => {
            let epilogue = PlainEpilogue {
                m: call.rows,
                n: count,
                k: call.features,
                count: list.count,
                logits: Some(LogitMap { bias, ..map }),
                ..PlainEpilogue::default()
            };
            // SAFETY: the caller's promise.
            unsafe { plain(call.stream, Operation::Logits, &operands, epilogue) }
        }
    }
}
