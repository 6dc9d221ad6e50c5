//! `Spec`: which statistics a call computes, and the output fields that follow.

use std::hash::{DefaultHasher, Hash, Hasher};

use logitless_core as core;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::errors::to_python;

/// The set of statistics of a call: immutable, hashable, picklable.
#[pyclass(module = "logitless._core", frozen, eq)]
#[derive(Clone, PartialEq)]
pub struct Spec(pub core::Spec);

#[pymethods]
impl Spec {
    #[new]
    #[pyo3(signature = (statistics, *, powers = Vec::new(), vectors = 0, topk = 0, targets = 0))]
    fn new(
        statistics: Vec<String>,
        powers: Vec<f64>,
        vectors: usize,
        topk: usize,
        targets: usize,
    ) -> PyResult<Self> {
        let names: Vec<&str> = statistics.iter().map(String::as_str).collect();
        core::Spec::new(&names, &powers, vectors, topk, targets).map(Self).map_err(to_python)
    }

    /// Names of the statistics, in registry order.
    #[getter]
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.statistics().collect::<Vec<_>>())
    }

    /// Exponents of `rest_power`.
    #[getter]
    fn powers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.powers())
    }

    /// Number of class vectors of `weighted_sum` and `weighted_rest`.
    #[getter]
    fn vectors(&self) -> usize {
        self.0.vectors()
    }

    /// k of `topk`.
    #[getter]
    fn topk(&self) -> usize {
        self.0.topk()
    }

    /// Target ids per row; 0 where no target is given.
    #[getter]
    fn targets(&self) -> usize {
        self.0.targets()
    }

    /// `(name, columns, is_integer)` of every output, in registry order.
    #[getter]
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.fields().iter().map(|f| (f.name, f.columns, f.integer)))
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.statistics().for_each(|name| name.hash(&mut hasher));
        self.0.powers().iter().for_each(|power| power.to_bits().hash(&mut hasher));
        (self.vectors(), self.topk(), self.targets()).hash(&mut hasher);
        hasher.finish()
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let keywords = PyDict::new(py);
        keywords.set_item("powers", self.powers(py)?)?;
        keywords.set_item("vectors", self.vectors())?;
        keywords.set_item("topk", self.topk())?;
        keywords.set_item("targets", self.targets())?;
        Ok((PyTuple::new(py, [self.statistics(py)?])?, keywords))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let mut text = format!("Spec({}", self.statistics(py)?.repr()?);
        if !self.0.powers().is_empty() {
            text += &format!(", powers={}", self.powers(py)?.repr()?);
        }
        for (name, value) in
            [("vectors", self.vectors()), ("topk", self.topk()), ("targets", self.targets())]
        {
            if value != 0 {
                text += &format!(", {name}={value}");
            }
        }
        Ok(text + ")")
    }
}
