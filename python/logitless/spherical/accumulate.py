"""Gradients of a spherical loss kept in their parts over micro-batches and ranks.

A dense weight gradient costs V·D numbers to store, to add and to send. Its parts are D² + D
numbers and the target rows, and they add up: collect them over the micro-batches of a step, sum
them over the ranks, and write the dense gradient once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from logitless._extras import torch
from logitless.spherical.gather import gather_rows
from logitless.spherical.structure import Structure

_active: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Accumulator:
    """The gradient of one weight, in its parts. Made by :func:`accumulate`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.structure: Structure | None = None

    def add(self, structure: Structure) -> None:
        """Add the parts of one backward pass."""
        self.structure = structure if self.structure is None else self.structure + structure

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the ranks of a process group: D² + D + rows·(D + 1) numbers instead of V·D.

        Ranks may hold different numbers of rows. The rows are concatenated in rank order, so every
        rank ends with the same bits. Every rank of the group must call, with something collected.
        """
        parts = self._collected()
        torch.distributed.all_reduce(parts.multiplier, group=group)
        torch.distributed.all_reduce(parts.addend, group=group)
        parts.ids = gather_rows(parts.ids, group)
        parts.rows = gather_rows(parts.rows, group)

    def write(
        self,
        grad: torch.Tensor | None = None,
        bias_grad: torch.Tensor | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """Write the dense gradient into ``grad`` (V, D) and ``bias_grad`` (V,): 2VD² flops.

        Without arguments it becomes ``weight.grad`` and ``bias.grad`` (allocated when absent, added
        to when present, as a backward pass would). With ``accumulate`` it is added to the tensors.
        """
        parts = self._collected()
        if grad is None and bias_grad is None:
            fresh = self.weight.grad is None
            for t in (self.weight, self.bias):
                if t is not None and t.grad is None:
                    t.grad = torch.zeros_like(t)
            bias_grad = None if self.bias is None else self.bias.grad
            parts.write(self.weight, self.bias, self.weight.grad, bias_grad, accumulate=not fresh)
        else:
            parts.write(self.weight, self.bias, grad, bias_grad, accumulate=accumulate)

    def _collected(self) -> Structure:
        if self.structure is None:
            raise RuntimeError(
                "nothing was collected: call backward of a spherical loss on this weight, with "
                "route='gram', inside `with spherical.accumulate(weight)`, then all_reduce or write"
            )
        return self.structure


@contextmanager
def accumulate(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Iterator[Accumulator]:
    """Collect the weight's (and bias's) gradient in its parts instead of writing it dense.

    Inside the block, backward of a spherical loss on ``weight`` by the Gram route leaves
    ``weight.grad`` alone. The weight must not change inside the block.

    Examples
    --------
    >>> with spherical.accumulate(head.weight) as acc:   # doctest: +SKIP
    ...     for h, y in micro_batches:
    ...         losses.zloss(h, head.weight, y).backward()
    ...     acc.all_reduce()
    >>> acc.write()                                      # doctest: +SKIP
    """
    if weight in _active:
        raise RuntimeError("spherical.accumulate is already active for this weight: do not nest it")
    accumulator = Accumulator(weight, bias)
    _active[weight] = accumulator
    try:
        yield accumulator
    finally:
        del _active[weight]


def refuse_collecting(weight: torch.Tensor) -> None:
    """Refuse a traced backward on a weight that is being collected: it could only write dense."""
    if any(w.data_ptr() == weight.data_ptr() for w in _active):
        raise RuntimeError(
            "spherical.accumulate does not see the backward of a compiled spherical loss: leave "
            "the loss out of torch.compile (torch.compiler.disable) inside the block"
        )


def collector(weight: torch.Tensor) -> Accumulator | None:
    """The active accumulator of a weight, if any."""
    found: Accumulator | None = _active.get(weight)
    return found
