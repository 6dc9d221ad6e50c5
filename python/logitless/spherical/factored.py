"""W = A U + 1 ωᵀ and a few rows of its own: a tall matrix that right multiplications never visit.

Every exact update of a spherical head is a right multiplication of the whole matrix, one row vector
added to every row, and a few rows of its own (Vincent, de Brébisson, Bouthillier 2015). Keeping the
matrix in two factors moves the first two into P×P and P-sized state.

The published form writes the rows into A, for which it must multiply them by U⁻¹: it fails where
a step is singular, and drifts where U becomes ill-conditioned. Here rows that were a target in the
current epoch are *hot*: kept as they are and updated with U, ω and w̄, as rows of one array. After
some steps the epoch closes: hot rows are written to A as they stand, the map (U, ω) is composed
into those of earlier epochs (see `epochs`), and U starts again from the identity. Nothing is
inverted, any step is exact, and no decision needs a number from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from logitless._extras import torch
from logitless.spherical.epochs import BLOCK, COLD, Epoch, Epochs, counts_are_free

# Hot rows are bounded in number so that updating them costs about what closing an epoch does, but
# an epoch holds at least this many steps where that takes few rows: closing is many small kernels.
STEPS = 8
FEW_ROWS = 4096


class FactoredMatrix:
    """A (V, P) matrix in factored form, with its Gram matrix and column sums kept up to date.

    Parameters
    ----------
    storage
        (V + 1, P): the matrix and a last row that stands in where nothing is to be written. Kept.
    compile
        Whether the device's work goes through torch.compile.

    Attributes
    ----------
    stack : Tensor
        (P + 3 + C, P) float64, the rows that every step rewrites: U, ω, w̄ = Wᵀ1, a hot row that
        stands in for nothing, and C hot rows.
    hot_ids : Tensor
        (C + 1,) int64: the classes of the hot rows; V where there is none.
    place : Tensor
        (V + 1,) int64: the number of a class's hot row, or `COLD` + the slot of its epoch.
    cursor : Tensor
        0-d int64: the next free hot row.
    gram : Tensor
        Q = WᵀW, (P, P) float64.
    """

    def __init__(self, storage: torch.Tensor, *, compile: bool = False) -> None:
        self.storage, self.compile = storage, compile
        classes, width = storage.shape[0] - 1, storage.shape[1]
        device = storage.device
        self.place = torch.empty(classes + 1, dtype=torch.int64, device=device)
        self.epochs = Epochs(self.place, width)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        # Constants on the device: a Python number would be one more kernel wherever it is used.
        self.zero = self.gram.new_zeros(())
        self.nan = self.gram.new_full((), torch.nan)
        self.nothing = torch.full_like(self.cursor, 2 * COLD - 1)
        self.stand_in = torch.full_like(self.cursor, classes)
        # Rows that one replay of the captured graphs takes; whether a graph holds our buffers.
        self.sweeps, self.captured, self.pinned = 0, 0, False
        self.filled: int = 0  # hot rows taken, as far as the host was told
        # Counts what changes W, so that a backward can tell that its forward is out of date.
        self.version = 0
        self._allocate(0)
        self.refresh()

    @property
    def classes(self) -> int:
        """V."""
        return self.storage.shape[0] - 1

    @property
    def width(self) -> int:
        """P."""
        return self.storage.shape[1]

    @property
    def factor(self) -> torch.Tensor:
        """A, (V, P)."""
        return self.storage[:-1]

    @property
    def mix(self) -> torch.Tensor:
        """U, (P, P)."""
        return self.stack[: self.width]

    @property
    def shift(self) -> torch.Tensor:
        """The vector ω, (P,)."""
        return self.stack[self.width]

    @property
    def column_sum(self) -> torch.Tensor:
        """The vector w̄, (P,)."""
        return self.stack[self.width + 1]

    @property
    def hot(self) -> torch.Tensor:
        """Hot rows, (C + 1, P); the first stands in for nothing."""
        return self.stack[self.width + 2 :]

    @property
    def capacity(self) -> int:
        """C."""
        return len(self.hot_ids) - 1

    # ------------------------------------------------------------------ reading

    def rows(self, ids: torch.Tensor, *, every: bool = False) -> torch.Tensor:
        """W[ids] in float64: (n,) int64 ids, V for none, to (n, P).

        ``every`` as in `Epochs.bring`.
        """
        place = self.place[ids]
        hot = place < COLD
        stored = self.storage[ids].to(torch.float64)
        epoch = (place - COLD).clamp_(min=0)
        cold = torch.addmm(self.shift, self.epochs.bring(stored, epoch, every=every), self.mix)
        return torch.where(hot[:, None], self.hot[place * hot], cold)

    def dense(self) -> torch.Tensor:
        """The whole (V, P) matrix in the factor's dtype, block by block."""
        out = torch.empty_like(self.factor)
        for start in range(0, out.shape[0], BLOCK):
            ids = torch.arange(start, min(start + BLOCK, out.shape[0]), device=out.device)
            out[ids] = self.rows(ids).to(out.dtype)
        return out

    # ------------------------------------------------------------------ writing

    def reserve(self, count: int) -> None:
        """Make room for a step with ``count`` targets; what the host knows decides."""
        if capturing(self.stack):
            self.captured += count
            self.pinned = True
            if self.filled + self.captured > self.capacity:
                raise RuntimeError(
                    f"SphericalHead.step in a CUDA graph: room for {self.capacity} target rows, "
                    f"of which {self.filled} are taken and the graph needs {self.captured}; take "
                    "one step of this batch size before the capture, and capture fewer steps"
                )
            return
        if self.filled + count > self.capacity:
            self.close()
        if count > self.capacity:
            if self.pinned:
                raise RuntimeError(
                    f"SphericalHead.step: {count} target rows, but a captured graph holds the "
                    f"buffers for {self.capacity}; take a step of the largest batch first"
                )
            self._allocate(self._suitable(count))

    def claim(self, ids: torch.Tensor, rows: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
        """Make classes hot: (m,) ids, V for none, and their rows W[ids]; their hot rows' numbers.

        Nothing happens unless ``ok`` (0-d bool). Of equal ids the first decides.
        """
        count = ids.shape[0]
        number = self.cursor + self.numbers[:count]
        wanted = torch.where(ok & (ids < self.classes), number, self.nothing)
        # Hot rows have lower numbers and stay; a minimum of integers is the same in any order.
        self.place.scatter_reduce_(0, ids, wanted, "amin")
        found = self.place[ids]
        new = found == wanted
        self.hot[found * new] = rows
        self.hot_ids[found * new] = torch.where(new, ids, self.stand_in)
        self.cursor.add_(ok, alpha=count)
        return found * (found < COLD)

    def room(self, count: int) -> torch.Tensor:
        """Whether the device has as many hot rows left (0-d bool); replays may use them up."""
        return self.cursor + (count - 1) <= self.capacity

    def fixed(self) -> bool:
        """Whether work must be of fixed sizes: recorded into a graph, or compiled."""
        recording = capturing(self.stack)
        self.pinned |= recording
        return self.compile or recording

    def height(self, count: int) -> int:
        """How many rows of ``stack`` a step with ``count`` targets must update."""
        if self.captured or self.fixed():
            return self.width + 3 + self.capacity
        return self.width + 3 + self.filled + count

    def taken(self, count: int) -> None:
        """Tell that a step with ``count`` targets was taken; close the epoch if it is full."""
        self.version += 1
        if not capturing(self.stack):
            self.filled += count
            if self.filled + max(count, self.captured) > self.capacity:
                self.close()

    def close(self) -> None:
        """Write the hot rows to A and begin an epoch."""
        if self.filled == 0 and not self.captured:
            return
        count = self.capacity + 1 if self.captured else self.filled + 1
        ids = self.hot_ids[:count].clone()
        if counts_are_free(ids):
            ids = ids[ids < self.classes]
        self.storage[self.hot_ids[:count]] = self.hot[:count].to(self.storage.dtype)
        swept = self.epochs.advance(self.storage, self.mix, self.shift, ids)
        self._begin()
        if swept:
            self.refresh()
            self.sweeps += 1

    def consolidate(self) -> None:
        """Bring every row up to date, so that A is the matrix itself; 2VP² flops."""
        self.close()
        if len(self.epochs.live) > 1:
            self.epochs.sweep(self.storage)
            self.refresh()
            self.sweeps += 1

    def replayed(self, times: int) -> None:
        """Tell that the captured steps were taken ``times`` times."""
        self.filled += times * self.captured
        self.version += 1
        if self.filled + self.captured > self.capacity:
            self.close()

    def restart(self) -> None:
        """Start over from what A holds now."""
        self.version += 1
        self.epochs.restart()
        self._begin()
        self.refresh()

    def refresh(self) -> None:
        """Compute Q and w̄ from A, which must be the matrix itself."""
        self.gram.zero_()
        self.column_sum.zero_()
        for start in range(0, self.classes, BLOCK):
            rows = self.factor[start : start + BLOCK].to(torch.float64)
            self.gram.addmm_(rows.T, rows)
            self.column_sum.add_(rows.sum(0))

    # ------------------------------------------------------------------ keeping

    def state(self) -> dict[str, Any]:
        """Copies of everything, by name."""
        tensors = {name: getattr(self, name).clone() for name in _STATE}
        epochs = self.epochs
        return {
            **tensors,
            "maps": epochs.maps.clone(),
            "offsets": epochs.offsets.clone(),
            "epochs": [
                (e.slot, e.level, None if e.ids is None else e.ids.clone()) for e in epochs.live
            ],
            "filled": self.filled,
            "sweeps": self.sweeps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; in place where the sizes agree."""
        device = self.storage.device

        def put(owner: Any, name: str) -> None:
            old, new = getattr(owner, name), state[name]
            if old.shape == new.shape and old.dtype == new.dtype:
                old.copy_(new)
            else:
                setattr(owner, name, new.to(device).clone())

        for name in _STATE:
            put(self, name)
        put(self.epochs, "maps")
        put(self.epochs, "offsets")
        self.epochs.place = self.place
        self.epochs.live = [
            Epoch(slot, level, None if ids is None else ids.to(device).clone())
            for slot, level, ids in state["epochs"]
        ]
        self.filled, self.sweeps = state["filled"], state["sweeps"]
        self.version += 1
        if len(self.numbers) != len(self.hot_ids):
            self._constants()

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move and cast as a module is moved; the P-sized state stays float64."""
        storage = fn(self.storage)
        if storage.dtype in (torch.float32, torch.float64):
            self.storage = storage
        else:  # half types would lose the sparse updates
            self.storage = self.storage.to(storage.device)
        device = storage.device
        for name in (*_STATE[1:], "affine", "numbers", "zero", "nan", "nothing", "stand_in"):
            setattr(self, name, getattr(self, name).to(device))
        self.epochs.place = self.place
        for name in ("maps", "offsets", "identity"):
            setattr(self.epochs, name, getattr(self.epochs, name).to(device))
        for epoch in self.epochs.live:
            epoch.ids = None if epoch.ids is None else epoch.ids.to(device)

    # ------------------------------------------------------------------ inside

    def _suitable(self, count: int) -> int:
        """Hot rows for steps of ``count`` targets: see `STEPS`.

        m steps cost m² count / 2 row updates of 4·count·P flops or 2P², and closing their epoch
        about eight products of P×P matrices.
        """
        p = self.width
        steps = round(math.sqrt(16 * p * p / (count * min(2 * count, p))))
        rows = count * max(1, min(64, steps))
        return max(rows, min(STEPS * count, FEW_ROWS))

    def _allocate(self, rows: int) -> None:
        """Replace the stack by one with ``rows`` hot rows; an epoch must just have begun."""
        device = self.storage.device
        size = (self.width + 3 + rows, self.width)
        column_sum = self.column_sum.clone() if hasattr(self, "stack") else None
        self.stack = torch.zeros(size, dtype=torch.float64, device=device)
        if column_sum is not None:
            self.column_sum.copy_(column_sum)
        self.hot_ids = torch.empty(rows + 1, dtype=torch.int64, device=device)
        self._constants()
        self._begin()
        if rows:
            self.epochs.reserve(rows)

    def _constants(self) -> None:
        """What goes with the size of the stack."""
        device = self.storage.device
        self.numbers = torch.arange(self.capacity + 1, device=device)
        # How many times each row of the stack takes what is added to every row of W.
        self.affine = torch.ones(self.stack.shape[0], dtype=torch.float64, device=device)
        self.affine[: self.width] = 0.0
        self.affine[self.width + 1] = self.classes

    def _begin(self) -> None:
        self.mix.copy_(self.epochs.identity)
        self.shift.zero_()
        self.hot.zero_()
        self.hot_ids.fill_(self.classes)
        self.cursor.fill_(1)
        self.filled = 0


_STATE = ("storage", "place", "stack", "hot_ids", "cursor", "gram")


def capturing(tensor: torch.Tensor) -> bool:
    """Whether work on the tensor's device is being recorded into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
