//! Sizes: how a call is cut into tiles, and every byte of memory that this takes.
//!
//! One pure function makes them; the engines allocate what it says.

use crate::element::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, LANES};
use crate::level::{WithKernel, dispatch};
use crate::rows::Key;
use crate::scratch::{Arena, Region};
use crate::spec::Spec;
use crate::stats::Lane;

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
    /// Scratch of a forward, beside `threads_bytes` for each thread.
    pub forward_bytes: usize,
    /// Scratch of a backward, beside `threads_bytes` for each thread.
    pub backward_bytes: usize,
    /// Logits kept from the forward for the backward, in the caller's memory.
    pub store_bytes: usize,
    /// Scratch of each thread.
    pub threads_bytes: usize,
    /// Named shares of the bytes above.
    pub parts: Vec<(&'static str, usize)>,
    /// How the forward is cut.
    pub(crate) forward: Forward,
    /// How the backward is cut.
    pub(crate) backward: Backward,
    /// Gradients that the backward may be asked for.
    pub(crate) gradients: u32,
}

impl Plan {
    /// The most that is held at once with so many threads.
    pub fn workspace_bytes(&self, threads: usize) -> usize {
        self.store_bytes
            + self.forward_bytes.max(self.backward_bytes)
            + threads.max(1) * self.threads_bytes
    }
}

/// What the engines' cuts have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tiling {
    /// Classes of a tile.
    pub block: usize,
    /// Classes of a tile, padded for the kernel.
    pub padded_block: usize,
    /// Features, padded for the kernel.
    pub depth: usize,
    /// Step between rows of packed `W`: off the powers of two, so that rows spread over cache sets.
    pub weight_row: usize,
    /// Tiles of all classes.
    pub blocks: usize,
    /// Leading tiles whose logits are stored.
    pub stored_blocks: usize,
}

/// How a forward is cut.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Forward {
    pub tiling: Tiling,
    /// Panels of a row group.
    pub group: usize,
    /// Tiles of a class chunk: the classes of one state.
    pub chunk: usize,
    /// Panels of a task.
    pub span: usize,
    /// Lanes of the states of all statistics.
    pub lanes: usize,
    pub list: Region,
    pub keys: Region,
    pub key_counts: Region,
    pub panels: Region,
    pub states: Region,
    /// Regions of each thread, from its own start on.
    pub tile: Region,
    pub exps: Region,
    pub weight: Region,
    pub bias: Region,
}

/// How a backward is cut.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Backward {
    pub tiling: Tiling,
    /// Panels of a row group.
    pub group: usize,
    /// Tiles of a class super-block.
    pub chunk: usize,
    /// Panels of a task of dE.
    pub span: usize,
    /// Features of a task of dE.
    pub features: usize,
    /// Strips of 32 features.
    pub strips: usize,
    /// Lanes of a panel's gradient coefficients.
    pub lanes: usize,
    /// Single-logit gradients of a row, at most.
    pub points: usize,
    pub list: Region,
    pub coefficients: Region,
    pub point_list: Region,
    pub point_counts: Region,
    pub panels: Region,
    pub strip_panels: Region,
    /// Gradient tiles in operand format, two buffers; the second order of a narrow kernel follows.
    pub dz: [Region; 2],
    pub dz_pairs: [Region; 2],
    /// Step between panels of `dz`, in operands.
    pub dz_panel: usize,
    pub weight: [Region; 2],
    pub columns: [Region; 2],
    pub d_input: Region,
    pub d_weight: Region,
    pub d_bias: Region,
    pub d_scale: Region,
    /// Regions of each thread, from its own start on.
    pub tile: Region,
    pub raw: Region,
    pub strip: Region,
    pub bias: Region,
    pub bias_lanes: Region,
}

/// The sizes that a kernel brings.
struct KernelSizes {
    step: usize,
    m: usize,
    column: bool,
    operand: usize,
    acc: usize,
    narrow: bool,
}

struct Measure;

impl WithKernel for Measure {
    type Output = KernelSizes;
    fn with<K: Kernel>(self, _: K) -> KernelSizes {
        KernelSizes {
            step: K::K_STEP,
            m: K::M_STEP,
            column: K::COLUMN_A,
            operand: size_of::<K::Operand>(),
            acc: size_of::<K::Acc>(),
            narrow: K::GROUP > 1,
        }
    }
}

