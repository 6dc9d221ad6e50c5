//! Sizes: which path a call takes, how it is cut into chunks of classes, and every byte that it needs.
//!
//! One pure function of the shapes, the wanted gradients and the device makes a plan. The chunk of
//! classes is what `layout` leaves of the budget.

use logitless_core::{DType, Error as CallError, Memory, Spec, Tensor, wanted};

use crate::blocks::{self, Blocks};
use crate::driver::{self, Facts};
use crate::error::Result;
use crate::frozen;
use crate::layout::{
    Arena, BackwardLayout, ForwardLayout, Geometry, StoreLayout, StoredBackwardLayout,
    StoredForwardLayout, padded,
};
use crate::params::MAX_POWERS;
use crate::partly::partly_stored;
use crate::product::{Matrix, Operation, choose, exists, slices};
use crate::share::{Lends, Outputs, Share};
use crate::widths::backward_width;

/// Where statistics are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// In the epilogue of E Wᵀ, which writes this many planes of partials.
    Fused { planes: usize },
    /// From tiles of logits in memory.
    Tiled,
}

/// The sizes of a forward and of its backward on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// N.
    pub rows: usize,
    /// D.
    pub features: usize,
    /// V.
    pub classes: usize,
    /// Element type of the input.
    pub dtype: DType,
    /// Workspace of a forward.
    pub forward_bytes: usize,
    /// Workspace of a backward.
    pub backward_bytes: usize,
    /// Kept from the forward for the backward.
    pub store_bytes: usize,
    /// Named shares of the workspaces.
    pub parts: Vec<(&'static str, usize)>,
    /// `frozen`, `stored`, `partly stored`, `fused` or `tiled`.
    pub mode: &'static str,
    /// Classes a chunk, forward and backward.
    pub chunks: (usize, usize),
    pub(crate) path: Path,
    pub(crate) direct_weight: bool,
    pub(crate) gradients: u32,
    /// Exponentials of every class are kept from the forward to the backward.
    pub(crate) stored: bool,
    /// The forward makes the input's gradient but for factors.
    pub(crate) frozen: bool,
    /// Shares that the input's gradient sums its classes in.
    pub(crate) slices: usize,
    /// Gradients of bias and scale are summed before the logits' are rounded to 16 bits.
    pub(crate) unrounded: bool,
    /// The classes whose exponentials are kept, where that is not all or none.
    pub(crate) share: Share,
    /// The gradient of the input can hold the packed input.
    pub(crate) compact: bool,
    /// Rows are cut into blocks.
    pub(crate) blocks: Blocks,
}

impl Plan {
    /// Bytes of exponentials that the memory of the weight's gradient holds from the forward on.
    pub fn lent_bytes(&self) -> usize {
        self.share.lent_bytes(self.rows)
    }

    /// Whether the store counts on what the caller said that it lends: good for one backward.
    pub fn on_loan(&self) -> bool {
        self.share.lends != Lends::Nothing
    }
}

/// Whether tensor-core kernels can read a weight in place; otherwise plans need `contiguous = false`.
pub fn describable(weight: &Tensor) -> bool {
    weight.shape().len() == 2 && Matrix::of(weight).describable()
}

/// The forward product of a path.
pub(crate) fn partials(path: Path) -> Operation {
    match path {
        Path::Fused { planes: 7 } => Operation::Statistics,
        Path::Fused { planes: 2 } => Operation::OnlineRest,
        _ => Operation::Online,
    }
}

/// Sizes the workspaces of a forward and its backward on a device.
///
/// `contiguous` says that the weight is [`describable`]; if not, chunks of it are copied. `outputs`
/// says what the memory of the gradients may serve for before they are written.
///
/// # Errors
/// A parameter beyond what the kernels take, or no usable device.
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn plan(
    spec: &Spec,
    rows: usize,
    features: usize,
    classes: usize,
    dtype: DType,
    memory: Memory,
    gradients: u32,
    contiguous: bool,
    device: usize,
    outputs: Outputs,
) -> Result<Plan> {
    let facts = &driver::device(device)?.facts;
    plan_for(spec, rows, features, classes, dtype, memory, gradients, contiguous, facts, outputs)
}

