//! `max`: the largest logit and its class. The lowest id wins ties, nan wins over everything.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, scalar};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: the largest logit, its class (infinite before the first).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Max;

impl Unit for Max {
    const NAME: &'static str = "max";
    const SCOPE: Scope = Scope::All;
    const FIELDS: usize = 2;

    fn fields(&self) -> Vec<Field> {
        vec![scalar("max"), Field { name: "argmax", columns: 0, integer: true }]
    }

    fn lanes(&self) -> usize {
        2
    }

    fn start(&self, state: &mut [Lane]) {
        state[0].fill(f64::NEG_INFINITY);
        state[1].fill(f64::INFINITY);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let (mut best, mut at) = (tile.z[0], [0u32; LANES]);
        for (class, z) in tile.z.iter().enumerate().skip(1) {
            for i in 0..LANES {
                let better = (z[i] > best[i]) | (z[i].is_nan() & !best[i].is_nan());
                best[i] = if better { z[i] } else { best[i] };
                at[i] = if better { class as u32 } else { at[i] };
            }
        }
        let mut later = [[0.0; LANES]; 2];
        for i in 0..LANES {
            later[0][i] = best[i].to_f64();
            later[1][i] = (tile.first + at[i] as usize) as f64;
        }
        self.merge::<FMA>(state, &later);
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        for i in 0..LANES {
            let (old, new) = (state[0][i], later[0][i]);
            let empty = state[1][i] == f64::INFINITY;
            let better = (new > old) | (new.is_nan() & !old.is_nan()) | empty;
            state[0][i] = if better { new } else { old };
            state[1][i] = if better { later[1][i] } else { state[1][i] };
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        out.set(0, 0, state[0][lane]);
        out.set(1, 0, state[1][lane]);
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        out.selected.push((row.value(1, 0) as usize, row.cotangent(0, 0)));
    }
}
