//! Properties over shapes, options and thread counts.

mod common;

use common::{ALL, Case};
use logitless_core::{DType, Memory};
use proptest::prelude::*;

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F64), Just(DType::Bf16), Just(DType::F16)]
}

fn memory() -> impl Strategy<Value = Memory> {
    prop_oneof![Just(Memory::Lean), Just(Memory::Fast), (0usize..200_000).prop_map(Memory::Bytes)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any shape, any subset of statistics, any maps, any memory: the dense reference.
    #[test]
    fn engine_equals_reference(
        seed in any::<u64>(),
        dtype in dtype(),
        rows in 1usize..100,
        features in 1usize..50,
        classes in 1usize..400,
        subset in proptest::collection::vec(any::<bool>(), ALL.len()),
        softcap in prop_oneof![Just(0.0), Just(5.0)],
        biased in any::<bool>(),
        memory in memory(),
        threads in 1usize..4,
    ) {
        let mut case = Case::new(seed, dtype, [rows, features, classes]);
        let mut names = vec!["rest"];
        names.extend(ALL.iter().zip(subset).filter(|(name, kept)| *kept && **name != "rest").map(|(name, _)| *name));
        case.only(&names);
        if !biased {
            case.bias = None;
        }
        (case.softcap, case.memory, case.threads) = (softcap, memory, threads);
        case.check();
    }

    /// The bits of a row do not depend on the rows around it, nor on the threads.
    #[test]
    fn rows_and_threads_leave_no_trace(seed in any::<u64>(), rows in 2usize..80, threads in 2usize..6) {
        let whole = Case::new(seed, DType::F32, [rows, 16, 300]);
        let mut many = Case::new(seed, DType::F32, [rows, 16, 300]);
        many.threads = threads;
        prop_assert_eq!(whole.run().unwrap().bits, many.run().unwrap().bits);
    }
}
