"""Exact optimiser steps of a spherical head, in O(D²) a row.

The gradient of any loss of the spherical family is ∇W = W X + 1 xᵀ + S: a right multiplication by
a D×D matrix, one row added to every row, and rows of their own for the batch's targets. A step is
exact in the factored form when it only multiplies such a matrix from the right, scales it or adds
to it. SGD, decoupled weight decay, clipping by the global norm, the trust ratio, heavy-ball
momentum and Muon with the exact polar factor all do. Adam, Adagrad, RMSprop and sign methods do
not: they square or take the sign of single elements, which no right multiplication can.
"""

from __future__ import annotations

from dataclasses import dataclass

from logitless._extras import torch
from logitless.spherical.factored import FactoredMatrix, RightMultiplication

# Eigenvalues of ∇Wᵀ∇W below this share of the largest are round-off of a rank-deficient gradient
# (its rank is at most the number of rows of the batch); Muon gives those directions no step.
POLAR_CUTOFF = 1e-13


@dataclass(frozen=True)
class Gradient:
    """∇W = W X + 1 xᵀ + S of one step, from the rows of all its backward passes.

    Attributes
    ----------
    features : Tensor
        E, (n, D) float64.
    square : Tensor
        γ, (n,): ∂loss/∂Σz². X = 2 Eᵀ diag(γ) E.
    linear : Tensor
        ς, (n,): ∂loss/∂Σz. x = Eᵀ ς.
    ids : Tensor
        (m,) distinct classes that are somebody's target.
    rows : Tensor
        S[ids], (m, D) float64.
    """

    features: torch.Tensor
    square: torch.Tensor
    linear: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def collect(
        cls,
        features: torch.Tensor,
        square: torch.Tensor,
        linear: torch.Tensor,
        ids: torch.Tensor,
        target: torch.Tensor,
    ) -> Gradient:
        """Sum the target columns' cotangents ``target`` (n, K) by class; ids < 0 are padding."""
        n, k = ids.shape
        valid = ids >= 0
        distinct, place = ids[valid].unique(return_inverse=True)
        source = torch.arange(n, device=ids.device)[:, None].expand(n, k)[valid]
        rows = features.new_zeros(distinct.shape[0], features.shape[1])
        rows.index_add_(0, place, features[source] * target[valid][:, None])
        return cls(features, square, linear, distinct, rows)

    def multiplier(self) -> torch.Tensor:
        """X (D, D)."""
        return (self.features * (2 * self.square)[:, None]).T @ self.features

    def addend(self) -> torch.Tensor:
        """The vector x (D,)."""
        return self.linear @ self.features


