//! `target`: the logits of the row's target ids, one column an id.
//!
//! The forward takes these logits out of the tile before the statistics over R see it, and writes
//! them where it finds them ([`crate::forward`]): there is no state.

use super::{Lane, RowGradient, SavedRow, Scope, Tile, Unit, Writer};
use crate::element::Real;
use crate::spec::Field;

/// No state.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    /// Ids a row.
    pub ids: usize,
}

impl Unit for Target {
    const NAME: &'static str = "target";
    const SCOPE: Scope = Scope::All;

    fn fields(&self) -> Vec<Field> {
        vec![Field { name: "target", columns: self.ids, integer: false }]
    }

    fn lanes(&self) -> usize {
        0
    }

    fn start(&self, _: &mut [Lane]) {}

    #[inline(always)]
    fn absorb<A: Real, const FMA: bool>(&self, _: &Tile<'_, A>, _: &mut [Lane]) {}

    #[inline(always)]
    fn merge<const FMA: bool>(&self, _: &mut [Lane], _: &[Lane]) {}

    fn finish(&self, _: &[Lane], _: usize, _: &mut Writer<'_>) {}

    fn grad(&self, row: &SavedRow<'_>, out: &mut RowGradient) {
        out.targets.extend((0..self.ids).map(|column| row.cotangent(0, column)));
    }
}
