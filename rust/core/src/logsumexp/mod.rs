//! Streamed log-sum-exp over any axes of an array: `(m, s)` pairs with `Σ w eᵃ = s · eᵐ`.
//!
//! The array may have any shape, strides (zero, negative), alignment and float type; nothing of its
//! size is allocated. Elements are gathered in blocks into a buffer that stays in the first cache
//! level, where a block becomes a pair with its own maximum; pairs are merged in block order, in
//! f64. Blocks depend on shape and strides alone, so the bits do not depend on the thread count.
//!
//! A block is `[rows][LANES]`. Where the kept elements are adjacent (the sum over axis 0 of a C
//! array) lanes are kept elements and rows run along the reduced ones; else all of a block belongs
//! to one kept element.

mod axes;
mod block;

use crate::element::DType;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::level::{WithKernel, dispatch};
use crate::pool::{self, Stage};
use crate::tensor::Tensor;
use axes::Layout;
use block::Buffer;
use std::sync::{Mutex, PoisonError};

/// An array of any rank, in somebody else's memory. Strides count elements.
#[derive(Clone, Debug)]
pub struct Strided {
    /// Address of the first element.
    pub address: usize,
    /// Its element type.
    pub dtype: DType,
    /// One step an axis.
    pub strides: Vec<isize>,
}

/// `Σ w eᵃ = sum · e^max`. An empty sum is `(−inf, 0)`; nan in either is nan in both.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pair {
    max: f64,
    sum: f64,
}

impl Pair {
    const EMPTY: Self = Self { max: f64::NEG_INFINITY, sum: 0.0 };
    const NAN: Self = Self { max: f64::NAN, sum: f64::NAN };

    fn new(max: f64, sum: f64) -> Self {
        if max.is_nan() || sum.is_nan() { Self::NAN } else { Self { max, sum } }
    }

    /// The pair of two disjoint sets of elements.
    fn merge(self, other: Self) -> Self {
        if self.max.is_nan() || other.max.is_nan() {
            return Self::NAN;
        }
        let max = self.max.max(other.max);
        // Equal maxima, infinite ones among them, have weight one and not e^(inf − inf).
        let part = |p: Self| if p.max == max { p.sum } else { p.sum * (p.max - max).exp() };
        Self::new(max, part(self) + part(other))
    }
}

/// Reduces `axes` of an array to one pair for each element of the others.
///
/// `maximum` and `total` are f64 and contiguous, one element for each kept element in row-major
/// order. With `merge` they hold pairs already, which come first. An element of weight zero is left
/// out, whatever its value. Where `m` is +inf, `s` sums the weights of the elements at +inf. f32 and
/// half inputs exponentiate in f32, f64 inputs in f64; sums are f64.
///
/// # Errors
/// A dtype, an axis, or a number of outputs that does not fit.
///
/// # Safety
/// `shape` with the strides of `array` and `weights` spans readable memory, the outputs are
/// writable, and nothing else writes to any of them until the call returns.
#[expect(clippy::too_many_arguments, reason = "the parts of one reduction")]
pub unsafe fn logsumexp_pairs(
    array: &Strided,
    weights: Option<&Strided>,
    shape: &[usize],
    axes: &[usize],
    maximum: &Tensor,
    total: &Tensor,
    merge: bool,
    threads: usize,
) -> Result<()> {
    check_dtypes(array, weights)?;
    let layout = Layout::new(array, weights, shape, axes)?;
    let outputs = layout.outputs();
    for (name, tensor) in [("maximum", maximum), ("total", total)] {
        tensor.expect_dtype(name, &[DType::F64])?;
        tensor.expect_len(name, outputs)?;
        tensor.expect_contiguous(name)?;
    }
    if outputs == 0 {
        return Ok(());
    }
    let (lanes, chunks, tiles) = (layout.lanes, layout.chunks(), layout.tiles());
    let mut partial = vec![Pair::EMPTY; tiles * chunks * lanes];
    let operands = Operands { layout: &layout, array, weights };
    let threads = if threads == 0 { pool::get_num_threads() } else { threads };
    dispatch(array.dtype, Reduce { operands, partial: &mut partial, threads })?;
    // SAFETY: f64, contiguous and `outputs` long, as checked above.
    let (maximum, total) = unsafe {
        (
            std::slice::from_raw_parts_mut(maximum.pointer::<f64>(), outputs),
            std::slice::from_raw_parts_mut(total.pointer::<f64>(), outputs),
        )
    };
    for tile in 0..tiles {
        for (lane, output) in layout.tile(tile).outputs.enumerate() {
            let start = Pair { max: maximum[output], sum: total[output] };
            let start = if merge { start } else { Pair::EMPTY };
            let parts = (0..chunks).map(|chunk| partial[(tile * chunks + chunk) * lanes + lane]);
            let pair = parts.fold(start, Pair::merge);
            (maximum[output], total[output]) = (pair.max, pair.sum);
        }
    }
    Ok(())
}

fn check_dtypes(array: &Strided, weights: Option<&Strided>) -> Result<()> {
    if !array.dtype.is_float() {
        return Err(Error::DType {
            argument: "array",
            dtype: array.dtype.name(),
            expected: "a float type; convert the array".into(),
        });
    }
    match weights {
        Some(weights) if !matches!(weights.dtype, DType::F32 | DType::F64) => Err(Error::DType {
            argument: "weights",
            dtype: weights.dtype.name(),
            expected: "float32 or float64; convert the weights".into(),
        }),
        _ => Ok(()),
    }
}

/// What a call reduces.
#[derive(Clone, Copy)]
struct Operands<'a> {
    layout: &'a Layout,
    array: &'a Strided,
    weights: Option<&'a Strided>,
}

/// Fills `partial`, `[tile][chunk][lane]`.
struct Reduce<'a> {
    operands: Operands<'a>,
    partial: &'a mut [Pair],
    threads: usize,
}

impl WithKernel for Reduce<'_> {
    type Output = ();

    fn with<K: Kernel>(self, kernel: K) {
        let Self { operands, partial, threads } = self;
        let layout = operands.layout;
        let (lanes, chunks, each) = (layout.lanes, layout.chunks(), layout.chunks_of_task());
        let stage = Stage { tasks: partial.len().div_ceil(each * lanes), ..Stage::default() };
        let tasks = Mutex::new(partial.chunks_mut(each * lanes).enumerate());
        pool::run(threads, &[stage], |_| {
            let mut buffer = Buffer::new();
            let tasks = &tasks;
            move |_, _| {
                let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((task, pairs)) = next else { return };
                for (index, pairs) in pairs.chunks_mut(lanes).enumerate() {
                    let index = task * each + index;
                    let (tile, chunk) = (layout.tile(index / chunks), index % chunks);
                    block::reduce::<K::Element, K::Isa>(
                        kernel.isa(),
                        &operands,
                        &tile,
                        chunk,
                        &mut buffer,
                        pairs,
                    );
                }
            }
        });
    }
}

#[cfg(test)]
mod tests;
