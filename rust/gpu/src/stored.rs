//! The stored mode: exponentials of a cross entropy are kept from the forward to the backward.
//!
//! The forward writes X = bf16(e^(z − reference)), 0 at the target, where a row's reference is its
//! target's logit. Rows whose rest lies more than 60 nats from it are found on the device; their
//! blocks of 256 rows run again, first for the rest with running maxima, then for X against that.
//! In the common case these launches find an empty list and end.
//!
//! Where only some classes are kept, they are the first ones, in chunks (`share`). The rest over the
//! others comes with running maxima, and the backward in `backward.rs` turns each chunk into a tile
//! of gradients of the logits by one pass over it.

use logitless_core::{DType, Error, Gradients, Tensor};

use crate::call::{Call, row_view, value, vector};
use crate::error::Result;
use crate::forward::select;
use crate::frozen;
use crate::layout::{
    Arena, Geometry, StoreLayout, StoredBackwardLayout, StoredForwardLayout, padded, pitch,
};
use crate::params::{self, Fields, RowList};
use crate::plan::partials;
use crate::product::{Choice, Matrix, Operands, Operation, choose, choose_sliced, tensor_cores};
use crate::share::{Lends, Piece, Place};

/// Bytes of an accumulator.
const F32: usize = 4;

fn kernel(call: &Call, operation: Operation, m: usize, n: usize) -> Choice {
    let mapped =
        call.mapped() && !matches!(operation, Operation::Dw | Operation::DwF32 | Operation::De);
    choose(&call.stream.device.facts, operation, call.dtype, mapped, m, n)
        .expect("the plan found it")
}

fn exponentials(call: &Call, g: &Geometry, store: &StoreLayout) -> Matrix {
    Matrix::packed(store.x, call.dtype, call.classes, g.store_pitch())
}

/// Some classes' exponentials.
#[derive(Clone, Copy)]
pub(crate) struct Exponentials {
    pub first: usize,
    pub count: usize,
    pub x: Matrix,
}

/// Where a call keeps its exponentials, in the order of the classes. `lent` is the address of the
/// gradient of the weight.
pub(crate) fn kept(
    call: &Call,
    g: &Geometry,
    store: &StoreLayout,
    lent: usize,
) -> Vec<Exponentials> {
    if call.plan.stored {
        return vec![Exponentials {
            first: 0,
            count: call.classes,
            x: exponentials(call, g, store),
        }];
    }
    let pieces = g.share.pieces(call.rows, g.lender_bytes());
    let matrix = |piece: Piece| {
        let address = match piece.place {
            Place::Lent(at) => lent + at,
            Place::Own(at) => store.x + at,
        };
        let x = Matrix::packed(address, call.dtype, piece.count, piece.width);
        Exponentials { first: piece.first, count: piece.count, x }
    };
    pieces.map(matrix).collect()
}

/// The address of the memory that the gradient of the weight lends, if the plan counts on it.
pub(crate) fn check_lent(lent: Option<&Tensor>, call: &Call, g: &Geometry) -> Result<usize> {
    let Lends::Weight(element) = g.share.lends else { return Ok(0) };
    if g.share.lent.classes == 0 {
        return Ok(0);
    }
    let expected = || {
        format!(
            "a contiguous tensor of {} x {} with elements of {element} bytes, which d_weight will be",
            call.classes, call.features
        )
    };
    let Some(lent) = lent else {
        return Err(Error::Missing { argument: "lent", expected: expected() }.into());
    };
    lent.expect_shape("lent", &[call.classes, call.features])?;
    lent.expect_contiguous("lent")?;
    if lent.dtype().size() != element || !lent.address().is_multiple_of(256) {
        let found = format!("{} at {:#x}", lent.dtype().name(), lent.address());
        return Err(value("lent", found, expected()));
    }
    Ok(lent.address())
}

