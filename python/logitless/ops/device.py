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

__all__ = [
    "backward",
    "check",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "forward",
    "plan",
    "policy_backward",
    "policy_forward",
]

# `engine` makes the arguments of both; the CUDA calls take device, stream and scratch besides, and
# are there only where the extension was built with them.
_CPU: Any = _core
_CUDA: Any = _core


def check(input: torch.Tensor) -> None:
    """Refuse a device without an engine, and say what to do."""
    if input.is_cpu or input.is_meta or (input.is_cuda and hasattr(_core, "cuda_forward")):
        return
    device = input.device
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
    plan: Any,
    device: torch.device,
    *arguments: Any,
    scale: Handle | None = None,
    lent: Handle | None = None,
) -> None:
    """Run `_core.forward`, or its CUDA twin.

    `scale` is a logit scale that lives on the device, `lent` the memory of d_weight.
    """
    if not isinstance(plan, _core.Plan):
        scratch = torch.empty(plan.forward_bytes, dtype=torch.uint8, device=device)
        _CUDA.cuda_forward(*arguments, *_launch(device, plan, scratch), scale, lent)
    else:
        _CPU.forward(*arguments, plan, torch.get_num_threads())


def backward(
    plan: Any,
    device: torch.device,
    *arguments: Any,
    scale: Handle | None = None,
    accumulate_weight: bool = False,
    lent: Handle | None = None,
) -> None:
    """Run `_core.backward`, or its CUDA twin, which can add to d_weight."""
    if not isinstance(plan, _core.Plan):
        scratch = torch.empty(plan.backward_bytes, dtype=torch.uint8, device=device)
        launch = _launch(device, plan, scratch)
        _CUDA.cuda_backward(*arguments, *launch, accumulate_weight, scale, lent)
    else:
        _CPU.backward(*arguments, plan, torch.get_num_threads())


def cross_entropy_forward(
    plan: Any,
    device: torch.device,
    *arguments: Any,
    share: Handle | None,
    scale: Handle | None,
    lent: Handle | None,
) -> None:
    """Run `_core.cross_entropy_forward`, or its CUDA twin.

    The twin keeps in `share` what a reduction multiplies each row by; nobody reads it on the host.
    Where nothing is kept, it has the statistics in its scratch.
    """
    if not isinstance(plan, _core.Plan):
        size = plan.cross_entropy_bytes[0] if share is None else plan.forward_bytes
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        launch = _launch(device, plan, scratch)
        _CUDA.cuda_cross_entropy_forward(*arguments, *launch, share, scale, lent)
    else:
        _CPU.cross_entropy_forward(*arguments, plan, torch.get_num_threads())


def cross_entropy_backward(
    plan: Any,
    device: torch.device,
    *arguments: Any,
    share: Handle,
    accumulate_weight: bool,
    scale: Handle | None,
    lent: Handle | None,
) -> None:
    """Run `_core.cross_entropy_backward`, or its CUDA twin."""
    if not isinstance(plan, _core.Plan):
        scratch = torch.empty(plan.cross_entropy_bytes[1], dtype=torch.uint8, device=device)
        launch = _launch(device, plan, scratch)
        _CUDA.cuda_cross_entropy_backward(
            *arguments, *launch, share, accumulate_weight, scale, lent
        )
    else:
        _CPU.cross_entropy_backward(*arguments, plan, torch.get_num_threads())


def policy_forward(device: torch.device, *arguments: Any) -> None:
    """Run `_core.cuda_policy_forward`; a CPU has no such call."""
    _CUDA.cuda_policy_forward(*arguments, device.index, _stream(device))


def policy_backward(device: torch.device, *arguments: Any) -> None:
    """Run `_core.cuda_policy_backward`; a CPU has no such call."""
    _CUDA.cuda_policy_backward(*arguments, device.index, _stream(device))


def _launch(device: torch.device, plan: Any, scratch: torch.Tensor) -> tuple[Any, ...]:
    """Return the arguments of a CUDA call that follow those of the CPU's.

    The caller holds the scratch until the call returns: it then goes back to torch's allocator,
    which reuses it in stream order.
    """
    return (plan, 0, device.index, _stream(device), torch_handle(scratch))


def _stream(device: torch.device) -> int:
    # torch.cuda.current_stream makes an object of this number.
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
