//! The CUDA engine, one function per entry point.
//!
//! Arguments are those of the CPU functions in the same order, then the device, its stream and the
//! workspace that the caller's framework allocated. Calls enqueue work and return.

use logitless_core as core;
use logitless_gpu as gpu;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::args::{TensorArg, optional_tensors, tensors};
use crate::cpu::{cross_entropy, problem};
use crate::cuda_plan::CudaPlan;
use crate::errors::to_python;
use crate::spec::Spec;

pub(crate) fn error(error: gpu::Error) -> PyErr {
    match error {
        gpu::Error::Call(error) => to_python(error),
        other => PyRuntimeError::new_err(other.to_string()),
    }
}

/// Compute the statistics of `spec` for every row and write them to `outputs`. `scale` is the logit
/// scale where the device holds it: one number in the accumulation dtype. `lent` is d_weight, where
/// the plan has `lent_bytes`.
#[pyfunction]
#[pyo3(signature = (
    spec, input, weight, bias, ids, ignore_index, logit_scale, softcap, vectors, dense, outputs,
    store, plan, threads, device, stream, workspace, scale = None, lent = None
))]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_forward(
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
    plan: &Bound<'_, CudaPlan>,
    threads: usize,
    device: usize,
    stream: usize,
    workspace: TensorArg,
    scale: Option<TensorArg>,
    lent: Option<TensorArg>,
) -> PyResult<()> {
    let problem =
        problem(input, weight, bias, ids, ignore_index, logit_scale, softcap, vectors, dense);
    let (store, scale, lent) = (store.map(|t| t.0), scale.map(|t| t.0), lent.map(|t| t.0));
    let _ = threads;
    let (spec, outputs, plan) = (&spec.get().0, tensors(outputs)?, &plan.get().plan);
    // SAFETY: Python holds every array behind the addresses until the stream has passed this call
    // (its allocator reuses memory in stream order), with shapes and strides inside them.
    py.detach(|| unsafe {
        gpu::forward(
            spec,
            &problem,
            &outputs,
            plan,
            device,
            stream,
            &workspace.0,
            store.as_ref(),
            scale.as_ref(),
            lent.as_ref(),
        )
    })
    .map_err(error)
}

/// Turn cotangents of the statistics into gradients of the wanted arguments.
#[pyfunction]
#[pyo3(signature = (
    spec, input, weight, bias, ids, ignore_index, logit_scale, softcap, vectors, dense, saved,
    cotangents, store, d_input, d_weight, d_bias, d_scale, d_dense, accumulate_input, plan,
    threads, device, stream, workspace, accumulate_weight = false, scale = None, lent = None
))]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_backward(
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
    plan: &Bound<'_, CudaPlan>,
    threads: usize,
    device: usize,
    stream: usize,
    workspace: TensorArg,
    accumulate_weight: bool,
    scale: Option<TensorArg>,
    lent: Option<TensorArg>,
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
    let (store, scale, lent) = (store.map(|t| t.0), scale.map(|t| t.0), lent.map(|t| t.0));
    let _ = threads;
    let (saved, cotangents) = (tensors(saved)?, optional_tensors(cotangents)?);
    let (spec, plan) = (&spec.get().0, &plan.get().plan);
    // SAFETY: as for the forward.
    py.detach(|| unsafe {
        gpu::backward(
            spec,
            &problem,
            &saved,
            &cotangents,
            &gradients,
            accumulate_weight,
            plan,
            device,
            stream,
            &workspace.0,
            store.as_ref(),
            scale.as_ref(),
            lent.as_ref(),
        )
    })
    .map_err(error)
}

/// Plain cross entropy: what `cross_entropy_forward` does. Of `rest`, `target` and `share`, which a
/// backward needs, either all are given or none.
#[pyfunction]
#[pyo3(signature = (
    input, weight, bias, ids, ignore_index, logit_scale, softcap, reduction, z_loss_weight, loss,
    rest, target, store, plan, threads, device, stream, workspace, share, scale = None, lent = None
))]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_cross_entropy_forward(
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
    rest: Option<TensorArg>,
    target: Option<TensorArg>,
    store: Option<TensorArg>,
    plan: &Bound<'_, CudaPlan>,
    threads: usize,
    device: usize,
    stream: usize,
    workspace: TensorArg,
    share: Option<TensorArg>,
    scale: Option<TensorArg>,
    lent: Option<TensorArg>,
) -> PyResult<()> {
    let problem =
        problem(input, weight, bias, Some(ids), ignore_index, logit_scale, softcap, None, None);
    let of = cross_entropy(reduction, z_loss_weight)?;
    let kept = match (rest, target, share) {
        (Some(rest), Some(target), Some(share)) => Some(kept(rest, target, share)),
        _ => None,
    };
    let (store, scale, lent) = (store.map(|t| t.0), scale.map(|t| t.0), lent.map(|t| t.0));
    let _ = threads;
    let plan = &plan.get().plan;
    // SAFETY: as in `cuda_forward`.
    py.detach(|| unsafe {
        gpu::cross_entropy_forward(
            &of,
            &problem,
            &loss.0,
            kept,
            plan,
            device,
            stream,
            &workspace.0,
            store.as_ref(),
            scale.as_ref(),
            lent.as_ref(),
        )
    })
    .map_err(error)
}

