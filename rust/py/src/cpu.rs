//! The CPU engine, one function per entry point.

use logitless_core as core;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::args::{ArrayArg, TensorArg, optional_tensors, tensors};
use crate::errors::to_python;
use crate::plan::Plan;
use crate::spec::Spec;

/// Compute the statistics of `spec` for every row and write them to `outputs`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn forward(
    py: Python<'_>,
    spec: &Bound<'_, Spec>,
    input: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    ids: Option<TensorArg>,
    ignore_index: Option<i64>,
    logit_scale: f64,
    softcap: f64,
    vectors: Option<TensorArg>,
    dense: Option<TensorArg>,
    outputs: &Bound<'_, PyTuple>,
    store: Option<TensorArg>,
    plan: &Bound<'_, Plan>,
    threads: usize,
) -> PyResult<()> {
    let problem =
        problem(input, weight, bias, ids, ignore_index, logit_scale, softcap, vectors, dense);
    let (spec, outputs, store, plan) =
        (&spec.get().0, tensors(outputs)?, store.map(|t| t.0), &plan.get().plan);
    // SAFETY: Python holds every array behind the addresses until this call returns, and passes
    // shapes and strides that stay inside them.
    py.detach(|| unsafe { core::forward(spec, &problem, &outputs, store, plan, threads) })
        .map_err(to_python)
}

/// Turn cotangents of the statistics into gradients of the wanted arguments.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn backward(
    py: Python<'_>,
    spec: &Bound<'_, Spec>,
    input: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    ids: Option<TensorArg>,
    ignore_index: Option<i64>,
    logit_scale: f64,
    softcap: f64,
    vectors: Option<TensorArg>,
    dense: Option<TensorArg>,
    saved: &Bound<'_, PyTuple>,
    cotangents: &Bound<'_, PyTuple>,
    store: Option<TensorArg>,
    d_input: Option<TensorArg>,
    d_weight: Option<TensorArg>,
    d_bias: Option<TensorArg>,
    d_scale: Option<TensorArg>,
    d_dense: Option<TensorArg>,
    accumulate_input: bool,
    plan: &Bound<'_, Plan>,
    threads: usize,
) -> PyResult<()> {
    let problem =
        problem(input, weight, bias, ids, ignore_index, logit_scale, softcap, vectors, dense);
    let gradients = core::Gradients {
        input: d_input.map(|t| t.0),
        weight: d_weight.map(|t| t.0),
        bias: d_bias.map(|t| t.0),
        scale: d_scale.map(|t| t.0),
        dense: d_dense.map(|t| t.0),
        accumulate_input,
    };
    let (saved, cotangents) = (tensors(saved)?, optional_tensors(cotangents)?);
    let (spec, store, plan) = (&spec.get().0, store.map(|t| t.0), &plan.get().plan);
    // SAFETY: as in `forward`; the gradient tensors are fresh and overlap nothing.
    py.detach(|| unsafe {
        core::backward(spec, &problem, &saved, &cotangents, store, &gradients, plan, threads)
    })
    .map_err(to_python)
}

#[expect(clippy::too_many_arguments, reason = "gathers positional arguments into a struct")]
pub(crate) fn problem(
    input: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    ids: Option<TensorArg>,
    ignore_index: Option<i64>,
    logit_scale: f64,
    softcap: f64,
    vectors: Option<TensorArg>,
    dense: Option<TensorArg>,
) -> core::Problem {
    core::Problem {
        input: input.0,
        weight: weight.0,
        bias: bias.map(|t| t.0),
        ids: ids.map(|t| t.0),
        ignore_index,
        logit_scale,
        softcap,
        vectors: vectors.map(|t| t.0),
        dense: dense.map(|t| t.0),
    }
}

/// Plain cross entropy: statistics, row losses and reduction. Returns the number of kept rows.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cross_entropy_forward(
    py: Python<'_>,
    input: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    ids: TensorArg,
    ignore_index: Option<i64>,
    logit_scale: f64,
    softcap: f64,
    reduction: u8,
    z_loss_weight: f64,
    loss: TensorArg,
    rest: TensorArg,
    target: TensorArg,
    store: Option<TensorArg>,
    plan: &Bound<'_, Plan>,
    threads: usize,
) -> PyResult<usize> {
    let problem =
        problem(input, weight, bias, Some(ids), ignore_index, logit_scale, softcap, None, None);
    let loss_of = cross_entropy(reduction, z_loss_weight)?;
    let saved = core::Saved { rest: rest.0, target: target.0 };
    let (store, plan) = (store.map(|t| t.0), &plan.get().plan);
    // SAFETY: as in `forward`.
    py.detach(|| unsafe { loss_of.forward(&problem, &saved, &loss.0, store, plan, threads) })
        .map_err(to_python)
}

