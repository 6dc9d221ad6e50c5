//! The kernels' parameters: `cuda/include/logitless/params.cuh`, field by field.
//!
//! Device addresses are `usize`, 0 for "not wanted". The sizes are asserted on both sides.

use std::mem::size_of;

/// One product on tensor cores.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Gemm {
    pub a: usize,
    pub b: usize,
    pub d: usize,
    pub lda: i64,
    pub ldb: i64,
    pub ldd: i64,
    pub count: usize,
    pub alpha: usize,
    pub reference: usize,
    pub target: usize,
    pub coef: usize,
    pub bias: usize,
    pub part: usize,
    pub part_plane: i64,
    pub gate: usize,
    pub onehot_w: usize,
    pub onehot_g: usize,
    pub onehot_ld: i64,
    pub onehot_start: usize,
    pub onehot_rows: usize,
    pub scale_at: usize,
    pub columns: usize,
    pub dots: usize,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub ld_row: i32,
    pub col0: i32,
    pub group: i32,
    pub accumulate: i32,
    pub count_is_k: i32,
    pub scale: f32,
    pub softcap: f32,
    pub shift: f32,
    pub reserved: i32,
    pub slices: i32,
    pub slice_rows: i32,
}
const _: () = assert!(size_of::<Gemm>() == 240);

/// Rows of a tensor (outer, inner, features) of any strides.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct RowView {
    pub data: usize,
    pub outer_stride: i64,
    pub inner_stride: i64,
    pub feature_stride: i64,
    pub inner: i64,
}

/// A matrix whose element type is known on the host.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct AnyMatrix {
    pub data: usize,
    pub row_stride: i64,
    pub column_stride: i64,
    pub dtype: i64,
}

/// One address a field, in registry order.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Fields {
    pub rest: usize,
    pub target: usize,
    pub entropy: usize,
    pub sum: usize,
    pub sum_sq: usize,
    pub mean: usize,
    pub variance: usize,
    pub max: usize,
    pub argmax: usize,
    pub rest_power: usize,
    pub weighted_sum: usize,
    pub weighted_rest: usize,
    pub dot: usize,
    pub topk_values: usize,
    pub topk_ids: usize,
}

impl Fields {
    /// The field of a name of the registry.
    pub fn slot(&mut self, name: &str) -> Option<&mut usize> {
        Some(match name {
            "rest" => &mut self.rest,
            "target" => &mut self.target,
            "rest_entropy" => &mut self.entropy,
            "sum" => &mut self.sum,
            "sum_sq" => &mut self.sum_sq,
            "mean" => &mut self.mean,
            "variance" => &mut self.variance,
            "max" => &mut self.max,
            "argmax" => &mut self.argmax,
            "rest_power" => &mut self.rest_power,
            "weighted_sum" => &mut self.weighted_sum,
            "weighted_rest" => &mut self.weighted_rest,
            "dot" => &mut self.dot,
            "topk_values" => &mut self.topk_values,
            "topk_ids" => &mut self.topk_ids,
            _ => return None,
        })
    }
}

/// Live rows, packed in front.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct RowList {
    pub rows: usize,
    pub slots: usize,
    pub count: usize,
    pub total: i64,
}

/// Ids of the targets.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Targets {
    pub ids: usize,
    pub ignore: i64,
    pub columns: i32,
    pub has_ignore: i32,
    pub classes: i64,
}

/// `live_rows`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Live {
    pub grad: Fields,
    pub targets: Targets,
    pub live: usize,
    pub block_max: usize,
    pub total: i64,
    pub powers: i32,
    pub vectors: i32,
    pub topk: i32,
    pub is_double: i32,
}
const _: () = assert!(size_of::<Live>() == 192);

/// `select_rows`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Select {
    pub targets: Targets,
    pub live: usize,
    pub block_max: usize,
    pub rows: usize,
    pub slots: usize,
    pub count: usize,
    pub scalars: usize,
    pub total: i64,
    pub blocks: i64,
    pub scale: f64,
    pub scale_at: usize,
    pub is_double: i64,
    pub kept: usize,
    pub again: usize,
    pub least: f64,
}
const _: () = assert!(size_of::<Select>() == 144);

/// `gather_rows_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Gather {
    pub source: RowView,
    pub list: RowList,
    pub packed: usize,
    pub pitch: i64,
    pub features: i32,
    pub padded: i32,
}
const _: () = assert!(size_of::<Gather>() == 96);

/// `scatter_rows_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Scatter {
    pub target: RowView,
    pub list: RowList,
    pub packed: usize,
    pub factor: usize,
    pub pitch: i64,
    pub slice: i64,
    pub features: i32,
    pub accumulate: i32,
    pub slices: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<Scatter>() == 120);

