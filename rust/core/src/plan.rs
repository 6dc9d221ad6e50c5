//! Sizes of a call: how much memory it takes, and in what shares.
//!
//! [`plan`] is a pure function; the engines allocate what it says. How a call is cut into tiles,
//! from which the bytes follow, is in [`crate::layout`].

use crate::element::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, LANES};
use crate::layout::{Backward, Forward, Sizes, Tiling};
use crate::level::{WithKernel, dispatch};
use crate::rows::Key;
use crate::spec::Spec;

/// How much memory a backward may trade for time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// As little as possible: logits are computed a second time.
    Lean,
    /// All logits are kept from the forward: three matrix products instead of four.
    Fast,
    /// At most so many bytes of logits are kept.
    Bytes(usize),
}

/// Bits of the wanted gradients.
pub mod wanted {
    /// Gradient of the input.
    pub const INPUT: u32 = 1;
    /// Gradient of the weight.
    pub const WEIGHT: u32 = 2;
    /// Gradient of the bias.
    pub const BIAS: u32 = 4;
    /// Gradient of the logit scale.
    pub const SCALE: u32 = 8;
    /// Gradient of the dense weights of `dot`.
    pub const DENSE: u32 = 16;
}

/// The sizes of a forward and of its backward.
///
/// A call on t threads allocates `forward_bytes + t · threads_bytes`, or the same with
/// `backward_bytes`, in one block that it frees; `store_bytes` are the caller's.
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
    /// Scratch of a forward, beside that of its threads.
    pub forward_bytes: usize,
    /// Scratch of a backward, beside that of its threads.
    pub backward_bytes: usize,
    /// Logits kept from the forward for the backward, in the caller's memory.
    pub store_bytes: usize,
    /// Scratch of each thread.
    pub threads_bytes: usize,
    /// Named shares of the bytes above; those of a thread begin with `thread.`.
    pub parts: Vec<(&'static str, usize)>,
    pub(crate) sizes: Sizes,
    pub(crate) memory: Memory,
    pub(crate) gradients: u32,
}

impl Plan {
    /// The most that is held at once with so many threads.
    pub fn workspace_bytes(&self, threads: usize) -> usize {
        let scratch = self.forward_bytes.max(self.backward_bytes);
        self.store_bytes + scratch + threads.max(1) * self.threads_bytes
    }
}

/// What a kernel brings to the sizes.
struct Measure;

/// Bytes and steps of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Kernels {
    pub k_step: usize,
    pub m_step: usize,
    pub column_a: bool,
    pub operand: usize,
    pub acc: usize,
    /// Operands are narrower than accumulators, and gradient tiles come in two orders.
    pub narrow: bool,
}

impl WithKernel for Measure {
    type Output = Kernels;
    fn with<K: Kernel>(self, _: K) -> Kernels {
        Kernels {
            k_step: K::K_STEP,
            m_step: K::M_STEP,
            column_a: K::COLUMN_A,
            operand: size_of::<K::Operand>(),
            acc: size_of::<K::Acc>(),
            narrow: K::GROUP > 1,
        }
    }
}

/// Sizes a call. `contiguous` says that the features of each class of the weight are adjacent in
/// memory; a call that finds them otherwise sizes itself anew.
///
/// # Errors
/// No class or no feature, or more than the engine can index; an unavailable `LOGITLESS_CPU`.
#[allow(clippy::too_many_arguments)]
pub fn plan(
    spec: &Spec,
    rows: usize,
    features: usize,
    classes: usize,
    dtype: DType,
    memory: Memory,
    gradients: u32,
    contiguous: bool,
) -> Result<Plan> {
    check(spec, rows, features, classes, dtype)?;
    let kernels = dispatch(dtype, Measure)?;
    let tiling = Tiling::new(&kernels, features, classes);
    let panels = rows.div_ceil(LANES);
    let tile_bytes = tiling.block * LANES * kernels.acc;
    let kept = match memory {
        _ if gradients == 0 => 0,
        Memory::Lean => 0,
        Memory::Fast => usize::MAX,
        Memory::Bytes(bytes) => bytes,
    };
    let stored_blocks = (kept / (tile_bytes * panels.max(1))).min(tiling.blocks);
    let same_type = dtype == dtype.accumulator();
    let sizes = Sizes {
        kernels,
        tiling: Tiling { stored_blocks, ..tiling },
        rows,
        features,
        targets: spec.targets(),
        state_lanes: spec.statistics.iter().map(|statistic| statistic.lanes()).sum(),
        shares_exps: spec.statistics.iter().filter(|s| s.shares_exps()).count() > 1,
        coefficient_lanes: crate::gradient::lanes(spec),
        points: crate::gradient::points(spec),
        gradients,
        same_type,
        in_place: contiguous && tiling.reads_in_place(&kernels, features, same_type),
    };
    let forward = Forward::new(&sizes, 1);
    let mut parts = forward.parts();
    let (mut backward_bytes, mut threads_bytes) = (0, forward.each_bytes);
    if gradients != 0 {
        let backward = Backward::new(&sizes, 1);
        let growth = Backward::growth(&sizes);
        backward_bytes = backward.shared_bytes - growth.min(backward.shared_bytes);
        threads_bytes = threads_bytes.max(backward.each_bytes + growth);
        parts.extend(backward.parts());
        parts.push(("thread.gradient_tiles", growth));
    }
    let store_bytes = stored_blocks * panels * tile_bytes;
    parts.push(("store.logits", store_bytes));
    parts.retain(|&(_, bytes)| bytes > 0);
    let forward_bytes = forward.shared_bytes;
    Ok(Plan {
        rows,
        features,
        classes,
        dtype,
        forward_bytes,
        backward_bytes,
        store_bytes,
        threads_bytes,
        parts,
        sizes,
        memory,
        gradients,
    })
}

/// Checks the arguments of [`plan`].
fn check(spec: &Spec, rows: usize, features: usize, classes: usize, dtype: DType) -> Result<()> {
    let range = |argument, value: usize, most: usize| {
        if (1..=most).contains(&value) {
            return Ok(());
        }
        let expected = format!("1 to {most}");
        Err(Error::Value { argument, value: value.to_string(), expected })
    };
    range("features", features, 1 << 32)?;
    range("classes", classes, Key::MAX_CLASSES)?;
    range("rows", rows.max(1), u32::MAX as usize)?;
    if !dtype.is_float() {
        let expected = "float32, float64, bfloat16 or float16".into();
        return Err(Error::DType { argument: "input", dtype: dtype.name(), expected });
    }
    if spec.topk() > classes {
        return Err(Error::Value {
            argument: "topk",
            value: spec.topk().to_string(),
            expected: format!("at most the number of classes, {classes}"),
        });
    }
    Ok(())
}
