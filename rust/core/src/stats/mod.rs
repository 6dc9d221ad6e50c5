//! Row statistics: small units behind one trait, listed in one registry.
//!
//! A statistic sees the logits of 32 rows at a time, as tiles `z[class][32]`. For each panel of rows
//! and each range of classes it keeps a *state* of a few lanes of f64; states of later ranges merge
//! into earlier ones in class order, and one `finish` turns them into the outputs. Its gradient is
//! not a loop of its own: it adds to the [`RowGradient`] of a row, whose terms one routine evaluates
//! for all statistics together ([`crate::gradient`]).
//!
//! To add one: a file with a type that implements [`Unit`], a line in [`registry`].

mod dot;
mod entropy;
mod max;
mod rest;
mod rest_power;
mod row;
mod softmax;
mod sum;
mod target;
mod topk;
mod variance;
mod weighted;

pub(crate) use row::{RowGradient, SavedRow, Writer};
pub(crate) use softmax::{exps, peak};
pub(crate) use topk::MAX_TOPK;

use crate::element::Real;
use crate::kernel::LANES;
use crate::spec::Field;

/// One number for each row of a panel, as states keep them.
pub(crate) type Lane = [f64; LANES];

/// The classes that a statistic runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All classes.
    All,
    /// R: those outside the row's target set. The tile holds −inf at the others.
    Rest,
}

/// A tile of logits and what statistics may read beside it.
pub(crate) struct Tile<'a, A> {
    /// `z[class][row]`.
    pub z: &'a [[A; LANES]],
    /// The class of `z[0]`.
    pub first: usize,
    /// Largest logit of each row in the tile, at least the lowest finite number, nan skipped.
    /// Present with `exps`.
    pub peak: &'a [A; LANES],
    /// `e^(z − peak)`, made once where several statistics read it; else empty.
    pub exps: &'a [[A; LANES]],
    /// Class vectors, `vectors[c][class]` by strides, of which the tile's part is read.
    pub vectors: crate::operands::Vectors<A>,
    /// Rows of the dense weights.
    pub dense: Option<&'a crate::operands::DensePanel>,
}

/// A row statistic.
pub(crate) trait Unit {
    /// Its name in the public interface.
    const NAME: &'static str;
    /// The classes that it runs over.
    const SCOPE: Scope;
    /// Whether it reads `e^(z − peak)`, so that two such statistics share them.
    const SHARES_EXPS: bool = false;

    /// Number of its outputs.
    const FIELDS: usize = 1;

    /// Its outputs.
    fn fields(&self) -> Vec<Field>;

    /// Lanes of its state.
    fn lanes(&self) -> usize;

    /// The state of no class at all.
    fn start(&self, state: &mut [Lane]);

    /// Takes in the next classes.
    fn absorb<A: Real, const FMA: bool>(&self, tile: &Tile<'_, A>, state: &mut [Lane]);

    /// Takes in the state of the class range that follows.
    fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]);

    /// Writes the outputs of one row.
    fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>);

    /// Adds its share of the logit gradient of one row, given the row's outputs and cotangents.
    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient);
}

/// The registry: a closed enum, so that every call is static and inlines into the vector wrappers.
macro_rules! registry {
    ($($variant:ident($unit:ty) = $make:expr;)*) => {
        /// Any statistic of the registry.
        #[derive(Clone, Debug, PartialEq)]
        pub(crate) enum Statistic {
            $(#[doc = concat!("`", stringify!($variant), "`")] $variant($unit),)*
        }

        impl Statistic {
            /// Names of all statistics, in registry order.
            pub(crate) fn names() -> Vec<&'static str> {
                vec![$(<$unit as Unit>::NAME),*]
            }

            /// Every statistic with these parameters, in registry order.
            pub(crate) fn all(
                powers: &[f64],
                vectors: usize,
                topk: usize,
                targets: usize,
            ) -> impl Iterator<Item = Self> {
                let parameters = Parameters { powers, vectors, topk, targets };
                [$(Self::$variant($make(&parameters))),*].into_iter()
            }

            pub(crate) fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$unit as Unit>::NAME,)* }
            }

            pub(crate) fn scope(&self) -> Scope {
                match self { $(Self::$variant(_) => <$unit as Unit>::SCOPE,)* }
            }

            pub(crate) fn shares_exps(&self) -> bool {
                match self { $(Self::$variant(_) => <$unit as Unit>::SHARES_EXPS,)* }
            }

            pub(crate) fn fields(&self) -> Vec<Field> {
                match self { $(Self::$variant(unit) => unit.fields(),)* }
            }

            /// Number of its outputs.
            pub(crate) fn field_count(&self) -> usize {
                match self { $(Self::$variant(_) => <$unit as Unit>::FIELDS,)* }
            }

            pub(crate) fn lanes(&self) -> usize {
                match self { $(Self::$variant(unit) => unit.lanes(),)* }
            }

            pub(crate) fn start(&self, state: &mut [Lane]) {
                match self { $(Self::$variant(unit) => unit.start(state),)* }
            }

            #[inline(always)]
            pub(crate) fn absorb<A: Real, const FMA: bool>(
                &self,
                tile: &Tile<'_, A>,
                state: &mut [Lane],
            ) {
                match self { $(Self::$variant(unit) => unit.absorb::<A, FMA>(tile, state),)* }
            }

            #[inline(always)]
            pub(crate) fn merge<const FMA: bool>(&self, state: &mut [Lane], later: &[Lane]) {
                match self { $(Self::$variant(unit) => unit.merge::<FMA>(state, later),)* }
            }

            pub(crate) fn finish(&self, state: &[Lane], lane: usize, out: &mut Writer<'_>) {
                match self { $(Self::$variant(unit) => unit.finish(state, lane, out),)* }
            }

            pub(crate) fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
                match self { $(Self::$variant(unit) => unit.grad(row, out),)* }
            }
        }
    };
}

/// The parameters of a [`crate::Spec`].
struct Parameters<'a> {
    powers: &'a [f64],
    vectors: usize,
    topk: usize,
    targets: usize,
}

registry! {
    Rest(rest::Rest) = |_: &Parameters| rest::Rest;
    Target(target::Target) = |p: &Parameters| target::Target { ids: p.targets };
    Entropy(entropy::Entropy) = |_: &Parameters| entropy::Entropy;
    Sum(sum::Sum) = |_: &Parameters| sum::Sum;
    SumSq(sum::SumSq) = |_: &Parameters| sum::SumSq;
    Variance(variance::Variance) = |_: &Parameters| variance::Variance;
    Max(max::Max) = |_: &Parameters| max::Max;
    RestPower(rest_power::RestPower) =
        |p: &Parameters| rest_power::RestPower { powers: p.powers.to_vec() };
    WeightedSum(weighted::WeightedSum) =
        |p: &Parameters| weighted::WeightedSum { vectors: p.vectors };
    WeightedRest(weighted::WeightedRest) =
        |p: &Parameters| weighted::WeightedRest { vectors: p.vectors };
    Dot(dot::Dot) = |_: &Parameters| dot::Dot;
    TopK(topk::TopK) = |p: &Parameters| topk::TopK { k: p.topk };
}

/// A field of floats with one value a row.
fn scalar(name: &'static str) -> Field {
    Field { name, columns: 0, integer: false }
}
