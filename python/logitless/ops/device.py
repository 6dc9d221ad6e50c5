"""The engines by device: the one place that tells a CPU call from a CUDA call.

On CUDA everything runs on the current stream, in scratch from torch's allocator; nothing is
read back and nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from logitless import _core
from logitless._arrays import Handle, torch_handle
from logitless._check import ArgumentError
from logitless._extras import torch

__all__ = ["backward", "check", "cotangents", "forward", "losses", "plan"]

# `engine` makes the arguments of both; the CUDA calls take device, stream and scratch besides, and
# are there only where the extension was built with them.
_CPU: Any = _core
_CUDA: Any = _core


def check(device: torch.device) -> None:
    """Refuse a device without an engine, and say what to do."""
    if device.type in ("cpu", "meta"):
        return
    if device.type == "cuda" and hasattr(_core, "cuda_forward"):
        return
    reason = "this build has no CUDA engine" if device.type == "cuda" else "there is none for it"
    raise ArgumentError(
        f"input.device = {device}: expected a device with an engine ({reason}); "
        "move input, linear_weight and target with .cpu(), and see `logitless info`"
    )


def plan(
    device: torch.device,
    weight: Handle,
    *arguments: Any,
    lends: int | None = None,
    compact: bool = True,
) -> Any:
    """Size a call on `device`; cached. `arguments` are those of `_core.plan` up to gradients.

    `lends` and `compact` are those of `_core.cuda_plan`; a CPU borrows nothing.
    """
    if device.type == "cuda":
        describable = _CUDA.cuda_describable(weight)
        return _cached("cuda_plan", *arguments, describable, _index(device), lends, compact)
    return _cached("plan", *arguments)


@lru_cache(maxsize=256)
def _cached(name: str, *arguments: Any) -> Any:
    return getattr(_core, name)(*arguments)


def forward(
    device: torch.device,
    plan: Any,
    *arguments: Any,
    scale: Handle | None = None,
    lent: Handle | None = None,
) -> None:
    """Run `_core.forward`, or its CUDA twin.

    `scale` is a logit scale that lives on the device, `lent` the memory of d_weight.
    """
    if device.type == "cuda":
        scratch = torch.empty(plan.forward_bytes, dtype=torch.uint8, device=device)
        launch = _launch(device, plan, scratch)
        _CUDA.cuda_forward(*arguments, *launch, **_options(scale=scale, lent=lent))
    else:
        _CPU.forward(*arguments, plan, torch.get_num_threads())


def backward(
    device: torch.device,
    plan: Any,
    *arguments: Any,
    scale: Handle | None = None,
    accumulate_weight: bool | None = None,
    lent: Handle | None = None,
) -> None:
    """Run `_core.backward`, or its CUDA twin, which can add to d_weight."""
    if device.type == "cuda":
        scratch = torch.empty(plan.backward_bytes, dtype=torch.uint8, device=device)
        launch = _launch(device, plan, scratch)
        options = _options(scale=scale, accumulate_weight=accumulate_weight, lent=lent)
        _CUDA.cuda_backward(*arguments, *launch, **options)
    else:
        _CPU.backward(*arguments, plan, torch.get_num_threads())


def losses(device: torch.device, *arguments: Any) -> None:
    """Run `_core.cuda_losses` on contiguous tensors of any shape."""
    _CUDA.cuda_losses(*map(_handle, arguments), *_where(device))


def cotangents(device: torch.device, *arguments: Any) -> None:
    """Run `_core.cuda_cotangents` on contiguous tensors of any shape."""
    _CUDA.cuda_cotangents(*map(_handle, arguments), *_where(device))


def _handle(argument: Any) -> Any:
    return torch_handle(argument.view(-1)) if isinstance(argument, torch.Tensor) else argument


def _launch(device: torch.device, plan: Any, scratch: torch.Tensor) -> tuple[Any, ...]:
    """Return the trailing arguments of a CUDA call.

    The caller holds the scratch until the call returns: it then goes back to torch's allocator,
    which reuses it in stream order.
    """
    return (plan, 0, *_where(device), torch_handle(scratch))


def _where(device: torch.device) -> tuple[int, int]:
    """Return ordinal and current stream."""
    return _index(device), torch.cuda.current_stream(device).cuda_stream


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
