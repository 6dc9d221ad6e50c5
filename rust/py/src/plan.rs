//! `plan`: tile sizes and bytes of a call, before it is made.

use std::collections::BTreeMap;

use logitless_core as core;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};

use crate::args::{dtype, memory};
use crate::errors::to_python;
use crate::spec::Spec;

/// What `plan` was asked: enough to compute it again in another process.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Question {
    rows: usize,
    features: usize,
    classes: usize,
    dtype: u8,
    memory: i64,
    gradients: u32,
    contiguous: bool,
}

/// Bytes and tile sizes of one forward and backward.
#[pyclass(module = "logitless._core", frozen, eq)]
#[derive(Clone, PartialEq)]
pub struct Plan {
    spec: Spec,
    question: Question,
    /// The engine's plan.
    pub plan: core::Plan,
}

/// Size the scratch and the store of a call; `memory` is -1 lean, -2 fast, or bytes to keep.
#[pyfunction]
#[pyo3(signature = (spec, rows, features, classes, dtype, memory, gradients, contiguous = true))]
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub fn plan(
    spec: &Bound<'_, Spec>,
    rows: usize,
    features: usize,
    classes: usize,
    dtype: u8,
    memory: i64,
    gradients: u32,
    contiguous: bool,
) -> PyResult<Plan> {
    let spec = spec.get().clone();
    let question = Question { rows, features, classes, dtype, memory, gradients, contiguous };
    question.answer(&spec).map(|plan| Plan { spec, question, plan })
}

impl Question {
    fn answer(&self, spec: &Spec) -> PyResult<core::Plan> {
        core::plan(
            &spec.0,
            self.rows,
            self.features,
            self.classes,
            dtype(self.dtype)?,
            memory(self.memory)?,
            self.gradients,
            self.contiguous,
        )
        .map_err(to_python)
    }
}

#[pymethods]
impl Plan {
    /// Scratch of a forward, allocated by the engine and freed before it returns.
    #[getter]
    fn forward_bytes(&self) -> usize {
        self.plan.forward_bytes
    }

    /// Scratch of a backward, allocated by the engine and freed before it returns.
    #[getter]
    fn backward_bytes(&self) -> usize {
        self.plan.backward_bytes
    }

    /// Logit tiles kept from the forward to the backward, in the caller's memory.
    #[getter]
    fn store_bytes(&self) -> usize {
        self.plan.store_bytes
    }

    /// Share of the scratch that each thread adds.
    #[getter]
    fn threads_bytes(&self) -> usize {
        self.plan.threads_bytes
    }

    /// Everything held at once at the worst moment.
    #[getter]
    fn workspace_bytes(&self) -> usize {
        self.plan.store_bytes + self.plan.forward_bytes.max(self.plan.backward_bytes)
    }

    /// Named shares of the bytes above.
    #[getter]
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let mut sums = BTreeMap::new();
        for &(name, bytes) in &self.plan.parts {
            *sums.entry(name).or_insert(0) += bytes;
        }
        sums.into_py_dict(py)
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
        );
        Ok((py.import("logitless._core")?.getattr("plan")?, arguments))
    }

    fn __repr__(&self) -> String {
        let Question { rows, features, classes, .. } = self.question;
        format!(
            "Plan(rows={rows}, features={features}, classes={classes}, forward_bytes={}, \
             backward_bytes={}, store_bytes={})",
            self.plan.forward_bytes, self.plan.backward_bytes, self.plan.store_bytes
        )
    }
}

/// The arguments of `plan`.
type PlanArguments = (Spec, usize, usize, usize, u8, i64, u32, bool);
