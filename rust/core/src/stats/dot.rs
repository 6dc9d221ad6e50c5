//! `dot`: Σ q z with dense weights q, one row of them for each row of the input.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, scalar};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: the sum.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dot;

impl Unit for Dot {
    const NAME: &'static str = "dot";
    const SCOPE: Scope = Scope::All;

    fn fields(&self) -> Vec<Field> {
        vec![scalar("dot")]
    }

    fn lanes(&self) -> usize {
        1
    }

    fn start(&self, state: &mut [Lane]) {
        state[0].fill(0.0);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let Some(dense) = tile.dense else { return };
        // Down the rows of q, which are what lies in memory; lanes past the last row have no q.
        for lane in 0..dense.count {
            let mut sum = A::ZERO;
            for (class, z) in tile.z.iter().enumerate() {
                let q: A = dense.read(lane, tile.first + class);
                if q != A::ZERO {
                    sum = q.mul_add::<FMA>(z[lane], sum);
                }
            }
            state[0][lane] += sum.to_f64();
        }
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        for i in 0..LANES {
            state[0][i] += later[0][i];
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        out.set(0, 0, state[0][lane]);
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        out.dense += row.cotangent(0, 0);
    }
}
