"""How the statistics of a spherical loss are computed: streamed over the classes, or by Gram."""

from __future__ import annotations

from typing import Any

from logitless import stats
from logitless._check import Geometry, argument_error
from logitless._extras import torch
from logitless.ops import inputs
from logitless.ops.row_statistics import RowStatistics, compute
from logitless.spherical.gram import is_fresh, wide
from logitless.spherical.statistics import gram_statistics

__all__ = ["check_ids", "choose", "spherical_statistics"]

ROUTES = ("auto", "stream", "gram")
# Core statistics that the Gram route gives; any other of a request is streamed beside it.
SPHERICAL = frozenset(("target", "sum", "sum_sq", "variance"))
# The Gram route pays from this many rows per feature. Flops say 1/2 (8NVD against 4VD²); measured
# break-evens lie between 0.4 and 0.7 on CPUs.
BREAK_EVEN = 0.6


def choose(rows: int, features: int, *, fresh: bool = False) -> str:
    """Return the route that costs less: "gram" or "stream".

    Parameters
    ----------
    rows, features
        N and D of the call.
    fresh
        Whether the Gram matrix of the weight is cached already, which halves what the route costs.
    """
    return "gram" if rows >= BREAK_EVEN * features * (0.5 if fresh else 1.0) else "stream"


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
    if route not in ROUTES:
        raise argument_error("route", repr(route), f"one of {', '.join(ROUTES)}", "'auto' picks")
    obstacle = _obstacle(geometry, softcap)
    if route == "gram" and obstacle is not None:
        raise argument_error("route", "'gram'", obstacle, "use route='stream' or 'auto'")
    if route == "auto":
        if obstacle is not None or torch.compiler.is_compiling():
            route = "stream"
        else:
            fresh = is_fresh(linear_weight, linear_bias)
            route = choose(geometry.rows, geometry.features, fresh=fresh)
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
        flat_ids = torch.where(flat_ids == ignore, -1, flat_ids)
        if not ids.is_cuda:
            check_ids(flat_ids, geometry.classes)
    with torch.autocast(input.device.type, enabled=False):
        mean, variance, target = gram_statistics(
            rows.reshape(-1, geometry.features),
            weight,
            streamed["linear_bias"],
            flat_ids,
            streamed["logit_scale"],
        )
    if flat_ids is not None:  # skipped rows carry safe values
        kept = (flat_ids >= 0).any(1)
        mean, variance = torch.where(kept, mean, 0.0), torch.where(kept, variance, 0.0)
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


def check_ids(ids: torch.Tensor, classes: int) -> None:
    """Refuse an id outside [0, V); negative ids of (n, K) stand for padding only at -1."""
    wrong = ((ids >= classes) | (ids < -1)).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        value = next(int(i) for i in ids[row] if int(i) >= classes or int(i) < -1)
        raise IndexError(
            f"target[{row}] = {value} is out of range; expected a class id in [0, {classes}), "
            "or ignore_index for positions to skip"
        )


def _shifted(weight: torch.Tensor | None, geometry: Geometry, shift: int) -> torch.Tensor | None:
    if weight is None or not shift:
        return weight
    axis = len(geometry.lead) - 1
    return weight.narrow(axis, shift, geometry.lead[-1] - shift)
