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

__all__ = ["backward", "check", "forward", "plan"]

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


def plan(device: torch.device, weight: Handle, *arguments: Any) -> Any:
    """Size a call on `device`; cached. `arguments` are those of `_core.plan` up to gradients."""
    if device.type == "cuda":
        describable = _CUDA.cuda_describable(weight)
        return _cached("cuda_plan", *arguments, describable, _index(device))
    return _cached("plan", *arguments)


@lru_cache(maxsize=256)
def _cached(name: str, *arguments: Any) -> Any:
    return getattr(_core, name)(*arguments)


def forward(device: torch.device, plan: Any, *arguments: Any) -> None:
    """Run `_core.forward`, or its CUDA twin."""
    if device.type == "cuda":
        _launch(_CUDA.cuda_forward, device, plan, plan.forward_bytes, arguments)
    else:
        _CPU.forward(*arguments, plan, torch.get_num_threads())


def backward(device: torch.device, plan: Any, *arguments: Any) -> None:
    """Run `_core.backward`, or its CUDA twin."""
    if device.type == "cuda":
        _launch(_CUDA.cuda_backward, device, plan, plan.backward_bytes, arguments)
    else:
        _CPU.backward(*arguments, plan, torch.get_num_threads())


def _launch(
    run: Any, device: torch.device, plan: Any, scratch_bytes: int, arguments: tuple[Any, ...]
) -> None:
    # The scratch goes back to torch's allocator at return; it is reused in stream order.
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    run(*arguments, plan, 0, _index(device), stream, torch_handle(scratch))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
