"""The spherical family: losses of Σz, Σz² and the target logits alone, in O(D²) a row.

Every loss takes ``route="auto" | "stream" | "gram"``: tiles over the classes, or the weight's Gram
matrix (see `logitless.spherical`). The routes agree to rounding; ``return_statistics=True`` returns
statistics whose ``route`` names the one that ran. With K ids a row, ``target_weight`` (signed, 1 if
absent) weighs the ids.

Sources: Vincent, de Brébisson, Bouthillier, "Efficient exact gradient update for training deep
networks with very large sparse targets" (2015); de Brébisson, Vincent, "An exploration of softmax
alternatives belonging to the spherical loss family" (2016) and "The Z-loss: a shift and scale
invariant classification loss belonging to the spherical family" (2016); Hui, Belkin, Wright,
"Cut your losses with squentropy" (2023).
"""

from __future__ import annotations

from logitless._extras import torch
from logitless.losses._base import row_loss
from logitless.ops.row_statistics import RowStatistics
from logitless.spherical.route import spherical_statistics

__all__ = ["spherical_softmax", "squared_error", "squentropy", "taylor_softmax", "zloss"]

Tensor = torch.Tensor


def _per_target(s: RowStatistics, loss: Tensor) -> Tensor:
    """Weigh the losses of the K ids of a row and add them; (...) unchanged for one id a row."""
    if not s.several:
        return loss
    return (torch.where(s.real, loss, 0.0) * s.weights).sum(-1)


def _column(s: RowStatistics, value: Tensor) -> Tensor:
    return value.unsqueeze(-1) if s.several else value


@row_loss(want=("variance", "target"), compute=spherical_statistics)
def zloss(s: RowStatistics, *, a: float = 1.0, b: float = 0.0, epsilon: float = 1e-12) -> Tensor:
    """Z-loss  softplus(a (b − ζ_y)) / a,  ζ the logits standardised over the classes.

    ζ_y = (z_y − mean) / (σ + epsilon). Invariant to shift and scale of the logits; ζ_y is at most
    √(V − 1), so choose b on that scale. Undefined where all logits of a row are equal (σ = 0: for
    V = 1 or a zero weight): the gradient is nan there. Not the λ·lse² regulariser, which other
    libraries also call z-loss.
    """
    sigma = torch.sqrt(s.variance) + epsilon
    zeta = (s.target - _column(s, s.mean)) / _column(s, sigma)
    # Linear above the threshold, where it differs by less than an ulp of float64.
    return _per_target(s, torch.nn.functional.softplus(b - zeta, beta=a, threshold=40))


@row_loss(want=("sum_sq", "target"), compute=spherical_statistics)
def spherical_softmax(s: RowStatistics, *, epsilon: float = 1e-6) -> Tensor:
    """Log of the spherical softmax  −log((z_y² + ε) / Σ(z² + ε)); even in z, so signs are lost."""
    total = torch.log(s.sum_sq + s.classes * epsilon)
    return _per_target(s, _column(s, total) - torch.log(s.target.square() + epsilon))


@row_loss(want=("sum", "sum_sq", "target"), compute=spherical_statistics)
def taylor_softmax(s: RowStatistics) -> Tensor:
    """Log of the Taylor softmax  −log((1 + z_y + z_y²/2) / Σ(1 + z + z²/2)); terms are ≥ 1/2."""
    total = torch.log(s.classes + s.sum + 0.5 * s.sum_sq)
    own = torch.log1p(s.target + 0.5 * s.target.square())
    return _per_target(s, _column(s, total) - own)


@row_loss(want=("sum_sq", "target"), compute=spherical_statistics)
def squared_error(s: RowStatistics, *, average: bool = False) -> Tensor:
    """Squared error to the one-hot target  Σ_j (z_j − t_j)²,  t = 1 (or the weight) at the target.

    Ids that repeat in a row add their weights. ``average`` divides by V. Squares are expanded:
    Σz² − 2 Σ t z + Σ t², which loses the digits of an error far below Σz².
    """
    if s.several:
        weight = torch.where(s.real, s.weights, 0.0)
        own = (weight * s.target).sum(-1)
        same = s.target_ids.unsqueeze(-1) == s.target_ids.unsqueeze(-2)
        square = torch.einsum("...k,...l,...kl->...", weight, weight, same.to(weight.dtype))
        loss = s.sum_sq - 2 * own + square
    else:
        loss = s.sum_sq - 2 * s.target + 1
    return loss / s.classes if average else loss


@row_loss(want=("rest", "target", "sum_sq"), compute=spherical_statistics)
def squentropy(s: RowStatistics) -> Tensor:
    """Squentropy  −log p_y + Σ_{j≠y} z_j² / (V − 1)  (Hui, Belkin, Wright 2023).

    With the Gram route the square part costs O(D²) a row and the cross entropy is streamed. V = 1
    has no other class: the square part is 0. With K ids a row, the weighted sum over them.
    """
    if s.classes == 1:
        return _per_target(s, -s.log_prob)
    square = (_column(s, s.sum_sq) - s.target.square()) / (s.classes - 1)
    return _per_target(s, square - s.log_prob)