/// `plan` on a device of the given facts.
#[expect(clippy::too_many_arguments, reason = "as above")]
pub(crate) fn plan_for(
    spec: &Spec,
    rows: usize,
    features: usize,
    classes: usize,
    dtype: DType,
    memory: Memory,
    gradients: u32,
    contiguous: bool,
    facts: &Facts,
    outputs: Outputs,
) -> Result<Plan> {
    let limit = |argument, value: usize, least: usize, most: usize| {
        let expected = format!("{least} to {most} on CUDA");
        if (least..=most).contains(&value) {
            Ok(())
        } else {
            Err(CallError::Value { argument, value: value.to_string(), expected })
        }
    };
    limit("powers", spec.powers().len(), 0, MAX_POWERS)?;
    for (argument, value, least) in
        [("rows", rows, 0), ("features", features, 1), ("classes", classes, 1)]
    {
        limit(argument, value, least, i32::MAX as usize - 65_536)?;
    }
    limit("topk", spec.topk(), 0, classes)?;
    if !dtype.is_float() {
        let expected = "float32, float64, bfloat16 or float16".into();
        return Err(CallError::DType { argument: "input", dtype: dtype.name(), expected }.into());
    }
    let path = path(spec, dtype, facts, rows, classes);
    let mode = if path == Path::Tiled { "tiled" } else { "fused" };
    let mut plan = Plan {
        rows,
        features,
        classes,
        dtype,
        forward_bytes: 0,
        backward_bytes: 0,
        store_bytes: 0,
        parts: Vec::new(),
        mode,
        chunks: (0, 0),
        path,
        direct_weight: contiguous,
        gradients,
        stored: false,
        frozen: false,
        share: Share::default(),
        compact: outputs.compact,
        slices: 1,
        unrounded: false,
        blocks: Blocks::default(),
    };
    let sums = gradients & (wanted::BIAS | wanted::SCALE) != 0;
    // A fused tile gets the cotangent of `max` when it has been rounded.
    let with_tile = !spec.statistics().any(|name| name == "max")
        && exists(facts, Operation::GradientSums, dtype);
    plan.unrounded = sums && dtype != dtype.accumulator() && (path == Path::Tiled || with_tile);
    // d(logit_scale) may read the sums; a chunk of the classes keeps the slices of all.
    if gradients & wanted::INPUT != 0 && (gradients & wanted::SCALE == 0 || plan.unrounded) {
        plan.slices = slices(facts, dtype, (rows, features, classes));
    }
    let g = Geometry::new(spec, &plan, facts);

    if frozen::plan(&mut plan, &g, spec, memory, facts) {
        return Ok(plan);
    }
    plan.chunks.0 = match path {
        Path::Fused { .. } if contiguous => classes.max(1),
        // A tile of logits that stays in a large L2 on its way to the row kernel, and fills the device.
        _ => (TILE_BYTES / (padded(rows).max(1) * g.acc().size()))
            .clamp(512, 32_768)
            .next_multiple_of(384)
            .min(classes.next_multiple_of(64).max(64)),
    };
    let lean = lean_budget(&g);
    let budget = match memory {
        Memory::Lean => lean,
        Memory::Fast => lean.max(g.rows * 2 * 16_896 * g.dtype.size() + (256 << 20)),
        Memory::Bytes(bytes) => lean.max(bytes),
    };
    let storable = may_store(&g, spec, facts);
    if storable {
        let mut arena = Arena::at(0);
        StoreLayout::lay(&mut arena, &g);
        let allowed = match memory {
            Memory::Lean => 0,
            Memory::Fast => usize::MAX,
            Memory::Bytes(bytes) => bytes,
        };
        // An entropy's gradient is not a factor a row: it takes a pass over chunks, all of them or some.
        if arena.used <= allowed && !g.entropy() {
            return Ok(stored_plan(plan, &g, arena));
        }
        if memory != Memory::Fast
            && let Some(whole) = stored_on_loan(&plan, &g, arena, memory, outputs.lends)
        {
            return Ok(whole);
        }
    }
    if let Some(cut) = blocks::plan(&plan, &g, budget, facts) {
        return Ok(cut);
    }
    if storable && let Some(partly) = partly_stored(&plan, &g, spec, memory, facts, outputs.lends) {
        return Ok(partly);
    }
    let mut arena = Arena::at(0);
    ForwardLayout::lay(&mut arena, &g, plan.chunks.0);
    plan.forward_bytes = arena.used;
    plan.parts = arena.parts;
    if gradients != 0 {
        let width = backward_width(&g, budget, facts);
        let mut arena = Arena::at(0);
        BackwardLayout::lay(&mut arena, &g, width, g.may_borrow());
        plan.chunks.1 = width;
        plan.backward_bytes = arena.used;
        if plan.backward_bytes > plan.forward_bytes {
            plan.parts = arena.parts;
        }
    }
    Ok(plan)
}

