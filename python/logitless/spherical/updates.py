"""Exact optimiser steps of a spherical head, in O(D²) a row.

The gradient of any loss of the spherical family is ∇W = dzᵀE = W X + 1 xᵀ + S: a right
multiplication by a D×D matrix, one row added to every row, and rows of their own for the batch's
targets. A step is exact in the factored form when it only multiplies such a matrix from the right,
scales it or adds to it. SGD, decoupled weight decay, clipping by the global norm, the trust ratio,
heavy-ball momentum and Muon with the exact polar factor all do. Adam, Adagrad, RMSprop and sign
methods do not: they square or take the sign of single elements, which no right multiplication can.

A step first computes the gradient's rows for U, ω, w̄ and the hot rows alike (they transform as W's
rows do), then applies the optimiser to them row by row, as a dense one would, and to the Gram
matrix. Everything is tensor operations of fixed sizes: the host reads nothing, so that a step can
be part of a CUDA graph. (Muon's eigenvectors are the exception: torch waits for them.)
"""

from __future__ import annotations

from dataclasses import dataclass

from logitless._extras import torch
from logitless.spherical.factored import FactoredMatrix
from logitless.spherical.records import Record, run

# Eigenvalues of ∇Wᵀ∇W below this share of the largest are round-off of a rank-deficient gradient
# (its rank is at most the number of rows of the batch); Muon gives those directions no step.
POLAR_CUTOFF = 1e-13


@dataclass
class Settings:
    """What a step does with the gradient.

    ``lr`` is a 0-d float64 tensor on the matrix' device, so that a captured graph sees it change.
    ``velocity_scale`` is the constant s in the factored pair [W, sB]: with s = the first lr the two
    halves are of one size.
    """

    lr: torch.Tensor
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    trust_ratio: float | None = None
    muon: bool = False
    velocity_scale: float = 1.0


@torch.no_grad()
def apply_step(matrix: FactoredMatrix, record: Record, settings: Settings) -> torch.Tensor:
    """Take one step on ``matrix``: W of width D, or the pair [W, sB].

    Returns
    -------
    Tensor
        (2,) bool: whether the record is finite, and whether there was room for its rows. Otherwise
        the step is refused: the state is as it was, bit by bit.
    """
    count = record.ids.numel()
    matrix.reserve(count)
    passed: torch.Tensor = run(_step, matrix.compile)(
        matrix, record, settings, matrix.height(count)
    )
    matrix.taken(count)
    return passed


def _step(matrix: FactoredMatrix, record: Record, settings: Settings, height: int) -> torch.Tensor:
    """All of a step that the device does, on ``height`` rows of the stack."""
    passed = torch.stack([record.finite(), matrix.room(record.ids.numel())])
    ok = passed.all()
    record = record.where(ok, matrix.zero)
    numbers = matrix.claim(record.ids.flatten(), record.rows.flatten(0, 1), ok)
    gradient = _gradient(matrix, record, numbers.view_as(record.ids), height)
    _optimise(matrix, record, gradient, settings, ok)
    return passed


@dataclass(frozen=True)
class _Gradient:
    """∇W in the parts that a step needs.

    Attributes
    ----------
    rows : Tensor
        (R, D): the gradient of each row of the stack in use.
    product : Tensor
        MᵀG, (P, D), M being the factored matrix.
    square : Tensor
        dz·G (n, D), so that GᵀG = Eᵀ square.
    """

    rows: torch.Tensor
    product: torch.Tensor
    square: torch.Tensor


def _gradient(
    matrix: FactoredMatrix, record: Record, numbers: torch.Tensor, height: int
) -> _Gradient:
    e, linear, target = record.features, record.linear, record.target
    twice = 2 * record.cotangents[:, :1]
    n, d = e.shape
    weights, affine = matrix.stack[:height, :d], matrix.affine[:height]
    scaled = e * twice
    sums, first = matrix.width + 1, matrix.width + 2
    if n <= d:
        coefficients = torch.outer(affine, linear).addmm_(weights, scaled.T)
        coefficients[sums].add_(target.sum(1))
        hot = coefficients[first:]
        row = matrix.numbers[:n]
        for k in range(numbers.shape[1]):  # one column: no place occurs twice, no atomics needed
            places = (numbers[:, k], row)
            hot[places] = hot[places] + target[:, k]
        rows = coefficients @ e
        hot = rows[first:]
    else:
        rows = torch.outer(affine, linear @ e).addmm_(weights, scaled.T @ e)
        rows[sums].add_(target.sum(1) @ e)
        hot = rows[first:]
        for k in range(numbers.shape[1]):  # sorted by torch on CUDA, in order on the host
            hot.index_put_((numbers[:, k],), e * target[:, k, None], accumulate=True)
    product = record.response.T @ e
    square = torch.outer(linear, rows[sums])
    square.addcmul_(e @ product[:d], twice)
    for k in range(numbers.shape[1]):
        square.addcmul_(target[:, k, None], hot[numbers[:, k]])
    return _Gradient(rows, product, square)


