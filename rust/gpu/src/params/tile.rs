//! Parameters of `tile.cu` and `loss.cu`.

use std::mem::size_of;

use super::{AnyMatrix, Fields, RowList, Targets};

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

/// `policy_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Policy {
    pub rest: usize,
    pub target: usize,
    pub rest_entropy: usize,
    pub ids: usize,
    pub log_prob: usize,
    pub entropy: usize,
    pub g_log_prob: usize,
    pub g_entropy: usize,
    pub g_rest: usize,
    pub g_target: usize,
    pub g_rest_entropy: usize,
    pub ignore: i64,
    pub rows: i64,
}
const _: () = assert!(size_of::<Policy>() == 104);
