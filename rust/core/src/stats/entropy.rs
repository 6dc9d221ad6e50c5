//! `entropy`: of the softmax over R, right to the last digits for peaked and for offset rows.
//!
//! With M the maximum, n the number of classes that attain it, and over the others d = z − M,
//! T = Σ e^d, U = Σ d e^d: rest = M + ln n + ln(1 + T/n), and
//! H = rest − Σ r z = ln n + ln(1 + T/n) − U / (n + T), where no term is negative.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, scalar, softmax};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: M, n, T, U.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entropy;

/// Refers a state's sums to a maximum that is larger by −`shift`; `factor` = e^shift.
#[inline(always)]
fn refer(state: [f64; 3], factor: f64, shift: f64) -> [f64; 3] {
    let [count, sum, linear] = state;
    // The former maxima join the others; a factor of zero takes everything but nan with it.
    if factor == 0.0 && !sum.is_nan() {
        [0.0; 3]
    } else {
        [0.0, factor * (sum + count), factor * (linear + shift * (sum + count))]
    }
}

impl Unit for Entropy {
    const NAME: &'static str = "entropy";
    const SCOPE: Scope = Scope::Rest;
    const SHARES_EXPS: bool = true;

    fn fields(&self) -> Vec<Field> {
        vec![scalar("rest_entropy")]
    }

    fn lanes(&self) -> usize {
        4
    }

    fn start(&self, state: &mut [Lane]) {
        state.fill([0.0; LANES]);
        state[0].fill(f64::NEG_INFINITY);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let shared = !tile.exps.is_empty();
        let peak = if shared { *tile.peak } else { softmax::peak(tile.z) };
        let (mut count, mut sum, mut linear) =
            ([A::ZERO; LANES], [A::ZERO; LANES], [A::ZERO; LANES]);
        for (class, z) in tile.z.iter().enumerate() {
            let shared = if shared { tile.exps[class] } else { [A::ZERO; LANES] };
            for i in 0..LANES {
                let d = z[i] - peak[i];
                let e = if tile.exps.is_empty() { d.exp::<FMA>() } else { shared[i] };
                let top = z[i] == peak[i];
                count[i] += if top { A::ONE } else { A::ZERO };
                let e = if top { A::ZERO } else { e };
                sum[i] += e;
                // p = 0 contributes 0, though d may be −inf.
                linear[i] += if e == A::ZERO { A::ZERO } else { d * e };
            }
        }
        let later = [peak, count, sum, linear].map(|lane| softmax::wide(&lane));
        self.merge::<FMA>(state, &later);
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        let (peak, old, new) = softmax::rescale::<FMA>(&state[0], &later[0]);
        for i in 0..LANES {
            let mut total = [0.0; 3];
            for (from, factor) in [(&*state, old[i]), (later, new[i])] {
                let part = [from[1][i], from[2][i], from[3][i]];
                let part = if from[0][i] == peak[i] {
                    part
                } else {
                    refer(part, factor, from[0][i] - peak[i])
                };
                for (total, part) in total.iter_mut().zip(part) {
                    *total += part;
                }
            }
            for (lane, total) in state[1..].iter_mut().zip(total) {
                lane[i] = total;
            }
        }
        state[0] = peak;
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        let [peak, count, sum, linear] = [0, 1, 2, 3].map(|i: usize| state[i][lane]);
        let entropy = if peak == f64::INFINITY {
            f64::NAN
        } else if count + sum == 0.0 {
            0.0
        } else {
            count.ln() + (sum / count).ln_1p() - linear / (count + sum)
        };
        out.set(0, 0, entropy);
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        // dH = −r (z − μ), μ = Σ r z = rest − H: written as −r ((z − rest) + H), for on a peaked row
        // H is far below a unit in the last place of μ.
        out.a -= row.cotangent(0, 0) * row.value(0, 0);
        out.b -= row.cotangent(0, 0);
        out.center = row.rest;
    }
}