def _optimise(
    matrix: FactoredMatrix,
    record: Record,
    gradient: _Gradient,
    settings: Settings,
    ok: torch.Tensor,
) -> None:
    lr, clip = settings.lr, None
    if settings.clip_norm is not None or settings.trust_ratio is not None:
        norm = (gradient.square * record.features).sum().clamp(min=0).sqrt()
        if settings.clip_norm is not None:
            clip = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils clips
            norm = norm * clip
        if settings.trust_ratio is not None:
            lr = lr * _trust(matrix, norm, settings.trust_ratio, settings)
    keep = None
    if settings.weight_decay:
        keep = torch.where(ok, 1 - lr * settings.weight_decay, 1.0)
    if clip is not None and (settings.momentum or settings.muon):
        square = gradient.square * (clip * clip)  # of GᵀG
        gradient = _Gradient(gradient.rows * clip, gradient.product * clip, square)
    elif clip is not None:
        lr = lr * clip
    if settings.momentum or settings.muon:
        _with_velocity(matrix, record, gradient, settings, lr, keep, ok)
    else:
        _plain(matrix, record, gradient, lr, keep)


def _trust(
    matrix: FactoredMatrix, norm: torch.Tensor, ratio: float, settings: Settings
) -> torch.Tensor:
    """The LARS factor; 1 where the weight or the gradient is 0."""
    width = matrix.width // 2 if settings.momentum else matrix.width
    weight = matrix.gram.diagonal()[:width].sum().clamp(min=0).sqrt()
    factor = ratio * weight / (norm + settings.weight_decay * weight)
    return torch.where((weight > 0) & (norm > 0), factor, 1.0)


def _plain(
    matrix: FactoredMatrix,
    record: Record,
    gradient: _Gradient,
    lr: torch.Tensor,
    keep: torch.Tensor | None,
) -> None:
    """SGD: W ← keep·W − lr·G, and Q ← keep²·Q − lr·(EᵀN + NᵀE), N = keep·dz W − lr/2·dz G."""
    used = matrix.stack[: gradient.rows.shape[0]]
    response = record.response if keep is None else record.response * keep
    update = record.features.T @ torch.addcmul(response, gradient.square, lr, value=-0.5)
    if keep is not None:
        used.mul_(keep)
        matrix.gram.mul_(keep * keep)
    used.addcmul_(gradient.rows, lr, value=-1)
    matrix.gram.addcmul_(update, lr, value=-1).addcmul_(update.T, lr, value=-1)


def _with_velocity(
    matrix: FactoredMatrix,
    record: Record,
    gradient: _Gradient,
    settings: Settings,
    lr: torch.Tensor,
    keep: torch.Tensor | None,
    ok: torch.Tensor,
) -> None:
    """B ← μB + G; W ← keep·W − lr·B·polar: momentum, and Muon with or without it.

    With M = [W, sB] or W alone; sB is written C below, and η for lr/s.
    """
    d, used = record.features.shape[1], matrix.stack[: gradient.rows.shape[0]]
    scale, mu = settings.velocity_scale, settings.momentum
    ww = matrix.gram[:d, :d]
    square = record.features.T @ gradient.square
    square = 0.5 * (square + square.T)
    if mu:
        velocity = torch.add(mu * used[:, d:], gradient.rows, alpha=scale)
        wc = torch.add(mu * matrix.gram[:d, d:], gradient.product[:d], alpha=scale)
        cross = gradient.product[d:]
        cc = (mu * mu) * matrix.gram[d:, d:] + (mu * scale) * (cross + cross.T)
        cc.add_(square, alpha=scale * scale)
    else:
        scale = 1.0
        velocity, wc, cc = gradient.rows, gradient.product, square
    if settings.muon:
        polar = _inverse_root(cc) * lr  # of C, which is that of B
        direction = velocity @ polar
        wd, cd = wc @ polar, cc @ polar
        dd = polar @ cd
    else:
        eta = lr / scale
        direction, wd, cd = velocity * eta, wc * eta, cc * eta
        dd = cd * eta
    kept, kept_wc = used[:, :d], wc
    kept_ww, kept_wd = ww, wd
    if keep is not None:
        kept, kept_wc = kept * keep, wc * keep
        kept_ww, kept_wd = ww * (keep * keep), wd * keep
    new_ww = kept_ww - kept_wd - kept_wd.T + dd
    new_ww = 0.5 * (new_ww + new_ww.T)
    _put(used[:, :d], kept - direction, ok)
    _put(ww, new_ww, ok)
    if mu:
        new_wc = kept_wc - cd.T
        _put(used[:, d:], velocity, ok)
        _put(matrix.gram[:d, d:], new_wc, ok)
        _put(matrix.gram[d:, :d], new_wc.T, ok)
        _put(matrix.gram[d:, d:], cc, ok)


def _put(where: torch.Tensor, value: torch.Tensor, ok: torch.Tensor) -> None:
    where.copy_(torch.where(ok, value, where))


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """(GᵀG)^(−½) on the range of G, zero off it."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > POLAR_CUTOFF * values[-1]
    root = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    inverse: torch.Tensor = (vectors * root) @ vectors.T
    return inverse
