//! Scratch: never more than planned, and little of what dense logits would take.

mod common;

use common::Case;
use logitless_core::{DType, Memory, Spec, last_workspace_bytes, plan, wanted};
use std::sync::Mutex;

/// `last_workspace_bytes` is of the whole process.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn calls_allocate_at_most_what_was_planned() {
    let _turn = TURN.lock();
    for dtype in [DType::F32, DType::Bf16, DType::F64] {
        for sizes in [[3, 2, 5], [64, 32, 5000], [300, 129, 1200], [1100, 4, 900]] {
            for threads in [1, 2, 3, 7] {
                for mut case in [Case::new(1, dtype, sizes), Case::plain(1, dtype, sizes)] {
                    case.threads = threads;
                    case.run().unwrap();
                    let plan = case.plan();
                    let planned = plan.workspace_bytes(threads) - plan.store_bytes;
                    let used = last_workspace_bytes();
                    assert!(used <= planned, "{used} > {planned}: {dtype:?} {sizes:?} {threads}");
                }
            }
        }
    }
}

#[test]
fn a_weight_that_is_not_contiguous_costs_a_packed_copy_of_some_classes() {
    let _turn = TURN.lock();
    let mut case = Case::plain(2, DType::F32, [40, 12, 1500]);
    let values = case.weight.values();
    let strided = common::Array::strided(DType::F32, &[1500, 12], &[1, 1501]);
    case.weight = strided.filled(|index| values[index]);
    case.check();
}

/// Cross entropy's share of three dense logit arrays, the peak of eager mode, on two threads.
fn share(dtype: DType, [rows, features, classes]: [usize; 3]) -> f64 {
    let spec = Spec::new(&["rest", "target"], &[], 0, 0, 1).unwrap();
    let both = wanted::INPUT | wanted::WEIGHT;
    let plan = plan(&spec, rows, features, classes, dtype, Memory::Lean, both, true).unwrap();
    plan.workspace_bytes(2) as f64 / (3 * rows * classes * dtype.size()) as f64
}

#[test]
fn lean_calls_take_a_few_percent_of_eager_mode() {
    for sizes in [[1024, 512, 32768], [2048, 1024, 16384], [1024, 512, 50257]] {
        let share = share(DType::F32, sizes);
        assert!(share <= 0.05, "{sizes:?} {share}");
    }
}

#[test]
fn workspace_does_not_grow_with_classes() {
    let spec = Spec::new(&["rest", "target"], &[], 0, 0, 1).unwrap();
    let both = wanted::INPUT | wanted::WEIGHT;
    let bytes = |classes| {
        plan(&spec, 512, 64, classes, DType::F32, Memory::Lean, both, true)
            .unwrap()
            .workspace_bytes(2)
    };
    assert!(bytes(1 << 22) <= bytes(1 << 16) + (1 << 16));
}
