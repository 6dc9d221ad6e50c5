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
    let logits = if g.path == Path::Tiled { Operation::Logits } else { Operation::Gradient };
    let chunk = |width: usize| {
        choose(facts, logits, g.dtype, false, g.rows, width)
            .map_or(0.0, |choice| choice.cost(facts, g.rows, width) * g.features as f64 + LAUNCH)
            + products_cost(g, facts, width)
    };
    let (whole, last) = (classes / width, classes % width);
    whole as f64 * chunk(width) + if last > 0 { chunk(last) } else { 0.0 }
}

/// Time of the products that make the gradients of a tile of `width` classes: that of the input, and
/// beside it that of the weight.
pub(crate) fn products_cost(g: &Geometry, facts: &Facts, width: usize) -> f64 {
    let (rows, features) = (g.rows, g.features);
    let shape = (rows, features, width);
    let dw = choose(facts, Operation::Dw, g.dtype, false, width, features)
        .or_else(|| choose(facts, Operation::DwF32, g.dtype, false, width, features));
    let (Some((de, cost)), Some(dw)) = (choose_sliced(facts, g.dtype, shape, g.slices), dw) else {
        return 0.0;
    };
    let after = if de.by_maps() {
        dw.cost_beside(facts, (width, features, rows), de.idle(facts, shape, g.slices))
    } else {
        dw.cost(facts, width, features) * rows as f64
    };
    // Adding to the sums of the input's gradient reads and writes them.
    cost + after + 2.0 * PASS * (rows * features) as f64 + 2.0 * LAUNCH
}
