//! What the forward put out, and the cotangents of it, row by row.

use crate::spec::Spec;
use crate::stats::{RowGradient, SavedRow, Statistic};
use crate::tensor::Tensor;

/// The saved outputs of a call with their cotangents.
pub(crate) struct Outputs<'a> {
    pub spec: &'a Spec,
    pub saved: &'a [Tensor],
    pub cotangents: &'a [Option<Tensor>],
    /// V.
    pub classes: usize,
}

impl Outputs<'_> {
    /// Calls `visit` with each statistic and its part of a row.
    fn for_statistics(&self, row: usize, mut visit: impl FnMut(&Statistic, SavedRow<'_>)) {
        let whole = SavedRow {
            saved: self.saved,
            cotangents: self.cotangents,
            fields: self.spec.fields(),
            row,
            rest: 0.0,
            classes: self.classes,
        };
        let rest = self.spec.position("rest").map_or(0.0, |place| whole.value(place, 0));
        let mut first = 0;
        for statistic in &self.spec.statistics {
            let range = first..first + statistic.field_count();
            first = range.end;
            let part = SavedRow {
                saved: &self.saved[range.clone()],
                cotangents: &self.cotangents[range.clone()],
                fields: &self.spec.fields()[range],
                rest,
                ..whole
            };
            visit(statistic, part);
        }
    }

    /// Whether a row has a cotangent.
    pub(crate) fn is_live(&self, row: usize) -> bool {
        let mut live = false;
        self.for_statistics(row, |_, part| live |= part.is_live());
        live
    }

    /// The gradient of a row's logits; returns its `rest`.
    pub(crate) fn gradient(&self, row: usize, out: &mut RowGradient) -> f64 {
        out.clear();
        let mut rest = 0.0;
        self.for_statistics(row, |statistic, part| {
            rest = part.rest;
            if part.cotangents.iter().any(Option::is_some) {
                statistic.grad(&part, out);
            }
        });
        rest
    }
}
