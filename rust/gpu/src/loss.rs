//! Cross entropy of class ids: the statistics of the rows, and one launch more each way.

use logitless_core::{CrossEntropy, DType, Error, Gradients, Problem, Reduction, Saved, Tensor};

use crate::backward::backward;
use crate::error::Result;
use crate::forward::{check_workspace, forward};
use crate::launch::{Stream, suffix};
use crate::params;
use crate::plan::Plan;

/// What a cross entropy keeps for its backward.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// The statistics.
    pub saved: Saved,
    /// What a reduction multiplies each row by: one element.
    pub share: Tensor,
}

impl Kept {
    /// The same at an address: 2 N + 1 elements.
    fn at(address: usize, acc: DType, rows: usize) -> Result<Kept> {
        let at = |index: usize, shape: &[usize]| {
            Tensor::new(address + index * acc.size(), acc, shape, &[1, 1][..shape.len()])
        };
        let saved = Saved { rest: at(0, &[rows])?, target: at(rows, &[rows, 1])? };
        Ok(Kept { saved, share: at(2 * rows, &[])? })
    }
}

impl Plan {
    /// Workspaces of a [`cross_entropy_forward`] that keeps nothing and of [`cross_entropy_backward`]:
    /// those of the statistics, and behind them what the first would keep and the cotangents.
    pub fn cross_entropy_bytes(&self) -> (usize, usize) {
        let [forward, backward] = self.behind();
        let element = self.dtype.accumulator().size();
        (forward + (2 * self.rows + 1) * element, backward + 2 * self.rows * element)
    }

    /// Where the workspaces of the statistics end.
    fn behind(&self) -> [usize; 2] {
        [self.forward_bytes, self.backward_bytes].map(|bytes| bytes.next_multiple_of(256))
    }
}

/// Computes the loss of every row, 0 for ignored ones, or their sum or mean.
///
/// Without `kept` there can be no backward, and the workspace is larger:
/// [`Plan::cross_entropy_bytes`].
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
    loss: &Tensor,
    kept: Option<Kept>,
    plan: &Plan,
    device: usize,
    stream: usize,
    workspace: &Tensor,
    store: Option<&Tensor>,
    scale: Option<&Tensor>,
    lent: Option<&Tensor>,
) -> Result<()> {
    let (acc, per_row) = (plan.dtype.accumulator(), of.reduction == Reduction::None);
    let kept = match kept {
        Some(kept) => kept,
        None => {
            check_workspace("workspace", workspace, plan.cross_entropy_bytes().0)?;
            Kept::at(workspace.address() + plan.behind()[0], acc, plan.rows)?
        }
    };
    check("loss", loss, acc, if per_row { plan.rows } else { 1 })?;
    let params = params::Loss { loss: loss.address(), ..loss_params(of, problem, &kept, plan)? };
    let (spec, outputs) = (CrossEntropy::spec(), [kept.saved.rest, kept.saved.target]);
    // SAFETY: the caller's promise.
    unsafe {
        forward(spec, problem, &outputs, plan, device, stream, workspace, store, scale, lent)?;
    }
    let (name, blocks, threads) =
        if per_row { ("loss_rows", plan.rows.div_ceil(256), 256) } else { ("loss_total", 1, 1024) };
    let stream = Stream::enter(device, stream)?;
    // SAFETY: the caller's promise; shapes are checked.
    unsafe { stream.launch(&format!("{name}_{}", suffix(acc)), (blocks, 1), threads, 0, &params) }
}

/// Turns the `gradient` of the loss into those of the wanted operands: it has one element a row, or
/// one in all, which the kept share multiplies. For the workspace see [`Plan::cross_entropy_bytes`].
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
    kept: &Kept,
    gradient: &Tensor,
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
    let (acc, rows) = (plan.dtype.accumulator(), plan.rows);
    check("gradient", gradient, acc, if of.reduction == Reduction::None { rows } else { 1 })?;
    check_workspace("workspace", workspace, plan.cross_entropy_bytes().1)?;
    let cotangents = Kept::at(workspace.address() + plan.behind()[1], acc, rows)?.saved;
    let params = params::Loss {
        gradient: gradient.address(),
        g_rest: cotangents.rest.address(),
        g_target: cotangents.target.address(),
        ..loss_params(of, problem, kept, plan)?
    };
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
            &[kept.saved.rest, kept.saved.target],
            &[Some(cotangents.rest), Some(cotangents.target)],
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
    kept: &Kept,
    plan: &Plan,
) -> Result<params::Loss> {
    let (rows, acc) = (plan.rows, plan.dtype.accumulator());
    let Kept { saved: Saved { rest, target }, share } = kept;
    check("rest", rest, acc, rows)?;
    check("target", target, acc, rows)?;
    check("share", share, acc, 1)?;
    let missing = |argument| Error::Missing { argument, expected: "that of class ids".into() };
    let ids = problem.ids.as_ref().ok_or_else(|| missing("ids"))?;
    check("ids", ids, DType::I64, rows)?;
    Ok(params::Loss {
        rest: rest.address(),
        target: target.address(),
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

/// Checks a contiguous tensor of so many elements.
pub(crate) fn check(
    argument: &'static str,
    tensor: &Tensor,
    dtype: DType,
    len: usize,
) -> Result<()> {
    tensor.expect_dtype(argument, &[dtype])?;
    tensor.expect_len(argument, len)?;
    Ok(tensor.expect_contiguous(argument)?)
}