/// Outputs `rest` and `target`, and exponentials of the classes that the plan keeps.
pub(crate) unsafe fn forward(
    call: &Call,
    g: &Geometry,
    out: Fields,
    store: usize,
    lent: usize,
    workspace: usize,
) -> Result<()> {
    let store = StoreLayout::lay(&mut Arena::at(store), g);
    let layout = StoredForwardLayout::lay(&mut Arena::at(workspace), g);
    if call.problem.softcap > 0.0 && g.entropy() {
        let expected = "0 where exponentials are kept of an entropy: make the plan with memory=0";
        return Err(value("softcap", call.problem.softcap.to_string(), expected.into()));
    }
    // SAFETY: all of it: operands checked, buffers of the layouts.
    unsafe {
        let (list, input, pack) = select(call, store.list, layout.packed, true)?;
        let bias = call.widen_bias(layout.bias)?;
        if list.slots != 0 && out.target != 0 {
            call.stream.zero(out.target, call.rows * F32)?;
        }
        let logits = if out.target == 0 { layout.logits } else { out.target };
        call.target_logits(list, logits, store.reference, store.target, pack)?;
        let pieces = kept(call, g, &store, lent);
        let run = Forward { call, g, store: &store, layout: &layout, list, input, bias };
        let left = call.classes - pieces.iter().map(|piece| piece.count).sum::<usize>();
        let out = Fields { rest: out.rest, entropy: out.entropy, ..Fields::default() };
        if left == 0 {
            return run.keep(&pieces, out);
        }
        let entropy = if g.entropy() { layout.entropy } else { 0 };
        run.keep(&pieces, Fields { rest: layout.rest, entropy, ..Fields::default() })?;
        run.others(left, out)
    }
}

struct Forward<'a> {
    call: &'a Call<'a>,
    g: &'a Geometry,
    store: &'a StoreLayout,
    layout: &'a StoredForwardLayout,
    list: RowList,
    input: Matrix,
    bias: usize,
}

