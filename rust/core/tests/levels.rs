//! Every level of this machine passes the engine's tests: the suite runs itself once for each.

mod common;

use common::Case;
use logitless_core::{DType, level, levels};
use std::process::Command;

#[test]
fn forced_levels_give_the_reference() {
    for forced in levels() {
        let test = std::env::current_exe().unwrap();
        let output = Command::new(test)
            .args(["--exact", "inner", "--ignored", "--nocapture"])
            .env("LOGITLESS_CPU", forced)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{forced}: {text}");
    }
}

#[test]
fn an_unknown_level_is_an_error_that_lists_the_known() {
    let test = std::env::current_exe().unwrap();
    let output = Command::new(test)
        .args(["--exact", "unknown", "--ignored"])
        .env("LOGITLESS_CPU", "sse9")
        .output()
        .unwrap();
    assert!(output.status.success());
}

#[test]
#[ignore = "run by `forced_levels_give_the_reference`"]
fn inner() {
    assert_eq!(level().unwrap(), std::env::var("LOGITLESS_CPU").unwrap());
    for dtype in [DType::F32, DType::F64, DType::Bf16, DType::F16] {
        Case::new(1, dtype, [40, 33, 300]).check();
        Case::plain(2, dtype, [65, 40, 260]).check();
    }
}

#[test]
#[ignore = "run by `an_unknown_level_is_an_error_that_lists_the_known`"]
fn unknown() {
    let error = level().unwrap_err().to_string();
    assert!(error.contains("sse9") && error.contains("portable"), "{error}");
    assert!(Case::plain(1, DType::F32, [3, 3, 3]).try_plan().is_err());
}