/// Gradients of `cuda_cross_entropy_forward`.
#[pyfunction]
#[pyo3(signature = (
    input, weight, bias, ids, ignore_index, logit_scale, softcap, reduction, z_loss_weight, rest,
    target, grad_loss, store, d_input, d_weight, d_bias, d_scale, plan, threads, device, stream,
    workspace, share, accumulate_weight = false, scale = None, lent = None
))]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_cross_entropy_backward(
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
    plan: &Bound<'_, CudaPlan>,
    threads: usize,
    device: usize,
    stream: usize,
    workspace: TensorArg,
    share: TensorArg,
    accumulate_weight: bool,
    scale: Option<TensorArg>,
    lent: Option<TensorArg>,
) -> PyResult<()> {
    let problem =
        problem(input, weight, bias, Some(ids), ignore_index, logit_scale, softcap, None, None);
    let of = cross_entropy(reduction, z_loss_weight)?;
    let kept = kept(rest, target, share);
    let gradients = core::Gradients {
        input: d_input.map(|t| t.0),
        weight: d_weight.map(|t| t.0),
        bias: d_bias.map(|t| t.0),
        scale: d_scale.map(|t| t.0),
        ..core::Gradients::default()
    };
    let (store, scale, lent) = (store.map(|t| t.0), scale.map(|t| t.0), lent.map(|t| t.0));
    let _ = threads;
    let plan = &plan.get().plan;
    // SAFETY: as in `cuda_forward`.
    py.detach(|| unsafe {
        gpu::cross_entropy_backward(
            &of,
            &problem,
            &kept,
            &grad_loss.0,
            &gradients,
            accumulate_weight,
            plan,
            device,
            stream,
            &workspace.0,
            store.as_ref(),
            scale.as_ref(),
            lent.as_ref(),
        )
    })
    .map_err(error)
}

fn kept(rest: TensorArg, target: TensorArg, share: TensorArg) -> gpu::Kept {
    gpu::Kept { saved: core::Saved { rest: rest.0, target: target.0 }, share: share.0 }
}

/// Log-probability of the targets and entropy of the rows, from statistics of (N,) each.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_policy_forward(
    py: Python<'_>,
    rest: TensorArg,
    target: TensorArg,
    rest_entropy: TensorArg,
    ids: TensorArg,
    ignore_index: i64,
    log_prob: TensorArg,
    entropy: TensorArg,
    device: usize,
    stream: usize,
) -> PyResult<()> {
    let of = policy(rest, target, rest_entropy, ids, ignore_index);
    // SAFETY: as in `cuda_forward`.
    py.detach(|| unsafe { gpu::policy_forward(&of, &log_prob.0, &entropy.0, device, stream) })
        .map_err(error)
}

/// Cotangents of the statistics that `cuda_policy_forward` read.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_policy_backward(
    py: Python<'_>,
    rest: TensorArg,
    target: TensorArg,
    rest_entropy: TensorArg,
    ids: TensorArg,
    ignore_index: i64,
    grad_log_prob: Option<TensorArg>,
    grad_entropy: Option<TensorArg>,
    d_rest: TensorArg,
    d_target: TensorArg,
    d_rest_entropy: Option<TensorArg>,
    device: usize,
    stream: usize,
) -> PyResult<()> {
    let of = policy(rest, target, rest_entropy, ids, ignore_index);
    let [grad_log_prob, grad_entropy, d_rest_entropy] =
        [grad_log_prob, grad_entropy, d_rest_entropy].map(|tensor| tensor.map(|t| t.0));
    // SAFETY: as in `cuda_forward`.
    py.detach(|| unsafe {
        gpu::policy_backward(
            &of,
            grad_log_prob.as_ref(),
            grad_entropy.as_ref(),
            &d_rest.0,
            &d_target.0,
            d_rest_entropy.as_ref(),
            device,
            stream,
        )
    })
    .map_err(error)
}

fn policy(
    rest: TensorArg,
    target: TensorArg,
    rest_entropy: TensorArg,
    ids: TensorArg,
    ignore_index: i64,
) -> gpu::Policy {
    gpu::Policy {
        rest: rest.0,
        target: target.0,
        rest_entropy: rest_entropy.0,
        ids: ids.0,
        ignore_index,
    }
}

/// Whether tensor cores read a weight in place: what `cuda_plan` calls `contiguous`.
#[pyfunction]
pub fn cuda_describable(weight: TensorArg) -> bool {
    gpu::describable(&weight.0)
}

/// Whether CUDA tensors can be used: kernels, a driver and a device.
#[pyfunction]
pub fn cuda_available() -> bool {
    let info = gpu::info();
    info.reason.is_empty()
}

/// Driver, devices and images, and the reason when CUDA tensors cannot be used.
#[pyfunction]
pub fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = py.detach(gpu::info);
    let result = PyDict::new(py);
    result.set_item("reason", info.reason)?;
    result.set_item("driver", info.driver)?;
    let mut devices = Vec::new();
    for device in info.devices {
        let entry = PyDict::new(py);
        entry.set_item("name", device.name)?;
        entry.set_item("capability", device.capability)?;
        entry.set_item("multiprocessors", device.multiprocessors)?;
        entry.set_item("images", device.images)?;
        devices.push(entry);
    }
    result.set_item("devices", devices)?;
    result.set_item("images", info.images)?;
    Ok(result)
}

/// Load every kernel of a device, so that a graph capture finds nothing left to load.
#[pyfunction]
pub fn cuda_warm_up(py: Python<'_>, device: usize) -> PyResult<()> {
    py.detach(|| gpu::warm_up(device)).map_err(error)
}
