//! What the statistics of a softmax have in common: maxima, and sums relative to them.

use super::{Lane, Tile};
use crate::element::Real;
use crate::kernel::LANES;

/// The largest of each lane, at least the lowest finite number; nan is skipped (it reaches every sum
/// of exponentials by itself).
#[inline(always)]
pub(crate) fn peak<A: Real>(z: &[[A; LANES]]) -> [A; LANES] {
    let mut peak = [A::LOWEST; LANES];
    for z in z {
        for i in 0..LANES {
            peak[i] = if z[i] > peak[i] { z[i] } else { peak[i] };
        }
    }
    peak
}

/// `e^(z − peak)` of a tile.
#[inline(always)]
pub(crate) fn exps<A: Real, const FMA: bool>(
    z: &[[A; LANES]],
    peak: &[A; LANES],
    out: &mut [[A; LANES]],
) {
    for (out, z) in out.iter_mut().zip(z) {
        for i in 0..LANES {
            out[i] = (z[i] - peak[i]).exp::<FMA>();
        }
    }
}

/// The maximum and the sum of exponentials of a tile: shared exponentials are only added up.
#[inline(always)]
pub(crate) fn pair<A: Real, const FMA: bool>(tile: &Tile<'_, A>) -> ([A; LANES], [A; LANES]) {
    let mut sum = [A::ZERO; LANES];
    if !tile.exps.is_empty() {
        for e in tile.exps {
            for i in 0..LANES {
                sum[i] += e[i];
            }
        }
        return repair(tile.z, *tile.peak, sum);
    }
    let peak = peak(tile.z);
    for z in tile.z {
        for i in 0..LANES {
            sum[i] += (z[i] - peak[i]).exp::<FMA>();
        }
    }
    repair(tile.z, peak, sum)
}

/// Puts right the lanes with a logit of +inf, where inf − inf has made the sum nan: (inf, 1), but nan
/// where a logit was nan.
#[inline(always)]
pub(crate) fn repair<A: Real>(
    z: &[[A; LANES]],
    peak: [A; LANES],
    mut sum: [A; LANES],
) -> ([A; LANES], [A; LANES]) {
    #[cold]
    fn infinite<A: Real>(z: &[[A; LANES]], peak: &[A; LANES], sum: &mut [A; LANES]) {
        for i in 0..LANES {
            if peak[i] == -A::NEG_INFINITY && !z.iter().any(|z| z[i].is_nan()) {
                sum[i] = A::ONE;
            }
        }
    }
    let mut any = false;
    for peak in &peak {
        any |= *peak == -A::NEG_INFINITY;
    }
    if any {
        infinite(z, &peak, &mut sum);
    }
    (peak, sum)
}

/// The common maximum of two ranges, and the factors that bring their sums to it.
#[inline(always)]
pub(crate) fn rescale<const FMA: bool>(earlier: &Lane, later: &Lane) -> (Lane, Lane, Lane) {
    let (mut peak, mut old, mut new) = (*earlier, [1.0; LANES], [1.0; LANES]);
    let mut moved = false;
    for i in 0..LANES {
        moved |= later[i] != earlier[i];
    }
    if moved {
        for i in 0..LANES {
            peak[i] = if later[i] > earlier[i] { later[i] } else { earlier[i] };
            // Equal infinities differ by nothing.
            let factor = |from: f64| {
                if from == peak[i] { 1.0 } else { Real::exp::<FMA>(from - peak[i]) }
            };
            (old[i], new[i]) = (factor(earlier[i]), factor(later[i]));
        }
    }
    (peak, old, new)
}

/// Widens a lane.
#[inline(always)]
pub(crate) fn wide<A: Real>(lane: &[A; LANES]) -> Lane {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = lane[i].to_f64();
    }
    out
}

/// Adds the (max, sum) pair of later classes to a state `[max, sum]`.
#[inline(always)]
pub(crate) fn add_pair<const FMA: bool>(state: &mut [Lane], peak: &Lane, sum: &Lane) {
    let (common, old, new) = rescale::<FMA>(&state[0], peak);
    for i in 0..LANES {
        state[1][i] = state[1][i] * old[i] + sum[i] * new[i];
    }
    state[0] = common;
}

/// The logarithm that a (max, sum) pair stands for; −inf without a class.
pub(crate) fn logarithm(peak: f64, sum: f64) -> f64 {
    if sum == 0.0 { f64::NEG_INFINITY } else { peak + sum.ln() }
}
