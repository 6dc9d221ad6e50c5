//! Parameters of `store.cu`.

use std::mem::size_of;

use super::{Gather, RowList, RowView, Targets};

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

/// What rows of the store stand for.
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
    pub scalars: usize,
    pub scale: f32,
    pub softcap: f32,
    pub padded: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<Factors>() == 168);

/// The slots by the class of their target.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ListTargets {
    pub target: usize,
    pub start: usize,
    pub rows: usize,
    pub values: usize,
    pub classes: i32,
    pub by_slot: i32,
}
const _: () = assert!(size_of::<ListTargets>() == 40);

/// `stored_operands_bf16`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct StoredOperands {
    pub factors: Factors,
    pub scaled: Gather,
    pub lists: ListTargets,
    pub clear: usize,
    pub list_blocks: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<StoredOperands>() == 320);

impl StoredOperands {
    /// Of one list of rows. Without `lists` none are made.
    pub fn new(factors: Factors, scaled: Gather, lists: Option<ListTargets>) -> StoredOperands {
        // A block lists 512 classes; what ends the last list counts as one.
        let list_blocks = lists.map_or(0, |lists| (lists.classes + 1 + 511) / 512);
        StoredOperands {
            factors,
            scaled,
            lists: lists.unwrap_or_default(),
            clear: 0,
            list_blocks,
            reserved: 0,
        }
    }

    /// Blocks of its grid: those of the lists, then a warp a slot.
    pub fn blocks(&self) -> usize {
        self.list_blocks as usize + (self.factors.padded as usize).div_ceil(8)
    }
}

/// `sum_lists_bf16`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct SumLists {
    pub lists: ListTargets,
    pub ids: usize,
    pub source: usize,
    pub pitch: i64,
    pub sums: usize,
    pub features: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<SumLists>() == 80);

impl SumLists {
    /// Entries from which on a list has a sum of its own.
    pub const LONG: usize = 16;

    /// Its grid: a warp looks for a list in each 16 entries, a block sums 256 columns.
    pub fn grid(&self, rows: usize) -> (usize, usize) {
        (rows.div_ceil(8 * SumLists::LONG), (self.features as usize).div_ceil(256))
    }
}

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
