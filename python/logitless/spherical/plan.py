"""What a spherical loss allocates by each route, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from logitless import _check, stats
from logitless._arrays import torch_code
from logitless._check import Geometry, argument_error
from logitless._extras import torch
from logitless.ops import autograd, inputs
from logitless.ops import device as device_calls
from logitless.spherical.gram import wide
from logitless.spherical.products import block_rows, tensor_cores
from logitless.spherical.route import pick_route, spherical_statistics

__all__ = ["Plan", "plan"]

# Vectors of one value a row and target that statistics, loss and gradients hold at most, beside
# what is counted one by one; and the rounding of small tensors by torch's allocator.
VECTORS = 12
ROUNDING = 48 * 512
# A GPU sums columns in parts, in scratch that grows with the device and not with the columns.
COLUMN_SUMS = 4 << 20


@dataclass(frozen=True)
class Plan:
    """Bytes of one forward and backward of a spherical loss. Nothing of size N x V, on any route.

    Attributes
    ----------
    route : str
        "gram" or "stream".
    cache_bytes : int
        Gram matrix and mean row, kept with the weight until it changes; 0 for "stream".
    kept_bytes : int
        From the forward to the backward, losses and statistics included.
    forward_bytes, backward_bytes : int
        Scratch at the worst moment of each, beside the rest; freed when it returns.
    gradient_bytes : int
        The gradients that backward returns.
    """

    route: str
    cache_bytes: int
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """Everything held at the worst moment beside the cache and the gradients."""
        return self.kept_bytes + max(self.forward_bytes, self.backward_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that a forward and backward add to what the caller holds."""
        backward = self.backward_bytes + self.gradient_bytes
        return self.cache_bytes + self.kept_bytes + max(self.forward_bytes, backward)


def plan(
    loss: Any,
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor | None,
    *,
    linear_bias: torch.Tensor | None = None,
    shift: int = 0,
    memory: str | int = "lean",
    route: str = "auto",
    **hyper_parameters: Any,
) -> Plan:
    """Size a forward and backward of a spherical loss, without running it.

    Parameters
    ----------
    loss
        ``losses.zloss`` or another of its family.
    input, linear_weight, target, linear_bias, shift, memory, route, hyper_parameters
        As for the loss itself. Only shapes, dtypes, devices and ``requires_grad`` are looked at, so
        that meta tensors do; those are planned as for the CPU.

    Returns
    -------
    Plan

    Examples
    --------
    >>> from logitless import losses, spherical
    >>> h, w = torch.empty(4096, 512, device="meta"), torch.empty(100_000, 512, device="meta")
    >>> y = torch.empty(4096, dtype=torch.int64, device="meta")
    >>> w.requires_grad_()  # doctest: +SKIP
    >>> spherical.plan(losses.zloss, h, w, y).peak_bytes  # doctest: +SKIP
    """
    definition = getattr(loss, "definition", None)
    if definition is None or definition.compute is not spherical_statistics:
        raise argument_error("loss", repr(loss), "a spherical loss", "e.g. losses.zloss")
    hyper = definition.hyper({**hyper_parameters, "route": route})
    geometry = inputs.inspect(input, linear_weight, target, linear_bias, None, shift)
    request = definition.resolve_want(hyper, has_target=target is not None)
    route = pick_route(request, geometry, input, linear_weight, linear_bias, route=route)
    code = _check.check_memory(memory)
    if route == "gram":
        return _gram(request, geometry, input, linear_weight, linear_bias, code, shift)
    return _stream(request, geometry, input, linear_weight, linear_bias, code)


