"""Error against float64, without ever holding the logits: the reference streams over rows too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.cli.harness.cases import Problem

REFERENCE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Reference:
    """Mean cross entropy and its gradients in float64."""

    loss: float
    d_input: Tensor
    d_weight: Tensor


@dataclass(frozen=True)
class Errors:
    """Error of the loss over max(1, |loss|), relative Frobenius errors of the gradients."""

    loss: float
    d_input: float
    d_weight: float


def reference(problem: Problem) -> Reference:
    """Float64 loss and gradients, in blocks of rows of at most `REFERENCE_BYTES` of logits."""
    e, w = problem.input.detach(), problem.weight.detach().double()
    rows, classes = e.shape[0], w.shape[0]
    block = max(1, REFERENCE_BYTES // (8 * classes))
    loss = torch.zeros((), dtype=torch.float64, device=e.device)
    d_input = torch.empty(e.shape, dtype=torch.float64, device=e.device)
    d_weight = torch.zeros_like(w)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        chunk, target = e[part].double(), problem.target[part, None]
        z = chunk @ w.t()
        lse = z.logsumexp(1, keepdim=True)
        loss += (lse - z.gather(1, target)).sum()
        dz = z.sub_(lse).exp_()
        dz.scatter_add_(1, target, torch.full_like(lse, -1.0))
        dz /= rows
        torch.mm(dz, w, out=d_input[part])
        d_weight.addmm_(dz.t(), chunk)
    return Reference(loss.item() / rows, d_input, d_weight)


def errors(result: tuple[Tensor, Tensor, Tensor], exact: Reference) -> Errors:
    """Errors of (loss, d_input, d_weight) against the reference."""
    loss, d_input, d_weight = result
    return Errors(
        abs(loss.item() - exact.loss) / max(1.0, abs(exact.loss)),
        relative(d_input, exact.d_input),
        relative(d_weight, exact.d_weight),
    )


def relative(value: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    return float((value.double() - exact).norm() / exact.norm())
