"""Functions over a linear head: torch in, torch out, the logits never stored.

The first three arguments are input, linear_weight and target everywhere. Losses and statistics are
float32 (float64 for float64 inputs), under autocast and outside; gradients have the dtype of what
they belong to, rounded once from the accumulation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from logitless import _check, stats
from logitless._check import Geometry, argument_error, type_error
from logitless._extras import torch
from logitless.losses import _cross_entropy as rows
from logitless.losses._reduce import check_denominator, masked, reduce
from logitless.ops import cross_entropy as fused
from logitless.ops import inputs, policy
from logitless.ops.row_statistics import row_statistics

__all__ = [
    "LogProb",
    "TopK",
    "linear_accuracy",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_logsumexp",
    "linear_topk",
]

Tensor = torch.Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,  # noqa: ARG001
    target_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    z_loss_weight: float = 0.0,
    memory: str | int = "lean",
    return_statistics: bool = False,
    grad_buffer: Tensor | None = None,
) -> Any:
    """Compute the cross entropy of a linear head without its logits.

    Agrees with `torch.nn.functional.linear_cross_entropy` (2.15) on everything that documents. The
    target is left out of the streamed sum and put back by ``log1p``: in float32 the loss is right
    to a margin of 87, where ``lse - target`` is 0 from a margin of 18.

    Parameters
    ----------
    input
        (..., D): any leading dimensions, any strides. float32, bfloat16, float16 or float64.
    linear_weight
        (V, D), or (V, d1, ..., dK, D) for K-dimensional targets; input's dtype.
    target
        - class ids (..., [d1, ..., dK]), int64, int32 or uint8;
        - class probabilities (..., V, [d1, ..., dK]), floating, any sign and sum; differentiable;
        - K ids a row (..., [d1, ..., dK,] K) with ``target_weight``.
    linear_bias
        (V, [d1, ..., dK]); input's dtype. A bias of -inf masks a class.
    weight
        (V,): a weight for each class, any float; a constant.
    reduction
        "none", "sum" or "mean": the sum divided by the number of kept rows; by the sum of their
        targets' weights for class ids with ``weight``; by the number of rows for probabilities.
    ignore_index
        Rows with this id are skipped; an id equal to it among K is padding. None means -100; an
        explicit one is refused with class probabilities.
    label_smoothing
        In [0, 1]: mixes the target with the uniform distribution, as torch does.
    options
        Accepted for torch's signature and ignored: nothing here needs to be chunked.
    target_weight
        (..., K): weights of the K ids. Signed, need not sum to one, duplicates add.
    row_weight
        A weight for each row, shifted with target; never enters the divisor of the mean.
    denominator
        Replaces the divisor of the mean: a number or a 0-d tensor (a batch's count of tokens).
    logit_scale, softcap
        Logits are ``softcap · tanh(x / softcap)``, x = ``logit_scale · input @ linear_weightᵀ +
        linear_bias``; logit_scale may be a 0-d tensor with gradient.
    shift
        Position t predicts target t + shift; "none" and statistics have the last axis T - shift.
    z_loss_weight
        λ of the regulariser λ·lse², divided by kept rows under "mean".
    memory
        "lean"; "fast", which keeps tiles of the forward and makes the backward cheaper; or the
        number of bytes that may be kept. See `logitless.row_statistics` for what lean keeps.
    return_statistics
        Return (loss, `RowStatistics`); with probabilities, its target is the most probable class.
    grad_buffer
        float32 (float64 for float64 inputs) of linear_weight's shape: each backward adds the
        weight's gradient to it, unrounded, and returns none. See `logitless.row_statistics`.

    Returns
    -------
    Tensor
        A scalar, or one loss a row for "none" (0 where skipped).

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit, before any work; both are RuntimeErrors too.
    IndexError
        A class id outside [0, V), with the first offending row (on the CPU, before any work).

    Notes
    -----
    Memory beyond inputs and gradients: see `logitless memory`. Deterministic, for any number of
    threads. Works under torch.compile(fullgraph=True), torch.func.grad and functional_call,
    activation checkpointing and FSDP (inside the module that owns the weight). Twice
    differentiable; no forward mode, no vmap.
    """
    _check.check_reduction(reduction)
    if label_smoothing:
        _check.check_label_smoothing(label_smoothing)
    geometry = inputs.inspect(input, linear_weight, target, linear_bias, target_weight, shift)
    simple = not (
        weight is not None
        or label_smoothing
        or row_weight is not None
        or denominator is not None
        or return_statistics
    )
    if simple and fused.applies(geometry, input, linear_weight, linear_bias, target):
        return fused.cross_entropy(
            geometry,
            input,
            linear_weight,
            target,
            linear_bias,
            reduction=reduction,
            ignore_index=inputs.IGNORE_INDEX if ignore_index is None else ignore_index,
            logit_scale=logit_scale,
            softcap=_check.check_softcap(softcap),
            shift=shift,
            z_loss_weight=z_loss_weight,
            memory=_check.check_memory(memory),
            grad_buffer=grad_buffer,
        )
    _check_target(geometry, target, target_weight, ignore_index)
    check_denominator(denominator, reduction)
    if weight is not None:
        inputs.check_class_weight(weight, input, geometry.classes)
    if row_weight is not None:
        row_weight = inputs.per_row("row_weight", row_weight, geometry, shift, input)
    s, losses, by_kind = rows.cross_entropy_rows(
        geometry,
        input,
        linear_weight,
        target,
        weight=weight,
        label_smoothing=label_smoothing,
        target_weight=target_weight,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
        memory=memory,
        grad_buffer=grad_buffer,
    )
    kept = None if geometry.kind == "probability" else s.kept
    divisor = by_kind if denominator is None else denominator
    loss = reduce(losses, kept, reduction, row_weight, divisor)
    if z_loss_weight:
        squared = reduce(s.lse.square(), kept, reduction, row_weight, denominator)
        loss = loss + z_loss_weight * squared
    return (loss, s) if return_statistics else loss


def _check_target(
    geometry: Geometry, target: Tensor, target_weight: Tensor | None, ignore_index: int | None
) -> None:
    if geometry.kind == "probability" and ignore_index is not None:
        raise argument_error(
            "ignore_index",
            ignore_index,
            "None with class probabilities",
            "give skipped rows a row_weight of 0",
        )
    if geometry.kind == "sparse" and target_weight is None:
        raise argument_error(
            "target_weight",
            None,
            f"the weights of the {geometry.targets} ids a row, for target {tuple(target.shape)}",
            f"class ids have shape {inputs.per_row_shape(geometry)}; "
            "pass floating probabilities, or target_weight",
        )
    if geometry.kind == "none":
        raise type_error("target", None, "a tensor", "linear_logsumexp needs no target")


class LogProb(NamedTuple):
    """Log-probability of the targets, and the entropy of each row (None if not asked for)."""

    log_prob: Tensor
    entropy: Tensor | None


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    shift: int = 0,
    entropy: bool = True,
    memory: str | int = "lean",
) -> LogProb:
    """Log-probability of each target and entropy of each row, straight from hidden states.

    What DPO, GRPO, PPO and KTO are written in. Both are differentiable.

    Parameters
    ----------
    input, linear_weight, linear_bias, logit_scale, softcap, shift, memory
        As in `linear_cross_entropy`.
    target
        Class ids (...), or (..., K) for K candidates a row.
    temperature
        Divides the logits, after the softcap.
    ignore_index
        Rows with this id are skipped: both results are 0 there. None means -100.
    entropy
        Whether to compute the entropy too.

    Returns
    -------
    LogProb
        ``log_prob`` (...) or (..., K), precise near 0; ``entropy`` (...) or None.
    """
    if not (isinstance(temperature, (int, float)) and temperature > 0.0):
        raise argument_error(
            "temperature", repr(temperature), "a positive number", "logit_scale may be a tensor"
        )
    if temperature != 1.0:
        # z / T: every map scales with it.
        logit_scale = logit_scale / temperature
        linear_bias = None if linear_bias is None else linear_bias / temperature
        softcap = None if softcap is None else _check.check_softcap(softcap) / temperature
    s = row_statistics(
        input,
        linear_weight,
        target,
        want=("rest", "target", "entropy") if entropy else ("rest", "target"),
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
        memory=memory,
    )
    if entropy and policy.applies(s):
        ignored = inputs.IGNORE_INDEX if ignore_index is None else ignore_index
        return LogProb(*policy.log_prob_and_entropy(s, ignored))
    return LogProb(masked(s.log_prob, s.real), masked(s.entropy, s.kept) if entropy else None)


def linear_logsumexp(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    memory: str | int = "lean",
) -> Tensor:
    """Log-sum-exp of the logits of each row: (...), differentiable.

    Arguments as in `linear_cross_entropy`.
    """
    return row_statistics(
        input,
        linear_weight,
        want="lse",
        linear_bias=linear_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
    ).lse


def linear_argmax(
    input: Tensor, linear_weight: Tensor, *, linear_bias: Tensor | None = None
) -> Tensor:
    """Id of the largest logit of each row: (...), int64. The lowest id wins ties; nan wins.

    A scale above 0 or a softcap would not change it.
    """
    with torch.no_grad():
        return row_statistics(input, linear_weight, want="max", linear_bias=linear_bias).argmax


class TopK(NamedTuple):
    """The k largest logits of each row, sorted, and their ids."""

    values: Tensor
    indices: Tensor


def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    memory: str | int = "lean",
) -> TopK:
    """The k largest logits of each row, sorted, with their ids: (..., k) each, 1 <= k <= 64.

    Values are differentiable; ties: lowest id first; nan first. Other arguments as in
    `linear_cross_entropy`.
    """
    s = row_statistics(
        input,
        linear_weight,
        want=stats.topk(k),
        linear_bias=linear_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
    )
    return TopK(s.topk_values, s.topk_ids)


def linear_accuracy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    topk: int = 1,
    reduction: str = "mean",
    ignore_index: int | None = None,
    shift: int = 0,
) -> Tensor:
    """Share of rows whose target is among the topk largest logits.

    Parameters
    ----------
    input, linear_weight, linear_bias, ignore_index, shift
        As in `linear_cross_entropy`.
    target
        Class ids (...); or (..., K), of which any may be hit.
    topk
        1 <= topk <= 64; ties count for the lowest ids.
    reduction
        "mean" over kept rows (nan if there is none), "sum", or "none" (0 and 1 a row).

    Returns
    -------
    Tensor
        float32 (float64 for float64 inputs), without gradient.
    """
    _check.check_reduction(reduction)
    with torch.no_grad():
        s = row_statistics(
            input,
            linear_weight,
            target,
            want="max" if topk == 1 else stats.topk(topk),
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            shift=shift,
        )
        best = s.argmax.unsqueeze(-1) if topk == 1 else s.topk_ids
        ids = s.target_ids if s.several else s.target_ids.unsqueeze(-1)
        hits = (ids.unsqueeze(-1) == best.unsqueeze(-2)).flatten(-2).any(dim=-1)
        value = s.max if topk == 1 else s.topk_values
        return reduce(hits.to(value.dtype), s.kept, reduction, None, None)
