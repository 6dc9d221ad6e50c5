//! The plan that keeps some of the classes' exponentials: how many, and in how much memory.
//!
//! Lean's promise is a quarter of the gradients beside them, or 256 MiB. What the backward does not
//! need of that for its sums holds exponentials from the forward on, and its tiles later; the weight's
//! gradient lends what it can (`share`). Bytes beyond that are bought.

use logitless_core::{Memory, Spec, wanted};

use crate::driver::Facts;
use crate::layout::{Arena, BackwardLayout, Geometry, StoreLayout, StoredForwardLayout, padded};
use crate::plan::{Plan, lean_budget};
use crate::share::{Lends, Prices, Share, Strip, WIDEST};
use crate::widths::backward_width;

/// The plan that keeps some of the classes, if that pays within `memory`.
pub(crate) fn partly_stored(
    plan: &Plan,
    g: &Geometry,
    spec: &Spec,
    memory: Memory,
    facts: &Facts,
    lends: Lends,
) -> Option<Plan> {
    // Exponentials in 16 bits would show in sums that cancel: only who asks for them gets them.
    if memory == Memory::Lean && g.unrounded {
        return None;
    }
    let lists = {
        // Rows, targets and references, without any exponential.
        let mut arena = Arena::at(0);
        StoreLayout::lay_lists(&mut arena, g);
        arena.used
    };
    let column = padded(g.rows) * g.dtype.size();
    // Everything in the store, with what chunks are rounded up by.
    let everything = lists + column * (g.classes + 64) / 64 * 65;
    let (allowed, lends) = match (memory, lends) {
        (Memory::Lean, _) => (0, lends),
        (Memory::Bytes(bytes), _) => (bytes, lends),
        (Memory::Fast, Lends::Nothing) => (everything, lends),
        (Memory::Fast, _) => (everything, Lends::Store),
    };
    let bought = allowed.saturating_sub(lists);
    if lends == Lends::Nothing && bought == 0 {
        return None;
    }
    let lean = lean_budget(g);
    let width = backward_width(g, lean.saturating_sub(lists), facts);
    let prices = Prices::new(g, facts, width);
    // The store takes the place of the gradient tiles, or all that it may.
    let mut room = match lends {
        Lends::Nothing => bought,
        _ => {
            let mut others = Arena::at(0);
            let some = Strip { first: 0, classes: 1, width: 0 };
            let with = Geometry { share: Share { own: some, lends, ..Share::default() }, ..*g };
            BackwardLayout::lay(&mut others, &with, 0, g.may_borrow());
            lean.saturating_sub(lists + others.used).max(bought)
        }
    };
    let lent = match lends {
        Lends::Weight(element) => prices.lent(g.features * element),
        _ => Default::default(),
    };
    while room > 0 {
        // The other classes' tiles take the place of the store, if the backward may overwrite it.
        let (most, widest) = match lends {
            // An entropy's exponentials become tiles beside the store.
            Lends::Nothing => (if g.entropy() { width } else { WIDEST }, width),
            _ => (WIDEST, (room / column).min(WIDEST).min(g.classes + 63) / 64 * 64),
        };
        let (own, tile) = prices.own(lent.classes, most, room, widest);
        let (chunk, tile) = match (lends, tile) {
            (Lends::Nothing, _) => (width, 0),
            // Everything is kept: the device may still find that a few rows are cheaper made again.
            (_, 0) => (widest, widest),
            _ => (tile, tile),
        };
        let share = Share { lent, own, tile, lends };
        if share.classes() == 0 || chunk == 0 {
            return None;
        }
        let mut plan = Plan { share, mode: "partly stored", ..plan.clone() };
        let g = Geometry::new(spec, &plan, facts);
        let (mut store, mut forward, mut backward) = (Arena::at(0), Arena::at(0), Arena::at(0));
        StoreLayout::lay(&mut store, &g);
        StoredForwardLayout::lay(&mut forward, &g);
        BackwardLayout::lay(&mut backward, &g, chunk, g.may_borrow());
        // Beyond what was bought, lean's promise: the forward may use what the gradient of the input
        // will take.
        let lender = g.rows * g.features * if g.wants(wanted::INPUT) { g.dtype.size() } else { 0 };
        let excess = (store.used + forward.used).saturating_sub(lean + lender);
        if excess > 0 && store.used > allowed {
            room = bought.max(room.saturating_sub(excess.next_multiple_of(64 * column)));
            continue;
        }
        (plan.store_bytes, plan.forward_bytes, plan.backward_bytes) =
            (store.used, forward.used, backward.used);
        plan.parts = store.parts;
        plan.parts.extend(if forward.used > backward.used {
            forward.parts
        } else {
            backward.parts
        });
        plan.chunks = (g.classes, chunk);
        return Some(plan);
    }
    None
}

#[cfg(test)]
mod tests {
    use logitless_core::DType;