/// Sizes a call.
///
/// # Errors
/// No class or no feature, or more than the engine can index; an unavailable `LOGITLESS_CPU`.
pub fn plan(
    spec: &Spec,
    rows: usize,
    features: usize,
    classes: usize,
    dtype: DType,
    memory: Memory,
    gradients: u32,
) -> Result<Plan> {
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
    let sizes = dispatch(dtype, Measure)?;
    let panels = rows.div_ceil(LANES);
    let unit = least_common_multiple(sizes.m, sizes.step);
    let block = (TILE / unit * unit).min(classes);
    let depth = features.next_multiple_of(sizes.step);
    let tile_bytes = block * LANES * sizes.acc;
    let blocks = classes.div_ceil(block);
    let store = match memory {
        _ if gradients == 0 => 0,
        Memory::Lean => 0,
        Memory::Fast => usize::MAX,
        Memory::Bytes(bytes) => bytes,
    };
    let stored_blocks = (store / (tile_bytes * panels.max(1))).min(blocks);
    let padding = LINE / sizes.operand;
    let tiling = Tiling {
        block,
        padded_block: block.next_multiple_of(sizes.step),
        depth,
        weight_row: depth.next_multiple_of(padding) + padding,
        blocks,
        stored_blocks,
    };

    let (forward, shared, each) = forward(spec, &sizes, tiling, panels);
    let (mut parts, forward_bytes, forward_each) = (shared.parts, shared.bytes, each.bytes);
    parts.extend(each.parts);
    let (backward, shared, each) = if gradients == 0 {
        (Backward::default(), Arena::default(), Arena::default())
    } else {
        backward(spec, &sizes, tiling, panels, features, gradients)
    };
    parts.extend(shared.parts.into_iter().chain(each.parts));
    let store_bytes = stored_blocks * panels * tile_bytes;
    if store_bytes > 0 {
        parts.push(("store.logits", store_bytes));
    }
    Ok(Plan {
        rows,
        features,
        classes,
        dtype,
        forward_bytes,
        backward_bytes: shared.bytes,
        store_bytes,
        threads_bytes: forward_each.max(each.bytes),
        parts,
        forward,
        backward,
        gradients,
    })
}

/// The tallest tile: with 32 rows of f32 it and a block of operands share the first-level cache.
const TILE: usize = 128;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Panels of a row group of the forward: 1024 rows, so that `W` is streamed once for each 1024.
const FORWARD_GROUP: usize = 32;
/// Class chunks of the forward: enough for many threads, few enough to keep states small.
const CHUNKS: usize = 64;
/// Bytes that the states of a row group may take before its rows are cut.
const STATES: usize = 8 << 20;
/// Panels of a row group of the backward.
const BACKWARD_GROUP: usize = 64;
/// Bytes of a buffer of gradient tiles.
const DZ: usize = 2 << 20;

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

fn forward(
    spec: &Spec,
    sizes: &KernelSizes,
    tiling: Tiling,
    panels: usize,
) -> (Forward, Arena, Arena) {
    let (mut shared, mut each) = (Arena::default(), Arena::default());
    let lanes: usize = spec.statistics.iter().map(|statistic| statistic.lanes()).sum();
    let chunk = tiling.blocks.div_ceil(CHUNKS).max(4.min(tiling.blocks));
    let chunks = tiling.blocks.div_ceil(chunk);
    let state = lanes * size_of::<Lane>();
    let mut group = panels.clamp(1, FORWARD_GROUP);
    while group > 4 && chunks * group * state > STATES {
        group = group.div_ceil(2);
    }
    // With few chunks, rows are shared out too.
    let span = group.div_ceil(16usize.div_ceil(chunks)).max(1);
    let rows = group * LANES;
    let shares = spec.statistics.iter().filter(|statistic| statistic.shares_exps()).count() > 1;
    let tile = tiling.block * LANES;
    let forward = Forward {
        tiling,
        group,
        chunk,
        span,
        lanes,
        list: shared.take("forward.rows", panels * LANES, size_of::<u32>()),
        keys: shared.take("forward.targets", rows * spec.targets(), size_of::<Key>()),
        key_counts: shared.take("forward.targets", group, size_of::<usize>()),
        panels: shared.take("forward.input", rows * tiling.depth, sizes.operand),
        states: shared.take("forward.states", chunks * group, state),
        tile: each.take("thread.logits", tile, sizes.acc),
        exps: each.take("thread.exponentials", if shares { tile } else { 0 }, sizes.acc),
        weight: each.take("thread.weight", tiling.block * tiling.weight_row, sizes.operand),
        bias: each.take("thread.bias", tiling.block, sizes.acc),
    };
    (forward, shared, each)
}

