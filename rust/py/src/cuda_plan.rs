//! `CudaPlan`: the sizes of a call on a device.

use logitless_gpu as gpu;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::cuda::error;
use crate::spec::Spec;

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
    pub(crate) plan: gpu::Plan,
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
