"""Epochs: which affine map each untouched row of a factored matrix is behind by.

A row of A is written when an epoch closes and read, perhaps, many epochs later. Its *place* names
the epoch, and the epoch's map (S, c) leads from there to the start of the current epoch, so that
the row is A_v S + c. Maps are products of forward steps: nothing is ever inverted, and contractions
only make rounding errors smaller.

Epochs are merged as digits carry in a counter: when ``RADIX`` epochs of one size are alive, the
rows of all are written anew in the latest and one epoch of the next size is left. So a matrix has
O(log) epochs, each row is rewritten O(log) times however long it is not a target, and when the
lists of rows have grown to the number of classes, one sweep over everything starts afresh. What a
step costs does not depend on the number of classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from logitless._extras import torch

# Epochs of one size that become one of the next. More: fewer rewrites, more maps to keep.
RADIX = 4
# Places from here on are epochs, those below are rows of the current epoch's own.
COLD = 1 << 30
# Rows widened to float64 at once.
BLOCK = 1 << 14
# On CUDA a row is multiplied by every map and keeps one product: so many rows at once.
CUDA_BLOCK = 1 << 10


def counts_are_free(tensor: torch.Tensor) -> bool:
    """Whether how many rows satisfy something can be asked without waiting for a device."""
    return not tensor.is_cuda


@dataclass
class Epoch:
    """Rows last written at one time: ``ids`` holds each once, or V in its stead; None means all."""

    slot: int
    level: int
    ids: torch.Tensor | None


class Epochs:
    """The live epochs of a (V, P) matrix, the oldest first, and their maps.

    Attributes
    ----------
    maps, offsets : Tensor
        (J, P, P) and (J, P) float64: S and c by slot.
    place : Tensor
        (V + 1,) int64: `COLD` + the slot of each row's epoch. Entry V is a stand-in.
    live : list of Epoch
        Of the first, which has no list, are the rows that no other has.
    """

    def __init__(self, place: torch.Tensor, width: int) -> None:
        self.place, self.width = place, width
        self.maps = torch.zeros(1, width, width, dtype=torch.float64, device=place.device)
        self.offsets = torch.zeros_like(self.maps[0, :1])
        self.identity = torch.eye(width, dtype=torch.float64, device=place.device)
        self.restart()

    @property
    def classes(self) -> int:
        """V."""
        return self.place.shape[0] - 1

    def restart(self) -> None:
        """One epoch: every row is up to date."""
        self.live = [Epoch(0, 0, None)]
        self.place.fill_(COLD)
        self._identity(0)

    def reserve(self, rows: int) -> None:
        """Make room for the maps of epochs of ``rows`` rows; an epoch must just have begun."""
        # An epoch that closes because it is full has at least half of its rows.
        levels = 1 + math.floor(math.log(max(2 * self.classes / rows, 1.0), RADIX))
        slots = (RADIX - 1) * levels + 2
        if slots > self.maps.shape[0]:
            more = slots - self.maps.shape[0]
            # Zeros: products with the map of an unused slot are formed and not chosen.
            self.maps = torch.cat([self.maps, self.maps.new_zeros(more, *self.maps.shape[1:])])
            self.offsets = torch.cat([self.offsets, self.offsets.new_zeros(more, self.width)])

    def bring(self, rows: torch.Tensor, slot: torch.Tensor, *, every: bool) -> torch.Tensor:
        """Rows (n, P) float64 of the epochs ``slot`` (n,), as of the start of the current one.

        ``every`` reckons with slots that are not in use yet: for a graph that is replayed later.
        """
        if not every and len(self.live) == 1:
            return rows
        if not every and counts_are_free(rows):
            out = rows.clone()
            current = self.live[-1].slot
            for epoch in self.live:
                chosen = (slot == epoch.slot).nonzero()[:, 0]
                if epoch.slot != current and chosen.numel():
                    out[chosen] = self._move(rows[chosen], epoch)
            return out
        high = self.maps.shape[0] if every else 1 + max(epoch.slot for epoch in self.live)
        parts = []
        for start in range(0, rows.shape[0], CUDA_BLOCK):
            block, own = rows[start : start + CUDA_BLOCK], slot[start : start + CUDA_BLOCK]
            products = torch.bmm(block.expand(high, *block.shape), self.maps[:high])
            chosen = products[own, torch.arange(block.shape[0], device=rows.device)]
            parts.append(chosen + self.offsets[own])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def advance(
        self, storage: torch.Tensor, mix: torch.Tensor, shift: torch.Tensor, ids: torch.Tensor
    ) -> bool:
        """Close the current epoch, whose map was (mix, shift); rows ``ids`` begin the next.

        ``storage`` (V + 1, P) already holds those rows; true if every row is up to date now.
        """
        high = 1 + max(epoch.slot for epoch in self.live)
        self.offsets[:high] = torch.addmm(shift, self.offsets[:high], mix)
        self.maps[:high] = self.maps[:high] @ mix
        taken = {epoch.slot for epoch in self.live}
        slot = next((s for s in range(self.maps.shape[0]) if s not in taken), None)
        if slot is None:  # only if epochs were larger when room was made
            self.reserve_one_more()
            slot = self.maps.shape[0] - 1
        self._identity(slot)
        self.place.index_fill_(0, ids, COLD + slot)
        current = Epoch(slot, 0, ids)
        merged: list[Epoch] = []
        while True:
            same = [e for e in self.live if e.ids is not None and e.level == current.level]
            if len(same) < RADIX - 1:
                break
            merged += same
            self.live = [e for e in self.live if e not in same]
            current.level += 1
        lists = [ids, *(self._rewrite(storage, epoch, slot) for epoch in merged)]
        current.ids = torch.cat(lists) if merged else ids
        self.live.append(current)
        listed = sum(e.ids.numel() for e in self.live if e.ids is not None)
        if listed < self.classes:
            return False
        self.sweep(storage)
        return True

    def sweep(self, storage: torch.Tensor) -> None:
        """Bring every row to the current epoch: 2VP² flops."""
        current = self.live[-1]
        for epoch in self.live[:-1]:
            if epoch.ids is not None:
                self._rewrite(storage, epoch, current.slot)
        oldest = self.live[0]
        if oldest is not current:
            for start in range(0, self.classes, BLOCK):
                part = slice(start, min(start + BLOCK, self.classes))
                stale = (self.place[part] == COLD + oldest.slot)[:, None]
                rows = self._move(storage[part].to(torch.float64), oldest).to(storage.dtype)
                storage[part] = torch.where(stale, rows, storage[part])
        self.restart()

    def reserve_one_more(self) -> None:
        """Append a slot."""
        self.maps = torch.cat([self.maps, torch.zeros_like(self.maps[:1])])
        self.offsets = torch.cat([self.offsets, torch.zeros_like(self.offsets[:1])])

    def _identity(self, slot: int) -> None:
        self.maps[slot] = self.identity
        self.offsets[slot].zero_()

    def _move(self, rows: torch.Tensor, epoch: Epoch) -> torch.Tensor:
        return torch.addmm(self.offsets[epoch.slot], rows, self.maps[epoch.slot])

    def _rewrite(self, storage: torch.Tensor, epoch: Epoch, slot: int) -> torch.Tensor:
        """Write an epoch's rows anew in the epoch of ``slot``; the rows that were still its own."""
        assert epoch.ids is not None
        kept = []
        for ids in epoch.ids.split(BLOCK):
            own = self.place[ids] == COLD + epoch.slot
            # Others were written since: the stand-in takes what would be written to them. On the
            # host they are left out, which a device could only do by telling how many there are.
            ids = ids[own] if counts_are_free(ids) else torch.where(own, ids, self.classes)
            storage[ids] = self._move(storage[ids].to(torch.float64), epoch).to(storage.dtype)
            self.place.index_fill_(0, ids, COLD + slot)
            kept.append(ids)
        return torch.cat(kept)
