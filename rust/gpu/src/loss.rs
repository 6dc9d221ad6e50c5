//! Cross entropy of class ids: the statistics of the rows, and one launch more each way.

use logitless_core::{CrossEntropy, DType, Error, Gradients, Problem, Reduction, Saved, Tensor};

use crate::backward::backward;
use crate::error::Result;
use crate::forward::{check_workspace, forward};
use crate::launch::{Stream, suffix};
use crate::params;
use crate::plan::Plan;

/// Arrays of the workspace begin at multiples of this.
const ALIGNMENT: usize = 256;

impl Plan {
    /// Workspace of [`cross_entropy_backward`]: a backward's, and the cotangents behind it.
    pub fn cross_entropy_bytes(&self) -> usize {
        let cotangents = 2 * self.rows * self.dtype.accumulator().size();
        self.backward_bytes.next_multiple_of(ALIGNMENT) + cotangents
    }
}

/// Computes `rest` and `target` of every row, and the loss of every row, 0 for ignored ones, or their
/// sum or mean. With a reduction, `share` receives what it multiplies each row by.
///
/// # Errors
/// As for [`crate::forward`], before any work.
///
/// # Safety
/// As for [`crate::forward`].
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub unsafe fn cross_entropy_forward(
    of: &CrossEntropy,
    problem: &Problem,
    saved: &Saved,
    loss: &Tensor,
    share: &Tensor,
    plan: &Plan,
    device: usize,
    stream: usize,
    workspace: &Tensor,
    store: Option<&Tensor>,
    scale: Option<&Tensor>,
    lent: Option<&Tensor>,
) -> Result<()> {
    let (acc, per_row) = (saved.rest.dtype(), of.reduction == Reduction::None);
    check("loss", loss, acc, if per_row { plan.rows } else { 1 })?;
    let params =
        params::Loss { loss: loss.address(), ..loss_params(of, problem, saved, share, plan)? };
    let outputs = [saved.rest, saved.target];
    // SAFETY: the caller's promise.
    unsafe {
        let spec = CrossEntropy::spec();
        forward(spec, problem, &outputs, plan, device, stream, workspace, store, scale, lent)?;
    }
    let (name, blocks, threads) = match (per_row, acc) {
        (true, DType::F64) => ("loss_rows_f64", plan.rows.div_ceil(256), 256),
        (true, _) => ("loss_rows_f32", plan.rows.div_ceil(256), 256),
        (false, DType::F64) => ("loss_total_f64", 1, 1024),
        (false, _) => ("loss_total_f32", 1, 1024),
    };
    let stream = Stream::enter(device, stream)?;
    // SAFETY: the caller's promise; shapes are checked.
    unsafe { stream.launch(name, (blocks, 1), threads, 0, &params) }
}

/// Turns the `gradient` of the loss into those of the wanted operands: it has one element a row, or
/// one in all, which the forward's `share` multiplies. The workspace has
/// [`Plan::cross_entropy_bytes`].
///
/// # Errors
/// As for [`crate::backward`].
///
/// # Safety
/// As for [`crate::backward`].
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub unsafe fn cross_entropy_backward(
    of: &CrossEntropy,
    problem: &Problem,
    saved: &Saved,
    gradient: &Tensor,
    share: &Tensor,
    gradients: &Gradients,
    accumulate_weight: bool,
    plan: &Plan,
    device: usize,
    stream: usize,
    workspace: &Tensor,
    store: Option<&Tensor>,
    scale: Option<&Tensor>,
    lender: Option<&Tensor>,
) -> Result<()> {
    let (acc, rows) = (saved.rest.dtype(), plan.rows);
    check("gradient", gradient, acc, if of.reduction == Reduction::None { rows } else { 1 })?;
    check_workspace("workspace", workspace, plan.cross_entropy_bytes())?;
    let g_rest = workspace.address() + plan.backward_bytes.next_multiple_of(ALIGNMENT);
    let g_target = g_rest + rows * acc.size();
    let params = params::Loss {
        gradient: gradient.address(),
        g_rest,
        g_target,
        ..loss_params(of, problem, saved, share, plan)?
    };
    let cotangents = [
        Some(Tensor::new(g_rest, acc, &[rows], &[1])?),
        Some(Tensor::new(g_target, acc, &[rows, 1], &[1, 1])?),
    ];
    {
        let stream = Stream::enter(device, stream)?;
        let name = format!("loss_slopes_{}", suffix(acc));
        // SAFETY: the caller's promise; shapes are checked.
        unsafe { stream.launch(&name, (rows.div_ceil(256), 1), 256, 0, &params)? };
    }
    // SAFETY: the caller's promise; the cotangents lie behind what the plan's backward uses.
    unsafe {
        backward(
            CrossEntropy::spec(),
            problem,
            &[saved.rest, saved.target],
            &cotangents,
            gradients,
            accumulate_weight,
            plan,
            device,
            stream,
            workspace,
            store,
            scale,
            lender,
        )
    }
}

/// What both directions tell their kernel, once everything has been checked.
fn loss_params(
    of: &CrossEntropy,
    problem: &Problem,
    saved: &Saved,
    share: &Tensor,
    plan: &Plan,
) -> Result<params::Loss> {
    let (rows, acc) = (plan.rows, plan.dtype.accumulator());
    check("rest", &saved.rest, acc, rows)?;
    check("target", &saved.target, acc, rows)?;
    check("share", share, acc, 1)?;
    let missing = |argument| Error::Missing { argument, expected: "that of class ids".into() };
    let ids = problem.ids.as_ref().ok_or_else(|| missing("ids"))?;
    check("ids", ids, DType::I64, rows)?;
    Ok(params::Loss {
        rest: saved.rest.address(),
        target: saved.target.address(),
        ids: ids.address(),
        share: share.address(),
        z_loss: of.z_weight,
        ignore: problem.ignore_index.ok_or_else(|| missing("ignore_index"))?,
        rows: rows as i64,
        per_row: i32::from(of.reduction == Reduction::None),
        mean: i32::from(of.reduction == Reduction::Mean),
        ..params::Loss::default()
    })
}

fn check(argument: &'static str, tensor: &Tensor, dtype: DType, len: usize) -> Result<()> {
    tensor.expect_dtype(argument, &[dtype])?;
    tensor.expect_len(argument, len)?;
    Ok(tensor.expect_contiguous(argument)?)
}
