use super::*;
use half::{bf16, f16};
use proptest::prelude::*;

/// The definition, element by element in f64.
fn reference(values: &[f64], weights: &[f64]) -> Pair {
    let kept: Vec<_> = values.iter().zip(weights).filter(|(_, w)| **w != 0.0).collect();
    if kept.iter().any(|(a, w)| a.is_nan() || w.is_nan()) {
        return Pair::NAN;
    }
    let max = kept.iter().map(|(a, _)| **a).fold(f64::NEG_INFINITY, f64::max);
    let part = |a: f64| if a == max { 1.0 } else { (a - max).exp() };
    match max {
        f64::NEG_INFINITY => Pair::EMPTY,
        _ => Pair::new(max, kept.iter().map(|(a, w)| **w * part(**a)).sum()),
    }
}

fn strided<T>(values: &[T], dtype: DType, strides: &[isize]) -> Strided {
    Strided { address: values.as_ptr().expose_provenance(), dtype, strides: strides.to_vec() }
}

/// Row-major strides of a shape.
fn row_major(shape: &[usize]) -> Vec<isize> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product::<usize>() as isize).collect()
}

/// Every pair of a reduction, from memory that holds nan before.
fn pairs(
    array: &Strided,
    weights: Option<&Strided>,
    shape: &[usize],
    axes: &[usize],
    threads: usize,
) -> Vec<Pair> {
    let kept = (0..shape.len()).filter(|axis| !axes.contains(axis));
    let outputs: usize = kept.map(|axis| shape[axis]).product();
    let (mut max, mut sum) = (vec![f64::NAN; outputs], vec![f64::NAN; outputs]);
    let output = |values: &mut [f64]| {
        let address = values.as_mut_ptr().expose_provenance();
        Tensor::new(address, DType::F64, &[outputs], &[1]).unwrap()
    };
    let (max_out, sum_out) = (output(&mut max), output(&mut sum));
    // SAFETY: the vectors behind the descriptions live until the end of the test.
    unsafe {
        logsumexp_pairs(array, weights, shape, axes, &max_out, &sum_out, false, threads).unwrap();
    }
    max.into_iter().zip(sum).map(|(max, sum)| Pair { max, sum }).collect()
}

fn close(actual: Pair, expected: Pair, tolerance: f64) -> bool {
    let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
    same(actual.max, expected.max)
        && (same(actual.sum, expected.sum)
            || (actual.sum - expected.sum).abs() <= tolerance * expected.sum.abs().max(1.0))
}

/// Values with a few infinities and nans among them.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        40 => -100.0f32..100.0,
        1 => Just(f32::NEG_INFINITY),
        1 => prop_oneof![Just(f32::INFINITY), Just(f32::NAN), Just(f32::NEG_INFINITY)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every axis of a three-dimensional array, against the definition.
    #[test]
    fn agrees_with_the_definition(
        shape in (1usize..5, 1usize..70, 1usize..150),
        axis in 0usize..3,
        seed in proptest::collection::vec(value(), 200),
        weighted in any::<bool>(),
    ) {
        let shape = [shape.0, shape.1, shape.2];
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| seed[i * 7919 % seed.len()]).collect();
        let weights: Vec<f64> = (0..count).map(|i| ((i * 31 % 11) as f64 - 4.0) / 2.0).collect();
        let strides = row_major(&shape);
        let array = strided(&values, DType::F32, &strides);
        let weighting = strided(&weights, DType::F64, &strides);
        let actual = pairs(&array, weighted.then_some(&weighting), &shape, &[axis], 2);
        let (len, inner) = (shape[axis], strides[axis] as usize);
        for (output, &actual) in actual.iter().enumerate() {
            let first = output / inner * inner * len + output % inner;
            let along = || (0..len).map(|i| first + i * inner);
            let line: Vec<f64> = along().map(|i| f64::from(values[i])).collect();
            let w: Vec<f64> = along().map(|i| if weighted { weights[i] } else { 1.0 }).collect();
            let expected = reference(&line, &w);
            prop_assert!(close(actual, expected, 1e-5), "{actual:?} {expected:?}");
        }
    }

    /// Axes in any number and memory in any order give the pair of the same set of elements.
    #[test]
    fn layout_does_not_matter(
        (a, b) in (1usize..40, 1usize..140),
        values in proptest::collection::vec(-30.0f64..30.0, 40 * 140),
    ) {
        let whole = |strides: &[isize], start: usize| {
            let array = strided(&values[start..], DType::F64, strides);
            pairs(&array, None, &[a, b], &[0, 1], 1)[0]
        };
        let used: Vec<f64> = (0..a * b).map(|i| values[i]).collect();
        let expected = reference(&used, &vec![1.0; a * b]);
        let (rows, columns) = (a as isize, b as isize);
        prop_assert!(close(whole(&[columns, 1], 0), expected, 1e-13));
        prop_assert!(close(whole(&[1, rows], 0), expected, 1e-13));
        prop_assert!(close(whole(&[-columns, -1], a * b - 1), expected, 1e-13));
    }
}

