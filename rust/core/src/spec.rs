//! Which statistics a call computes.

use crate::error::{Error, Result};
use crate::stats::Statistic;

/// One output of a forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// 0 for an output of shape (N,), else c for one of shape (N, c).
    pub columns: usize,
    /// Class ids (i64) instead of values.
    pub integer: bool,
}

impl Field {
    /// Values in each row.
    pub fn width(&self) -> usize {
        self.columns.max(1)
    }
}

/// The set of statistics of a call, in registry order, with their parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub(crate) statistics: Vec<Statistic>,
    powers: Vec<f64>,
    vectors: usize,
    topk: usize,
    targets: usize,
    fields: Vec<Field>,
}

/// The most target ids that a row may have: they share a 64-bit sort key with class and lane.
pub const MAX_TARGETS: usize = 1 << 15;

impl Spec {
    /// Statistics by name, in any order, and their parameters: exponents of `rest_power`, number of
    /// class vectors of the weighted statistics, k of `topk`, and target ids a row (0: no target).
    ///
    /// # Errors
    /// An unknown name, or a parameter that is missing, superfluous or out of range.
    pub fn new(
        names: &[&str],
        powers: &[f64],
        vectors: usize,
        topk: usize,
        targets: usize,
    ) -> Result<Self> {
        let known = Statistic::names();
        if let Some(name) = names.iter().find(|name| !known.contains(name)) {
            return Err(Error::UnknownStatistic { name: (*name).into(), known: known.join(", ") });
        }
        let wanted = |name: &str| names.contains(&name);
        let value = |argument, value: &dyn ToString, expected: &str| {
            Err(Error::Value { argument, value: value.to_string(), expected: expected.into() })
        };
        if let Some(power) = powers.iter().find(|power| !(power.is_finite() && **power > 0.0)) {
            return value("powers", power, "finite exponents above 0");
        }
        if wanted("rest_power") == powers.is_empty() {
            return value("powers", &powers.len(), "exponents if and only if rest_power is asked");
        }
        if (wanted("weighted_sum") || wanted("weighted_rest")) == (vectors == 0) {
            return value(
                "vectors",
                &vectors,
                "class vectors if and only if a weighted statistic is asked",
            );
        }
        if wanted("topk") == (topk == 0) || topk > crate::stats::MAX_TOPK {
            return value("topk", &topk, "1 to 64 if the topk statistic is asked, else 0");
        }
        if targets > MAX_TARGETS || (wanted("target") && targets == 0) {
            return value("targets", &targets, "1 to 32768 ids a row where a target is given");
        }
        let statistics: Vec<_> =
            Statistic::all(powers, vectors, topk, targets).filter(|s| wanted(s.name())).collect();
        let fields = statistics.iter().flat_map(Statistic::fields).collect();
        Ok(Self { statistics, powers: powers.to_vec(), vectors, topk, targets, fields })
    }

    /// The outputs, in the order in which they are passed.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// Names of the statistics, in registry order.
    pub fn statistics(&self) -> impl Iterator<Item = &'static str> {
        self.statistics.iter().map(Statistic::name)
    }

    /// Exponents of `rest_power`.
    pub fn powers(&self) -> &[f64] {
        &self.powers
    }

    /// Number of class vectors.
    pub fn vectors(&self) -> usize {
        self.vectors
    }

    /// k of `topk`, 0 without.
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// Target ids a row, 0 without a target.
    pub fn targets(&self) -> usize {
        self.targets
    }

    /// Position of a field among the outputs.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.fields.iter().position(|field| field.name == name)
    }
}
