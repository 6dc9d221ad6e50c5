"""Rows of all ranks, where ranks hold different numbers of them."""

from __future__ import annotations

from typing import Any

from logitless._extras import torch


def gather_rows(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """Concatenate (n, ...) tensors of all ranks of ``group`` in rank order, the same bits on each.

    Every rank must call; n may differ from rank to rank, the other axes may not. Shorter tensors
    travel padded to the longest.
    """
    world = torch.distributed.get_world_size(group)
    mine = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.zeros_like(mine) for _ in range(world)]
    torch.distributed.all_gather(counts, mine, group=group)
    lengths = [int(c) for c in counts]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