impl Forward<'_> {
    /// A product of classes `first .. first + count` whose partials begin at column `tile`.
    fn product(&self, first: usize, count: usize, tile: usize, tiles: usize) -> params::Gemm {
        let (call, ld_row) = (self.call, padded(self.call.rows));
        params::Gemm {
            count: self.list.count,
            reference: self.store.reference,
            target: self.store.target,
            bias: if self.bias == 0 { 0 } else { self.bias + F32 * first },
            part: self.layout.part + F32 * tile * ld_row,
            part_plane: (tiles * ld_row) as i64,
            m: call.rows as i32,
            n: count as i32,
            k: call.features as i32,
            ld_row: ld_row as i32,
            col0: first as i32,
            scale: call.problem.logit_scale as f32,
            scale_at: call.scale_at,
            softcap: call.problem.softcap as f32,
            ..params::Gemm::default()
        }
    }

    fn finish(&self, out: Fields, tiles: usize, classes: usize) -> params::Finish {
        let ld_row = padded(self.call.rows);
        params::Finish {
            out,
            list: self.list,
            part: self.layout.part,
            reference: self.store.reference,
            part_plane: (tiles * ld_row) as i64,
            ld_row: ld_row as i32,
            tiles: tiles as i32,
            classes: classes as i64,
            tile_columns: self.g.part_columns as i32,
            planes: 1,
            chunk_columns: classes as i32,
            chunk_tiles: tiles as i32,
            flags: self.layout.flags,
        }
    }

    /// The exponentials of the kept classes, and what their sums say of them to `out`.
    unsafe fn keep(&self, pieces: &[Exponentials], out: Fields) -> Result<()> {
        let (call, layout, list) = (self.call, self.layout, self.list);
        let (rows, blocks) = (call.rows, call.rows.div_ceil(256));
        let columns = self.g.part_columns;
        let classes: usize = pieces.iter().map(|piece| piece.count).sum();
        let tiles: usize = pieces.iter().map(|piece| piece.count.div_ceil(columns)).sum();
        let (operation, finish) = if self.g.entropy() {
            (Operation::StoreMoment, "finish_fixed_moment")
        } else {
            (Operation::StoreExp, "finish_fixed")
        };
        let store = |gate: usize| {
            let mut tile = 0;
            for piece in pieces {
                let product =
                    params::Gemm { gate, ..self.product(piece.first, piece.count, tile, tiles) };
                let weight = call.weight.rows_from(piece.first);
                let operands = Operands { a: self.input, b: weight, d: Some(piece.x) };
                let choice = kernel(call, operation, rows, piece.count);
                // SAFETY: as for the caller.
                unsafe { tensor_cores(call.stream, operation, &choice, &operands, product)? };
                tile += piece.count.div_ceil(columns);
            }
            Ok::<(), crate::Error>(())
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            call.stream.zero(layout.flags, F32 * blocks)?;
            store(0)?;
            let sums = self.finish(out, tiles, classes);
            call.stream.launch(finish, (rows.div_ceil(32), 1), 512, 0, &sums)?;

            let gate =
                params::Gate { flags: layout.flags, gate: layout.gate, blocks: blocks as i64 };
            call.stream.launch("gate_blocks", (1, 1), 256, 0, &gate)?;
            let tiles = classes.div_ceil(columns);
            let gated = params::Gemm { gate: layout.gate, ..self.product(0, classes, 0, tiles) };
            let repair = kernel(call, Operation::Repair, rows, classes);
            let operands = Operands { a: self.input, b: call.weight, d: None };
            tensor_cores(call.stream, Operation::Repair, &repair, &operands, gated)?;
            let repaired = params::Repair {
                list,
                gate: layout.gate,
                part: layout.part,
                reference: self.store.reference,
                rest: out.rest,
                part_plane: gated.part_plane,
                ld_row: gated.ld_row,
                tiles: tiles as i32,
            };
            call.stream.launch("finish_repair", (blocks, 1), 256, 0, &repaired)?;
            store(layout.gate)?;
            // Moments about the new references; all other rows come out as before.
            if self.g.entropy() {
                call.stream.launch(finish, (rows.div_ceil(32), 1), 512, 0, &sums)?;
            }
        }
        Ok(())
    }

    /// The statistics over the last `left` classes; with those of the kept ones, the whole.
    unsafe fn others(&self, left: usize, out: Fields) -> Result<()> {
        let (call, rows) = (self.call, self.call.rows);
        let first = call.classes - left;
        let tiles = left.div_ceil(self.g.part_columns);
        let operation = partials(self.g.path);
        let choice = kernel(call, operation, rows, left);
        let operands = Operands { a: self.input, b: call.weight.rows_from(first), d: None };
        let merge = params::MergeRest {
            list: self.list,
            kept: self.layout.rest,
            rest: out.rest,
            kept_entropy: self.layout.entropy,
            entropy: out.entropy,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            let product = self.product(first, left, 0, tiles);
            tensor_cores(call.stream, operation, &choice, &operands, product)?;
            let planes = if self.g.entropy() { 3 } else { 2 };
            let finish = params::Finish { planes, ..self.finish(out, tiles, left) };
            call.stream.launch("finish_online", (rows.div_ceil(32), 1), 512, 0, &finish)?;
            call.stream.launch("merge_rest", (rows.div_ceil(256), 1), 256, 0, &merge)
        }
    }
}

/// A backward from the store.
pub(crate) struct Stored<'a> {
    pub call: &'a Call<'a>,
    pub g: &'a Geometry,
    pub gradients: &'a Gradients,
    pub accumulate_weight: bool,
    pub saved: Fields,
    pub grad: Fields,
}

