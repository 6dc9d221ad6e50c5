//! Cross entropy of class ids from the statistics of the rows: one launch each way.

use logitless_core::{CrossEntropy, DType, Reduction, Tensor};

use crate::error::Result;
use crate::launch::{Stream, suffix};
use crate::params;

/// What the forward left: `rest` and `target`, (N,) or (N, 1), and the ids of the targets.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The other classes' log-sum-exp.
    pub rest: &'a Tensor,
    /// The target's logit.
    pub target: &'a Tensor,
    /// int64.
    pub ids: &'a Tensor,
    /// Rows of this id count for nothing.
    pub ignore: i64,
}

impl Rows<'_> {
    /// Their parameters, once everything has been checked to be contiguous, one element a row.
    fn params(&self, of: &CrossEntropy) -> Result<params::Loss> {
        let rows = self.rest.len();
        let acc = self.rest.dtype();
        self.rest.expect_dtype("rest", &[DType::F32, DType::F64])?;
        check("rest", self.rest, acc, rows)?;
        check("target", self.target, acc, rows)?;
        check("ids", self.ids, DType::I64, rows)?;
        Ok(params::Loss {
            rest: self.rest.address(),
            target: self.target.address(),
            ids: self.ids.address(),
            z_loss: of.z_weight,
            ignore: self.ignore,
            rows: rows as i64,
            per_row: i32::from(of.reduction == Reduction::None),
            mean: i32::from(of.reduction == Reduction::Mean),
            ..params::Loss::default()
        })
    }
}

fn check(argument: &'static str, tensor: &Tensor, dtype: DType, len: usize) -> Result<()> {
    tensor.expect_dtype(argument, &[dtype])?;
    tensor.expect_len(argument, len)?;
    Ok(tensor.expect_contiguous(argument)?)
}

/// Enqueues the loss of every row, 0 for ignored ones, or their sum or mean. With a reduction,
/// `share` receives what it multiplies each row by.
///
/// # Errors
/// Tensors that do not fit, before any work; the driver's refusals.
///
/// # Safety
/// Every tensor describes memory of the device that stays valid until the stream has passed.
pub unsafe fn losses(
    of: &CrossEntropy,
    rows: Rows,
    loss: &Tensor,
    share: &Tensor,
    device: usize,
    stream: usize,
) -> Result<()> {
    let (acc, per_row) = (rows.rest.dtype(), of.reduction == Reduction::None);
    check("loss", loss, acc, if per_row { rows.rest.len() } else { 1 })?;
    check("share", share, acc, 1)?;
    let params = params::Loss { loss: loss.address(), share: share.address(), ..rows.params(of)? };
    let (name, blocks, threads) =
        if per_row { ("loss_rows", blocks(&rows), 256) } else { ("loss_total", 1, 1024) };
    let stream = Stream::enter(device, stream)?;
    // SAFETY: the caller's promise; shapes are checked.
    unsafe { stream.launch(&format!("{name}_{}", suffix(acc)), (blocks, 1), threads, 0, &params) }
}

/// Enqueues the cotangents of `rest` and `target` from the loss's `gradient`: one element a row, or
/// one in all, which `share` of the forward multiplies.
///
/// # Errors
/// As for [`losses`].
///
/// # Safety
/// As for [`losses`].
#[expect(clippy::too_many_arguments, reason = "the compiled interface is positional")]
pub unsafe fn cotangents(
    of: &CrossEntropy,
    rows: Rows,
    gradient: &Tensor,
    share: &Tensor,
    g_rest: &Tensor,
    g_target: &Tensor,
    device: usize,
    stream: usize,
) -> Result<()> {
    let (acc, count) = (rows.rest.dtype(), rows.rest.len());
    check("gradient", gradient, acc, if of.reduction == Reduction::None { count } else { 1 })?;
    check("share", share, acc, 1)?;
    check("g_rest", g_rest, acc, count)?;
    check("g_target", g_target, acc, count)?;
    let params = params::Loss {
        gradient: gradient.address(),
        share: share.address(),
        g_rest: g_rest.address(),
        g_target: g_target.address(),
        ..rows.params(of)?
    };
    let stream = Stream::enter(device, stream)?;
    let name = format!("loss_slopes_{}", suffix(acc));
    // SAFETY: the caller's promise; shapes are checked.
    unsafe { stream.launch(&name, (blocks(&rows), 1), 256, 0, &params) }
}

fn blocks(rows: &Rows) -> usize {
    rows.rest.len().div_ceil(256)
}
