//! `rest_power`: log Σ_{j ∈ R} e^(m z) for each of some powers m > 0.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, softmax};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: for each power, maximum of m z and sum of exponentials relative to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RestPower {
    /// The powers.
    pub powers: Vec<f64>,
}

impl Unit for RestPower {
    const NAME: &'static str = "rest_power";
    const SCOPE: Scope = Scope::Rest;

    fn fields(&self) -> Vec<Field> {
        vec![Field { name: "rest_power", columns: self.powers.len(), integer: false }]
    }

    fn lanes(&self) -> usize {
        2 * self.powers.len()
    }

    fn start(&self, state: &mut [Lane]) {
        for pair in state.chunks_exact_mut(2) {
            pair[0].fill(f64::NEG_INFINITY);
            pair[1].fill(0.0);
        }
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let peak = softmax::peak(tile.z);
        for (&power, state) in self.powers.iter().zip(state.chunks_exact_mut(2)) {
            let m = A::from_f64(power);
            // Powers are positive, so the largest logit stays the largest; the difference is
            // taken before it is scaled.
            let mut sum = [A::ZERO; LANES];
            for z in tile.z {
                for i in 0..LANES {
                    sum[i] += ((z[i] - peak[i]) * m).exp::<FMA>();
                }
            }
            let (peak, sum) = softmax::repair(tile.z, peak, sum);
            let (mut peak, sum) = (softmax::wide(&peak), softmax::wide(&sum));
            for peak in &mut peak {
                *peak *= power;
            }
            softmax::add_pair::<FMA>(state, &peak, &sum);
        }
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        for (state, later) in state.chunks_exact_mut(2).zip(later.chunks_exact(2)) {
            softmax::add_pair::<FMA>(state, &later[0], &later[1]);
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        for (column, pair) in state.chunks_exact(2).enumerate() {
            out.set(0, column, softmax::logarithm(pair[0][lane], pair[1][lane]));
        }
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        for (column, &power) in self.powers.iter().enumerate() {
            out.powers.push((power * row.cotangent(0, column), row.value(0, column)));
        }
    }
}
