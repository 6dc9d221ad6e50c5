"""`row_statistics`: differentiable statistics of each row of logits that are never stored."""

from __future__ import annotations

from logitless import _check, stats
from logitless._check import Geometry
from logitless._extras import torch
from logitless.ops import autograd, inputs
from logitless.ops.call import Call, Tensors, call_of
from logitless.ops.statistics import RowStatistics

__all__ = ["RowStatistics", "compute", "row_statistics"]

Tensor = torch.Tensor


def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    want: stats.Want = ("rest", "target"),
    linear_bias: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    memory: str | int = "lean",
    grad_buffer: Tensor | None = None,
) -> RowStatistics:
    """Stream the logits of a linear head over the classes and keep statistics of each row.

    The logits are ``x = logit_scale · input @ linear_weightᵀ + linear_bias`` and
    ``z = softcap · tanh(x / softcap)``. A tile of them lives in registers, is folded into the
    statistics and is gone: nothing of size N x V is stored, in the backward neither.

    Parameters
    ----------
    input
        (..., D): any leading dimensions, any strides. float32, bfloat16, float16 or float64.
    linear_weight
        (V, D), or (V, d1, ..., dK, D) for a head with extra dimensions; input's dtype.
    target
        (..., [d1, ..., dK]) class ids, int64, int32 or uint8; or (..., K) with K ids a row.
    want
        Names and `logitless.stats` objects: what to compute. See `logitless.stats`.
    linear_bias
        (V, [d1, ..., dK]); input's dtype. A bias of -inf masks a class.
    target_weight
        Weights of the K ids, carried along as ``target_weight`` for a loss to use.
    ignore_index
        A row whose ids all equal it is skipped; an id that equals it among K is padding.
        None means -100, as in torch.
    logit_scale
        A number or a 0-d tensor, which may require a gradient.
    softcap
        A positive number, or None.
    shift
        Position t predicts target t + shift: fields have the last axis T - shift.
    memory
        "lean"; "fast", which keeps tiles of the forward and makes the backward cheaper; or
        the number of bytes that may be kept. On CUDA in bfloat16, lean keeps what fits into memory
        of the backward's own: the forward of a cross entropy allocates the weight's gradient and
        holds exponentials in it. That serves the first backward through a graph; another one
        recomputes, and so do torch.compile, torch.func, checkpointing and a call beside one whose
        backward is still to come; recomputed gradients differ in their last digits (the same
        program still gives the same bits). Where only input has a
        gradient (a frozen head), the forward keeps float32 sums of input's shape if they fit, and
        the backward is a pass over them: two products in all.
    grad_buffer
        float32 (float64 for float64 inputs) of linear_weight's shape: each backward adds the
        weight's gradient to it, unrounded, and returns none for linear_weight, whose ``grad`` and
        hooks see nothing. For gradient accumulation. Under ``retain_graph`` every backward adds
        again; checkpointing adds once. Not differentiable, not for torch.compile or torch.func.

    Returns
    -------
    RowStatistics
        Fields of shape ``input.shape[:-1]`` (+ ``(d1, ..., dK)``), float32, or float64 for float64
        inputs, accumulated in that dtype. Skipped rows hold safe values: 0, ids -1.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes, devices or names that do not fit; both are RuntimeErrors too.
    IndexError
        An id outside [0, V) that is not ignore_index, before any work (on the CPU).

    Examples
    --------
    >>> s = row_statistics(hidden, head.weight, labels, want=("rest", "target", "entropy"))
    >>> loss = -torch.nn.functional.logsigmoid(s.target - s.rest).mean() - 0.01 * s.entropy.mean()
    """
    geometry = inputs.inspect(input, linear_weight, target, linear_bias, target_weight, shift)
    if geometry.kind == "probability":
        raise _check.type_error(
            "target.dtype",
            None if target is None else target.dtype,
            "class ids (an integer dtype)",
            "dense probabilities go through want=stats.dot(q)",
        )
    request = stats.resolve(
        want, has_target=target is not None, cached=not torch.compiler.is_compiling()
    )
    return compute(
        request,
        geometry,
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        target_weight=target_weight,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
        memory=memory,
        grad_buffer=grad_buffer,
    )


