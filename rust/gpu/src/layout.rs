//! Where the buffers of a call lie in its workspace and store.
//!
//! Planning and running use the same code: over an arena at address 0 it counts bytes, over the
//! caller's memory it hands out addresses.

use logitless_core::{DType, Spec, wanted};

use crate::driver::Facts;
use crate::params::{FIXED_SLOTS, SumLists};
use crate::plan::{Path, Plan, partials};
use crate::product::choose;
use crate::share::{Lends, Share};

/// Rows of a buffer that tensor-core tiles write whole.
pub(crate) fn padded(rows: usize) -> usize {
    rows.next_multiple_of(256)
}

/// Elements of a packed row: a multiple of 16 bytes.
pub(crate) fn pitch(columns: usize, dtype: DType) -> usize {
    columns.next_multiple_of((16 / dtype.size()).max(1))
}

/// Addresses of a workspace, or only their count of bytes.
#[derive(Debug)]
pub(crate) struct Arena {
    base: usize,
    pub used: usize,
    pub parts: Vec<(&'static str, usize)>,
}

impl Arena {
    pub fn at(base: usize) -> Arena {
        Arena { base, used: 0, parts: Vec::new() }
    }

    /// The next bytes, aligned for tensor maps and wide loads.
    pub fn take(&mut self, name: &'static str, bytes: usize) -> usize {
        let address = self.base + self.used;
        self.used += bytes.next_multiple_of(256);
        match self.parts.iter_mut().find(|part| part.0 == name) {
            Some(part) => part.1 += bytes.next_multiple_of(256),
            None => self.parts.push((name, bytes.next_multiple_of(256))),
        }
        address
    }
}

/// What the layouts depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub rows: usize,
    pub features: usize,
    pub classes: usize,
    pub dtype: DType,
    pub path: Path,
    pub direct_weight: bool,
    pub gradients: u32,
    /// Accumulators of a row's state on the tiled path.
    pub state: usize,
    /// Classes a column of partials.
    pub part_columns: usize,
    /// The classes whose exponentials are kept, where that is not all or none.
    pub share: Share,
    /// Rows of the input's gradient follow one another.
    pub compact: bool,
    /// Shares that the input's gradient sums its classes in.
    pub slices: usize,
    /// Sums over the gradient tile are made with it.
    pub unrounded: bool,
}

impl Geometry {
    pub fn new(spec: &Spec, plan: &Plan, facts: &Facts) -> Geometry {
        let Plan { rows, features, classes, dtype, path, .. } = *plan;
        let Plan { direct_weight, gradients, share, compact, slices, .. } = *plan;
        let operation = partials(path);
        let part_columns = choose(facts, operation, dtype, false, rows, classes)
            .map_or(64, |choice| choice.part_columns());
        let state = FIXED_SLOTS + 2 * spec.powers().len() + 2 * spec.vectors() + 2 * spec.topk();
        Geometry {
            rows,
            features,
            classes,
            dtype,
            path,
            direct_weight,
            gradients,
            state,
            part_columns,
            share,
            compact,
            slices,
            unrounded: plan.unrounded,
        }
    }

    pub fn acc(&self) -> DType {
        self.dtype.accumulator()
    }

    pub fn wants(&self, gradient: u32) -> bool {
        self.gradients & gradient != 0
    }

    /// A packed copy of the input.
    pub fn packed_bytes(&self) -> usize {
        padded(self.rows) * pitch(self.features, self.dtype) * self.dtype.size()
    }

    /// Sums of the gradient of the input.
    pub fn sums_bytes(&self) -> usize {
        padded(self.rows) * pitch(self.features, self.acc()) * self.acc().size()
    }

    /// Bytes of the gradient of the input, where it is wanted.
    pub fn input_gradient_bytes(&self) -> usize {
        let size = if self.wants(wanted::INPUT) { self.dtype.size() } else { 0 };
        self.rows * self.features * size
    }

    /// Whether the gradient of the input is a buffer that can hold the packed input until it is written.
    pub fn may_borrow(&self) -> bool {
        self.compact
            && self.wants(wanted::INPUT)
            && pitch(self.features, self.dtype) == self.features
    }

