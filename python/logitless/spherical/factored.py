"""W = A U + 1 ωᵀ: a tall matrix that right multiplications never visit.

Every exact update of a spherical head is a right multiplication of the whole matrix, one row vector
added to every row, and a few rows of its own (Vincent, de Brébisson, Bouthillier 2015). Keeping the
matrix in two factors moves the first two into D×D and D-sized state, so that a step touches the V×D
factor only in the rows of the batch's targets.

Products of many contractions would drive U towards singularity. Row v therefore remembers the
*epoch* in which its factor was last written; when U becomes ill-conditioned the epoch is closed:
the affine map of every live epoch absorbs U, and U starts again from the identity. A row is brought
to the current epoch when it is next written. Nothing of size V is swept until ``max_epochs`` maps
are alive, when one product re-bases all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from logitless._extras import torch

# cond₁(U) past which an epoch is closed. The factor's rows then lose at most this many units of
# round-off; measured drift is flat from 8 to 1000, and a larger limit saves epochs.
CONDITION_LIMIT = 128.0
# A step with cond₁(U K) past this, relative to the state's precision, is singular for our purpose.
SINGULAR_CONDITION = 1e12


_STATE = ("factor", "mix", "shift", "gram", "column_sum", "stamp", "maps", "offsets")


class SingularStepError(RuntimeError):
    """A step would make the factored matrix singular; the state was left untouched."""


@dataclass(frozen=True)
class RightMultiplication:
    """The matrix K = c·I + Lᵀ R, or any dense K: what a step multiplies W by from the right.

    Parameters
    ----------
    scale
        The factor c of the identity.
    left, right
        (r, P) factors of the low-rank part; absent for a pure scaling or a dense K.
    dense
        A (P, P) matrix that replaces all of the above.
    """

    scale: torch.Tensor | float = 1.0
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    dense: torch.Tensor | None = None

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (n, P) times K."""
        if self.dense is not None:
            return rows @ self.dense
        out = rows * self.scale
        if self.left is not None and self.right is not None:
            out = torch.addmm(out, rows @ self.left.T, self.right)
        return out

    def congruence(self, gram: torch.Tensor) -> torch.Tensor:
        """Kᵀ Q K for a symmetric Q, in O(r P²) when K is low-rank; exactly symmetric."""
        if self.dense is not None:
            out = self.dense.T @ gram @ self.dense
            return 0.5 * (out + out.T)
        out = gram * (self.scale * self.scale)
        if self.left is not None and self.right is not None:
            product = self.left @ gram
            half = product * self.scale + 0.5 * ((product @ self.left.T) @ self.right)
            update = self.right.T @ half
            out = out + update + update.T
        return out


