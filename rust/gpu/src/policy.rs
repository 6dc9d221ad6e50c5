//! Log-probability of the targets and entropy of the rows from their statistics: a launch each way.

use logitless_core::{DType, Tensor};

use crate::error::Result;
use crate::launch::{Stream, suffix};
use crate::loss::check;
use crate::params;

/// What both directions read: statistics of rows with one class id, (N,) each.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Log-sum-exp over the other classes.
    pub rest: Tensor,
    /// Logit of the target.
    pub target: Tensor,
    /// Entropy among the other classes.
    pub rest_entropy: Tensor,
    /// Class ids.
    pub ids: Tensor,
    /// The id of rows that have 0 of everything.
    pub ignore_index: i64,
}

impl Policy {
    /// What both directions tell their kernel, once it has been checked.
    fn params(&self) -> Result<params::Policy> {
        let Policy { rest, target, rest_entropy, ids, ignore_index } = self;
        rest.expect_dtype("rest", &[DType::F32, DType::F64])?;
        self.check("rest", rest)?;
        self.check("target", target)?;
        self.check("rest_entropy", rest_entropy)?;
        check("ids", ids, DType::I64, rest.len())?;
        Ok(params::Policy {
            rest: rest.address(),
            target: target.address(),
            rest_entropy: rest_entropy.address(),
            ids: ids.address(),
            ignore: *ignore_index,
            rows: rest.len() as i64,
            ..params::Policy::default()
        })
    }

    /// Checks that a tensor has a number a row; returns its address.
    fn check(&self, argument: &'static str, tensor: &Tensor) -> Result<usize> {
        check(argument, tensor, self.rest.dtype(), self.rest.len())?;
        Ok(tensor.address())
    }

    /// The same of one that may be missing: null.
    fn check_any(&self, argument: &'static str, tensor: Option<&Tensor>) -> Result<usize> {
        tensor.map_or(Ok(0), |tensor| self.check(argument, tensor))
    }

    /// # Safety
    /// As for [`policy_forward`].
    unsafe fn launch(
        &self,
        name: &str,
        params: &params::Policy,
        device: usize,
        stream: usize,
    ) -> Result<()> {
        let name = format!("{name}_{}", suffix(self.rest.dtype()));
        let stream = Stream::enter(device, stream)?;
        // SAFETY: the caller's promise; shapes are checked.
        unsafe { stream.launch(&name, (self.rest.len().div_ceil(256), 1), 256, 0, params) }
    }
}

/// Computes the log-probability of each target and the entropy of each row, 0 for ignored ones.
///
/// # Errors
/// Shapes and dtypes that do not fit, before any work; no driver, no device, a failed launch.
///
/// # Safety
/// The tensors are memory of the device that is valid until the stream has passed this call.
pub unsafe fn policy_forward(
    of: &Policy,
    log_prob: &Tensor,
    entropy: &Tensor,
    device: usize,
    stream: usize,
) -> Result<()> {
    let statistics = of.params()?;
    let params = params::Policy {
        log_prob: of.check("log_prob", log_prob)?,
        entropy: of.check("entropy", entropy)?,
        ..statistics
    };
    // SAFETY: the caller's promise.
    unsafe { of.launch("policy_rows", &params, device, stream) }
}

/// Turns cotangents of [`policy_forward`]'s results into those of the statistics.
///
/// Without `grad_log_prob` or `grad_entropy` they count as 0; `d_rest_entropy` may be left out.
///
/// # Errors
/// As for [`policy_forward`].
///
/// # Safety
/// As for [`policy_forward`].
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub unsafe fn policy_backward(
    of: &Policy,
    grad_log_prob: Option<&Tensor>,
    grad_entropy: Option<&Tensor>,
    d_rest: &Tensor,
    d_target: &Tensor,
    d_rest_entropy: Option<&Tensor>,
    device: usize,
    stream: usize,
) -> Result<()> {
    let statistics = of.params()?;
    let params = params::Policy {
        g_log_prob: of.check_any("grad_log_prob", grad_log_prob)?,
        g_entropy: of.check_any("grad_entropy", grad_entropy)?,
        g_rest: of.check("d_rest", d_rest)?,
        g_target: of.check("d_target", d_target)?,
        g_rest_entropy: of.check_any("d_rest_entropy", d_rest_entropy)?,
        ..statistics
    };
    // SAFETY: the caller's promise.
    unsafe { of.launch("policy_slopes", &params, device, stream) }
}
