//! Backward: the composition of launches that turns cotangents into gradients.
//!
//! Live rows (neither ignored nor without a cotangent) are packed in front on the device. Then, for
//! each chunk of classes: the gradient of the logits as a tile, its product with the input (rows of
//! the weight's gradient), its product with the weight (added to sums of the input's gradient). The
//! sums go back to the rows' places at the end. The packed input lives in the buffer of the input's
//! gradient until then, where that has room.

use std::mem::offset_of;
use std::ops::Range;

use logitless_core::{DType, Gradients, Problem, Spec, Tensor};

use crate::blocks;
use crate::call::{Call, check_gradients, row_view, value};
use crate::error::Result;
use crate::forward::{check_store, check_workspace};
use crate::frozen;
use crate::keep::{Exponentials, check_lent, kept};
use crate::launch::{Stream, suffix};
use crate::layout::{Arena, BackwardLayout, Geometry, StoreLayout, padded, pitch};
use crate::params::{self, Fields, RowList, Scalars};
use crate::plan::{Path, Plan};
use crate::product::{
    Matrix, Operands, Operation, Order, PlainEpilogue, choose, choose_sliced, ordered, plain,
    tensor_cores, write_sums,
};
use crate::stored::Stored;

/// Turns cotangents of the outputs into gradients of the wanted operands.
///
/// `accumulate_weight` adds to a gradient of the weight of the accumulation type. `lender` is what the
/// forward was lent; the gradient of the weight, if wanted, is that memory.
///
/// # Errors
/// As for [`crate::forward`].
///
/// # Safety
/// As for [`crate::forward`]; the gradients overlap nothing.
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub unsafe fn backward(
    spec: &Spec,
    problem: &Problem,
    saved: &[Tensor],
    cotangents: &[Option<Tensor>],
    gradients: &Gradients,
    accumulate_weight: bool,
    plan: &Plan,
    device: usize,
    stream: usize,
    workspace: &Tensor,
    store: Option<&Tensor>,
    scale: Option<&Tensor>,
    lender: Option<&Tensor>,
) -> Result<()> {
    let stream = Stream::enter(device, stream)?;
    let call = Call::new(spec, problem, scale, plan, &stream)?;
    problem.check_fields("saved", spec, saved.iter().map(Some))?;
    problem.check_fields("cotangents", spec, cotangents.iter().map(Option::as_ref))?;
    check_gradients(&call, gradients, accumulate_weight)?;
    check_workspace("workspace", workspace, plan.backward_bytes)?;
    let g = Geometry::new(spec, plan, &stream.device.facts);
    let (fields, grad) =
        (call.fields(saved.iter().map(Some)), call.fields(cotangents.iter().map(Option::as_ref)));
    if plan.blocks.backward > 0 {
        // SAFETY: the caller's promise.
        return unsafe {
            blocks::backward(
                spec,
                problem,
                saved,
                cotangents,
                gradients,
                accumulate_weight,
                plan,
                &g,
                device,
                &stream,
                workspace,
                scale,
            )
        };
    }
    if plan.frozen {
        let store = check_store(store, plan)?;
        // SAFETY: the caller's promise.
        return unsafe { frozen::backward(&call, &g, gradients, fields, grad, store) };
    }
    if plan.stored {
        let store = check_store(store, plan)?;
        let run = Stored { call: &call, g: &g, gradients, accumulate_weight, saved: fields, grad };
        // SAFETY: the caller's promise.
        return unsafe { run.backward(store, workspace.address()) };
    }
    let lent = gradients
        .input
        .as_ref()
        .filter(|_| g.may_borrow() && !gradients.accumulate_input)
        .and_then(|d_input| lend(&call, d_input));
    // A gradient of the input that the plan counts on but is not asked for leaves its sums' memory free.
    let borrow =
        lent.is_some() || (g.share.overwrites() && g.may_borrow() && gradients.input.is_none());
    let width = BackwardLayout::widest(&g, plan.backward_bytes, borrow).min(plan.chunks.1);
    if width == 0 && call.rows > 0 && plan.chunks.1 > 0 {
        let expected = "a plan with more memory, or a contiguous gradient of the input, which lends its memory";
        return Err(value("workspace", format!("{} bytes", plan.backward_bytes), expected.into()));
    }
    let mut arena = Arena::at(workspace.address());
    let mut layout = BackwardLayout::lay(&mut arena, &g, width, borrow);
    let (mut pieces, mut lists) = (Vec::new(), None);
    if g.share.classes() > 0 {
        let lender = check_lent(lender, &call, &g)?;
        let store = StoreLayout::lay(&mut Arena::at(check_store(store, plan)?), &g);
        pieces = kept(&call, &g, &store, lender);
        if g.share.overwrites() {
            layout.dx = store.x;
        }
        lists = Some(store);
    }
    let scalars = |field: usize| layout.scalars + field;
    let double = call.dtype == DType::F64;
    let run = Backward {
        saved: fields,
        grad,
        list: call.live_rows(layout.list),
        packed: lent.unwrap_or_else(|| {
            let address = layout.packed.unwrap_or(layout.sums);
            Matrix::packed(address, call.dtype, call.features, pitch(call.features, call.dtype))
        }),
        packed_rows: if lent.is_some() { call.rows } else { padded(call.rows) },
        pieces: &pieces,
        store: lists.as_ref(),
        sums: Matrix::packed(layout.sums, call.acc, call.features, pitch(call.features, call.acc)),
        alpha: scalars(if double {
            offset_of!(Scalars, g_scale_wide)
        } else {
            offset_of!(Scalars, g_scale)
        }),
        factor: scalars(offset_of!(Scalars, g_wide)),
        call: &call,
        layout: &layout,
        gradients,
        accumulate_weight,
        width,
    };
    // SAFETY: the caller's promise, and buffers laid out for this geometry.
    unsafe { run.run() }
}

