//! The kernels' parameters: `cuda/include/logitless/params.cuh`, field by field.
//!
//! Device addresses are `usize`, 0 for "not wanted". The sizes are asserted on both sides.

mod products;
mod rows;
mod store;
mod tile;

pub use products::*;
pub use rows::*;
pub use store::*;
pub use tile::*;

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
