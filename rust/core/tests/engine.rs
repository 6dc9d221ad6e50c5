//! The engine against a dense float64 reference.

mod common;

use common::{ALL, Array, Case};
use logitless_core::{DType, Error, Memory};

const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::Bf16, DType::F16];

#[test]
fn every_statistic_and_gradient_in_every_type() {
    for dtype in FLOATS {
        Case::new(1, dtype, [37, 19, 301]).check();
    }
}

#[test]
fn each_statistic_alone() {
    for name in ALL {
        let mut case = Case::new(2, DType::F64, [33, 8, 140]);
        // The gradients of some refer to the probabilities over R.
        case.only(if ["entropy", "weighted_rest"].contains(&name) { &["rest"] } else { &[] });
        let mut names = case.names.clone();
        names.push(name);
        let mut case = Case::new(2, DType::F64, [33, 8, 140]);
        case.only(&names);
        case.check();
    }
}

#[test]
fn plain_cross_entropy_without_maps() {
    for dtype in FLOATS {
        Case::plain(3, dtype, [70, 45, 530]).check();
    }
}

#[test]
fn shapes_down_to_one() {
    for sizes in [[1, 1, 1], [1, 3, 2], [32, 32, 128], [33, 1, 127], [31, 64, 129], [65, 257, 126]]
    {
        for dtype in [DType::F32, DType::Bf16, DType::F64] {
            Case::new(4, dtype, sizes).check();
            Case::plain(5, dtype, sizes).check();
        }
    }
}

#[test]
fn several_row_groups_and_super_blocks() {
    Case::plain(6, DType::F32, [2100, 5, 1200]).check();
    Case::new(7, DType::F64, [1100, 3, 600]).check();
    Case::new(7, DType::Bf16, [2100, 4, 600]).check();
    // So many features that strips are packed block by block.
    Case::plain(7, DType::Bf16, [1100, 1024, 270]).check();
}

#[test]
fn stored_logits_give_the_same_gradients() {
    for memory in [Memory::Fast, Memory::Bytes(40_000)] {
        for dtype in [DType::F32, DType::Bf16] {
            let mut case = Case::new(8, dtype, [50, 12, 700]);
            case.memory = memory;
            assert!(case.plan().store_bytes > 0);
            case.check();
        }
    }
}

#[test]
fn any_strides() {
    let mut case = Case::new(9, DType::F32, [40, 12, 150]);
    let values = (case.input.values(), case.weight.values());
    case.input = Array::strided(DType::F32, &[4, 10, 12], &[3, 12, 120]).filled(|i| values.0[i]);
    case.weight = Array::strided(DType::F32, &[150, 12], &[1, 151]).filled(|i| values.1[i]);
    case.check();
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dtype in [DType::F32, DType::Bf16] {
        let answer = |threads, sizes| {
            let mut case = Case::new(10, dtype, sizes);
            case.threads = threads;
            case.run().unwrap().bits
        };
        for sizes in [[300, 64, 2000], [1500, 8, 900]] {
            let one = answer(1, sizes);
            for threads in [2, 3, 5] {
                assert_eq!(one, answer(threads, sizes), "{dtype:?} {sizes:?} {threads} threads");
            }
        }
    }
}

#[test]
fn no_targets_at_all_and_all_rows_ignored() {
    let mut case = Case::new(11, DType::F32, [20, 6, 90]);
    case.only(&["rest", "entropy", "sum", "max"]);
    (case.ids, case.targets) = (None, 0);
    case.check();
    let mut case = Case::new(12, DType::F32, [20, 6, 90]);
    case.ids = Some(Array::new(DType::I64, &[20, 2]).filled(|_| -100.0));
    case.check();
}

#[test]
fn an_id_out_of_range_is_named() {
    let mut case = Case::plain(13, DType::F32, [5, 4, 30]);
    case.ids.as_mut().unwrap().set(7, 30.0);
    let wrong = Error::Target { row: 3, value: 30, classes: 30 };
    assert_eq!(case.run().err(), Some(wrong));
}

#[test]
fn far_targets_leave_the_rest_exact() {
    let mut case = Case::plain(14, DType::F32, [4, 1, 300]);
    for (row, class, weight) in [(0, 17, 500.0), (1, 18, -500.0)] {
        case.input.set(row, 1.0);
        case.weight.set(class, weight);
        let ids = case.ids.as_mut().unwrap();
        ids.set(2 * row, class as f64);
        ids.set(2 * row + 1, if row == 0 { 17.0 } else { -100.0 });
    }
    case.ids.as_mut().unwrap().set(3, 17.0);
    let (ours, dense) = (case.run().unwrap(), case.reference());
    for row in 0..2 {
        let (a, b) = (ours.outputs[0].1[row], dense.outputs[0].1[row]);
        assert!((a - b).abs() <= 2e-6 * b.abs().max(1.0), "{a} {b}");
    }
}