fn backward(
    spec: &Spec,
    sizes: &KernelSizes,
    tiling: Tiling,
    panels: usize,
    features: usize,
    gradients: u32,
) -> (Backward, Arena, Arena) {
    let (mut shared, mut each) = (Arena::default(), Arena::default());
    let has = |gradient: u32| gradients & gradient != 0;
    let only = |condition: bool, count: usize| if condition { count } else { 0 };
    let (input, weight) = (has(wanted::INPUT), has(wanted::WEIGHT));
    let group = panels.clamp(1, BACKWARD_GROUP);
    let groups = panels.div_ceil(group);
    let order = if sizes.narrow { 2 } else { 1 };
    let block_bytes = group * LANES * tiling.padded_block * sizes.operand * order;
    let chunk = (DZ / block_bytes).clamp(2, 64).min(tiling.blocks.div_ceil(4)).max(1);
    let strips = features.div_ceil(LANES);
    let tasks = features.div_ceil(TILE);
    let lanes = crate::gradient::lanes(spec);
    let points = crate::gradient::points(spec);
    let rows = panels * LANES;
    let chunk_classes = chunk * tiling.padded_block;
    let dz_panel = (chunk_classes + 15) * LANES;
    let tile = tiling.padded_block * LANES;
    let again = groups > 1;
    let twice = |shared: &mut Arena, name, count, size| {
        [shared.take(name, count, size), shared.take(name, count, size)]
    };
    let backward = Backward {
        tiling,
        group,
        chunk,
        span: 8,
        features: features.div_ceil(tasks).next_multiple_of(16),
        strips,
        lanes,
        points,
        list: shared.take("backward.rows", rows, size_of::<u32>()),
        coefficients: shared.take("backward.coefficients", rows * lanes, sizes.acc),
        point_list: shared.take(
            "backward.points",
            rows * points,
            size_of::<crate::gradient::Point>(),
        ),
        point_counts: shared.take("backward.points", panels, size_of::<usize>()),
        panels: shared.take("backward.input", rows * tiling.depth, sizes.operand),
        strip_panels: shared.take(
            "backward.strips",
            only(weight, rows * strips * LANES),
            sizes.operand,
        ),
        dz: twice(&mut shared, "backward.dz", group * dz_panel, sizes.operand),
        dz_pairs: twice(
            &mut shared,
            "backward.dz",
            only(sizes.narrow, group * dz_panel),
            sizes.operand,
        ),
        dz_panel,
        weight: twice(
            &mut shared,
            "backward.weight",
            chunk * tiling.block * tiling.weight_row,
            sizes.operand,
        ),
        columns: twice(
            &mut shared,
            "backward.weight",
            only(!sizes.column && input, chunk * features * tiling.padded_block),
            sizes.operand,
        ),
        d_input: shared.take("backward.d_input", only(input, rows * features), sizes.acc),
        d_weight: shared.take(
            "backward.d_weight",
            only(weight && again, chunk * tile * strips),
            sizes.acc,
        ),
        d_bias: shared.take("backward.d_bias", only(has(wanted::BIAS), chunk * tiling.block), 8),
        d_scale: shared.take("backward.d_scale", only(has(wanted::SCALE), tiling.blocks), 8),
        tile: each.take("thread.logits", tile, sizes.acc),
        raw: each.take("thread.products", only(has(wanted::SCALE), tile), sizes.acc),
        strip: each.take("thread.strip", only(weight, tile), sizes.acc),
        bias: each.take("thread.bias", tiling.block, sizes.acc),
        bias_lanes: each.take("thread.bias", only(has(wanted::BIAS), tile), sizes.acc),
    };
    (backward, shared, each)
}