def compute(
    request: stats.Request,
    geometry: Geometry,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None,
    target_weight: Tensor | None,
    ignore_index: int | None,
    logit_scale: float | Tensor,
    softcap: float | None,
    shift: int,
    memory: str | int,
    grad_buffer: Tensor | None = None,
) -> RowStatistics:
    """Compute a resolved request on inspected tensors: what `row_statistics` and losses share."""
    number, scale = inputs.logit_scale(logit_scale)
    if scale is not None and scale.device != input.device and scale.device.type != "cpu":
        raise _check.argument_error(
            "logit_scale.device",
            scale.device,
            f"{input.device} or cpu",
            "move it to input's device",
        )
    dtype = inputs.compute_dtype(input)
    dense = _dense(request, geometry, input)
    vectors = _vectors(request, geometry, input, dtype)
    ids = None
    if target is not None and geometry.targets:
        if ignore_index is None:
            ignore_index = inputs.IGNORE_INDEX
        ids = inputs.class_ids(target, geometry, shift, ignore_index)
        if target_weight is not None and shift:
            target_weight = target_weight.narrow(
                len(geometry.lead) - 1, shift, geometry.lead[-1] - shift
            )
    if request.topk:
        _check.check_topk(request.topk, geometry.classes)
    parts = (
        request.core,
        request.powers,
        request.vector_count,
        request.topk,
        geometry.targets,
    )
    # A tracer must see plain code.
    fields_of = (
        stats.core_fields.__wrapped__ if torch.compiler.is_compiling() else stats.core_fields
    )
    call = (Call if torch.compiler.is_compiling() else call_of)(
        *parts,
        fields=fields_of(*parts),
        rows_shape=geometry.rows_shape,
        rows=geometry.rows,
        positions=geometry.positions,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=number,
        softcap=_check.check_softcap(softcap),
        memory=_check.check_memory(memory),
        gradients=autograd.gradient_mask(
            input, linear_weight, linear_bias, scale, dense, grad_buffer=grad_buffer
        ),
        dtype=dtype,
    )
    tensors = Tensors(input, linear_weight, linear_bias, scale, dense, ids, vectors)
    buffer = inputs.grad_buffer(grad_buffer, linear_weight, dtype)
    fields = autograd.statistics(call, tensors, buffer)
    names = [name for name, _, _ in call.fields]
    return RowStatistics(
        dict(zip(names, fields, strict=True)),
        reading=request.reading,
        classes=geometry.classes,
        vectors=vectors,
        ids=ids,
        several=geometry.kind == "sparse",
        ignore_index=ignore_index,
        target_weight=target_weight,
    )


def _vectors(
    request: stats.Request, geometry: Geometry, input: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Class vectors as the engine takes them: (C, V), contiguous, in the accumulation dtype."""
    vectors: Tensor | None = request.vectors
    if vectors is None:
        return None
    inputs.check_float_tensor("stats.weighted(c): c", vectors, input.device)
    _check.check_vectors(tuple(vectors.shape), geometry.classes)
    if vectors.requires_grad:
        raise _check.argument_error(
            "stats.weighted(c): c.requires_grad", True, "False: a constant", "use c.detach()"
        )
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return vectors.reshape(-1, geometry.classes).to(wide).contiguous()


def _dense(request: stats.Request, geometry: Geometry, input: Tensor) -> Tensor | None:
    dense: Tensor | None = request.dense
    if dense is None:
        return None
    inputs.check_float_tensor("stats.dot(q): q", dense, input.device)
    expected = (*geometry.lead, geometry.classes, *geometry.positions)
    _check.check_dense(tuple(dense.shape), expected)
    return dense
