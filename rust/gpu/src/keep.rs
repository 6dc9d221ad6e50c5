//! Forwards that keep exponentials of a cross entropy, and perhaps of its entropy, for the backward.
//!
//! X = bf16(e^(z − reference)), 0 at the target, where a row's reference is its target's logit. Rows
//! whose rest lies more than 60 nats from it are found on the device; their blocks of 256 rows run
//! again, first for the rest with running maxima, then for X against that. In the common case these
//! launches find an empty list and end.
//!
//! Where only some classes are kept, they are the first ones, in chunks (`share`); the statistics of
//! the others come with running maxima, and both are merged.

use logitless_core::{Error, Tensor};

use crate::call::{Call, value};
use crate::error::Result;
use crate::forward::select;
use crate::layout::{Arena, Geometry, StoreLayout, StoredForwardLayout, padded};
use crate::params::{self, Fields, RowList};
use crate::plan::partials;
use crate::product::{Choice, Matrix, Operands, Operation, Order, choose, ordered, tensor_cores};
use crate::share::{Lends, Piece, Place};

/// Bytes of an accumulator.
const F32: usize = 4;

pub(crate) fn kernel(call: &Call, operation: Operation, m: usize, n: usize) -> Choice {
    let mapped =
        call.mapped() && !matches!(operation, Operation::Dw | Operation::DwF32 | Operation::De);
    choose(&call.stream.device.facts, operation, call.dtype, mapped, m, n)
        .expect("the plan found it")
}

/// Exponentials of every class.
pub(crate) fn exponentials(call: &Call, g: &Geometry, store: &StoreLayout) -> Matrix {
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
        let (list, input, pack) = select(call, store.list, layout.packed, true, 0)?;
        let bias = call.widen_bias(layout.bias)?;
        let logits = if out.target == 0 { layout.logits } else { out.target };
        call.target_logits(list, logits, store.reference, store.target, pack, layout.gate)?;
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
            reference: self.store.reference,
            target: self.store.target,
            part: self.layout.part + F32 * tile * ld_row,
            part_plane: (tiles * ld_row) as i64,
            ..call.logit_product(self.list, self.bias, first, count)
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
            gate: 0,
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
        // Pieces share inputs and nothing else: each fills what the one ahead leaves idle at its end.
        let store = |gate: usize| {
            let (mut tile, mut order) = (0, Order::After);
            for piece in pieces {
                let product =
                    params::Gemm { gate, ..self.product(piece.first, piece.count, tile, tiles) };
                let weight = call.weight.rows_from(piece.first);
                let operands = Operands { a: self.input, b: weight, d: Some(piece.x) };
                let choice = kernel(call, operation, rows, piece.count);
                // SAFETY: as for the caller.
                unsafe { ordered(call.stream, order, operation, &choice, &operands, product)? };
                tile += piece.count.div_ceil(columns);
                order = Order::beside(call.stream, &choice, (rows, piece.count, call.features), 1);
            }
            Ok::<(), crate::Error>(())
        };
        // SAFETY: operands checked, buffers of the layouts.
        unsafe {
            store(0)?;
            let sums = self.finish(out, tiles, classes);
            let listing = params::Finish { gate: layout.gate, ..sums };
            call.stream.launch(finish, (rows.div_ceil(32), 1), 512, 0, &listing)?;

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
