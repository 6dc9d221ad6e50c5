//! How wide the chunks of a backward are, by what its products cost.

use crate::driver::Facts;
use crate::layout::{BackwardLayout, Geometry, padded};
use crate::plan::Path;
use crate::product::{Operation, choose, choose_sliced};
use crate::share::{LAUNCH, PASS};

/// Most classes of a chunk: wider ones gain nothing (measured), but for few rows, whose launches would
/// do too little.
pub(crate) fn widest(rows: usize) -> usize {
    33_792.max((32 << 20) / padded(rows) / 384 * 384)
}

/// Classes a chunk of the backward: the budget's most, cut so that the last waves are full.
pub(crate) fn backward_width(g: &Geometry, budget: usize, facts: &Facts) -> usize {
    let most = BackwardLayout::widest(g, budget, g.may_borrow());
    even_width(g, facts, g.classes, most.clamp(384, widest(g.rows)))
}

/// The width of at most `most` at which a backward makes the tiles of `classes` classes fastest.
pub(crate) fn even_width(g: &Geometry, facts: &Facts, classes: usize, most: usize) -> usize {
    let all = classes.next_multiple_of(64).max(64);
    if most >= all {
        return all;
    }
    // All widths down to half of the most: the cheapest by waves, the narrower of equals.
    let most = most.max(64);
    (most / 2..=most)
        .filter(|width| width.is_multiple_of(64))
        .map(|width| (width, backward_cost(g, facts, classes, width)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(most / 64 * 64, |found| found.0)
}

/// Time of a backward that makes `classes` classes in chunks of `width`, in the units of
/// `Choice::cost` times depth.
pub(crate) fn backward_cost(g: &Geometry, facts: &Facts, classes: usize, width: usize) -> f64 {
    let chunk = |width: usize| {
        let cost = |operation, m, n, depth: usize| {
            choose(facts, operation, g.dtype, false, m, n)
                .map_or(0.0, |choice| choice.cost(facts, m, n) * depth as f64 + LAUNCH)
        };
        let logits = if g.path == Path::Tiled { Operation::Logits } else { Operation::Gradient };
        cost(logits, g.rows, width, g.features)
            + cost(Operation::DwF32, width, g.features, g.rows)
            + choose_sliced(facts, g.dtype, (g.rows, g.features, width), g.slices)
                .map_or(0.0, |(_, cost)| cost + LAUNCH)
            // Adding to the sums of the input's gradient reads and writes them.
            + 2.0 * PASS * (g.rows * g.features) as f64
    };
    let (whole, last) = (classes / width, classes % width);
    whole as f64 * chunk(width) + if last > 0 { chunk(last) } else { 0.0 }
}