/// Whether a backward can be made of stored exponentials: cross entropy and entropy in bf16 (f16
/// overflows at e^11), the weight's gradient wanted and writable in place, and nothing that needs the
/// logits.
fn may_store(g: &Geometry, spec: &Spec, facts: &Facts) -> bool {
    (g.path == Path::Fused { planes: 2 } || g.entropy())
        && g.dtype == DType::Bf16
        && spec.targets() == 1
        && spec.statistics().any(|name| name == "rest")
        && g.wants(wanted::WEIGHT)
        && !g.wants(wanted::SCALE)
        && g.weight_rows_fit()
        && [Operation::StoreExp, Operation::StoreMoment, Operation::Repair, Operation::De]
            .iter()
            .all(|&operation| exists(facts, operation, g.dtype))
}

/// The plan of the stored mode.
fn stored_plan(mut plan: Plan, g: &Geometry, store: Arena) -> Plan {
    let (mut forward, mut backward) = (Arena::at(0), Arena::at(0));
    StoredForwardLayout::lay(&mut forward, g);
    StoredBackwardLayout::lay(&mut backward, g);
    (plan.store_bytes, plan.forward_bytes, plan.backward_bytes) =
        (store.used, forward.used, backward.used);
    plan.parts = store.parts;
    plan.parts.extend(if forward.used > backward.used { forward.parts } else { backward.parts });
    plan.chunks = (plan.classes, plan.classes);
    plan.mode = "stored";
    plan.stored = true;
    plan
}

/// The same where a store of every class fits into what one backward may hold beside the gradients.
fn stored_on_loan(
    plan: &Plan,
    g: &Geometry,
    store: Arena,
    memory: Memory,
    lends: Lends,
) -> Option<Plan> {
    // Exponentials in 16 bits would show in sums that cancel: only who asks for them gets them.
    if lends == Lends::Nothing || g.entropy() || (memory == Memory::Lean && g.unrounded) {
        return None;
    }
    let whole = stored_plan(plan.clone(), g, store);
    let lean = lean_budget(g);
    // The gradient of the input does not exist before the backward.
    let forward = whole.store_bytes + whole.forward_bytes <= lean + g.input_gradient_bytes();
    let backward = whole.store_bytes + whole.backward_bytes <= lean;
    let share = Share { lends, ..Share::default() };
    (forward && backward).then_some(Plan { share, ..whole })
}

/// Bytes of a tile of logits on the tiled path.
const TILE_BYTES: usize = 64 << 20;

/// The fused path where its epilogues make everything that is wanted.
fn path(spec: &Spec, dtype: DType, facts: &Facts, rows: usize, classes: usize) -> Path {
    let has = |name: &str| spec.statistics().any(|other| other == name);
    let planes = match () {
        () if ["sum", "sum_sq", "variance", "max"].iter().any(|name| has(name)) => 7,
        // Where one kernel serves both, it writes the moment too.
        () if has("entropy") || !exists(facts, Operation::OnlineRest, dtype) => 3,
        () => 2,
    };
    let fused = spec.targets() <= 1
        && spec.statistics().all(|name| {
            ["rest", "target", "entropy", "sum", "sum_sq", "variance", "max"].contains(&name)
        });
    let path = Path::Fused { planes };
    let available = [partials(path), Operation::Gradient, Operation::DwF32, Operation::DeF32]
        .iter()
        .all(|&operation| choose(facts, operation, dtype, true, rows, classes).is_some());
    if fused && available { path } else { Path::Tiled }
}

