"""dW = [W, b] X + 1 xᵀ + target rows: the gradient of a spherical loss, in its parts or dense."""

from __future__ import annotations

from dataclasses import dataclass

from logitless._extras import torch
from logitless.spherical.gram import BLOCK, wide


def add_rows(out: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[ids] += rows`` where ids repeat, in an order that does not change from run to run."""
    if out.is_cuda:  # index_add_ would use atomics there; index_put_ sorts first
        return out.index_put_((ids,), rows, accumulate=True)
    return out.index_add_(0, ids, rows)


@dataclass
class Structure:
    """The parts of dW; two gradients of one weight add part by part.

    Attributes
    ----------
    multiplier, addend : Tensor
        X (P, P) and x (P,), P = D or, with a bias, D + 1; fp32, or fp64 for fp64 weights.
    ids : Tensor
        (n,) int64 target classes, repeats allowed.
    rows : Tensor
        (n, P): what each adds to the row of its class.
    """

    multiplier: torch.Tensor
    addend: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor

    def __add__(self, other: Structure) -> Structure:
        """Sum of two gradients of the same weight."""
        return Structure(
            self.multiplier + other.multiplier,
            self.addend + other.addend,
            torch.cat([self.ids, other.ids]),
            torch.cat([self.rows, other.rows]),
        )

    @torch.no_grad()
    def write(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        d_weight: torch.Tensor | None,
        d_bias: torch.Tensor | None,
        *,
        accumulate: bool = False,
    ) -> None:
        """Materialise into ``d_weight`` (V, D) and ``d_bias`` (V,): one product of 2VD² flops.

        Every element is summed in fp32 or better and rounded once to the output's dtype; scratch is
        one block of rows and the distinct target rows.
        """
        outputs = [
            (out, part) for out, part in _columns(weight, d_weight, d_bias) if out is not None
        ]
        distinct, place = self.ids.unique(return_inverse=True)
        touched = self._dense_rows(weight, bias, distinct)
        add_rows(touched, place, self.rows)
        if accumulate:
            for out, part in outputs:
                touched[:, part] += out[distinct].to(touched.dtype).view(len(distinct), -1)
        for start in range(0, weight.shape[0], BLOCK):
            rows = slice(start, min(start + BLOCK, weight.shape[0]))
            block = self._dense_rows(weight, bias, rows)
            for out, part in outputs:
                value = block[:, part].view(out[rows].shape)
                out[rows] = value.add_(out[rows]) if accumulate else value
        for out, part in outputs:
            out[distinct] = touched[:, part].reshape(out[distinct].shape).to(out.dtype)

    def _dense_rows(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor | slice
    ) -> torch.Tensor:
        """Rows of [W, b] X + 1 xᵀ, (n, P)."""
        features, dtype = weight.shape[1], wide(weight.dtype)
        out = torch.addmm(self.addend, weight[rows].to(dtype), self.multiplier[:features])
        if bias is not None:
            out.addr_(bias[rows].to(dtype), self.multiplier[features])
        return out


def _columns(
    weight: torch.Tensor, d_weight: torch.Tensor | None, d_bias: torch.Tensor | None
) -> list[tuple[torch.Tensor | None, slice]]:
    features = weight.shape[1]
    return [(d_weight, slice(0, features)), (d_bias, slice(features, features + 1))]
