//! `weighted_sum` and `weighted_rest`: Σ c z over all classes and Σ c r over R, for class vectors c.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, softmax};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: one sum a vector.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WeightedSum {
    /// Number of class vectors.
    pub vectors: usize,
}

/// State: maximum, sum of exponentials, and one weighted sum of them a vector.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WeightedRest {
    /// Number of class vectors.
    pub vectors: usize,
}

impl Unit for WeightedSum {
    const NAME: &'static str = "weighted_sum";
    const SCOPE: Scope = Scope::All;

    fn fields(&self) -> Vec<Field> {
        vec![Field { name: "weighted_sum", columns: self.vectors, integer: false }]
    }

    fn lanes(&self) -> usize {
        self.vectors
    }

    fn start(&self, state: &mut [Lane]) {
        state.fill([0.0; LANES]);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        for (vector, state) in state.iter_mut().enumerate() {
            let mut sum = [A::ZERO; LANES];
            for (class, z) in tile.z.iter().enumerate() {
                let c = tile.vectors.at(vector, tile.first + class);
                if c != A::ZERO {
                    for i in 0..LANES {
                        sum[i] = c.mul_add::<FMA>(z[i], sum[i]);
                    }
                }
            }
            for i in 0..LANES {
                state[i] += sum[i].to_f64();
            }
        }
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        for (state, later) in state.iter_mut().zip(later) {
            for i in 0..LANES {
                state[i] += later[i];
            }
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        for (column, sum) in state.iter().enumerate() {
            out.set(0, column, sum[lane]);
        }
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        out.vectors.extend((0..self.vectors).map(|column| row.cotangent(0, column)));
    }
}

impl Unit for WeightedRest {
    const NAME: &'static str = "weighted_rest";
    const SCOPE: Scope = Scope::Rest;
    const SHARES_EXPS: bool = true;

    fn fields(&self) -> Vec<Field> {
        vec![Field { name: "weighted_rest", columns: self.vectors, integer: false }]
    }

    fn lanes(&self) -> usize {
        2 + self.vectors
    }

    fn start(&self, state: &mut [Lane]) {
        state.fill([0.0; LANES]);
        state[0].fill(f64::NEG_INFINITY);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let (peak, sum) = softmax::pair::<A, FMA>(tile);
        let (common, old, new) = softmax::rescale::<FMA>(&state[0], &softmax::wide(&peak));
        for i in 0..LANES {
            state[1][i] = state[1][i] * old[i] + sum[i].to_f64() * new[i];
        }
        for (vector, state) in state[2..].iter_mut().enumerate() {
            let mut weighted = [A::ZERO; LANES];
            for (class, z) in tile.z.iter().enumerate() {
                let c = tile.vectors.at(vector, tile.first + class);
                for i in 0..LANES {
                    let e = if tile.exps.is_empty() {
                        (z[i] - peak[i]).exp::<FMA>()
                    } else {
                        tile.exps[class][i]
                    };
                    weighted[i] = c.mul_add::<FMA>(e, weighted[i]);
                }
            }
            for i in 0..LANES {
                state[i] = state[i] * old[i] + weighted[i].to_f64() * new[i];
            }
        }
        state[0] = common;
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        let (common, old, new) = softmax::rescale::<FMA>(&state[0], &later[0]);
        for (state, later) in state[1..].iter_mut().zip(&later[1..]) {
            for i in 0..LANES {
                state[i] = state[i] * old[i] + later[i] * new[i];
            }
        }
        state[0] = common;
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        for column in 0..self.vectors {
            let sum = state[1][lane];
            out.set(0, column, if sum == 0.0 { 0.0 } else { state[2 + column][lane] / sum });
        }
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        for column in 0..self.vectors {
            let cotangent = row.cotangent(0, column);
            out.a -= cotangent * row.value(0, column);
            out.rest_vectors.push(cotangent);
        }
    }
}