#[test]
fn long_reductions_have_the_same_bits_for_any_number_of_threads() {
    let values: Vec<f32> = (0..1_000_003u64).map(|i| (i * 7919 % 1000) as f32 * 0.05).collect();
    let array = strided(&values, DType::F32, &[1]);
    let one = pairs(&array, None, &[values.len()], &[0], 1);
    for threads in [2, 3, 7] {
        assert_eq!(pairs(&array, None, &[values.len()], &[0], threads), one);
    }
    let wide: Vec<f64> = values.iter().map(|&a| f64::from(a)).collect();
    assert!(close(one[0], reference(&wide, &vec![1.0; wide.len()]), 1e-6));
}

#[test]
fn merging_continues_a_pair() {
    let values = [1.0f64, 2.0, 3.0, f64::INFINITY];
    let (mut max, mut sum) = ([2.0f64], [1.5f64]);
    let output = |values: &mut [f64; 1]| {
        let address = values.as_mut_ptr().expose_provenance();
        Tensor::new(address, DType::F64, &[], &[]).unwrap()
    };
    let (max_out, sum_out) = (output(&mut max), output(&mut sum));
    let array = strided(&values, DType::F64, &[1]);
    // SAFETY: all arrays live until the end of the test.
    unsafe {
        logsumexp_pairs(&array, None, &[3], &[0], &max_out, &sum_out, true, 1).unwrap();
    }
    let expected = 1.5 * (-1.0f64).exp() + (-2.0f64).exp() + (-1.0f64).exp() + 1.0;
    assert!(max[0] == 3.0 && (sum[0] - expected).abs() < 1e-14);
    // SAFETY: as above.
    unsafe {
        logsumexp_pairs(&array, None, &[4], &[0], &max_out, &sum_out, true, 1).unwrap();
    }
    assert_eq!((max[0], sum[0]), (f64::INFINITY, 1.0));
}

#[test]
fn empty_reductions_and_zero_steps() {
    let value = [3.0f32];
    let empty = strided(&value, DType::F32, &[1, 1]);
    assert_eq!(pairs(&empty, None, &[2, 0], &[1], 1), [Pair::EMPTY; 2]);
    assert_eq!(pairs(&empty, None, &[0, 2], &[1], 1), []);
    let expanded = strided(&value, DType::F32, &[0, 0]);
    assert_eq!(pairs(&expanded, None, &[2, 5000], &[1], 1), [Pair { max: 3.0, sum: 5000.0 }; 2]);
    assert_eq!(pairs(&expanded, None, &[2, 50], &[], 1), [Pair { max: 3.0, sum: 1.0 }; 100]);
}

#[test]
fn half_types_and_unaligned_addresses() {
    let halves = [f16::from_f32(1.5), f16::from_f32(-2.0)];
    let expected = reference(&[1.5, -2.0], &[1.0, 1.0]);
    let array = strided(&halves, DType::F16, &[1]);
    assert!(close(pairs(&array, None, &[2], &[0], 1)[0], expected, 1e-6));
    let brains = [bf16::from_f32(1.5), bf16::from_f32(-2.0)];
    let array = strided(&brains, DType::Bf16, &[1]);
    assert!(close(pairs(&array, None, &[2], &[0], 1)[0], expected, 1e-6));
    let mut bytes = vec![0u8];
    [1.5f32, -2.0].iter().for_each(|value| bytes.extend(value.to_ne_bytes()));
    let mut array = strided(&bytes, DType::F32, &[1]);
    array.address += 1;
    assert!(close(pairs(&array, None, &[2], &[0], 1)[0], expected, 1e-6));
}

#[test]
fn bad_arguments_are_refused() {
    let value = [0.0f64];
    let output = Tensor::new(value.as_ptr().expose_provenance(), DType::F64, &[], &[]).unwrap();
    let call = |array: &Strided, axes: &[usize]| {
        // SAFETY: refused before anything is read.
        unsafe { logsumexp_pairs(array, None, &[1], axes, &output, &output, false, 1) }
    };
    let message = |result: Result<()>| result.unwrap_err().to_string();
    let integers = strided(&[0i64], DType::I64, &[1]);
    assert!(message(call(&integers, &[0])).contains("float"));
    assert!(message(call(&strided(&value, DType::F64, &[1]), &[1])).contains("axis = 1"));
}