def _gram(
    request: stats.Request,
    geometry: Geometry,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    memory: int,
    shift: int,
) -> Plan:
    dtype, item = wide(weight.dtype), weight.dtype.itemsize
    n, d, v, k = _rows(geometry), geometry.features, geometry.classes, geometry.targets
    p, f = d + (bias is not None), wide(weight.dtype).itemsize
    mask = autograd.gradient_mask(input, weight, bias, None, None)
    into_input, into_weight = mask & 1, mask & 6
    block = min(block_rows(p, dtype, weight.device), v)
    # The rows of the targets: as stored, widened, with the bias as a last column.
    gathered = n * d * item * (item != f) + n * d * f + (n * p * f if bias is not None else 0)
    sums = -(-v // block) * p * f
    forward = max(block * p * f + sums + p * (f + 16), n * p * f, gathered + n * p * f * (k > 0))
    halves = tensor_cores(weight) and bias is None
    if halves:  # the two halves, highᵀ·low and products of D x D
        forward = max(forward, block * p * (f + 2 * item) + sums + 3 * p * p * f)
    if weight.is_cuda:
        forward = max(forward, COLUMN_SUMS)
    kept = 2 * n * p * f if mask else 0
    if not mask:
        forward += 2 * n * p * f
    if shift or not input.is_contiguous():
        kept += n * d * item
    gradients = _gradients(mask, input, weight, bias)
    backward = 0
    if into_input:  # the weight's gradient comes later, into memory that is free until then
        backward = max(0, n * p * f + max(gathered, n * d * f) - gradients)
    if into_weight:
        target_rows, written = n * k * p * f, 0
        if item != f or bias is not None:
            written = block * (p * f + d * f * (item != f)) + halves * p * p * (f + 2 * item)
        if item != f:
            target_rows *= 2  # finished, before they are rounded
            written = max(written, n * k * d * (f + item))
        backward = max(backward, p * p * f + max(n * p * f, target_rows + written))
    cache = p * (p + 1) * f
    found = Plan("gram", cache, kept, forward, backward, gradients)
    others = tuple(name for name in request.core if name not in ("sum", "sum_sq", "variance"))
    if any(name not in ("target",) for name in others):
        # Beside it the other statistics are streamed; their gradients are added to those above.
        rest = stats.Request(core=others, has_target=request.has_target)
        beside = _stream(rest, geometry, input, weight, bias, memory)
        found = Plan(
            "gram",
            cache,
            kept + beside.kept_bytes,
            max(forward, beside.forward_bytes),
            max(backward, beside.backward_bytes) + gradients,
            gradients,
        )
    return _with_vectors(found, n, k)


def _stream(
    request: stats.Request,
    geometry: Geometry,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    memory: int,
) -> Plan:
    mask = autograd.gradient_mask(input, weight, bias, None, None)
    head = (0, torch_code(weight.dtype), tuple(weight.shape), tuple(weight.stride()))
    spec = stats.core_spec(request.core, request.powers, 0, request.topk, geometry.targets)
    sizes = (_rows(geometry), geometry.features, geometry.classes, torch_code(weight.dtype))
    # A bf16 forward on CUDA may borrow memory of the gradients, unless another does: plan for both.
    bf16 = weight.is_cuda and weight.dtype == torch.bfloat16 and mask & 2
    lends = (None, weight.element_size()) if bf16 else (None,)
    plans = [
        device_calls.plan(weight.device, head, spec, *sizes, memory, mask, lends=n) for n in lends
    ]
    threads = torch.get_num_threads() * plans[0].threads_bytes
    borrowed = weight.numel() * weight.element_size() if getattr(plans[-1], "lent_bytes", 0) else 0
    plan = Plan(
        "stream",
        0,
        max(found.store_bytes for found in plans),
        max(found.forward_bytes for found in plans) + threads + borrowed,
        max(found.backward_bytes for found in plans) + threads if mask else 0,
        _gradients(mask, input, weight, bias),
    )
    return _with_vectors(plan, _rows(geometry), geometry.targets)


def _with_vectors(found: Plan, rows: int, targets: int) -> Plan:
    pairs = 16 * rows * targets * targets if targets > 1 else 0  # squared_error compares ids
    vectors = VECTORS * 8 * rows * max(targets, 1) + pairs + ROUNDING
    return Plan(
        found.route,
        found.cache_bytes,
        found.kept_bytes + vectors,
        found.forward_bytes,
        found.backward_bytes,
        found.gradient_bytes,
    )


def _gradients(
    mask: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> int:
    tensors = (input, weight, bias)
    return sum(
        t.numel() * t.element_size()
        for bit, t in zip((1, 2, 4), tensors, strict=True)
        if t is not None and mask & bit
    )


def _rows(geometry: Geometry) -> int:
    return prod(geometry.lead)
