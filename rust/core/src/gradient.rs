//! From cotangents to a tile of logit gradients: one routine for all statistics.
//!
//! A row's gradient is a sum of terms ([`RowGradient`]); here its coefficients lie in lanes, a panel
//! at a time, and turn a tile of logits into a tile of dx in place.

use crate::element::Real;
use crate::kernel::LANES;
use crate::operands::{DensePanel, Vectors};
use crate::rows::Key;
use crate::spec::Spec;
use crate::stats::RowGradient;
use crate::transform::Maps;

/// Lanes of the coefficients with a fixed place.
mod lane {
    pub const SHIFT: usize = 0;
    pub const A: usize = 1;
    pub const B: usize = 2;
    pub const CENTER: usize = 3;
    pub const CONSTANT: usize = 4;
    pub const LINEAR: usize = 5;
    pub const SPREAD: usize = 6;
    pub const MEAN: usize = 7;
    pub const DENSE: usize = 8;
    pub const FIXED: usize = 9;
}

/// Lanes of a panel's coefficients.
pub(crate) fn lanes(spec: &Spec) -> usize {
    lane::FIXED + 2 * spec.vectors() + 2 * spec.powers().len()
}

/// Single-logit gradients of a row, at most.
pub(crate) fn points(spec: &Spec) -> usize {
    spec.targets() + usize::from(spec.position("max").is_some()) + spec.topk()
}

/// The gradient of a single logit. Its key's column is that of the target, or [`Point::SELECTED`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Point {
    pub key: Key,
    pub value: f64,
}

impl Point {
    /// Marks a logit that is no target; those also leave R.
    pub(crate) const SELECTED: usize = crate::spec::MAX_TARGETS;

    fn is_target(&self) -> bool {
        self.key.column() < Self::SELECTED
    }
}

/// Which terms any row of the call can have: those whose cotangents were given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Terms {
    pub rest: bool,
    pub center: bool,
    pub rest_vectors: usize,
    pub powers: usize,
    pub constant: bool,
    pub linear: bool,
    pub spread: bool,
    pub vectors: usize,
    pub dense: bool,
}

impl Terms {
    /// The terms of a call, by the names of the fields that have a cotangent.
    pub(crate) fn new(spec: &Spec, given: impl Fn(&str) -> bool) -> Self {
        let count = |name, count| if given(name) { count } else { 0 };
        let rest_vectors = count("weighted_rest", spec.vectors());
        Self {
            rest: given("rest") || given("rest_entropy") || rest_vectors > 0,
            center: given("rest_entropy"),
            rest_vectors,
            powers: count("rest_power", spec.powers().len()),
            constant: given("sum") || given("mean"),
            linear: given("sum_sq"),
            spread: given("variance"),
            vectors: count("weighted_sum", spec.vectors()),
            dense: given("dot"),
        }
    }

    /// Only r · a, the gradient of cross entropy: the loop that has to be fast.
    fn is_plain(&self) -> bool {
        *self == Self { rest: true, ..Self::default() }
    }
}

/// The coefficients of a panel: lanes in the order of [`lane`], then vectors over R, vectors, and
/// pairs (h, shift) of powers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coefficients<'a, A> {
    pub lanes: &'a [[A; LANES]],
    pub terms: &'a Terms,
    /// Number of class vectors of the spec.
    pub vectors: usize,
}

impl<A: Real> Coefficients<'_, A> {
    fn rest_vector(&self, vector: usize) -> &[A; LANES] {
        &self.lanes[lane::FIXED + vector]
    }

    fn vector(&self, vector: usize) -> &[A; LANES] {
        &self.lanes[lane::FIXED + self.vectors + vector]
    }

    fn power(&self, power: usize) -> (&[A; LANES], &[A; LANES]) {
        let first = lane::FIXED + 2 * self.vectors + 2 * power;
        (&self.lanes[first], &self.lanes[first + 1])
    }
}

