//! nan, infinities, empty sets, and rows far from zero.

mod common;

use common::{Array, Case};
use logitless_core::DType;

/// A case of one feature whose logits of row i are `rows[i] · weight`.
fn case(names: &[&'static str], weights: &[f64], ids: &[f64]) -> Case {
    let classes = weights.len();
    let mut case = Case::new(1, DType::F32, [ids.len(), 1, classes]);
    case.only(names);
    (case.scale, case.softcap, case.bias, case.targets) = (1.0, 0.0, None, 1);
    case.input = Array::new(DType::F32, &[1, ids.len(), 1]).filled(|_| 1.0);
    case.weight = Array::new(DType::F32, &[classes, 1]).filled(|class| weights[class]);
    case.ids = Some(Array::new(DType::I64, &[ids.len(), 1]).filled(|row| ids[row]));
    case
}

fn output(case: &Case, name: &str) -> Vec<f64> {
    let outputs = case.run().unwrap().outputs;
    outputs.into_iter().find(|(field, _)| *field == name).unwrap().1
}

#[test]
fn one_class_that_is_the_target_leaves_nothing() {
    let case = case(&["rest", "target", "entropy"], &[3.0], &[0.0]);
    assert_eq!(output(&case, "rest"), [f64::NEG_INFINITY]);
    assert_eq!(output(&case, "target"), [3.0]);
    assert_eq!(output(&case, "rest_entropy"), [0.0]);
    for (name, values) in case.run().unwrap().gradients {
        assert!(values.iter().all(|value| value.is_finite()), "{name} {values:?}");
    }
}

#[test]
fn infinite_and_nan_logits_propagate_as_in_logsumexp() {
    let inf = f64::INFINITY;
    let rest = |weights: &[f64]| output(&case(&["rest", "target"], weights, &[0.0]), "rest")[0];
    assert_eq!(rest(&[0.0, -inf, -inf]), -inf);
    assert_eq!(rest(&[0.0, inf, 1.0]), inf);
    assert_eq!(rest(&[0.0, inf, inf]), inf);
    assert!(rest(&[0.0, f64::NAN, 1.0]).is_nan());
    assert!(rest(&[0.0, f64::NAN, inf]).is_nan());
    assert!((rest(&[0.0, -inf, 1.0]) - 1.0).abs() < 1e-6);
    // The target's own value does not reach the rest.
    assert_eq!(rest(&[f64::NAN, 2.0]), 2.0);
    assert_eq!(rest(&[inf, 2.0]), 2.0);
}

#[test]
fn the_maximum_takes_the_lowest_id_and_nan_first() {
    let argmax = |weights: &[f64]| output(&case(&["max"], weights, &[0.0]), "argmax")[0];
    assert_eq!(argmax(&[1.0, 5.0, 5.0]), 1.0);
    assert_eq!(argmax(&[1.0, f64::NAN, 9.0, f64::NAN]), 1.0);
    assert_eq!(argmax(&[f64::NEG_INFINITY; 3]), 0.0);
    let mut weights = vec![0.0; 700];
    (weights[650], weights[300]) = (2.0, 2.0);
    assert_eq!(argmax(&weights), 300.0);
    weights[699] = f64::NAN;
    assert_eq!(argmax(&weights), 699.0);
}

#[test]
fn the_k_largest_are_sorted_with_ties_by_id() {
    let mut weights: Vec<f64> = (0..600).map(|class| f64::from(class % 50)).collect();
    weights[333] = f64::NAN;
    let mut case = case(&["topk"], &weights, &[0.0]);
    case.topk = 5;
    assert_eq!(output(&case, "topk_ids"), [333.0, 49.0, 99.0, 149.0, 199.0]);
    assert_eq!(output(&case, "topk_values")[1..], [49.0; 4]);
}

#[test]
fn fewer_finite_logits_than_k() {
    let mut case = case(&["topk"], &[f64::NEG_INFINITY, 1.0, f64::NEG_INFINITY], &[0.0]);
    case.topk = 3;
    assert_eq!(output(&case, "topk_ids"), [1.0, 0.0, 2.0]);
}

#[test]
fn entropy_of_peaked_and_offset_rows_keeps_its_digits() {
    let entropy =
        |weights: &[f64]| output(&case(&["rest", "entropy"], weights, &[0.0]), "rest_entropy")[0];
    // One class a margin of 20 above 299 others.
    let mut weights = vec![0.0; 301];
    weights[7] = 20.0;
    let t = 299.0 * (-20.0f64).exp();
    let expected = t.ln_1p() + 20.0 * t / (1.0 + t);
    assert!((entropy(&weights) / expected - 1.0).abs() < 1e-5);
    weights.iter_mut().for_each(|weight| *weight += 1000.0);
    assert!((entropy(&weights) / expected - 1.0).abs() < 1e-5);
    // Equal logits: the logarithm of their number.
    assert!((entropy(&[1000.0; 301]) - 300f64.ln()).abs() < 1e-6);
}

#[test]
fn a_nan_before_a_far_larger_logit_is_not_forgotten() {
    let mut weights = vec![0.0; 700];
    (weights[3], weights[600]) = (f64::NAN, 5000.0);
    for (name, field) in [("rest", "rest"), ("entropy", "rest_entropy"), ("sum", "sum")] {
        assert!(output(&case(&["rest", name], &weights, &[0.0]), field)[0].is_nan(), "{name}");
    }
}

#[test]
fn a_bias_of_minus_infinity_masks_a_class() {
    let mut case = case(&["rest", "target", "entropy", "weighted_sum"], &[1.0, 2.0, 3.0], &[0.0]);
    case.vectors = 2;
    case.class_vectors = Array::new(DType::F32, &[2, 3]).filled(|i| f64::from(i % 3 != 2));
    let bias = [0.0, 0.0, f64::NEG_INFINITY];
    case.bias = Some(Array::new(DType::F32, &[3]).filled(|class| bias[class]));
    assert_eq!(output(&case, "rest"), [2.0]);
    assert_eq!(output(&case, "rest_entropy"), [0.0]);
    assert_eq!(output(&case, "weighted_sum"), [3.0, 3.0]);
    let gradients = case.run().unwrap().gradients;
    for (name, values) in gradients {
        let expected_finite = values.iter().all(|value| value.is_finite());
        // The logit scale times −inf is the one product without a value.
        assert!(expected_finite || name == "scale", "{name} {values:?}");
    }
}

#[test]
fn nothing_to_do() {
    for sizes in [[0, 4, 30], [0, 1, 1]] {
        Case::plain(2, DType::F32, sizes).run().unwrap();
    }
}

#[test]
fn log_sum_exp_over_many_classes() {
    // V = 262144 in f32: spread, offset, ascending, one outlier.
    let classes = 1 << 18;
    let mut random = common::Random(5);
    let normal: Vec<f64> = (0..classes).map(|_| f64::from(random.normal() as f32)).collect();
    let mut ascending: Vec<f64> = normal.iter().map(|z| f64::from((3.0 * z) as f32)).collect();
    ascending.sort_by(f64::total_cmp);
    let mut outlier = normal.clone();
    outlier[99_999] = 20.0;
    let offset = normal.iter().map(|z| f64::from((z + 100.0) as f32)).collect();
    let zipf = (1..=classes).map(|rank| f64::from(-(f64::from(rank).ln()) as f32)).collect();
    for logits in [normal, ascending, outlier, offset, zipf] {
        let case = case(&["rest"], &logits, &[-100.0, 0.0]);
        let top = logits[1..].iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = logits[1..].iter().map(|z| (z - top).exp()).sum();
        let expected = top + sum.ln();
        let ours = output(&case, "rest")[1];
        assert!((ours - expected).abs() <= 2e-6 * expected.abs().max(1.0), "{ours} {expected}");
    }
}
