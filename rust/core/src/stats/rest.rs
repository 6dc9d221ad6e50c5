//! `rest`: log Σ_{j ∈ R} e^z, carried as a (max, sum) pair.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, scalar, softmax};
use crate::element::Real;
use crate::spec::Field;

/// State: maximum, sum of exponentials relative to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rest;

impl Unit for Rest {
    const NAME: &'static str = "rest";
    const SCOPE: Scope = Scope::Rest;
    const SHARES_EXPS: bool = true;

    fn fields(&self) -> Vec<Field> {
        vec![scalar("rest")]
    }

    fn lanes(&self) -> usize {
        2
    }

    fn start(&self, state: &mut [Lane]) {
        state[0].fill(f64::NEG_INFINITY);
        state[1].fill(0.0);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let (peak, sum) = softmax::pair::<A, FMA>(tile);
        softmax::add_pair::<FMA>(state, &softmax::wide(&peak), &softmax::wide(&sum));
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        softmax::add_pair::<FMA>(state, &later[0], &later[1]);
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        out.set(0, 0, softmax::logarithm(state[0][lane], state[1][lane]));
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        out.a += row.cotangent(0, 0);
    }
}