    /// Whether the fused path makes the entropy.
    pub fn entropy(&self) -> bool {
        self.path == Path::Fused { planes: 3 }
    }

    /// Whether the gradient of the logits is a factor a row times exponentials, some of them kept.
    pub fn keeps_factors(&self) -> bool {
        self.share.classes() > 0 && !self.entropy()
    }

    /// Bytes of the weight's gradient, where it lends them.
    pub fn lender_bytes(&self) -> usize {
        match self.share.lends {
            Lends::Weight(element) => self.classes * self.features * element,
            _ => 0,
        }
    }

    /// Elements of a row of the store.
    pub fn store_pitch(&self) -> usize {
        self.classes.next_multiple_of(64)
    }

    /// Whether the gradient of the weight may have rows that tensor cores can write.
    pub fn weight_rows_fit(&self) -> bool {
        self.direct_weight && pitch(self.features, self.dtype) == self.features
    }
}

/// Which rows take part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListBuffers {
    pub rows: usize,
    pub slots: usize,
    pub count: usize,
    /// Whether rows stay in their places.
    pub in_place: usize,
}

impl ListBuffers {
    pub fn lay(arena: &mut Arena, rows: usize) -> ListBuffers {
        let (list, slots) = (arena.take("rows", 4 * padded(rows)), arena.take("rows", 4 * rows));
        let count = arena.take("rows", 8);
        ListBuffers { rows: list, slots, count, in_place: count + 4 }
    }
}

/// Buffers of a forward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForwardLayout {
    pub list: ListBuffers,
    pub packed: usize,
    /// Class of each slot's target, and its logit.
    pub target: usize,
    pub reference: usize,
    pub bias: usize,
    pub part: usize,
    pub state: usize,
    pub z: usize,
    /// Copy of a chunk of the weight.
    pub copy: Option<usize>,
}

impl ForwardLayout {
    pub fn lay(arena: &mut Arena, g: &Geometry, width: usize) -> ForwardLayout {
        let (rows, acc) = (padded(g.rows), g.acc().size());
        let list = ListBuffers::lay(arena, g.rows);
        let packed = arena.take("packed input", g.packed_bytes());
        let target = arena.take("targets", 4 * rows);
        let reference = arena.take("targets", 4 * rows);
        let bias = arena.take("bias", acc * g.classes);
        let (mut part, mut state, mut z) = (0, 0, 0);
        match g.path {
            Path::Fused { planes } => {
                let tiles = g.classes.div_ceil(width.max(1)) * width.div_ceil(g.part_columns);
                part = arena.take("partials", 4 * planes * tiles * rows);
            }
            Path::Tiled => {
                state = arena.take("state", acc * g.rows * g.state);
                z = arena.take("logits", acc * rows * width);
            }
        }
        let copy = (!g.direct_weight).then(|| {
            arena.take("weight copy", width * pitch(g.features, g.dtype) * g.dtype.size())
        });
        ForwardLayout { list, packed, target, reference, bias, part, state, z, copy }
    }
}

/// Buffers of a backward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackwardLayout {
    pub list: ListBuffers,
    /// Flag of each row, largest cotangent of each block, and the scalars made of them.
    pub live: usize,
    pub block_max: usize,
    pub scalars: usize,
    /// Counts of rows where kept exponentials serve, and where they do not.
    pub kept: usize,
    pub again: usize,
    /// Where products read kept exponentials as they are.
    pub factors: Option<FactorBuffers>,
    pub coef: usize,
    pub target: usize,
    pub reference: usize,
    pub bias: usize,
    pub dots: usize,
    /// Sums of the gradient tile over 16 rows, and over a class block of its product with the logits'.
    pub columns: usize,
    pub block_dots: usize,
    /// Nothing when the gradient of the input lends its memory.
    pub packed: Option<usize>,
    /// Accumulators of the gradient of the input.
    pub sums: usize,
    pub z: usize,
    pub dx: usize,
    pub copy: Option<usize>,
    /// Accumulators of a chunk of the gradient of the weight, where its rows cannot be written in place.
    pub weight_sums: Option<usize>,
}

