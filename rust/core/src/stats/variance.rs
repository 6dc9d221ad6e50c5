//! `variance`: mean and variance of the logits over all classes, by Chan's merge.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, scalar};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: number of classes, mean, sum of squared deviations.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Variance;

impl Unit for Variance {
    const NAME: &'static str = "variance";
    const SCOPE: Scope = Scope::All;
    const FIELDS: usize = 2;

    fn fields(&self) -> Vec<Field> {
        vec![scalar("mean"), scalar("variance")]
    }

    fn lanes(&self) -> usize {
        3
    }

    fn start(&self, state: &mut [Lane]) {
        state.fill([0.0; LANES]);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let inverse = A::from_f64(1.0 / tile.z.len() as f64);
        let mut mean = [A::ZERO; LANES];
        for z in tile.z {
            for i in 0..LANES {
                mean[i] += z[i];
            }
        }
        for mean in &mut mean {
            *mean *= inverse;
        }
        // Deviations from the rounded mean: their own mean corrects the sum of squares.
        let (mut first, mut second) = ([A::ZERO; LANES], [A::ZERO; LANES]);
        for z in tile.z {
            for i in 0..LANES {
                let d = z[i] - mean[i];
                first[i] += d;
                second[i] = d.mul_add::<FMA>(d, second[i]);
            }
        }
        let count = tile.z.len() as f64;
        let mut later = [[count; LANES], [0.0; LANES], [0.0; LANES]];
        for i in 0..LANES {
            // An infinite mean has no deviations: it stands, and the variance is nan, as in torch.
            let correction = first[i].to_f64() / count;
            later[1][i] = mean[i].to_f64() + if correction.is_nan() { 0.0 } else { correction };
            later[2][i] = second[i].to_f64() - correction * first[i].to_f64();
        }
        self.merge::<FMA>(state, &later);
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        for i in 0..LANES {
            let count = state[0][i] + later[0][i];
            let share = if count == 0.0 { 0.0 } else { later[0][i] / count };
            let delta = later[1][i] - state[1][i];
            state[1][i] += if delta.is_finite() { delta * share } else { later[1][i] };
            state[2][i] += later[2][i] + delta * delta * share * state[0][i];
            state[0][i] = count;
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        out.set(0, 0, state[1][lane]);
        out.set(1, 0, state[2][lane] / state[0][lane]);
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        out.constant += row.cotangent(0, 0) / row.classes as f64;
        out.spread += 2.0 * row.cotangent(1, 0) / row.classes as f64;
        out.mean = row.value(0, 0);
    }
}
