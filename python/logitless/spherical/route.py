"""How the statistics of a spherical loss are computed: streamed over the classes, or by Gram."""

from __future__ import annotations

from typing import Any

from logitless import stats
from logitless._check import Geometry, argument_error
from logitless._extras import torch
from logitless.ops import custom_ops, inputs
from logitless.ops.row_statistics import RowStatistics, compute
from logitless.spherical.choice import choose
from logitless.spherical.gram import is_fresh, wide
from logitless.spherical.statistics import check_ids, gram_statistics

__all__ = ["check_ids", "pick_route", "spherical_statistics"]

ROUTES = ("auto", "stream", "gram")
# Core statistics that the Gram route gives; any other of a request is streamed beside it.
SPHERICAL = frozenset(("target", "sum", "sum_sq", "variance"))


def spherical_statistics(
    request: stats.Request,
    geometry: Geometry,
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor | None,
    *,
    linear_bias: torch.Tensor | None,
    target_weight: torch.Tensor | None,
    ignore_index: int | None,
    logit_scale: float | torch.Tensor,
    softcap: float | None,
    shift: int,
    memory: str | int,
    route: str = "auto",
) -> RowStatistics:
    """Compute a request by the route asked for; the result's ``route`` says which one ran.

    ``route="gram"`` costs O(D²) a row once the weight's Gram matrix is known (2VD² flops for each
    version of the weight); statistics that need the classes, as ``rest`` does, are streamed.
    """
    streamed: dict[str, Any] = {
        "linear_bias": linear_bias,
        "target_weight": target_weight,
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "shift": shift,
        "memory": memory,
    }
    route = pick_route(request, geometry, input, linear_weight, linear_bias, softcap, route=route)
    if route == "stream":
        return compute(request, geometry, input, linear_weight, target, **streamed)
    ids = (
        None
        if target is None
        else inputs.class_ids(
            target, geometry, shift, inputs.IGNORE_INDEX if ignore_index is None else ignore_index
        )
    )
    values = _gram_values(request, geometry, input, linear_weight, ids, streamed)
    others = tuple(name for name in request.core if name not in SPHERICAL)
    if others:
        # The target logit comes along: it must be the same bits that rest left out.
        rest = stats.Request(
            core=tuple(n for n in request.core if n in others or n == "target"),
            has_target=request.has_target,
        )
        s = compute(rest, geometry, input, linear_weight, target, **streamed)
        values |= s.values
    return RowStatistics(
        values,
        reading=request.reading,
        classes=geometry.classes,
        vectors=None,
        ids=ids,
        several=geometry.kind == "sparse",
        ignore_index=inputs.IGNORE_INDEX if ignore_index is None else ignore_index,
        target_weight=_shifted(target_weight, geometry, shift),
        route="gram",
    )


def pick_route(
    request: stats.Request,
    geometry: Geometry,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None = None,
    *,
    route: str = "auto",
) -> str:
    """Check the route asked for against what it can do; for "auto", the one that costs less."""
    if route not in ROUTES:
        raise argument_error("route", repr(route), f"one of {', '.join(ROUTES)}", "'auto' picks")
    obstacle = _obstacle(geometry, softcap)
    if route == "gram" and obstacle is not None:
        raise argument_error("route", "'gram'", obstacle, "use route='stream' or 'auto'")
    if route != "auto":
        return route
    if obstacle is not None or torch._C._are_functorch_transforms_active():
        return "stream"
    if any(name not in SPHERICAL for name in request.core):
        return "stream"  # the classes are visited anyway: the spherical fields come for nothing
    grad = torch.is_grad_enabled()
    parameters = weight.requires_grad or (bias is not None and bias.requires_grad)
    fresh = not custom_ops.needed(input, weight, bias) and is_fresh(weight, bias)
    return choose(
        geometry.rows,
        geometry.features,
        geometry.classes,
        device=weight.device.type,
        dtype=weight.dtype,
        fresh=fresh,
        gradients=(grad and input.requires_grad, grad and parameters),
    )


def _obstacle(geometry: Geometry, softcap: float | None) -> str | None:
    if softcap is not None:
        return "no softcap: capped logits are not spherical"
    if geometry.positions:
        return "a weight of shape (V, D)"
    return None


def _gram_values(
    request: stats.Request,
    geometry: Geometry,
    input: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor | None,
    streamed: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """The spherical fields of a request, of the rows' shape."""
    shift, ignore = streamed["shift"], streamed["ignore_index"]
    ignore = inputs.IGNORE_INDEX if ignore is None else ignore
    rows = input.narrow(-2, 0, input.shape[-2] - shift) if shift else input
    flat_ids = None
    if ids is not None and geometry.targets:
        flat_ids = ids.reshape(-1, geometry.targets)
    with torch.autocast(input.device.type, enabled=False):
        mean, variance, target = gram_statistics(
            rows.reshape(-1, geometry.features),
            weight,
            streamed["linear_bias"],
            flat_ids,
            streamed["logit_scale"],
            ignore,
        )
    shape, v = geometry.rows_shape, geometry.classes
    values: dict[str, torch.Tensor] = {}
    if "target" in request.core and flat_ids is not None:
        values["target"] = target.view(*shape, geometry.targets)
    if "sum" in request.core:
        values["sum"] = (mean * v).view(shape)
    if "sum_sq" in request.core:
        values["sum_sq"] = ((variance + mean * mean) * v).view(shape)
    if "variance" in request.core:
        values["mean"], values["variance"] = mean.view(shape), variance.view(shape)
    accumulation = wide(input.dtype)
    return {name: value.to(accumulation) for name, value in values.items()}


def _shifted(weight: torch.Tensor | None, geometry: Geometry, shift: int) -> torch.Tensor | None:
    if weight is None or not shift:
        return weight
    axis = len(geometry.lead) - 1
    return weight.narrow(axis, shift, geometry.lead[-1] - shift)
