//! Parameters of `select.cu`, `rows.cu` and `fold.cu`.

use std::mem::size_of;

use super::{AnyMatrix, Fields, RowList, RowView, Targets};

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
    pub in_place: usize,
    pub kept: usize,
    pub again: usize,
    pub least: f64,
}
const _: () = assert!(size_of::<Select>() == 152);

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
    pub onehot_w: usize,
    pub onehot_g: usize,
    pub onehot_target: usize,
    pub onehot_ld: i64,
    pub kept: usize,
    pub features: i32,
    pub accumulate: i32,
    pub slices: i32,
    pub kept_classes: i32,
}
const _: () = assert!(size_of::<Scatter>() == 160);

impl Select {
    /// Blocks of its grid: the scalars have one of their own.
    pub fn blocks(&self) -> usize {
        1 + usize::from(self.scalars != 0)
    }
}

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
    pub in_place: usize,
    pub gate: usize,
    pub features: i32,
    pub padded: i32,
}
const _: () = assert!(size_of::<TargetLogits>() == 256);

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
    pub gate: usize,
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
    pub column0: i64,
}
const _: () = assert!(size_of::<ColumnSum>() == 136);

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
