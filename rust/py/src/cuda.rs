//! The CUDA engine, one function per entry point.
//!
//! Arguments are those of the CPU functions in the same order, then the device, its stream and the
//! workspace that the caller's framework allocated. Calls enqueue work and return.

use logitless_core as core;
use logitless_gpu as gpu;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::args::{TensorArg, optional_tensors, tensors};
use crate::cpu::{cross_entropy, problem};
use crate::errors::to_python;
use crate::spec::Spec;

fn error(error: gpu::Error) -> PyErr {
    match error {
        gpu::Error::Call(error) => to_python(error),
        other => PyRuntimeError::new_err(other.to_string()),
    }
}

/// What `cuda_plan` was asked: enough to compute it again in another process.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Question {
    rows: usize,
    features: usize,
    classes: usize,
    dtype: u8,
    memory: i64,
    gradients: u32,
    contiguous: bool,
    device: usize,
    lends: Option<usize>,
    compact: bool,
}

/// Bytes and chunks of one forward and backward on a CUDA device.
#[pyclass(module = "logitless._core", frozen, eq)]
#[derive(Clone, PartialEq)]
pub struct CudaPlan {
    spec: Spec,
    question: Question,
    plan: gpu::Plan,
}

/// Size the workspaces of a call; `memory` is -1 lean, -2 fast, or bytes. `contiguous` is
/// `cuda_describable(weight)`. `lends` says what the forward may use that its backward will own: None
/// nothing, 0 the store, which that backward may overwrite, and the bytes of an element of d_weight
/// where that exists from the forward on. `compact`: the rows of d_input will follow one another.
#[pyfunction]
#[pyo3(signature = (
    spec, rows, features, classes, dtype, memory, gradients, contiguous = true, device = 0,
    lends = None, compact = true
))]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn cuda_plan(
    spec: &Bound<'_, Spec>,
    rows: usize,
    features: usize,
    classes: usize,
    dtype: u8,
    memory: i64,
    gradients: u32,
    contiguous: bool,
    device: usize,
    lends: Option<usize>,
    compact: bool,
) -> PyResult<CudaPlan> {
    let spec = spec.get().clone();
    let question = Question {
        rows,
        features,
        classes,
        dtype,
        memory,
        gradients,
        contiguous,
        device,
        lends,
        compact,
    };
    let lends = match lends {
        None => gpu::Lends::Nothing,
        Some(0) => gpu::Lends::Store,
        Some(element @ (2 | 4)) => gpu::Lends::Weight(element),
        Some(other) => {
            let message = format!("lends = {other}: expected None, 0, 2 or 4");
            return Err(PyValueError::new_err(message));
        }
    };
    let memory = crate::args::memory(memory)?;
    let dtype = crate::args::dtype(dtype)?;
    let plan = gpu::plan(
        &spec.0,
        rows,
        features,
        classes,
        dtype,
        memory,
        gradients,
        contiguous,
        device,
        gpu::Outputs { lends, compact },
    )
    .map_err(error)?;
    Ok(CudaPlan { spec, question, plan })
}

#[pymethods]
impl CudaPlan {
    /// Workspace of a forward, to be allocated by the caller.
    #[getter]
    fn forward_bytes(&self) -> usize {
        self.plan.forward_bytes
    }

    /// Workspace of a backward, to be allocated by the caller.
    #[getter]
    fn backward_bytes(&self) -> usize {
        self.plan.backward_bytes
    }

    /// Workspaces of a `cuda_cross_entropy_forward` that keeps nothing, and of its backward.
    #[getter]
    fn cross_entropy_bytes(&self) -> (usize, usize) {
        self.plan.cross_entropy_bytes()
    }

    /// Kept from the forward to the backward, in the caller's memory.
    #[getter]
    fn store_bytes(&self) -> usize {
        self.plan.store_bytes
    }

    /// Kept in the memory of d_weight; 0 where the forward does not need it.
    #[getter]
    fn lent_bytes(&self) -> usize {
        self.plan.lent_bytes()
    }

    /// Whether the store counts on what `lends` said: good for one backward.
    #[getter]
    fn on_loan(&self) -> bool {
        self.plan.on_loan()
    }

    /// 0: a GPU has no scratch of threads.
    #[getter]
    fn threads_bytes(&self) -> usize {
        0
    }

    /// Everything held at once at the worst moment.
    #[getter]
    fn workspace_bytes(&self) -> usize {
        self.plan.store_bytes + self.plan.forward_bytes.max(self.plan.backward_bytes)
    }

    /// Named shares of the larger workspace.
    #[getter]
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let parts = PyDict::new(py);
        for (name, bytes) in &self.plan.parts {
            parts.set_item(name, bytes)?;
        }
        Ok(parts)
    }

    /// `fused` (statistics in the product's epilogue), `stored` (and exponentials kept for the
    /// backward), `partly stored` (those of the first classes) or `tiled` (from tiles of logits).
    #[getter]
    fn mode(&self) -> &'static str {
        self.plan.mode
    }

    /// Classes a chunk of the forward and of the backward.
    #[getter]
    fn chunks(&self) -> (usize, usize) {
        self.plan.chunks
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, PlanArguments)> {
        let q = self.question;
        let arguments = (
            self.spec.clone(),
            q.rows,
            q.features,
            q.classes,
            q.dtype,
            q.memory,
            q.gradients,
            q.contiguous,
            q.device,
            q.lends,
            q.compact,
        );
        Ok((py.import("logitless._core")?.getattr("cuda_plan")?, arguments))
    }

    fn __repr__(&self) -> String {
        let Question { rows, features, classes, .. } = self.question;
        let gpu::Plan { mode, chunks, forward_bytes, backward_bytes, store_bytes, .. } = &self.plan;
        format!(
            "CudaPlan(rows={rows}, features={features}, classes={classes}, mode={mode:?}, \
             chunks={chunks:?}, forward_bytes={forward_bytes}, backward_bytes={backward_bytes}, \
             store_bytes={store_bytes}, lent_bytes={})",
            self.plan.lent_bytes()
        )
    }
}

type PlanArguments = (Spec, usize, usize, usize, u8, i64, u32, bool, usize, Option<usize>, bool);

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
