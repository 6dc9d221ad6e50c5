"""Functions of one value a row that keep their digits, and their derivatives."""

from __future__ import annotations

from logitless._extras import torch

__all__ = [
    "entropy_with",
    "logaddexp",
    "logsigmoid",
    "logsumexp",
    "margin",
    "softplus",
    "weighted",
]

Tensor = torch.Tensor


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x), right to x = -87 in float32.

    torch.nn.functional.softplus is linear from 20 on, which costs digits in float64; from 40 on it
    costs none. torch's logsigmoid wakes every thread for the smallest tensor.
    """
    return torch.nn.functional.softplus(x, threshold=40.0)


def logsigmoid(x: Tensor) -> Tensor:
    """Return log(1 / (1 + e^-x)), right to x = 87 in float32."""
    return -softplus(-x)


def margin(rest: Tensor, target: Tensor) -> Tensor:
    """Return rest - target; nan with a logit of +inf, whose softmax is inf/inf, as in torch."""
    return rest - target + 0.0 * torch.maximum(rest, target)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Return log(e^a + e^b); its second derivative at -inf is finite, unlike torch.logaddexp's."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high + softplus(torch.where(low == -torch.inf, low, low - high))


def logsumexp(z: Tensor) -> Tensor:
    """Log-sum-exp over the last axis; -inf with zero gradient where every entry is -inf."""
    empty = (z == -torch.inf).all(dim=-1)
    value = torch.logsumexp(torch.where(empty.unsqueeze(-1), 0.0, z), dim=-1)
    return torch.where(empty, -torch.inf, value)


def weighted(p: Tensor, x: Tensor) -> Tensor:
    """Return p x; 0 with zero slope where p is 0, also if x is infinite."""
    return p * torch.where(p > 0, x, 0.0)


def entropy_with(x: Tensor, rest_entropy: Tensor) -> Tensor:
    """Return the entropy of one target and the classes of `rest_entropy`, x ahead of it in log.

    H = h(p_R) + p_R H_R, with h the entropy of two, grouped so that every term is positive.
    """
    p_rest, p_target = torch.sigmoid(x), torch.sigmoid(-x)
    both = weighted(p_rest, softplus(-x)) + weighted(p_target, softplus(x))
    return both + p_rest * rest_entropy
