//! `sum` and `sum_sq`: Σ z and Σ z² over all classes.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer, scalar};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// State: the sum.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sum;

/// State: the sum of squares.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SumSq;

macro_rules! additive {
    ($unit:ident, $name:literal, |$z:ident| $term:expr, |$g:ident, $out:ident| $grad:expr) => {
        impl Unit for $unit {
            const NAME: &'static str = $name;
            const SCOPE: Scope = Scope::All;

            fn fields(&self) -> Vec<Field> {
                vec![scalar($name)]
            }

            fn lanes(&self) -> usize {
                1
            }

            fn start(&self, state: &mut [Lane]) {
                state[0].fill(0.0);
            }

            #[inline(always)]
            fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
                let mut sum = [A::ZERO; LANES];
                for z in tile.z {
                    for i in 0..LANES {
                        let $z = z[i];
                        sum[i] += $term;
                    }
                }
                for i in 0..LANES {
                    state[0][i] += sum[i].to_f64();
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

            fn grad(&self, row: &SavedRow<'_>, $out: &mut RowGradient) {
                let $g = row.cotangent(0, 0);
                $grad;
            }
        }
    };
}

additive!(Sum, "sum", |z| z, |g, out| out.constant += g);
additive!(SumSq, "sum_sq", |z| z * z, |g, out| out.linear += 2.0 * g);
