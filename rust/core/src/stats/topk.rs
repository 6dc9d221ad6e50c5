//! `topk`: the k largest logits and their classes, largest first. Ties: lowest id first; nan first.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// The largest k.
pub(crate) const MAX_TOPK: usize = 64;

/// State: k values, then their k classes (infinite where there is none yet).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopK {
    /// How many.
    pub k: usize,
}

/// Whether logit `a` of class `i` comes before logit `b` of class `j`.
#[inline(always)]
fn before(a: f64, i: f64, b: f64, j: f64) -> bool {
    match (a.is_nan(), b.is_nan()) {
        (true, false) => true,
        (false, true) => false,
        (true, true) => i < j,
        (false, false) => a > b || (a == b && i < j),
    }
}

/// Whether a logit may enter a list: also where it or the bar is nan.
#[inline(always)]
fn enters<A: Real>(z: A, bar: A) -> bool {
    (z > bar) | z.is_nan() | bar.is_nan()
}

impl TopK {
    /// The last value of each full list; nan, which nothing is below, where there is room.
    #[inline(always)]
    fn bar<A: Real>(&self, state: &[Lane]) -> [A; LANES] {
        let mut bar = [A::ZERO; LANES];
        for i in 0..LANES {
            let full = state[2 * self.k - 1][i] != f64::INFINITY;
            let last = state[self.k - 1][i];
            // A list full of nan takes no more: its bar is the largest.
            let last = if last.is_nan() { f64::INFINITY } else { last };
            bar[i] = A::from_f64(if full { last } else { f64::NAN });
        }
        bar
    }

    /// Puts a logit into the sorted list of one lane, if it belongs there.
    fn insert(&self, state: &mut [Lane], lane: usize, value: f64, class: f64) {
        let (values, classes) = state.split_at_mut(self.k);
        let mut place = self.k;
        while place > 0 && before(value, class, values[place - 1][lane], classes[place - 1][lane]) {
            place -= 1;
        }
        for i in (place + 1..self.k).rev() {
            values[i][lane] = values[i - 1][lane];
            classes[i][lane] = classes[i - 1][lane];
        }
        if place < self.k {
            values[place][lane] = value;
            classes[place][lane] = class;
        }
    }
}

impl Unit for TopK {
    const NAME: &'static str = "topk";
    const SCOPE: Scope = Scope::All;
    const FIELDS: usize = 2;

    fn fields(&self) -> Vec<Field> {
        vec![
            Field { name: "topk_values", columns: self.k, integer: false },
            Field { name: "topk_ids", columns: self.k, integer: true },
        ]
    }

    fn lanes(&self) -> usize {
        2 * self.k
    }

    fn start(&self, state: &mut [Lane]) {
        let (values, classes) = state.split_at_mut(self.k);
        values.fill([f64::NEG_INFINITY; LANES]);
        classes.fill([f64::INFINITY; LANES]);
    }

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]) {
        let mut bar = self.bar::<A>(state);
        for (class, z) in tile.z.iter().enumerate() {
            // Later classes enter a list only over its bar, or as nan.
            let mut any = false;
            for i in 0..LANES {
                any |= enters(z[i], bar[i]);
            }
            if any {
                for lane in 0..LANES {
                    if enters(z[lane], bar[lane]) {
                        let class = (tile.first + class) as f64;
                        self.insert(state, lane, z[lane].to_f64(), class);
                    }
                }
                bar = self.bar(state);
            }
        }
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        let (values, classes) = later.split_at(self.k);
        for lane in 0..LANES {
            for (value, class) in values.iter().zip(classes) {
                if class[lane] != f64::INFINITY {
                    self.insert(state, lane, value[lane], class[lane]);
                }
            }
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        for column in 0..self.k {
            out.set(0, column, state[column][lane]);
            out.set(1, column, state[self.k + column][lane]);
        }
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        for column in 0..self.k {
            out.selected.push((row.value(1, column) as usize, row.cotangent(0, column)));
        }
    }
}
