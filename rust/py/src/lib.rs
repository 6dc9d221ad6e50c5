//! `logitless._core`: the binding. Conversion only.
//!
//! Every function here turns Python tuples into tensors, releases the GIL, calls one function of
//! an engine, and turns its error into an exception. The mathematics, the checks and the messages
//! live below, in `rust/core` and `rust/gpu`; the frameworks live above, in Python.

mod args;
mod cpu;
mod cuda;
mod cuda_plan;
mod errors;
mod plan;
mod spec;

/// The compiled engines of logitless. Private: the stable interface is the Python package.
#[pyo3::pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::cpu::{
        backward, cpu_level, cpu_levels, cross_entropy_backward, cross_entropy_forward, forward,
        get_num_threads, last_workspace_bytes, logsumexp_pairs, set_num_threads,
    };
    #[pymodule_export]
    use crate::cuda::{
        cuda_available, cuda_backward, cuda_cross_entropy_backward, cuda_cross_entropy_forward,
        cuda_describable, cuda_forward, cuda_info, cuda_policy_backward, cuda_policy_forward,
        cuda_warm_up,
    };
    #[pymodule_export]
    use crate::cuda_plan::{CudaPlan, cuda_plan};
    #[pymodule_export]
    use crate::plan::{Plan, plan};
    #[pymodule_export]
    use crate::spec::Spec;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
