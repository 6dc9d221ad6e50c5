"""What a call is apart from its tensors, and how it is planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from logitless import stats
from logitless._arrays import Handle, torch_code
from logitless._extras import torch
from logitless.ops import device as device_calls

__all__ = [
    "ALIGNMENT",
    "BIAS",
    "BITS",
    "DENSE",
    "INPUT",
    "SCALE",
    "WEIGHT",
    "Call",
    "Tensors",
    "call_of",
    "core_spec",
    "keeps_when_lean",
    "plan",
    "recomputing",
    "store_bytes",
]

# Bits of `Call.gradients` and of `backward`'s `wanted`.
BITS = INPUT, WEIGHT, BIAS, SCALE, DENSE = (1, 2, 4, 8, 16)

Tensor = torch.Tensor
Optional = torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Everything about a call that is not a tensor."""

    core: tuple[str, ...]  # core statistics, in registry order
    powers: tuple[float, ...]
    vectors: int
    topk: int
    targets: int  # ids a row
    fields: tuple[tuple[str, int, bool], ...]  # (name, columns or 0, is integer) of each output
    rows_shape: tuple[int, ...]  # of a per-row field: leading dimensions less shift, positions
    rows: int  # N, of one position
    positions: tuple[int, ...]  # (d1, ..., dK) of the head
    shift: int
    ignore_index: int | None
    logit_scale: float  # unless it is a tensor
    softcap: float  # 0.0: none
    memory: int
    gradients: int
    dtype: torch.dtype  # of the products; differs from the tensors' own under autocast

    @property
    def accumulation(self) -> torch.dtype:
        """The dtype of the statistics: float64 for float64, else float32."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


# A step that repeats its shapes repeats its calls. Equal ones are one object, and a plan is found
# again by it. Tracers, whose sizes may be symbols, make their own.
call_of = lru_cache(maxsize=256)(Call)


@lru_cache(maxsize=256)
def recomputing(call: Call) -> Call:
    """Return the same call with a forward that keeps nothing."""
    return replace(call, memory=0)


class Tensors(NamedTuple):
    """The tensors of a call."""

    input: Tensor  # (..., D)
    weight: Tensor  # (V, [d1, ..., dK,] D)
    bias: Optional = None  # (V, [d1, ..., dK])
    scale: Optional = None  # 0-d; None: call.logit_scale
    dense: Optional = None  # (..., V, [d1, ..., dK])
    ids: Optional = None  # int64, of the rows' shape (and K)
    vectors: Optional = None  # (C, V) in the accumulation dtype, contiguous


def store_bytes(call: Call, device: torch.device, weight: Handle) -> int:
    """Bytes that the forward keeps for the backward; 0 where there is nothing to plan."""
    if not call.gradients or call.memory == 0 or call.positions or call.rows == 0:
        return 0
    if call.memory == -1 and not keeps_when_lean(call, device):
        return 0
    size: int = _planned(call, device, weight, None).store_bytes
    return size


def keeps_when_lean(call: Call, device: torch.device) -> bool:
    """Tell whether lean may keep something: on CUDA, sums for the gradient of the input alone."""
    return call.gradients == INPUT and device.type == "cuda" and call.dtype is torch.bfloat16


@lru_cache(maxsize=256)
def core_spec(call: Call) -> Any:
    """Return the statistics of a call as the core's object."""
    return stats.core_spec(call.core, call.powers, call.vectors, call.topk, call.targets)


# A plan depends on the strides of the weight, and on its address modulo this.
ALIGNMENT = 256


@lru_cache(maxsize=256)
def plan(
    call: Call,
    device: torch.device,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    lends: int | None,
) -> Any:
    """Size a call, once for each layout of its weight; `lends` is that of `_core.cuda_plan`."""
    return _planned(call, device, (address, torch_code(call.dtype), shape, strides), lends)


def _planned(call: Call, device: torch.device, weight: Handle, lends: int | None) -> Any:
    # What is kept belongs to one head: one with extra dimensions recomputes. Exponentials of a
    # softcap carry its slope, which an entropy's gradient cannot take out again.
    capped = call.softcap > 0 and "entropy" in call.core and device.type == "cuda"
    return device_calls.plan(
        device,
        weight,
        core_spec(call),
        call.rows,
        weight[2][1],
        weight[2][0],
        torch_code(call.dtype),
        0 if call.positions or capped else call.memory,
        call.gradients,
        lends=lends,
        compact=not call.shift,
    )