impl Scatter {
    /// Blocks of its grid: a warp a row, or a block where slices are summed.
    pub fn blocks(&self) -> usize {
        let rows = self.list.total as usize;
        if self.slices > 1 { rows } else { rows.div_ceil(8) }
    }
}

/// `target_logits_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct TargetLogits {
    pub input: RowView,
    pub list: RowList,
    pub targets: Targets,
    pub weight: AnyMatrix,
    pub bias: AnyMatrix,
    pub out: usize,
    pub reference: usize,
    pub target: usize,
    pub scale: f64,
    pub softcap: f64,
    pub scale_at: usize,
    pub packed: usize,
    pub pitch: i64,
    pub features: i32,
    pub padded: i32,
}
const _: () = assert!(size_of::<TargetLogits>() == 240);

/// `finish_online`, `finish_fixed`, `finish_full`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Finish {
    pub out: Fields,
    pub list: RowList,
    pub part: usize,
    pub reference: usize,
    pub part_plane: i64,
    pub ld_row: i32,
    pub tiles: i32,
    pub classes: i64,
    pub tile_columns: i32,
    pub planes: i32,
    pub chunk_columns: i32,
    pub chunk_tiles: i32,
    pub flags: usize,
}
const _: () = assert!(size_of::<Finish>() == 216);

/// `row_coefficients`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Coefficients {
    pub saved: Fields,
    pub grad: Fields,
    pub list: RowList,
    pub targets: Targets,
    pub scalars: usize,
    pub coef: usize,
    pub reference: usize,
    pub target: usize,
    pub classes: i64,
    pub ld_row: i32,
    pub padded: i32,
}
const _: () = assert!(size_of::<Coefficients>() == 352);

/// What a backward's gradients are divided by, and its results multiplied with; made on the device.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Scalars {
    pub g: f32,
    pub inverse: f32,
    pub g_scale: f32,
    pub unused: f32,
    pub g_wide: f64,
    pub inverse_wide: f64,
    pub g_scale_wide: f64,
    pub unused_wide: f64,
}
const _: () = assert!(size_of::<Scalars>() == 48);

/// `add_maximum`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct AddMaximum {
    pub saved: Fields,
    pub grad: Fields,
    pub list: RowList,
    pub tile: AnyMatrix,
    pub scalars: usize,
    pub softcap: f64,
    pub column0: i64,
    pub width: i64,
}
const _: () = assert!(size_of::<AddMaximum>() == 336);

/// `column_sum`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ColumnSum {
    pub tile: AnyMatrix,
    pub out: AnyMatrix,
    pub count: usize,
    pub factor: usize,
    pub weights: usize,
    pub target: usize,
    pub value: usize,
    pub rows: i64,
    pub columns: i64,
    pub group: i64,
}
const _: () = assert!(size_of::<ColumnSum>() == 128);

/// `row_dots` and `fold_dots`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Dots {
    pub input: AnyMatrix,
    pub gradient: AnyMatrix,
    pub count: usize,
    pub partial: usize,
    pub out: usize,
    pub factor: usize,
    pub rows: i64,
    pub features: i32,
    pub is_double: i32,
}
const _: () = assert!(size_of::<Dots>() == 112);

/// `absorb_dots`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct AbsorbDots {
    pub part: usize,
    pub count: usize,
    pub partial: usize,
    pub rows: i64,
    pub ld_row: i32,
    pub tiles: i32,
    pub first: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<AbsorbDots>() == 48);

/// `widen_vector`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Widen {
    pub source: AnyMatrix,
    pub out: usize,
    pub length: i64,
    pub is_double: i64,
}
const _: () = assert!(size_of::<Widen>() == 56);

/// `gate_blocks`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Gate {
    pub flags: usize,
    pub gate: usize,
    pub blocks: i64,
}
const _: () = assert!(size_of::<Gate>() == 24);

/// `finish_repair`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Repair {
    pub list: RowList,
    pub gate: usize,
    pub part: usize,
    pub reference: usize,
    pub rest: usize,
    pub part_plane: i64,
    pub ld_row: i32,
    pub tiles: i32,
}
const _: () = assert!(size_of::<Repair>() == 80);

/// `store_factors`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Factors {
    pub list: RowList,
    pub targets: Targets,
    pub rest: usize,
    pub logits: usize,
    pub g_rest: usize,
    pub g_target: usize,
    pub reference: usize,
    pub factor: usize,
    pub input_factor: usize,
    pub target_factor: usize,
    pub ratio: usize,
    pub scale_at: usize,
    pub scale: f32,
    pub softcap: f32,
    pub padded: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<Factors>() == 160);

/// `scale_rows_bf16`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Scale {
    pub gather: Gather,
    pub factor: usize,
    pub scale_at: usize,
    pub scale: f32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<Scale>() == 120);