/// The memory of the input's gradient as a packed input, if its rows follow one another.
fn lend(call: &Call, d_input: &Tensor) -> Option<Matrix> {
    let lent = Matrix::packed(d_input.address(), call.dtype, call.features, call.features);
    (d_input.is_contiguous() && lent.describable()).then_some(lent)
}

#[derive(Clone, Copy)]
pub(crate) struct Backward<'a> {
    pub call: &'a Call<'a>,
    pub layout: &'a BackwardLayout,
    pub gradients: &'a Gradients,
    pub accumulate_weight: bool,
    pub width: usize,
    pub saved: Fields,
    pub grad: Fields,
    pub list: RowList,
    pub packed: Matrix,
    pub packed_rows: usize,
    /// Classes whose exponentials were kept: the first ones; and which rows they are of.
    pub pieces: &'a [Exponentials],
    pub store: Option<&'a StoreLayout>,
    pub sums: Matrix,
    /// Device scalars: largest cotangent times the logit scale, in accumulators; largest cotangent, in double.
    pub alpha: usize,
    pub factor: usize,
}

impl Backward<'_> {
    unsafe fn run(&self) -> Result<()> {
        let (call, gradients) = (self.call, self.gradients);
        // SAFETY: all of it: operands checked, buffers of the layout.
        unsafe {
            if let Some(dense) = &gradients.dense {
                call.stream.zero(dense.address(), dense.len() * dense.dtype().size())?;
            }
            self.select()?;
            let bias = call.widen_bias(self.layout.bias)?;
            if self.fused() {
                self.coefficients()?;
            }
            let made = self.kept_classes();
            if made > 0 {
                self.kept_chunks(made, bias)?;
            } else {
                call.gather(self.list, self.packed, self.packed_rows)?;
            }
            self.chunks(made..call.classes, bias)?;
            self.scale_gradient()?;
            self.scatter()
        }
    }

    /// Whether gradients of the logits come from a product's epilogue.
    fn fused(&self) -> bool {
        self.call.plan.path != Path::Tiled && self.gradients.dense.is_none()
    }

    /// Classes whose logits are made again.
    pub unsafe fn chunks(&self, classes: Range<usize>, bias: usize) -> Result<()> {
        let call = self.call;
        let copy = self.layout.copy.map(|address| {
            Matrix::packed(address, call.dtype, call.features, pitch(call.features, call.dtype))
        });
        for first in classes.clone().step_by(self.width.max(1)) {
            let count = self.width.min(classes.end - first);
            // SAFETY: operands checked, buffers of the layout.
            unsafe {
                let weight = call.weight_rows(first, count, copy)?;
                if self.fused() {
                    self.fused_tile(weight, bias, first, count)?;
                } else {
                    self.tiled_tile(weight, bias, first, count)?;
                }
                self.products(self.dx(), weight, first, count)?;
            }
        }
        Ok(())
    }

    /// What the gradients take from a tile of logit gradients.
    pub unsafe fn products(
        &self,
        tile: Matrix,
        weight: Matrix,
        first: usize,
        count: usize,
    ) -> Result<()> {
        // SAFETY: operands checked, buffers of the layout.
        unsafe {
            self.bias_gradient(tile, first, count)?;
            self.scale_blocks(first, count)?;
            // dE first: its tiles are as deep as the chunk is wide, and dW's fill what they leave idle.
            // Both read the tile. dE writes the sums; dW, rows of its gradient (also where later ones
            // hold the tile, `share`) or float rows of its own.
            let mut order = Order::After;
            let scale_from_sums = self.gradients.scale.is_some() && !self.unrounded();
            if self.gradients.input.is_some() || scale_from_sums {
                order = self.input_gradient(tile, 0, weight, first, count)?;
            }
            if let Some(d_weight) = &self.gradients.weight {
                self.weight_gradient(order, tile, Matrix::of(d_weight).rows_from(first), count)?;
            }
        }
        Ok(())
    }

    /// Lists the live rows and makes the scalars.
    unsafe fn select(&self) -> Result<()> {
        let (call, layout) = (self.call, self.layout);
        let blocks = call.rows.div_ceil(256);
        let live = params::Live {
            grad: self.grad,
            targets: call.targets(),
            live: layout.live,
            block_max: layout.block_max,
            total: call.rows as i64,
            powers: call.spec.powers().len() as i32,
            vectors: call.spec.vectors() as i32,
            topk: call.spec.topk() as i32,
            is_double: i32::from(call.acc == DType::F64),
        };
        // Gradients held in accumulators need no normalisation.
        let normalise = call.dtype != call.acc;
        let select = params::Select {
            targets: call.targets(),
            live: layout.live,
            block_max: if normalise { layout.block_max } else { 0 },
            rows: self.list.rows,
            slots: self.list.slots,
            count: self.list.count,
            scalars: layout.scalars,
            total: call.rows as i64,
            blocks: if normalise { blocks as i64 } else { 0 },
            scale: call.problem.logit_scale,
            scale_at: call.scale_at,
            is_double: i64::from(call.acc == DType::F64),
            in_place: 0,
            kept: if self.pieces.is_empty() { 0 } else { layout.kept },
            again: layout.again,
            least: self.least(),
        };
        // SAFETY: buffers of the layout.
        unsafe {
            call.stream.launch("live_rows", (blocks, 1), 256, 0, &live)?;
            call.stream.launch("select_rows", (select.blocks(), 1), 1024, 0, &select)
        }
    }

    /// The five planes of the fused gradient tile.
    unsafe fn coefficients(&self) -> Result<()> {
        let (call, rows) = (self.call, padded(self.call.rows));
        let params = params::Coefficients {
            saved: self.saved,
            grad: self.grad,
            list: self.list,
            targets: call.targets(),
            scalars: self.layout.scalars,
            coef: self.layout.coef,
            reference: self.layout.reference,
            target: self.layout.target,
            classes: call.classes as i64,
            ld_row: rows as i32,
            padded: rows as i32,
        };
        // SAFETY: buffers of the layout.
        unsafe { call.stream.launch("row_coefficients", (rows.div_ceil(256), 1), 256, 0, &params) }
    }

    /// Rows of the weight's gradient: dxᵀ E.
    unsafe fn weight_gradient(
        &self,
        order: Order,
        tile: Matrix,
        d_weight: Matrix,
        count: usize,
    ) -> Result<()> {
        let call = self.call;
        let facts = &call.stream.device.facts;
        let find = |operation| choose(facts, operation, call.dtype, false, count, call.features);
        // Float results, and rows that the copy engine cannot write, go through float tiles.
        let apart = self.layout.weight_sums.filter(|_| !d_weight.describable());
        let sums = apart.map(|address| {
            Matrix::packed(address, DType::F32, call.features, pitch(call.features, DType::F32))
        });
        let out = sums.unwrap_or(d_weight);
        let operation = if out.dtype == DType::F32 { Operation::DwF32 } else { Operation::Dw };
        let operands = Operands { a: tile, b: self.packed, d: Some(out) };
        let accumulate = self.accumulate_weight && apart.is_none();
        match find(operation).filter(|_| out.describable() && self.packed.describable()) {
            Some(choice) => {
                let epilogue = params::Gemm {
                    count: self.list.count,
                    count_is_k: 1,
                    alpha: self.alpha,
                    m: count as i32,
                    n: call.features as i32,
                    k: call.rows as i32,
                    accumulate: i32::from(accumulate),
                    scale: 1.0,
                    ..params::Gemm::default()
                };
                // SAFETY: operands checked, buffers of the layout.
                unsafe { ordered(call.stream, order, operation, &choice, &operands, epilogue)? };
                let Some(sums) = sums else { return Ok(()) };
                // SAFETY: as above.
                unsafe { write_sums(call.stream, sums, d_weight, count, self.accumulate_weight) }
            }
            None => {
                let epilogue = PlainEpilogue {
                    m: count,
                    n: call.features,
                    k: call.rows,
                    count: self.list.count,
                    count_is_k: true,
                    alpha: self.alpha,
                    accumulate: self.accumulate_weight,
                    logits: None,
                };
                let operands = Operands { d: Some(d_weight), ..operands };
                // SAFETY: as above.
                unsafe { plain(call.stream, operation, &operands, epilogue) }
            }
        }
    }

    /// Adds dx W of the chunk to the sums of the input's gradient, with dx the tile, or factors of its
    /// rows times the tile; how the other product may follow.
    pub unsafe fn input_gradient(
        &self,
        tile: Matrix,
        factors: usize,
        weight: Matrix,
        first: usize,
        count: usize,
    ) -> Result<Order> {
        let (call, slices) = (self.call, self.call.plan.slices);
        let facts = &call.stream.device.facts;
        let operands = Operands { a: tile, b: weight, d: Some(self.sums) };
        let shape = (call.rows, call.features, count);
        match choose_sliced(facts, call.dtype, shape, slices).filter(|_| weight.describable()) {
            Some((choice, _)) => {
                let epilogue = params::Gemm {
                    count: self.list.count,
                    coef: factors,
                    m: call.rows as i32,
                    n: call.features as i32,
                    k: count as i32,
                    ld_row: padded(call.rows) as i32,
                    accumulate: i32::from(first > 0),
                    scale: 1.0,
                    slices: slices as i32,
                    slice_rows: padded(call.rows) as i32,
                    ..params::Gemm::default()
                };
                // SAFETY: operands checked, buffers of the layout.
                unsafe {
                    tensor_cores(call.stream, Operation::DeF32, &choice, &operands, epilogue)?;
                }
                Ok(Order::beside(call.stream, &choice, shape, slices))
            }
            None => {
                assert_eq!(factors, 0, "plans keep exponentials where tensor cores take them");
                let epilogue = PlainEpilogue {
                    m: call.rows,
                    n: call.features,
                    k: count,
                    count: self.list.count,
                    accumulate: first > 0,
                    ..PlainEpilogue::default()
                };
                // SAFETY: as above.
                unsafe { plain(call.stream, Operation::DeF32, &operands, epilogue)? };
                Ok(Order::After)
            }
        }
    }

    /// The sums to the rows' places, with the targets' part of kept classes; skipped rows become 0.
    unsafe fn scatter(&self) -> Result<()> {
        let (call, Some(d_input)) = (self.call, &self.gradients.input) else { return Ok(()) };
        let targets = self.layout.factors.map_or(0, |factors| factors.target_factor);
        let params = params::Scatter {
            onehot_w: call.weight.address,
            onehot_g: targets,
            onehot_target: self.store.map_or(0, |store| store.target),
            onehot_ld: call.weight.row_stride,
            kept: self.layout.kept,
            kept_classes: self.kept_classes() as i32,
            target: row_view(d_input),
            list: self.list,
            packed: self.sums.address,
            factor: self.alpha,
            pitch: self.sums.row_stride,
            slice: padded(call.rows) as i64 * self.sums.row_stride,
            features: call.features as i32,
            accumulate: i32::from(self.gradients.accumulate_input),
            slices: call.plan.slices as i32,
        };
        let name = format!("scatter_rows_{}_{}", suffix(call.acc), suffix(d_input.dtype()));
        // SAFETY: operands checked, buffers of the layout; what the gradient lent has been read.
        unsafe { call.stream.launch(&name, (params.blocks(), 1), 256, 0, &params) }
    }
}
