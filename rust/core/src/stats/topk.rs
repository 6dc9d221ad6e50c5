//! `topk`: the k largest logits and their classes, largest first. Ties: lowest id first; nan first.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer};
use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// The largest k.
pub(crate) const MAX_TOPK: usize = 64;

/// State: for each lane its k values, sorted; then for each lane their k classes, infinite where
/// there is none yet. A lane's list is contiguous, so that it moves up quickly.
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

/// The lists of one lane.
struct List<'a> {
    values: &'a mut [f64],
    classes: &'a mut [f64],
}

impl List<'_> {
    /// Puts a logit in, if it belongs here.
    fn insert(&mut self, value: f64, class: f64) {
        let k = self.values.len();
        let follows = |place: usize| before(value, class, self.values[place], self.classes[place]);
        let mut place = k;
        while place > 0 && follows(place - 1) {
            place -= 1;
        }
        if place < k {
            self.values.copy_within(place..k - 1, place + 1);
            self.classes.copy_within(place..k - 1, place + 1);
            (self.values[place], self.classes[place]) = (value, class);
        }
    }

    /// What a later logit has to exceed: the last value of a full list; nan, which nothing is below,
    /// where there is room.
    fn bar(&self) -> f64 {
        let last = self.values.len() - 1;
        match (self.classes[last] == f64::INFINITY, self.values[last].is_nan()) {
            (true, _) => f64::NAN,
            // Full of nan: it takes no more.
            (false, true) => f64::INFINITY,
            (false, false) => self.values[last],
        }
    }
}

impl TopK {
    fn list<'a>(&self, state: &'a mut [Lane], lane: usize) -> List<'a> {
        let (values, classes) = state.as_flattened_mut().split_at_mut(self.k * LANES);
        let range = lane * self.k..(lane + 1) * self.k;
        List { values: &mut values[range.clone()], classes: &mut classes[range] }
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
        let mut bar = [A::ZERO; LANES];
        for (lane, bar) in bar.iter_mut().enumerate() {
            *bar = A::from_f64(self.list(state, lane).bar());
        }
        for (class, z) in tile.z.iter().enumerate() {
            // Later classes enter a list only over its bar, or as nan.
            let mut any = false;
            for i in 0..LANES {
                any |= enters(z[i], bar[i]);
            }
            if any {
                let class = (tile.first + class) as f64;
                for lane in 0..LANES {
                    if enters(z[lane], bar[lane]) {
                        let mut list = self.list(state, lane);
                        list.insert(z[lane].to_f64(), class);
                        bar[lane] = A::from_f64(list.bar());
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
        let (values, classes) = later.as_flattened().split_at(self.k * LANES);
        for lane in 0..LANES {
            let mut list = self.list(state, lane);
            let range = lane * self.k..(lane + 1) * self.k;
            for (&value, &class) in values[range.clone()].iter().zip(&classes[range]) {
                // Both are sorted: what follows one that stays out stays out.
                if class == f64::INFINITY || !enters(value, list.bar()) {
                    break;
                }
                list.insert(value, class);
            }
        }
    }

    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
        let (values, classes) = state.as_flattened().split_at(self.k * LANES);
        for column in 0..self.k {
            out.set(0, column, values[lane * self.k + column]);
            out.set(1, column, classes[lane * self.k + column]);
        }
    }

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        for column in 0..self.k {
            out.selected.push((row.value(1, column) as usize, row.cotangent(0, column)));
        }
    }
}
