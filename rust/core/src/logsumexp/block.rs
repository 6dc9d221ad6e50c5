//! One block: gathered into a buffer, then folded into a pair for each lane.

use super::axes::{BLOCK, LANES, Layout, Offset, Tile};
use super::{Operands, Pair, Strided};
use crate::element::{DType, Element, Real};
use crate::kernel::{Isa, Vectorize};
use std::ops::Range;

/// A block's values and weights, as `[rows][LANES]`. Lanes that a tile does not have hold anything.
pub(super) struct Buffer<A> {
    values: [A; BLOCK],
    weights: [f64; BLOCK],
}

impl<A: Real> Buffer<A> {
    pub fn new() -> Self {
        Self { values: [A::NEG_INFINITY; BLOCK], weights: [0.0; BLOCK] }
    }
}

/// Reduces one chunk of one tile; `pairs` has one element for each lane of the layout.
pub(super) fn reduce<E: Element, I: Isa>(
    isa: I,
    operands: &Operands<'_>,
    tile: &Tile,
    chunk: usize,
    buffer: &mut Buffer<E::Acc>,
    pairs: &mut [Pair],
) {
    let Operands { layout, array, weights } = *operands;
    for range in layout.blocks(chunk) {
        let rows = isa.vectorize(Gather::<E> { layout, array, weights, tile, range, buffer });
        let weights = weights.is_some().then_some(&buffer.weights[..rows * LANES]);
        let whole = layout.lanes == 1;
        let fold = Fold { values: &buffer.values[..rows * LANES], weights, whole };
        let lanes = isa.vectorize(fold);
        for (pair, lane) in pairs.iter_mut().zip(lanes) {
            *pair = pair.merge(lane);
        }
    }
}

/// Copies a block into the buffer; elements of weight zero become −inf. Returns its rows.
struct Gather<'a, E: Element> {
    layout: &'a Layout,
    array: &'a Strided,
    weights: Option<&'a Strided>,
    tile: &'a Tile,
    range: Range<usize>,
    buffer: &'a mut Buffer<E::Acc>,
}

impl<E: Element> Vectorize for Gather<'_, E> {
    type Output = usize;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> usize {
        let Self { layout, array, weights, tile, range, buffer } = self;
        let (count, lanes) = (range.len(), tile.outputs.len());
        let mut copy = |at: usize, start: Offset, count: usize, step: Offset| {
            let values = &mut buffer.values[at..at + count];
            // SAFETY: `logsumexp_pairs`' caller vouches for every element of the shape, and `start`
            // and `step` come from the shape's own strides.
            unsafe {
                read::<E, _>(array.address, start.array, step.array, values, E::widen);
                let Some(source) = weights else { return };
                let kept = &mut buffer.weights[at..at + count];
                let (address, start, step) = (source.address, start.weights, step.weights);
                match source.dtype {
                    DType::F64 => read::<f64, _>(address, start, step, kept, |w| w),
                    _ => read::<f32, _>(address, start, step, kept, f64::from),
                }
                for (value, &weight) in values.iter_mut().zip(&*kept) {
                    *value = if weight == 0.0 { E::Acc::NEG_INFINITY } else { *value };
                }
            }
        };
        if layout.lanes > 1 {
            let side = layout.lane_step();
            layout.runs(range, |row, start, count, step| {
                for along in 0..count {
                    let start = start.plus(tile.start, 1).plus(step, along);
                    copy((row + along) * LANES, start, lanes, side);
                }
            });
            return count;
        }
        layout.runs(range, |at, start, count, step| {
            copy(at, start.plus(tile.start, 1), count, step);
        });
        let rows = count.div_ceil(LANES);
        buffer.values[count..rows * LANES].fill(E::Acc::NEG_INFINITY);
        buffer.weights[count..rows * LANES].fill(0.0);
        rows
    }
}

/// `out[i] = convert(element at start + i · step)`; elements may lie at any address.
///
/// # Safety
/// Every element read is in readable memory.
#[inline(always)]
unsafe fn read<E: Copy, A>(
    address: usize,
    start: isize,
    step: isize,
    out: &mut [A],
    convert: impl Fn(E) -> A,
) {
    let first = std::ptr::with_exposed_provenance::<E>(address);
    // SAFETY: the caller's promise. A unit step is told apart so that it vectorises.
    unsafe {
        let first = first.wrapping_offset(start);
        if step == 1 {
            for (index, value) in out.iter_mut().enumerate() {
                *value = convert(first.wrapping_add(index).read_unaligned());
            }
        } else {
            for (index, value) in out.iter_mut().enumerate() {
                *value = convert(first.wrapping_offset(step * index as isize).read_unaligned());
            }
        }
    }
}

/// Maximum, then exponentials, of each lane; with `whole`, lane 0 stands for all of them.
struct Fold<'a, A> {
    values: &'a [A],
    weights: Option<&'a [f64]>,
    whole: bool,
}

impl<A: Real> Vectorize for Fold<'_, A> {
    type Output = [Pair; LANES];

    #[inline(always)]
    fn run<const FMA: bool>(self) -> [Pair; LANES] {
        let mut max = [A::NEG_INFINITY; LANES];
        for row in self.values.as_chunks::<LANES>().0 {
            for (max, &value) in max.iter_mut().zip(row) {
                // False for nan, which the sum carries.
                *max = if value > *max { value } else { *max };
            }
        }
        if self.whole {
            max = [max.into_iter().fold(A::NEG_INFINITY, |a, b| if b > a { b } else { a }); LANES];
        }
        // −inf minus itself would be nan: an empty lane is measured from 0.
        let reference = max.map(|m| if m == A::NEG_INFINITY { A::ZERO } else { m });
        let mut sum = [0.0; LANES];
        let rows = self.values.as_chunks::<LANES>().0.iter();
        match self.weights {
            None => rows.for_each(|row| {
                for lane in 0..LANES {
                    sum[lane] += (row[lane] - reference[lane]).exp::<FMA>().to_f64();
                }
            }),
            Some(weights) => rows.zip(weights.as_chunks::<LANES>().0).for_each(|(row, w)| {
                for lane in 0..LANES {
                    let e = (row[lane] - reference[lane]).exp::<FMA>().to_f64();
                    sum[lane] += w[lane] * e;
                }
            }),
        }
        let mut pairs = [Pair::EMPTY; LANES];
        for (lane, pair) in pairs.iter_mut().enumerate() {
            *pair = match max[lane].to_f64() {
                f64::INFINITY => self.infinite(lane),
                max => Pair::new(max, sum[lane]),
            };
        }
        if self.whole {
            let total = if max[0].to_f64() == f64::INFINITY {
                pairs.iter().map(|pair| pair.sum).sum()
            } else {
                sum.iter().sum()
            };
            pairs[0] = Pair::new(max[0].to_f64(), total);
        }
        pairs
    }
}

impl<A: Real> Fold<'_, A> {
    /// The pair of a lane whose maximum is +inf: it counts the elements that are.
    #[cold]
    fn infinite(&self, lane: usize) -> Pair {
        let mut sum = 0.0;
        for at in (lane..self.values.len()).step_by(LANES) {
            let value = self.values[at].to_f64();
            if value.is_nan() {
                return Pair::NAN;
            }
            if value == f64::INFINITY {
                sum += self.weights.map_or(1.0, |weights| weights[at]);
            }
        }
        Pair::new(f64::INFINITY, sum)
    }
}
