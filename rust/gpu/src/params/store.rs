//! Parameters of `store.cu`.

use std::mem::size_of;

use super::{Gather, RowList, RowView, Targets};

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