/// Gradients of `cross_entropy_forward`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cross_entropy_backward(
    py: Python<'_>,
    input: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    ids: TensorArg,
    ignore_index: Option<i64>,
    logit_scale: f64,
    softcap: f64,
    reduction: u8,
    z_loss_weight: f64,
    rest: TensorArg,
    target: TensorArg,
    grad_loss: TensorArg,
    store: Option<TensorArg>,
    d_input: Option<TensorArg>,
    d_weight: Option<TensorArg>,
    d_bias: Option<TensorArg>,
    d_scale: Option<TensorArg>,
    plan: &Bound<'_, Plan>,
    threads: usize,
) -> PyResult<()> {
    let problem =
        problem(input, weight, bias, Some(ids), ignore_index, logit_scale, softcap, None, None);
    let loss_of = cross_entropy(reduction, z_loss_weight)?;
    let saved = core::Saved { rest: rest.0, target: target.0 };
    let gradients = core::Gradients {
        input: d_input.map(|t| t.0),
        weight: d_weight.map(|t| t.0),
        bias: d_bias.map(|t| t.0),
        scale: d_scale.map(|t| t.0),
        ..core::Gradients::default()
    };
    let (store, plan) = (store.map(|t| t.0), &plan.get().plan);
    // SAFETY: as in `backward`.
    py.detach(|| unsafe {
        loss_of.backward(&problem, &saved, &grad_loss.0, store, &gradients, plan, threads)
    })
    .map_err(to_python)
}

pub(crate) fn cross_entropy(reduction: u8, z_weight: f64) -> PyResult<core::CrossEntropy> {
    let reduction = match reduction {
        0 => core::Reduction::None,
        1 => core::Reduction::Mean,
        2 => core::Reduction::Sum,
        _ => {
            let message = format!("reduction = {reduction}; expected 0 none, 1 mean or 2 sum");
            return Err(PyValueError::new_err(message));
        }
    };
    Ok(core::CrossEntropy { reduction, z_weight })
}

/// Log-sum-exp over `axes` of an array of any rank, as pairs: `sum of w * exp(a) = total * exp(maximum)`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn logsumexp_pairs(
    py: Python<'_>,
    array: ArrayArg,
    weights: Option<ArrayArg>,
    axes: Vec<usize>,
    maximum: TensorArg,
    total: TensorArg,
    merge: bool,
    threads: usize,
) -> PyResult<()> {
    let shape = array.shape;
    if weights.as_ref().is_some_and(|weights| weights.shape != shape) {
        return Err(PyValueError::new_err(
            "weights must have the shape of the array: broadcast it",
        ));
    }
    let weights = weights.map(|weights| weights.array);
    // SAFETY: as in `forward`.
    py.detach(|| unsafe {
        core::logsumexp_pairs(
            &array.array,
            weights.as_ref(),
            &shape,
            &axes,
            &maximum.0,
            &total.0,
            merge,
            threads,
        )
    })
    .map_err(to_python)
}

/// Scratch that the last engine call of any thread allocated, in bytes.
#[pyfunction]
pub fn last_workspace_bytes() -> usize {
    core::last_workspace_bytes()
}

/// Instruction levels that this machine can run, slowest first.
#[pyfunction]
pub fn cpu_levels() -> Vec<&'static str> {
    core::levels()
}

/// The level in use: the fastest, or the one that `LOGITLESS_CPU` forces.
#[pyfunction]
pub fn cpu_level() -> PyResult<&'static str> {
    core::level().map_err(to_python)
}

/// Set how many threads an engine call uses by default.
#[pyfunction]
pub fn set_num_threads(threads: usize) -> PyResult<()> {
    if threads == 0 {
        return Err(PyValueError::new_err("threads = 0; expected 1 or more"));
    }
    core::set_num_threads(threads);
    Ok(())
}

/// How many threads an engine call uses by default.
#[pyfunction]
pub fn get_num_threads() -> usize {
    core::get_num_threads()
}