/// `list_targets`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ListTargets {
    pub list: RowList,
    pub target: usize,
    pub value: usize,
    pub start: usize,
    pub rows: usize,
    pub values: usize,
    pub classes: i32,
    pub by_slot: i32,
}
const _: () = assert!(size_of::<ListTargets>() == 80);

/// `merge_rest`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MergeRest {
    pub list: RowList,
    pub kept: usize,
    pub rest: usize,
    pub kept_entropy: usize,
    pub entropy: usize,
}
const _: () = assert!(size_of::<MergeRest>() == 64);

/// `stored_gradient_bf16`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct StoredTile {
    pub list: RowList,
    pub coef: usize,
    pub rest: usize,
    pub reference: usize,
    pub target: usize,
    pub logits: usize,
    pub x: usize,
    pub tile: usize,
    pub x_pitch: i64,
    pub tile_pitch: i64,
    pub ld_row: i32,
    pub column0: i32,
    pub width: i32,
    pub shift: f32,
    pub softcap: f32,
    pub moments: i32,
}
const _: () = assert!(size_of::<StoredTile>() == 128);

/// `unpack_rows_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Unpack {
    pub target: RowView,
    pub list: RowList,
    pub packed: usize,
    pub pitch: i64,
    pub features: i32,
    pub accumulate: i32,
}
const _: () = assert!(size_of::<Unpack>() == 96);

/// `frozen_rows_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Frozen {
    pub out: RowView,
    pub list: RowList,
    pub targets: Targets,
    pub weight: usize,
    pub weight_pitch: i64,
    pub rest: usize,
    pub logits: usize,
    pub g_rest: usize,
    pub g_target: usize,
    pub reference: usize,
    pub sums: usize,
    pub pitch: i64,
    pub slice: i64,
    pub scale_at: usize,
    pub scale: f32,
    pub softcap: f32,
    pub features: i32,
    pub accumulate: i32,
    pub slices: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<Frozen>() == 216);

/// `tile_statistics_*` and `tile_gradient_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Tile {
    pub saved: Fields,
    pub grad: Fields,
    pub list: RowList,
    pub targets: Targets,
    pub z: usize,
    pub dx: usize,
    pub z_pitch: i64,
    pub dx_pitch: i64,
    pub state: usize,
    pub vectors: usize,
    pub vector_stride: i64,
    pub vector_column: i64,
    pub dense: AnyMatrix,
    pub d_dense: AnyMatrix,
    pub scalars: usize,
    pub softcap: f64,
    pub bias: usize,
    pub scale_at: usize,
    pub scale: f64,
    pub dots: usize,
    pub column0: i64,
    pub width: i32,
    pub state_size: i32,
    pub first: i32,
    pub last: i32,
    pub mask: i32,
    pub powers: i32,
    pub vector_count: i32,
    pub topk: i32,
    pub power: [f64; MAX_POWERS],
    pub padded: i32,
    pub keep: i32,
}
const _: () = assert!(size_of::<Tile>() == 592);

/// Exponents that one call takes.
pub const MAX_POWERS: usize = 8;

/// Slots of a row's state that do not depend on the statistics' parameters.
pub const FIXED_SLOTS: usize = 10;

/// Bits of `Tile::mask`, by the statistics' names.
pub fn statistic_bit(name: &str) -> i32 {
    match name {
        "rest" => 1,
        "entropy" => 2,
        "sum" => 4,
        "sum_sq" => 8,
        "variance" => 16,
        "max" => 32,
        "rest_power" => 64,
        "weighted_sum" => 128,
        "weighted_rest" => 256,
        "dot" => 512,
        "topk" => 1024,
        "target" => 2048,
        _ => 0,
    }
}

/// `loss_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Loss {
    pub rest: usize,
    pub target: usize,
    pub ids: usize,
    pub loss: usize,
    pub share: usize,
    pub gradient: usize,
    pub g_rest: usize,
    pub g_target: usize,
    pub z_loss: f64,
    pub ignore: i64,
    pub rows: i64,
    pub per_row: i32,
    pub mean: i32,
}
const _: () = assert!(size_of::<Loss>() == 96);

/// `plain_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Plain {
    pub a: usize,
    pub b: usize,
    pub d: usize,
    pub a_m: i64,
    pub a_k: i64,
    pub b_n: i64,
    pub b_k: i64,
    pub d_m: i64,
    pub d_n: i64,
    pub count: usize,
    pub alpha: usize,
    pub bias: usize,
    pub scale_at: usize,
    pub scale: f64,
    pub softcap: f64,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub count_is_k: i32,
    pub accumulate: i32,
    pub logits: i32,
}
const _: () = assert!(size_of::<Plain>() == 144);
