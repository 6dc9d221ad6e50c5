//! How a call is cut into tiles, and where in its block of scratch everything lies.

use crate::gradient::Point;
use crate::kernel::LANES;
use crate::plan::{Kernels, wanted};
use crate::rows::Key;
use crate::scratch::{Arena, Region};
use crate::stats::Lane;

/// The tallest tile: with 32 rows of f32 it shares the first-level cache with a block of operands.
const TILE: usize = 128;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Panels of a row group: 1024 rows, so that `W` is streamed once for each 1024.
const GROUP: usize = 32;
/// The same for a backward with classes outside, where shorter groups leave room for more classes.
const INNER_GROUP: usize = 16;
/// Bytes of right operand that one product goes through: they stay in the first-level cache.
const OPERAND: usize = 32 << 10;
/// Class chunks of the forward: enough for many threads, few enough to keep states small.
const CHUNKS: usize = 64;
/// The same where states are large: the lists of `topk` start anew in every chunk.
const LONG_CHUNKS: usize = 16;
/// Lanes of a large state.
const LARGE: usize = 32;
/// Bytes that the states of a row group may take before its rows are cut.
const STATES: usize = 8 << 20;
/// Bytes of gradient tiles, and of packed weight beside them, that each thread adds in two buffers.
const GRADIENT_TILES: usize = 2 << 20;
/// Bytes of strips that are packed once a call; larger ones are packed again for each class block.
const STRIPS: usize = 2 << 20;
/// Tasks that a stage should have for each thread, so that none waits long for the last.
const TASKS: usize = 4;

/// What a call's cuts follow from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sizes {
    pub kernels: Kernels,
    pub tiling: Tiling,
    pub rows: usize,
    pub features: usize,
    pub targets: usize,
    pub state_lanes: usize,
    pub shares_exps: bool,
    pub coefficient_lanes: usize,
    pub points: usize,
    pub gradients: u32,
    /// Inputs have the accumulation type, and so have their gradients.
    pub same_type: bool,
    /// Rows of `W` are read where they are.
    pub in_place: bool,
}

/// Tiles of classes and features.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tiling {
    /// Classes of a tile: a class block.
    pub block: usize,
    /// The same, padded for the kernel.
    pub padded_block: usize,
    /// Features, padded for the kernel.
    pub depth: usize,
    /// Step between rows of packed `W`: off the powers of two, so that rows spread over cache sets.
    pub weight_row: usize,
    /// Blocks of all classes.
    pub blocks: usize,
    /// Leading blocks whose logits are stored.
    pub stored_blocks: usize,
}

impl Tiling {
    pub(crate) fn new(kernels: &Kernels, features: usize, classes: usize) -> Self {
        let unit = least_common_multiple(kernels.m_step, kernels.k_step);
        let block = (TILE / unit * unit).max(unit).min(classes);
        let depth = features.next_multiple_of(kernels.k_step);
        let line = LINE / kernels.operand;
        Self {
            block,
            padded_block: block.next_multiple_of(kernels.k_step),
            depth,
            weight_row: depth.next_multiple_of(line) + line,
            blocks: classes.div_ceil(block),
            stored_blocks: 0,
        }
    }

    /// Whether contiguous rows of `W` can be multiplied where they are; see
    /// [`crate::kernel::Kernel::in_place`].
    pub(crate) fn reads_in_place(&self, kernels: &Kernels, features: usize, same: bool) -> bool {
        if kernels.narrow {
            return features.is_multiple_of(kernels.k_step);
        }
        same && !(features * kernels.operand).is_multiple_of(4096)
    }
}