impl BackwardLayout {
    pub fn lay(arena: &mut Arena, g: &Geometry, width: usize, borrow: bool) -> BackwardLayout {
        let (rows, acc) = (padded(g.rows), g.acc().size());
        let list = ListBuffers::lay(arena, g.rows);
        let live = arena.take("rows", g.rows);
        let block_max = arena.take("rows", 4 * g.rows.div_ceil(256));
        let scalars = arena.take("rows", 16);
        let (kept, again) = (arena.take("rows", 4), arena.take("rows", 4));
        let factors = g.keeps_factors().then(|| FactorBuffers::lay(arena, g));
        let coef = arena.take("coefficients", 5 * 4 * rows);
        let target = arena.take("coefficients", 4 * rows);
        let reference = arena.take("coefficients", 4 * rows);
        let bias = arena.take("bias", acc * g.classes);
        let dots = arena.take("coefficients", if g.wants(wanted::SCALE) { 8 * g.rows } else { 0 });
        let packed = (!borrow).then(|| arena.take("packed input", g.packed_bytes()));
        let with_tile = g.unrounded && g.path != Path::Tiled;
        let sums_of = |gradient, bytes| if with_tile && g.wants(gradient) { bytes } else { 0 };
        let columns = arena.take("coefficients", sums_of(wanted::BIAS, 4 * (rows / 16) * width));
        let block_dots =
            arena.take("coefficients", sums_of(wanted::SCALE, 4 * rows * width.div_ceil(64)));
        let with_sums = g.wants(wanted::INPUT) || (g.wants(wanted::SCALE) && !g.unrounded);
        let sums = arena.take("input sums", if with_sums { g.slices * g.sums_bytes() } else { 0 });
        let size = g.dtype.size();
        // Gradients of the accumulators' type overwrite the logits they are made of.
        let in_place = g.dtype == g.acc();
        let z = arena.take("logits", if g.path == Path::Tiled { acc * rows * width } else { 0 });
        let dx = if g.path == Path::Tiled && in_place {
            z
        } else if g.share.overwrites() {
            0 // the store's
        } else {
            arena.take("logit gradients", size * rows * width)
        };
        let copy = (!g.direct_weight)
            .then(|| arena.take("weight copy", width * pitch(g.features, g.dtype) * size));
        let apart = g.wants(wanted::WEIGHT) && !g.weight_rows_fit();
        let weight_sums =
            apart.then(|| arena.take("weight sums", acc * width * pitch(g.features, g.acc())));
        BackwardLayout {
            list,
            live,
            block_max,
            scalars,
            kept,
            again,
            factors,
            coef,
            target,
            reference,
            bias,
            dots,
            columns,
            block_dots,
            packed,
            sums,
            z,
            dx,
            copy,
            weight_sums,
        }
    }

    /// Classes a chunk that `bytes` allow, in steps of 64 (0: not even one step).
    pub fn widest(g: &Geometry, bytes: usize, borrow: bool) -> usize {
        let used = |width| {
            let mut arena = Arena::at(0);
            BackwardLayout::lay(&mut arena, g, width, borrow);
            arena.used
        };
        // Sizes are linear in the width, and 64 classes of any buffer fill whole alignment steps.
        let (fixed, step) = (used(0), used(64) - used(0));
        match bytes.checked_sub(fixed) {
            Some(_) if step == 0 => usize::MAX, // nothing grows with it
            left => left.unwrap_or(0) / step.max(1) * 64,
        }
    }
}

/// What the stored mode keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreLayout {
    pub list: ListBuffers,
    pub target: usize,
    pub reference: usize,
    pub x: usize,
}

impl StoreLayout {
    /// Without exponentials.
    pub fn lay_lists(arena: &mut Arena, g: &Geometry) -> StoreLayout {
        let rows = padded(g.rows);
        StoreLayout {
            list: ListBuffers::lay(arena, g.rows),
            target: arena.take("targets", 4 * rows),
            reference: arena.take("targets", 4 * rows),
            x: 0,
        }
    }