@dataclass
class Settings:
    """What a step does with the gradient; every number but the last may change between steps.

    ``velocity_scale`` is the constant s in the factored pair [W, sB]. With s = the first lr the two
    halves are of one size, and U stays well-conditioned for tens of steps, not one.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    trust_ratio: float | None = None
    muon: bool = False
    velocity_scale: float = 1.0


def apply_step(matrix: FactoredMatrix, gradient: Gradient, settings: Settings) -> None:
    """One optimiser step on the factored weight.

    Without momentum ``matrix`` holds W (P = D), with momentum [W, sB] side by side (P = 2D), B the
    velocity: B ← μB + ∇W, then W ← (1 − lr·λ) W − lr·B. Muon replaces the last B by its polar
    factor B (BᵀB)^(−½); the trust ratio replaces lr by lr·ratio·‖W‖/(‖∇W‖ + λ‖W‖).

    Raises
    ------
    SingularStepError
        If the step would make the weight's factor singular; nothing was changed.
    """
    features = gradient.features.shape[1]
    heavy_ball = matrix.gram.shape[0] == 2 * features
    scale = _clip_and_trust(matrix, gradient, settings)
    lr = settings.lr * scale.trust
    keep = 1.0 - lr * settings.weight_decay
    if not heavy_ball and not settings.muon:
        _plain_step(matrix, gradient, lr * scale.clip, keep)
        return
    x = gradient.multiplier() * scale.clip
    add = gradient.addend() * scale.clip
    rows = gradient.rows * scale.clip
    identity = torch.eye(features, dtype=x.dtype, device=x.device)
    # The new velocity is a right multiplication too: B = [W, sB] · first + 1 addᵀ + rows.
    scale_b = settings.velocity_scale
    first = torch.cat([x, settings.momentum / scale_b * identity]) if heavy_ball else x
    polar = identity
    if settings.muon:
        polar = _inverse_root(_gram_of(matrix, first, add, gradient.ids, rows))
    weight = -lr * (first @ polar)
    weight[:features] += keep * identity
    if heavy_ball:
        dense = torch.cat([weight, scale_b * first], 1)
        add = torch.cat([-lr * (add @ polar), scale_b * add])
        rows = torch.cat([-lr * (rows @ polar), scale_b * rows], 1)
    else:
        dense, add, rows = weight, -lr * (add @ polar), -lr * (rows @ polar)
    matrix.step(RightMultiplication(dense=dense), add, gradient.ids, rows)


@dataclass(frozen=True)
class _Scale:
    clip: torch.Tensor | float
    trust: torch.Tensor | float


def _plain_step(
    matrix: FactoredMatrix, gradient: Gradient, lr: torch.Tensor | float, keep: torch.Tensor | float
) -> None:
    """SGD: K = keep·I − lr·X, low-rank when the batch has fewer rows than features."""
    e, weights = gradient.features, (-2 * lr) * gradient.square
    if e.shape[0] < e.shape[1]:
        multiply = RightMultiplication(keep, e, e * weights[:, None])
    else:
        dense = (e * weights[:, None]).T @ e
        dense.diagonal().add_(keep)
        multiply = RightMultiplication(dense=dense)
    matrix.step(multiply, -lr * gradient.addend(), gradient.ids, -lr * gradient.rows)


def _clip_and_trust(matrix: FactoredMatrix, gradient: Gradient, settings: Settings) -> _Scale:
    """Factors of the global-norm clip and of the trust ratio; ‖∇W‖ is only computed when used."""
    if settings.clip_norm is None and settings.trust_ratio is None:
        return _Scale(1.0, 1.0)
    norm = gradient_norm(matrix, gradient)
    clip: torch.Tensor | float = 1.0
    trust: torch.Tensor | float = 1.0
    if settings.clip_norm is not None:
        clip = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils clips
    if settings.trust_ratio is not None:
        features = gradient.features.shape[1]
        weight = matrix.gram.diagonal()[:features].sum().clamp(min=0).sqrt()
        ratio = settings.trust_ratio * weight / (norm * clip + settings.weight_decay * weight)
        trust = torch.where((weight > 0) & (norm > 0), ratio, torch.ones_like(ratio))
    return _Scale(clip, trust)


def gradient_norm(matrix: FactoredMatrix, gradient: Gradient) -> torch.Tensor:
    """‖∇W‖_F (0-d float64) without visiting the classes."""
    d = gradient.features.shape[1]
    x, add, rows = gradient.multiplier(), gradient.addend(), gradient.rows
    weight = matrix.rows(gradient.ids)[:, :d]
    square = ((x @ matrix.gram[:d, :d]) * x).sum() + matrix.factor.shape[0] * (add @ add)
    square = square + (rows * rows).sum() + 2 * (add @ (x @ matrix.column_sum[:d]))
    square = square + 2 * ((weight @ x) * rows).sum() + 2 * (add @ rows.sum(0))
    return square.clamp(min=0).sqrt()


def _gram_of(
    matrix: FactoredMatrix,
    multiply: torch.Tensor,
    add: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """GᵀG (D, D) of G = M·multiply + 1 addᵀ + rows, where M is the factored matrix."""
    gram = multiply.T @ matrix.gram @ multiply + matrix.factor.shape[0] * torch.outer(add, add)
    cross = torch.outer(multiply.T @ matrix.column_sum + rows.sum(0), add)
    cross = cross + (matrix.rows(ids) @ multiply).T @ rows
    gram = gram + cross + cross.T + rows.T @ rows
    return 0.5 * (gram + gram.T)


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """(GᵀG)^(−½) on the range of G, zero off it."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > POLAR_CUTOFF * values[-1]
    root = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    inverse: torch.Tensor = (vectors * root) @ vectors.T
    return inverse
