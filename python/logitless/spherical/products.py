"""Products over all the classes, in blocks of rows: the Gram matrix and its kin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from logitless._extras import torch

# Bytes of a block of widened, centred rows. On the CPU it is written and read back at once, so it
# should stay in cache. A GPU splits the long sums of a block over its cores, and the longer they
# are the better: at V = 793471, D = 512 an H200 takes 7.7 ms in blocks of 64 MiB, 6.5 ms of 256.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
SMALLEST_BLOCK = 1024
# A symmetric product computes its upper triangle in this many panels: 5/8 of the flops. Narrower
# panels than these cost more than they save.
PANELS = 4
NARROWEST_PANEL = {"cpu": 32, "cuda": 128}


def block_rows(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block of the given width: a function of the shape alone, as plans need it."""
    budget = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cpu"])
    rows = budget // (width * dtype.itemsize)
    return max(SMALLEST_BLOCK, 1 << (max(rows, 1).bit_length() - 1))


def blocks(classes: int, rows: int) -> Iterator[slice]:
    """Cut the classes into blocks of ``rows``, the last one shorter."""
    for start in range(0, classes, rows):
        yield slice(start, min(start + rows, classes))


def add_square(out: torch.Tensor, rows: torch.Tensor, *, first: bool) -> None:
    """Add rowsᵀ·rows to the upper triangle of ``out`` (P, P); ``first`` overwrites it instead.

    Below the diagonal ``out`` is undefined until :func:`mirror`.
    """
    for panel in _panels(out):
        upper = slice(panel.start, None)
        out[panel, upper].addmm_(rows[:, panel].T, rows[:, upper], beta=0 if first else 1)


def tensor_cores(weight: torch.Tensor) -> bool:
    """Whether products with this weight may run as bf16 with fp32 sums (torch 2.8, CUDA)."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and "dtype" in _MM_OVERLOADS


_MM_OVERLOADS = frozenset(torch.ops.aten.mm.overloads())


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves in bf16 whose sum has 16 bits of each fp32 value; ``values`` are overwritten."""
    high = values.to(torch.bfloat16)
    return high, values.sub_(high).to(torch.bfloat16)


def add_square_split(
    out: torch.Tensor, cross: torch.Tensor, rows: torch.Tensor, *, first: bool
) -> None:
    """The same as `add_square` on tensor cores: ``cross`` (P, P) collects highᵀ·low.

    rowsᵀ·rows is highᵀhigh + lowᵀlow + cross + crossᵀ. Products of bf16 are exact, and the bits
    below the halves are less than 1e-6 of Q. But tensor cores truncate where they add to a sum,
    2⁻²⁴ of it for 16 rows: a block of 32768 rows may come out 1.2e-4 low, where rounding a weight
    to bf16 moves it by up to 4e-3. ``rows`` are overwritten.
    """
    high, low = split(rows)
    for panel in _panels(out):
        upper = slice(panel.start, None)
        part = torch.mm(high[:, panel].T, high[:, upper], out_dtype=torch.float32)
        part.add_(torch.mm(low[:, panel].T, low[:, upper], out_dtype=torch.float32))
        out[panel, upper] = part if first else part.add_(out[panel, upper])
    part = torch.mm(high.T, low, out_dtype=torch.float32)
    cross.copy_(part) if first else cross.add_(part)


def mirror(out: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of panels over the lower one."""
    for panel in _panels(out)[:-1]:
        out[panel.stop :, panel].copy_(out[panel, panel.stop :].T)
    return out


def _panels(out: torch.Tensor) -> list[slice]:
    size = out.shape[0]
    narrowest = NARROWEST_PANEL.get(out.device.type, NARROWEST_PANEL["cpu"])
    count = max(1, min(PANELS, size // narrowest))
    edges = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