    use super::*;
    use crate::plan::plan_for;
    use crate::product::{Operation, exists};
    use crate::share::Outputs;

    /// The plan of (rows, features, classes), with entropy or without.
    fn make(shape: [usize; 3], entropy: bool, memory: Memory, lends: Lends) -> Plan {
        let [rows, features, classes] = shape;
        let names = ["rest", "target", "entropy"];
        let spec = Spec::new(&names[..2 + usize::from(entropy)], &[], 0, 0, 1).unwrap();
        let outputs = Outputs { compact: true, lends };
        let (dtype, facts) = (DType::Bf16, Facts::h200());
        plan_for(&spec, rows, features, classes, dtype, memory, 3, true, &facts, outputs).unwrap()
    }

    /// Whether this build has the kernels.
    fn possible() -> bool {
        exists(&Facts::h200(), Operation::StoreExp, DType::Bf16)
    }

    #[test]
    fn lean_keeps_what_the_gradients_lend() {
        let shapes = [
            ([8192, 4096, 128_256], 0.50),
            ([8192, 2304, 256_000], 0.29),
            ([8192, 3584, 152_064], 0.43),
            ([8192, 1024, 65_536], 0.25),
            ([8192, 768, 50_257], 0.2),
            ([2048, 4096, 128_256], 0.80),
            ([2000, 1024, 100_003], 0.5),
        ];
        for (shape, least) in shapes.into_iter().filter(|_| possible()) {
            let [rows, features, classes] = shape;
            for (element, entropy) in [(2, false), (4, false), (2, true), (4, true)] {
                let plan = make(shape, entropy, Memory::Lean, Lends::Weight(element));
                assert_eq!(plan.mode, "partly stored");
                assert!(plan.share.classes() as f64 >= least * classes as f64, "{plan:?}");
                let gradients = 2 * features * (rows + classes);
                let budget = (gradients / 4).max(256 << 20);
                assert!(plan.store_bytes + plan.backward_bytes <= budget, "{plan:?}");
                // The input's gradient does not exist yet.
                let forward = plan.store_bytes + plan.forward_bytes;
                assert!(forward <= budget + 2 * features * rows, "{plan:?}");
            }
        }
    }

    #[test]
    fn lean_keeps_everything_that_fits_for_one_backward() {
        let shapes =
            [[128, 1024, 32_768], [1000, 1024, 65_537], [4096, 1024, 151], [8192, 4096, 4096]];
        for shape in shapes.into_iter().filter(|_| possible()) {
            let [rows, features, classes] = shape;
            let gradients = 2 * features * (rows + classes);
            let budget = (gradients / 4).max(256 << 20);
            for lends in [Lends::Store, Lends::Weight(2), Lends::Weight(4)] {
                for memory in [Memory::Lean, Memory::Bytes(1 << 20)] {
                    let plan = make(shape, false, memory, lends);
                    assert!(plan.stored && plan.on_loan() && plan.lent_bytes() == 0, "{plan:?}");
                    assert!(plan.store_bytes + plan.backward_bytes <= budget, "{plan:?}");
                    let forward = plan.store_bytes + plan.forward_bytes;
                    assert!(forward <= budget + 2 * features * rows, "{plan:?}");
                }
            }
            // Without a loan lean keeps nothing; what is bought or fast may serve again.
            assert_eq!(make(shape, false, Memory::Lean, Lends::Nothing).store_bytes, 0);
            for memory in [Memory::Bytes(1 << 30), Memory::Fast] {
                let plan = make(shape, false, memory, Lends::Weight(2));
                assert!(plan.stored && !plan.on_loan(), "{plan:?}");
            }
        }
    }

    #[test]
    fn bytes_buy_a_share_of_the_classes() {
        let shape = [8192, 4096, 128_256];
        let whole = 2 * shape[0] * shape[2] + (1 << 20);
        for percent in [20, 50, 90].into_iter().filter(|_| possible()) {
            let bytes = whole / 100 * percent;
            let plan = make(shape, false, Memory::Bytes(bytes), Lends::Nothing);
            let share = plan.share.classes() as f64 / shape[2] as f64;
            assert!(plan.store_bytes <= bytes);
            assert!((share - percent as f64 / 100.0).abs() < 0.02, "{plan:?}");
            // What is lent comes on top.
            let more = make(shape, false, Memory::Bytes(bytes), Lends::Weight(2));
            assert!(more.store_bytes <= bytes);
            assert!(more.share.classes() >= shape[2].min(plan.share.classes() + 50_000));
        }
    }

    #[test]
    fn fast_keeps_everything_of_an_entropy() {
        for lends in [Lends::Nothing, Lends::Store, Lends::Weight(2)] {
            let plan = make([8192, 4096, 128_256], true, Memory::Fast, lends);
            let classes = if possible() { 128_256 } else { 0 };
            assert_eq!((plan.share.classes(), plan.stored), (classes, false));
            assert_eq!(plan.lent_bytes(), 0);
        }
    }
}
