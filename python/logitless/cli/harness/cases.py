"""What is measured: sizes of a head, the presets, and the random inputs made for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["forward", "forward+backward", "frozen head"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward", "frozen head")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One shape: N rows, D features, V classes, a dtype's short name and a device."""

    rows: int
    features: int
    classes: int
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def label(self) -> str:
        """Short text for tables: ``1024 x 512 x 32768 fp32``."""
        return f"{self.rows} x {self.features} x {self.classes} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of input, weight and gradients."""
        return DTYPES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of both gradients: (N, D) and (V, D)."""
        return (self.rows + self.classes) * self.features * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Problem:
    """Inputs of a case: `input` (N, D) and `weight` (V, D) that require grad, `target` (N,)."""

    case: Case
    input: Tensor
    weight: Tensor
    target: Tensor


def problem(case: Case, seed: int = 0) -> Problem:
    """Inputs whose logits have a standard deviation of 2; targets are uniform."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, scale: float) -> Tensor:
        # In place and rounded last: no second copy is alive when the memory measurement starts.
        out = torch.empty(rows, case.features, device=device)
        out.normal_(0.0, scale, generator=generator)
        return out.to(case.torch_dtype).requires_grad_()

    return Problem(
        case,
        normal(case.rows, 1.0),
        normal(case.classes, 2.0 / case.features**0.5),
        torch.randint(case.classes, (case.rows,), device=device, generator=generator),
    )


_CPU = (
    Case(1024, 512, 32768),
    Case(2048, 1024, 16384),
    Case(1024, 512, 50257),
    Case(64, 512, 50257),
    Case(32, 64, 1000),
)
_GPU = tuple(
    Case(8192, features, classes, "bf16", "cuda")
    for features, classes in (
        (2304, 256000),
        (4096, 128256),
        (3584, 152064),
        (5120, 131072),
        (1024, 65536),
        (3072, 32064),
        (768, 50257),
    )
)
_EDGE = tuple(Case(rows, 1024, 32768, "bf16", "cuda") for rows in (1, 7, 128, 1000, 32768, 131072))
_EDGE += tuple(Case(4096, 1024, classes, "bf16", "cuda") for classes in (2, 151, 50257, 1_000_000))
_EDGE += tuple(Case(4096, features, 32768, "bf16", "cuda") for features in (8, 33, 64, 12288))

PRESETS: dict[str, tuple[Case, ...]] = {
    "quick": (Case(512, 256, 16384),),
    "cpu": _CPU + tuple(replace(case, dtype="bf16") for case in _CPU),
    "cpu-fp32": _CPU,
    "cpu-bf16": tuple(replace(case, dtype="bf16") for case in _CPU),
    "gpu": _GPU,
    "gpu-edge": _EDGE,
}
"""Named lists of cases.

``cpu``: a plain head, one with many features, GPT-2's vocabulary, a small batch and a tiny head.
``gpu``: heads of published models at 8192 rows. ``gpu-edge``: one size at a time taken to its
extremes.
"""