/// K that one product goes through, for operands of some bytes.
pub(crate) const fn depth(operand: usize) -> usize {
    OPERAND / (LANES * operand)
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// How a forward is cut.
#[derive(Clone, Debug)]
pub(crate) struct Forward {
    /// Panels of a row group.
    pub group: usize,
    /// Blocks of a class chunk: the classes of one state.
    pub chunk: usize,
    /// Panels of a task.
    pub span: usize,
    pub list: Region,
    pub keys: Region,
    pub key_counts: Region,
    pub panels: Region,
    pub states: Region,
    // Regions of each thread, from its own start on.
    pub tile: Region,
    pub exps: Region,
    pub weight: Region,
    pub bias: Region,
    pub shared_bytes: usize,
    pub each_bytes: usize,
    parts: Vec<(&'static str, usize)>,
}

impl Forward {
    /// Only the length of tasks depends on the number of threads.
    pub(crate) fn new(sizes: &Sizes, threads: usize) -> Self {
        let Sizes { kernels, tiling, .. } = sizes;
        let (mut shared, mut each) = (Arena::default(), Arena::default());
        let panels = sizes.rows.div_ceil(LANES);
        let most = if sizes.state_lanes >= LARGE { LONG_CHUNKS } else { CHUNKS };
        let chunk = tiling.blocks.div_ceil(most).max(4.min(tiling.blocks));
        let chunks = tiling.blocks.div_ceil(chunk);
        let state = sizes.state_lanes * size_of::<Lane>();
        let mut group = panels.clamp(1, GROUP);
        while group > 4 && chunks * group * state > STATES {
            group = group.div_ceil(2);
        }
        let spans = (TASKS * threads).div_ceil(chunks).min(group);
        let rows = group * LANES;
        let tile = tiling.block * LANES;
        let exps = if sizes.shares_exps { tile } else { 0 };
        let weight = if sizes.in_place { 0 } else { tiling.block * tiling.weight_row };
        Self {
            group,
            chunk,
            span: group.div_ceil(spans),
            list: shared.take("forward.rows", panels * LANES, size_of::<u32>()),
            keys: shared.take("forward.targets", rows * sizes.targets, size_of::<Key>()),
            key_counts: shared.take("forward.targets", group, size_of::<usize>()),
            panels: shared.take("forward.input", rows * tiling.depth, kernels.operand),
            states: shared.take("forward.states", chunks * group, state),
            tile: each.take("thread.forward.logits", tile, kernels.acc),
            exps: each.take("thread.forward.exponentials", exps, kernels.acc),
            weight: each.take("thread.forward.weight", weight, kernels.operand),
            bias: each.take("thread.forward.bias", tiling.block, kernels.acc),
            shared_bytes: shared.bytes,
            each_bytes: each.bytes,
            parts: [shared.parts, each.parts].concat(),
        }
    }

    pub(crate) fn parts(&self) -> Vec<(&'static str, usize)> {
        self.parts.clone()
    }
}

/// How a backward is cut.
///
/// Where gradients have the accumulation type, rows are the outer loop: dW is added up in the
/// output, and everything else has the size of a row group. Narrower outputs cannot be added to, so
/// there classes are the outer loop, dW of a super-block is added up aside, and dE of all rows.
#[derive(Clone, Debug)]
pub(crate) struct Backward {
    /// Row groups are the outer loop.
    pub rows_outer: bool,
    /// Panels of a row group.
    pub group: usize,
    /// Blocks of a class super-block, a multiple of `pieces`: blocks join in the same way in all.
    pub chunk: usize,
    /// Blocks that one product of dE goes through.
    pub pieces: usize,
    /// Panels of a task of dE.
    pub span: usize,
    /// Features of a task of dE.
    pub features: usize,
    /// Strips of 32 features.
    pub strips: usize,
    /// Whether strips are packed once, with the panels.
    pub keeps_strips: bool,
    pub list: Region,
    pub coefficients: Region,
    pub points: Region,
    pub point_counts: Region,
    pub panels: Region,
    pub strip_panels: Region,
    /// Gradient tiles in operand format, two buffers.
    pub dz: [Region; 2],
    /// The second order of narrow kernels.
    pub dz_pairs: [Region; 2],
    /// Step between panels of `dz`, in operands.
    pub dz_panel: usize,
    pub weight: [Region; 2],
    pub columns: [Region; 2],
    pub d_input: Region,
    pub d_weight: Region,
    pub d_bias: Region,
    pub d_scale: Region,
    // Regions of each thread, from its own start on.
    pub tile: Region,
    pub raw: Region,
    pub strip: Region,
    pub strip_pieces: Region,
    pub bias: Region,
    pub bias_lanes: Region,
    pub shared_bytes: usize,
    pub each_bytes: usize,
    parts: Vec<(&'static str, usize)>,
}

impl Backward {
    /// Super-blocks and tasks depend on the number of threads; the order of no sum does.
    pub(crate) fn new(sizes: &Sizes, threads: usize) -> Self {
        let blocks = Self::blocks_of_thread(sizes) * threads;
        Self::with_chunk(sizes, blocks.next_multiple_of(Self::pieces(sizes)), threads)
    }

    /// Bytes that one more thread adds to the shared regions, at most.
    pub(crate) fn growth(sizes: &Sizes) -> usize {
        let blocks = Self::blocks_of_thread(sizes);
        let first = blocks.next_multiple_of(Self::pieces(sizes));
        let bytes = |chunk| Self::with_chunk(sizes, chunk, 1).shared_bytes;
        bytes(first + blocks) - bytes(first)
    }

    /// Blocks that one product of dE goes through: as many as fit the first-level cache, unless
    /// super-blocks of so many would take much memory. A power of two, as is `blocks_of_thread`.
    fn pieces(sizes: &Sizes) -> usize {
        let mut pieces = (depth(sizes.kernels.operand) / sizes.tiling.padded_block).max(1);
        pieces = 1 << pieces.ilog2();
        while pieces > 1 && pieces * Self::block_bytes(sizes) > 2 * GRADIENT_TILES {
            pieces /= 2;
        }
        pieces
    }

    /// Panels of a row group.
    fn group(sizes: &Sizes) -> usize {
        let most = if sizes.same_type { GROUP } else { INNER_GROUP };
        sizes.rows.div_ceil(LANES).clamp(1, most)
    }

    /// Class blocks that each thread adds to a super-block.
    fn blocks_of_thread(sizes: &Sizes) -> usize {
        let blocks = (GRADIENT_TILES / Self::block_bytes(sizes)).clamp(1, 8);
        1 << blocks.ilog2()
    }

    /// Bytes of a class block in both buffers: gradient tiles, packed weight.
    fn block_bytes(sizes: &Sizes) -> usize {
        let Sizes { kernels, tiling, .. } = sizes;
        let orders = if kernels.narrow { 2 } else { 1 };
        let tiles = Self::group(sizes) * LANES * tiling.padded_block * orders;
        let weight = if sizes.in_place { 0 } else { tiling.block * tiling.weight_row };
        let columns = if kernels.column_a { 0 } else { sizes.features * tiling.padded_block };
        2 * (tiles + weight + columns) * kernels.operand
    }

    fn with_chunk(sizes: &Sizes, chunk: usize, threads: usize) -> Self {
        let Sizes { kernels, tiling, features, .. } = *sizes;
        let (mut shared, mut each) = (Arena::default(), Arena::default());
        let has = |gradient: u32| sizes.gradients & gradient != 0;
        let only = |condition: bool, count: usize| if condition { count } else { 0 };
        let (input, weight, bias) = (has(wanted::INPUT), has(wanted::WEIGHT), has(wanted::BIAS));
        let panels = sizes.rows.div_ceil(LANES);
        let group = Self::group(sizes);
        let rows_outer = sizes.same_type;
        let chunk = chunk.min(tiling.blocks);
        let strips = features.div_ceil(LANES);
        let feature_tasks = features.div_ceil(TILE);
        let spans = (TASKS * threads).div_ceil(feature_tasks).max(group.div_ceil(8)).min(group);
        // Packed operands are held for the rows of the inner loop.
        let rows = if rows_outer { group * LANES } else { panels * LANES };
        let strip_count = only(weight, rows * strips * LANES);
        let keeps_strips = rows_outer || strip_count * kernels.operand <= STRIPS;
        let dz_panel = (chunk * tiling.padded_block + 15) * LANES;
        let tile = tiling.padded_block * LANES;
        let weight_count = only(!sizes.in_place, chunk * tiling.block * tiling.weight_row);
        let column_count = only(!kernels.column_a && input, chunk * features * tiling.padded_block);
        let sums = only(weight && !rows_outer && panels > group, chunk * tile * strips);
        let twice = |shared: &mut Arena, name, count| {
            [(); 2].map(|()| shared.take(name, count, kernels.operand))
        };
        Self {
            rows_outer,
            group,
            chunk,
            pieces: Self::pieces(sizes),
            span: group.div_ceil(spans),
            features: features.div_ceil(feature_tasks).next_multiple_of(16),
            strips,
            keeps_strips,
            list: shared.take("backward.rows", panels * LANES, size_of::<u32>()),
            coefficients: shared.take(
                "backward.coefficients",
                rows * sizes.coefficient_lanes,
                kernels.acc,
            ),
            points: shared.take("backward.points", rows * sizes.points, size_of::<Point>()),
            point_counts: shared.take("backward.points", rows / LANES, size_of::<usize>()),
            panels: shared.take("backward.input", rows * tiling.depth, kernels.operand),
            strip_panels: shared.take(
                "backward.strips",
                only(keeps_strips, strip_count),
                kernels.operand,
            ),
            dz: twice(&mut shared, "backward.gradient_tiles", group * dz_panel),
            dz_pairs: twice(
                &mut shared,
                "backward.gradient_tiles",
                only(kernels.narrow, group * dz_panel),
            ),
            dz_panel,
            weight: twice(&mut shared, "backward.weight", weight_count),
            columns: twice(&mut shared, "backward.weight", column_count),
            d_input: shared.take("backward.d_input", only(input, rows * features), kernels.acc),
            d_weight: shared.take("backward.d_weight", sums, kernels.acc),
            d_bias: shared.take("backward.d_bias", only(bias, tiling.blocks * tiling.block), 8),
            d_scale: shared.take("backward.d_scale", only(has(wanted::SCALE), tiling.blocks), 8),
            tile: each.take("thread.backward.logits", only(kernels.narrow, tile), kernels.acc),
            raw: each.take("thread.backward.products", only(has(wanted::SCALE), tile), kernels.acc),
            strip: each.take("thread.backward.strip", only(weight, tile), kernels.acc),
            strip_pieces: each.take(
                "thread.backward.strip",
                only(!keeps_strips, group * LANES * LANES),
                kernels.operand,
            ),
            bias: each.take("thread.backward.bias", tiling.block, kernels.acc),
            bias_lanes: each.take("thread.backward.bias", only(bias, tile), kernels.acc),
            shared_bytes: shared.bytes,
            each_bytes: each.bytes,
            parts: [shared.parts, each.parts].concat(),
        }
    }

    pub(crate) fn parts(&self) -> Vec<(&'static str, usize)> {
        self.parts.clone()
    }
}