    pub fn lay(arena: &mut Arena, g: &Geometry) -> StoreLayout {
        let rows = padded(g.rows);
        let lists = StoreLayout::lay_lists(arena, g);
        StoreLayout {
            x: arena.take(
                "exponentials",
                match g.share.classes() {
                    0 => g.dtype.size() * rows * g.store_pitch(),
                    _ => g.share.own_bytes(g.rows),
                },
            ),
            ..lists
        }
    }
}

/// Buffers of a forward that stores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredForwardLayout {
    pub packed: usize,
    pub bias: usize,
    pub part: usize,
    /// Blocks of rows to run again: their number, their indices, a flag for each block.
    pub gate: usize,
    /// The target's logits, where they are not an output.
    pub logits: usize,
    /// `rest` over the kept classes, where that is not all of it; and the entropy.
    pub rest: usize,
    pub entropy: usize,
}

impl StoredForwardLayout {
    pub fn lay(arena: &mut Arena, g: &Geometry) -> StoredForwardLayout {
        let (rows, blocks) = (padded(g.rows), g.rows.div_ceil(256));
        let partly = g.share.classes() > 0;
        let planes = if g.entropy() { 3 } else { 2 };
        StoredForwardLayout {
            packed: arena.take("packed input", g.packed_bytes()),
            bias: arena.take("bias", 4 * g.classes),
            // One plane of sums; a repair and the classes that are not kept need two, of maxima and sums;
            // the entropy one more.
            part: arena.take("partials", planes * 4 * StoredForwardLayout::tiles(g) * rows),
            gate: arena.take("repair", 4 * (1 + 2 * blocks)),
            logits: arena.take("targets", 4 * rows),
            rest: arena.take("targets", if partly { 4 * g.rows } else { 0 }),
            entropy: arena.take("targets", if partly && g.entropy() { 4 * g.rows } else { 0 }),
        }
    }

    /// Columns of partials: the kept classes are through with theirs before the others begin.
    fn tiles(g: &Geometry) -> usize {
        let kept: usize =
            g.share.pieces(g.rows, 0).map(|piece| piece.count.div_ceil(g.part_columns)).sum();
        kept.max((g.classes - g.share.classes()).div_ceil(g.part_columns))
    }
}

/// What rows of exponentials stand for in a backward that reads them as they were kept: planes of
/// slots, and lists of rows by class.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FactorBuffers {
    pub factor: usize,
    pub input_factor: usize,
    pub target_factor: usize,
    pub ratio: usize,
    /// Where each class begins, rows, values.
    pub lists: [usize; 3],
    /// Sums of long lists.
    pub list_sums: usize,
}

impl FactorBuffers {
    fn lay(arena: &mut Arena, g: &Geometry) -> FactorBuffers {
        let mut plane = || arena.take("coefficients", 4 * padded(g.rows));
        let [factor, input_factor, target_factor, ratio] = [plane(), plane(), plane(), plane()];
        let (rows, values) = (plane(), plane());
        let lists = [arena.take("targets", 4 * (g.classes + 1)), rows, values];
        let list_sums = 4 * (g.rows / SumLists::LONG + 1) * g.features;
        let list_sums = arena.take("targets", list_sums);
        FactorBuffers { factor, input_factor, target_factor, ratio, lists, list_sums }
    }
}

/// Buffers of a backward from the store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredBackwardLayout {
    pub factors: FactorBuffers,
    /// Sums of each slice of the classes; nothing where there is one.
    pub sums: usize,
    /// Scaled input, then, where it cannot be written in place, the packed gradient of the input.
    pub packed: usize,
}

impl StoredBackwardLayout {
    pub fn lay(arena: &mut Arena, g: &Geometry) -> StoredBackwardLayout {
        let factors = FactorBuffers::lay(arena, g);
        let sums = if g.slices > 1 { g.slices * g.sums_bytes() } else { 0 };
        let sums = arena.take("input sums", sums);
        let packed = arena.take("packed input", g.packed_bytes());
        StoredBackwardLayout { factors, sums, packed }
    }
}