/// Writes a row's coefficients into its lane.
pub(crate) fn fill<A: Real>(
    row: &RowGradient,
    rest: f64,
    vectors: usize,
    lane: usize,
    out: &mut [[A; LANES]],
) {
    let mut set = |place: usize, value: f64| out[place][lane] = A::from_f64(value);
    set(lane::A, row.a);
    set(lane::B, row.b);
    set(lane::CENTER, row.center);
    set(lane::CONSTANT, row.constant);
    set(lane::LINEAR, row.linear);
    set(lane::SPREAD, row.spread);
    set(lane::MEAN, row.mean);
    set(lane::DENSE, row.dense);
    for vector in 0..vectors {
        let at = |list: &[f64]| list.get(vector).copied().unwrap_or(0.0);
        set(lane::FIXED + vector, at(&row.rest_vectors));
        set(lane::FIXED + vectors + vector, at(&row.vectors));
    }
    for (power, &(h, shift)) in row.powers.iter().enumerate() {
        let first = lane::FIXED + 2 * vectors + 2 * power;
        out[first][lane] = A::from_f64(h);
        out[first + 1][lane] = reference(shift);
    }
    out[lane::SHIFT][lane] = reference(rest);
}

/// Makes a lane without a row: no term, no probability.
pub(crate) fn fill_dead<A: Real>(lane: usize, out: &mut [[A; LANES]]) {
    for out in out.iter_mut() {
        out[lane] = A::ZERO;
    }
    out[lane::SHIFT][lane] = -A::LOWEST;
}

/// What logits are compared with. Where R is empty or holds only −inf, z − (−inf) would be nan:
/// against the largest number every probability is 0, as it should be.
fn reference<A: Real>(rest: f64) -> A {
    if rest == f64::NEG_INFINITY { -A::LOWEST } else { A::from_f64(rest) }
}

/// Turns a tile of logits into dx.
pub(crate) struct GradientTile<'a, A> {
    /// Logits z, after the maps; dx on return.
    pub tile: &'a mut [[A; LANES]],
    /// The class of `tile[0]`.
    pub first: usize,
    /// Rows of the panel.
    pub count: usize,
    pub coefficients: Coefficients<'a, A>,
    pub maps: &'a Maps<A>,
    pub powers: &'a [f64],
    pub vectors: Vectors<A>,
    pub dense: Option<&'a DensePanel>,
    /// Where the gradient of `dense` goes.
    pub d_dense: Option<&'a DensePanel>,
    /// The points inside the tile, sorted.
    pub points: &'a [Point],
}

/// Points of one tile whose logits are kept aside; more are handled in several rounds.
const ASIDE: usize = 64;