/// Lean's promise: a quarter of the gradients beside them, or 256 MiB. Out of it come what a loss
/// has of its rows (statistics, cotangents, losses) and what an allocator rounds up: torch's leaves
/// as much as a MiB of a block unsplit, of four blocks.
pub(crate) fn lean_budget(g: &Geometry) -> usize {
    let gradient = |bit, bytes: usize| if g.gradients & bit != 0 { bytes } else { 0 };
    let gradients = gradient(wanted::INPUT, g.rows * g.features * g.dtype.size())
        + gradient(wanted::WEIGHT, g.classes * g.features * g.dtype.size());
    (gradients / 4).max(256 << 20).saturating_sub(32 * g.rows + (4 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(statistics: &[&str], targets: usize, memory: Memory, gradients: u32) -> Plan {
        let spec = Spec::new(statistics, &[], 0, 0, targets).unwrap();
        plan_for(
            &spec,
            8192,
            4096,
            128_256,
            DType::Bf16,
            memory,
            gradients,
            true,
            &Facts::h200(),
            Outputs::default(),
        )
        .unwrap()
    }

    #[test]
    fn lean_keeps_its_promise() {
        for gradients in [1, 2, 3, 7, 15] {
            let plan = make(&["rest", "target"], 1, Memory::Lean, gradients);
            let bytes =
                |bit: u32, rows: usize| if gradients & bit != 0 { rows * 4096 * 2 } else { 0 };
            let outputs = bytes(1, 8192) + bytes(2, 128_256);
            let held = plan.store_bytes + plan.backward_bytes;
            assert!(held <= (outputs / 4).max(256 << 20), "{plan:?}");
            assert_eq!(plan.store_bytes > 0, plan.frozen);
        }
    }

    #[test]
    fn fast_stores_cross_entropy_where_a_kernel_can() {
        let spec = Spec::new(&["rest", "target"], &[], 0, 0, 1).unwrap();
        let plan = make(&["rest", "target"], 1, Memory::Fast, 3);
        let possible = exists(&Facts::h200(), Operation::StoreExp, DType::Bf16);
        assert_eq!(plan.stored, possible);
        assert_eq!(plan.store_bytes > 8192 * 128_256 * 2, possible);
        // The scale's gradient needs sums in float.
        assert!(!make(&["rest", "target"], 1, Memory::Fast, 11).stored);
        let tiny = plan_for(
            &spec,
            8,
            64,
            100,
            DType::F16,
            Memory::Fast,
            3,
            true,
            &Facts::h200(),
            Outputs::default(),
        )
        .unwrap();
        assert!(!tiny.stored);
    }

    #[test]
    fn what_the_epilogues_lack_goes_through_tiles() {
        for (statistics, targets) in [(&["rest", "target"][..], 3), (&["dot", "rest"], 1)] {
            assert_eq!(make(statistics, targets, Memory::Lean, 3).path, Path::Tiled);
        }
    }

    #[test]
    fn layouts_are_linear_in_the_width() {
        let spec = Spec::new(&["rest", "target"], &[], 0, 0, 1).unwrap();
        for contiguous in [true, false] {
            for dtype in [DType::Bf16, DType::F32, DType::F64] {
                let facts = Facts::h200();
                let plan = plan_for(
                    &spec,
                    1000,
                    33,
                    5003,
                    dtype,
                    Memory::Lean,
                    15,
                    contiguous,
                    &facts,
                    Outputs::default(),
                );
                let g = Geometry::new(&spec, &plan.unwrap(), &facts);
                for borrow in [true, false] {
                    for width in [64, 640, 4992] {
                        let mut arena = Arena::at(0);
                        BackwardLayout::lay(&mut arena, &g, width, borrow);
                        assert_eq!(BackwardLayout::widest(&g, arena.used, borrow), width);
                        assert_eq!(BackwardLayout::widest(&g, arena.used - 1, borrow), width - 64);
                    }
                }
            }
        }
    }

    #[test]
    fn too_many_exponents_are_refused() {
        let spec = Spec::new(&["rest_power"], &[2.0; 9], 0, 0, 0).unwrap();
        let plan = plan_for(
            &spec,
            8,
            8,
            8,
            DType::F32,
            Memory::Lean,
            0,
            true,
            &Facts::h200(),
            Outputs::default(),
        );
        assert!(plan.unwrap_err().to_string().contains("0 to 8"));
    }

    #[test]
    fn nonsense_is_refused() {
        let spec = Spec::new(&["rest", "topk"], &[], 0, 9, 0).unwrap();
        for (features, classes, dtype, word) in [
            (0, 9, DType::F32, "features"),
            (8, 0, DType::F32, "classes"),
            (8, 9, DType::I64, "input"),
            (8, 8, DType::F32, "topk"),
        ] {
            let (memory, outputs) = (Memory::Lean, Outputs::default());
            let plan = plan_for(
                &spec,
                8,
                features,
                classes,
                dtype,
                memory,
                0,
                true,
                &Facts::h200(),
                outputs,
            );
            let error = plan.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