impl Stored<'_> {
    /// dW first: dE may be packed over the scaled input, which dW reads. The targets' parts of both
    /// are added in float.
    pub unsafe fn backward(&self, store: usize, workspace: usize) -> Result<()> {
        let (call, g) = (self.call, self.g);
        let store = StoreLayout::lay(&mut Arena::at(store), g);
        let layout = StoredBackwardLayout::lay(&mut Arena::at(workspace), g);
        let list = if call.targets().has_ignore != 0 {
            call.live_rows(store.list)
        } else {
            call.all_rows()
        };
        let x = exponentials(call, g, &store);
        let packed = Matrix::packed(
            layout.packed,
            call.dtype,
            call.features,
            pitch(call.features, call.dtype),
        );
        // SAFETY: all of it: operands checked, buffers of the layouts.
        unsafe {
            self.factors(list, &store, &layout)?;
            self.scaled_input(list, packed, layout.factor)?;
            self.weight_gradient(list, x, packed, &store, &layout)?;
            self.bias_gradient(list, x, &store, &layout)?;
            self.input_gradient(list, x, packed, &store, &layout)
        }
    }

    unsafe fn factors(
        &self,
        list: RowList,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, rows) = (self.call, padded(self.call.rows));
        let params = params::Factors {
            list,
            targets: call.targets(),
            rest: self.saved.rest,
            logits: self.saved.target,
            g_rest: self.grad.rest,
            g_target: self.grad.target,
            reference: store.reference,
            factor: layout.factor,
            input_factor: layout.input_factor,
            target_factor: layout.target_factor,
            ratio: layout.ratio,
            scale: call.problem.logit_scale as f32,
            scale_at: call.scale_at,
            softcap: call.problem.softcap as f32,
            padded: rows as i32,
            reserved: 0,
        };
        // SAFETY: buffers of the layouts.
        unsafe { call.stream.launch("store_factors", (rows.div_ceil(256), 1), 256, 0, &params) }
    }

    unsafe fn scaled_input(&self, list: RowList, packed: Matrix, factor: usize) -> Result<()> {
        let (call, rows) = (self.call, padded(self.call.rows));
        let gather = params::Gather {
            source: call.input(),
            list,
            packed: packed.address,
            pitch: packed.row_stride,
            features: call.features as i32,
            padded: rows as i32,
        };
        let params = params::Scale {
            gather,
            factor,
            scale_at: call.scale_at,
            scale: call.problem.logit_scale as f32,
            reserved: 0,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { call.stream.launch("scale_rows_bf16", (rows.div_ceil(8), 1), 256, 0, &params) }
    }

    unsafe fn weight_gradient(
        &self,
        list: RowList,
        x: Matrix,
        scaled: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, Some(d_weight)) = (self.call, &self.gradients.weight) else { return Ok(()) };
        let out = Matrix::of(d_weight);
        if !out.describable() {
            let expected = "adjacent features and rows of 16-byte multiples; or memory=\"lean\"";
            return Err(value(
                "d_weight",
                format!("strides {:?}", d_weight.strides()),
                expected.into(),
            ));
        }
        let operation = if out.dtype == call.dtype { Operation::Dw } else { Operation::DwF32 };
        // The input as it came, where rows can be read in pairs; else the scaled one: rounded twice.
        let paired = |m: &Matrix| {
            m.column_stride == 1 && m.row_stride % 2 == 0 && m.address.is_multiple_of(4)
        };
        let whole = call.input_matrix().filter(paired);
        let [start, rows, values] = layout.lists;
        let lists = params::ListTargets {
            list,
            target: store.target,
            value: if whole.is_some() { layout.target_factor } else { layout.ratio },
            start,
            rows,
            values,
            classes: call.classes as i32,
            by_slot: i32::from(whole.is_none()),
        };
        let source = whole.unwrap_or(scaled);
        let epilogue = params::Gemm {
            count: list.count,
            count_is_k: 1,
            onehot_w: source.address,
            onehot_ld: source.row_stride,
            onehot_g: values,
            onehot_start: start,
            onehot_rows: rows,
            m: call.classes as i32,
            n: call.features as i32,
            k: call.rows as i32,
            accumulate: i32::from(self.accumulate_weight),
            scale: 1.0,
            ..params::Gemm::default()
        };
        let choice = kernel(call, operation, call.classes, call.features);
        let blocks = (call.classes + 1).div_ceil(512);
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            call.stream.launch("list_targets", (blocks, 1), 256, 0, &lists)?;
            tensor_cores(
                call.stream,
                operation,
                &choice,
                &Operands { a: x, b: scaled, d: Some(out) },
                epilogue,
            )
        }
    }

    /// The targets' part in float: the exponentials cancel it.
    unsafe fn bias_gradient(
        &self,
        list: RowList,
        x: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, Some(d_bias)) = (self.call, &self.gradients.bias) else { return Ok(()) };
        let params = params::ColumnSum {
            tile: x.any(),
            out: vector(d_bias),
            count: list.count,
            factor: 0,
            weights: layout.factor,
            target: store.target,
            value: layout.ratio,
            rows: call.rows as i64,
            columns: call.classes as i64,
            group: 1,
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe { call.stream.launch("column_sum", (call.classes.div_ceil(32), 1), 256, 0, &params) }
    }

    unsafe fn input_gradient(
        &self,
        list: RowList,
        x: Matrix,
        packed: Matrix,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, g) = (self.call, self.g);
        let Some(d_input) = &self.gradients.input else { return Ok(()) };
        if g.slices > 1 {
            // SAFETY: as for this function.
            return unsafe { self.sliced_input_gradient(list, x, d_input, store, layout) };
        }
        // In place where rows keep their places, else packed over the scaled input, which dW has read.
        let in_place = Matrix::packed(d_input.address(), call.dtype, call.features, call.features);
        let direct = list.slots == 0
            && d_input.is_contiguous()
            && d_input.dtype() == call.dtype
            && !self.gradients.accumulate_input
            && in_place.describable();
        let epilogue = params::Gemm {
            count: list.count,
            target: store.target,
            coef: layout.input_factor,
            onehot_w: call.weight.address,
            onehot_g: layout.target_factor,
            onehot_ld: call.weight.row_stride,
            m: call.rows as i32,
            n: call.features as i32,
            k: call.classes as i32,
            ld_row: padded(call.rows) as i32,
            scale: 1.0,
            ..params::Gemm::default()
        };
        let choice = kernel(call, Operation::De, call.rows, call.features);
        let d = Some(if direct { in_place } else { packed });
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            tensor_cores(
                call.stream,
                Operation::De,
                &choice,
                &Operands { a: x, b: call.weight, d },
                epilogue,
            )?;
        }
        if direct {
            return Ok(());
        }
        let params = params::Unpack {
            target: row_view(d_input),
            list,
            packed: packed.address,
            pitch: packed.row_stride,
            features: call.features as i32,
            accumulate: i32::from(self.gradients.accumulate_input),
        };
        let name = format!("unpack_rows_{}", crate::launch::suffix(d_input.dtype()));
        // SAFETY: as above.
        unsafe { call.stream.launch(&name, (call.rows.div_ceil(8), 1), 256, 0, &params) }
    }

    /// Few rows: sums of each slice of the classes, then as a frozen head.
    unsafe fn sliced_input_gradient(
        &self,
        list: RowList,
        x: Matrix,
        d_input: &Tensor,
        store: &StoreLayout,
        layout: &StoredBackwardLayout,
    ) -> Result<()> {
        let (call, slices, slice_rows) = (self.call, self.g.slices, padded(self.call.rows));
        let shape = (call.rows, call.features, call.classes);
        let sums_pitch = pitch(call.features, DType::F32);
        let sums = Matrix::packed(layout.sums, DType::F32, call.features, sums_pitch);
        let (choice, _) = choose_sliced(&call.stream.device.facts, call.dtype, shape, slices)
            .expect("the plan found it");
        let epilogue = params::Gemm {
            count: list.count,
            m: call.rows as i32,
            n: call.features as i32,
            k: call.classes as i32,
            scale: 1.0,
            slices: slices as i32,
            slice_rows: slice_rows as i32,
            ..params::Gemm::default()
        };
        let operands = Operands { a: x, b: call.weight, d: Some(sums) };
        let (saved, grad) = (self.saved, self.grad);
        let rows = params::Frozen {
            sums: layout.sums,
            slice: (slice_rows * sums_pitch) as i64,
            slices: slices as i32,
            ..frozen::rows(call, self.gradients, d_input, list, saved, grad, store.reference)
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            tensor_cores(call.stream, Operation::DeF32, &choice, &operands, epilogue)?;
            frozen::launch(call, d_input, &rows)
        }
    }
}