impl<A: Real> GradientTile<'_, A> {
    /// The terms of one logit outside R.
    #[inline]
    fn outside(&self, z: A, class: usize, lane: usize) -> A {
        let c = &self.coefficients;
        let at = |place: usize| c.lanes[place][lane];
        let mut dz = A::ZERO;
        if c.terms.constant || c.terms.spread {
            dz += at(lane::CONSTANT);
        }
        if c.terms.linear {
            dz += at(lane::LINEAR) * z;
        }
        if c.terms.spread {
            dz += at(lane::SPREAD) * (z - at(lane::MEAN));
        }
        for vector in 0..c.terms.vectors {
            dz += c.vector(vector)[lane] * self.vectors.at(vector, class);
        }
        if let (true, Some(dense)) = (c.terms.dense, self.dense) {
            dz += at(lane::DENSE) * dense.read::<A>(lane, class);
        }
        dz
    }

    /// The terms of every logit, as if all classes belonged to R.
    #[inline(always)]
    fn everywhere<const FMA: bool>(&mut self) {
        let c = self.coefficients;
        let [shift, a, b, center] =
            [lane::SHIFT, lane::A, lane::B, lane::CENTER].map(|i| &c.lanes[i]);
        let [constant, linear, spread, mean] =
            [lane::CONSTANT, lane::LINEAR, lane::SPREAD, lane::MEAN].map(|i| &c.lanes[i]);
        let dense_factor = &c.lanes[lane::DENSE];
        if c.terms.is_plain() && !self.maps.is_capped() {
            for tile in self.tile.iter_mut() {
                for i in 0..LANES {
                    tile[i] = (tile[i] - shift[i]).exp::<FMA>() * a[i];
                }
            }
            return;
        }
        for (offset, tile) in self.tile.iter_mut().enumerate() {
            let class = self.first + offset;
            let z = *tile;
            let mut dz = [A::ZERO; LANES];
            if c.terms.rest {
                let mut factor = *a;
                if c.terms.center {
                    for i in 0..LANES {
                        factor[i] += b[i] * (z[i] - center[i]);
                    }
                }
                for vector in 0..c.terms.rest_vectors {
                    let (lanes, weight) = (c.rest_vector(vector), self.vectors.at(vector, class));
                    for i in 0..LANES {
                        factor[i] += lanes[i] * weight;
                    }
                }
                for i in 0..LANES {
                    let r = (z[i] - shift[i]).exp::<FMA>();
                    // r = 0 contributes 0, though the factor may be infinite.
                    dz[i] = if r == A::ZERO { A::ZERO } else { r * factor[i] };
                }
            }
            for power in 0..c.terms.powers {
                let (h, shift) = c.power(power);
                let m = A::from_f64(self.powers[power]);
                for i in 0..LANES {
                    dz[i] += h[i] * (m * z[i] - shift[i]).exp::<FMA>();
                }
            }
            if c.terms.constant || c.terms.spread {
                for i in 0..LANES {
                    dz[i] += constant[i];
                }
            }
            if c.terms.linear {
                for i in 0..LANES {
                    dz[i] += linear[i] * z[i];
                }
            }
            if c.terms.spread {
                for i in 0..LANES {
                    dz[i] += spread[i] * (z[i] - mean[i]);
                }
            }
            for vector in 0..c.terms.vectors {
                let (lanes, weight) = (c.vector(vector), self.vectors.at(vector, class));
                for i in 0..LANES {
                    dz[i] += lanes[i] * weight;
                }
            }
            if let (true, Some(dense)) = (c.terms.dense, self.dense) {
                for i in 0..self.count {
                    dz[i] += dense_factor[i] * dense.read::<A>(i, class);
                }
            }
            if self.maps.is_capped() {
                for i in 0..LANES {
                    dz[i] *= self.maps.slope(z[i]);
                }
            }
            *tile = dz;
        }
    }

    /// Puts right the logits that points name, given their z before the sweep. `points` are whole
    /// runs of equal class and lane.
    fn correct(&mut self, points: &[Point], before: &[A]) {
        let mut rest = points;
        let mut before = before;
        while let Some(Point { key, .. }) = rest.first() {
            let (class, lane) = (key.class(), key.lane());
            let same = |point: &&Point| (point.key.class(), point.key.lane()) == (class, lane);
            let run = rest.iter().take_while(same).count();
            let z = before[0];
            let slope = if self.maps.is_capped() { self.maps.slope(z) } else { A::ONE };
            let value: f64 = rest[..run].iter().map(|point| point.value).sum();
            let value = A::from_f64(value) * slope;
            let place = class - self.first;
            self.tile[place][lane] = if rest[..run].iter().any(Point::is_target) {
                self.outside(z, class, lane) * slope + value
            } else {
                self.tile[place][lane] + value
            };
            rest = &rest[run..];
            before = &before[run..];
        }
    }
}

impl<A: Real> GradientTile<'_, A> {
    /// Does it.
    #[inline(always)]
    pub(crate) fn run<const FMA: bool>(&mut self) {
        if let Some(d_dense) = self.d_dense {
            let factor = &self.coefficients.lanes[lane::DENSE];
            for (offset, z) in self.tile.iter().enumerate() {
                for lane in 0..self.count {
                    // A cotangent of zero gives zero, though the logit may be infinite.
                    let g = factor[lane];
                    let value = if g == A::ZERO { A::ZERO } else { g * z[lane] };
                    d_dense.write(lane, self.first + offset, value);
                }
            }
        }
        let points = self.points;
        let mut aside = [A::ZERO; ASIDE];
        if points.len() <= ASIDE {
            for (aside, point) in aside.iter_mut().zip(points) {
                *aside = self.tile[point.key.class() - self.first][point.key.lane()];
            }
            self.everywhere::<FMA>();
            self.correct(points, &aside[..points.len()]);
        } else {
            let kept: Vec<A> = points
                .iter()
                .map(|point| self.tile[point.key.class() - self.first][point.key.lane()])
                .collect();
            self.everywhere::<FMA>();
            self.correct(points, &kept);
        }
        // Lanes without a row stay out of every sum, whatever the bias made of them.
        if self.count < LANES {
            for tile in self.tile.iter_mut() {
                tile[self.count..].fill(A::ZERO);
            }
        }
    }
}
