"""Steps that the device refused, told to the host without waiting for it."""

from __future__ import annotations

from typing import Any

from logitless._extras import torch

_NOT_FINITE = (
    "SphericalHead.step: the recorded gradient is not finite; the weight was left as it was and "
    "the rows were dropped. A row of equal logits (V = 1, or a zero weight) makes the Z-loss "
    "undefined"
)
_NO_ROOM = (
    "SphericalHead.step in a CUDA graph: no room for the target rows of a replay; the weight was "
    "left as it was and the rows were dropped. Call head.replayed() after every replay"
)


class Refusals:
    """Counts of refused steps, by reason; the host's copy may be some steps behind on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.seen = self.counts
        if self.counts.is_cuda:
            self.seen = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self.told = [0, 0]

    def add(self, passed: torch.Tensor) -> None:
        """Count a step: (2,) bool, finite and room for it. On the host, raise at once."""
        self.counts += ~passed
        if self.counts.is_cuda:
            self.seen.copy_(self.counts, non_blocking=True)
        else:
            self.check()

    def check(self, *, wait: bool = False) -> None:
        """Raise for refusals that were not raised for yet; ``wait`` for the device to be sure."""
        if wait and self.counts.is_cuda:
            self.seen.copy_(self.counts)
        counts = self.seen.tolist()
        new = [now > before for now, before in zip(counts, self.told, strict=True)]
        self.told = counts
        if new[0]:
            raise FloatingPointError(_NOT_FINITE)
        if new[1]:
            raise RuntimeError(_NO_ROOM)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing to keep but where to count."""
        return {"device": self.counts.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Count from zero."""
        self.__init__(state["device"])  # type: ignore[misc]