def condition(lu: torch.Tensor, pivots: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Hager's estimate of cond₁(matrix) from its LU factors: a few triangular solves, no inverse.

    Source: W. W. Hager, "Condition estimates", SIAM J. Sci. Stat. Comput. 5 (1984); never above the
    true value, nearly always within a factor of 3 of it.
    """
    size = matrix.shape[0]
    x = torch.full((size, 1), 1.0 / size, dtype=matrix.dtype, device=matrix.device)
    best = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    for _ in range(4):
        y = torch.linalg.lu_solve(lu, pivots, x)
        best = torch.maximum(best, y.abs().sum().nan_to_num(nan=torch.inf))
        gradient = torch.linalg.lu_solve(lu, pivots, y.sign(), adjoint=True)
        x = torch.nn.functional.one_hot(gradient.abs().argmax(), size).to(x.dtype)[:, None]
    return best * matrix.abs().sum(0).max()


class FactoredMatrix:
    """A (V, P) matrix in factored form, with its Gram matrix and column sums kept up to date.

    Attributes
    ----------
    factor : Tensor
        A, (V, P), the only large array; fp32 by default.
    mix, shift : Tensor
        U (P, P) and ω (P,), float64.
    gram, column_sum : Tensor
        Q = WᵀW (P, P) and w̄ = Wᵀ1 (P,), float64.
    stamp : Tensor
        (V,) int32: the index into ``maps`` of the epoch in which each row's factor was written.
    maps, offsets : Tensor
        (J, P, P) and (J, P): the affine map from the start of each live epoch to the start of the
        current one, which is the last and the identity.
    """

    def __init__(self, weight: torch.Tensor, *, max_epochs: int = 32) -> None:
        self.max_epochs, self.rebases = max_epochs, 0
        self.load(weight)

    def load(self, weight: torch.Tensor) -> None:
        """Start over from a dense (V, P) matrix, which is kept: A = W, U = I, one epoch."""
        device = weight.device
        self.factor = weight.detach().contiguous()
        self.mix = torch.eye(weight.shape[1], dtype=torch.float64, device=device)
        self.shift = torch.zeros_like(self.mix[0])
        self.stamp = torch.zeros(weight.shape[0], dtype=torch.int32, device=device)
        self.maps, self.offsets = self.mix[None].clone(), self.shift[None].clone()
        self.gram, self.column_sum = gram_and_sum(self.factor)

    @property
    def epochs(self) -> int:
        """Number of live epochs."""
        return len(self.maps)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """W[ids] in float64: (n,) ids to (n, P)."""
        return self._current(ids) @ self.mix + self.shift

    def dense(self) -> torch.Tensor:
        """The whole (V, P) matrix in the factor's dtype, block by block."""
        out = torch.empty_like(self.factor)
        for start in range(0, out.shape[0], 1 << 14):
            ids = torch.arange(start, min(start + (1 << 14), out.shape[0]), device=out.device)
            out[ids] = self.rows(ids).to(out.dtype)
        return out

    def step(
        self,
        multiply: RightMultiplication,
        add: torch.Tensor | None,
        ids: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """W ← W K + 1 addᵀ, then W[ids] += rows.

        Parameters
        ----------
        multiply
            K.
        add
            (P,) float64, added to every row; or None.
        ids
            (n,) int64, distinct.
        rows
            (n, P) float64.

        Raises
        ------
        SingularStepError
            If K is singular to working precision. Nothing was changed.
        """
        mix = multiply.apply(self.mix)
        lu, pivots, info = torch.linalg.lu_factor_ex(mix)
        estimate = condition(lu, pivots, mix)
        if int(info) != 0 or not float(estimate) < SINGULAR_CONDITION:
            raise SingularStepError(
                f"the step multiplies the weight by a singular matrix (condition estimate "
                f"{float(estimate):.1e}, limit {SINGULAR_CONDITION:.0e}): an eigenvalue of "
                "learning rate × input Gram matrix is at 1; lower the learning rate or set "
                "clip_norm. The weight was left as it was."
            )
        before = self.rows(ids)
        current = self._current(ids)
        vocabulary = self.factor.shape[0]
        moved = multiply.apply(before)
        gram = multiply.congruence(self.gram)
        column_sum = multiply.apply(self.column_sum[None])[0]
        self.shift = multiply.apply(self.shift[None])[0]
        if add is not None:
            cross = torch.outer(column_sum, add)
            gram = gram + cross + cross.T + vocabulary * torch.outer(add, add)
            column_sum = column_sum + vocabulary * add
            self.shift = self.shift + add
            moved = moved + add
        cross = moved.T @ rows
        self.gram = gram + cross + cross.T + rows.T @ rows
        self.column_sum = column_sum + rows.sum(0)
        self.mix = mix
        delta = torch.linalg.lu_solve(lu, pivots, rows, left=False)
        self.factor[ids] = (current + delta).to(self.factor.dtype)
        self.stamp[ids] = self.epochs - 1
        if float(estimate) > CONDITION_LIMIT:
            self._close_epoch()

    def condition(self) -> float:
        """Estimate of cond₁(U): bounded by the limit at which an epoch is closed."""
        lu, pivots, _ = torch.linalg.lu_factor_ex(self.mix)
        return float(condition(lu, pivots, self.mix))

    def consolidate(self) -> None:
        """Fold the live epochs into the factor: one map serves all rows; 2VP² flops."""
        if self.epochs > 1:
            self._rebase()

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of everything, by name."""
        return {name: getattr(self, name).clone() for name in _STATE}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        for name in _STATE:
            setattr(self, name, state[name])

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move and cast as a module is moved; the D-sized state stays float64."""
        factor = fn(self.factor)
        if factor.dtype in (torch.float32, torch.float64):
            self.factor = factor
        else:  # half types would lose the sparse updates
            self.factor = self.factor.to(factor.device)
        for name in _STATE[1:]:
            setattr(self, name, getattr(self, name).to(factor.device))

    def _current(self, ids: torch.Tensor) -> torch.Tensor:
        """The factor's rows as if they had been written in the current epoch, float64."""
        stored = self.factor[ids].to(torch.float64)
        if self.epochs == 1:
            return stored
        stamp = self.stamp[ids].long()
        out = stored.clone()
        for epoch in stamp.unique().tolist():
            if epoch != self.epochs - 1:
                chosen = (stamp == epoch).nonzero()[:, 0]
                out[chosen] = stored[chosen] @ self.maps[epoch] + self.offsets[epoch]
        return out

    def _close_epoch(self) -> None:
        """Let every live map absorb U and ω, and open a new epoch; re-base when too many live."""
        if self.epochs >= self.max_epochs:
            self._rebase()
            return
        identity = torch.eye(self.mix.shape[0], dtype=self.mix.dtype, device=self.mix.device)
        nothing = torch.zeros_like(self.shift)
        self.offsets = torch.cat([self.offsets @ self.mix + self.shift, nothing[None]])
        self.maps = torch.cat([self.maps @ self.mix, identity[None]])
        self.mix, self.shift = identity.clone(), nothing.clone()

    def _rebase(self) -> None:
        """A ← W, U ← I, ω ← 0, one epoch: the only sweep over all classes."""
        self.load(self.dense())
        self.rebases += 1


def gram_and_sum(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """WᵀW (D, D) and Wᵀ1 (D,) in float64, widening 16384 rows at a time."""
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    total = torch.zeros_like(gram[0])
    for start in range(0, weight.shape[0], 1 << 14):
        rows = weight.detach()[start : start + (1 << 14)].to(torch.float64)
        gram.addmm_(rows.T, rows)
        total += rows.sum(0)
    return gram, total
