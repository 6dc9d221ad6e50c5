"""dW = [W, b] X + 1 xᵀ + target rows: the gradient of a spherical loss, in its parts or dense."""

from __future__ import annotations

from dataclasses import dataclass

from logitless._extras import torch
from logitless.spherical.products import block_rows, blocks, split, tensor_cores


@dataclass
class Structure:
    """The parts of dW; two gradients of one weight add part by part.

    Attributes
    ----------
    multiplier, addend : Tensor
        X (P, P) and x (P,), P = D or, with a bias, D + 1; fp32, or fp64 for fp64 weights.
    ids : Tensor
        (n,) int64 target classes in [0, V), repeats allowed.
    rows : Tensor
        (n, P): what each adds to the row of its class; zeros where there is no target.
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

        Every element is summed in fp32 or better and rounded once to the output's dtype. An fp32 or
        fp64 weight without a bias is multiplied straight into the gradient; else scratch is two
        blocks of rows and, for a rounded gradient, the target rows.
        """
        with torch.autocast(weight.device.type, enabled=False):
            outputs = [o for o in (d_weight, d_bias) if o is not None]
            rounded = any(o.dtype != self.rows.dtype for o in outputs)
            touched = self._touched(weight, bias, d_weight, d_bias, accumulate) if rounded else None
            if d_weight is not None and d_bias is None and bias is None and not rounded:
                self._multiply(weight, d_weight, accumulate)
            elif d_weight is not None and bias is None and tensor_cores(weight):
                self._multiply_split(weight, d_weight, accumulate)
            else:
                self._write_blocks(weight, bias, d_weight, d_bias, accumulate)
            if touched is None:
                self._add_rows(d_weight, d_bias)
            else:
                self._put_rows(*touched, d_weight, d_bias)

    def _multiply(self, weight: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:  # noqa: FBT001
        """Fill out with W X + 1 xᵀ, or add it, where both have the dtype of the sums."""
        # On the CPU the broadcast of x is a pass over the output: in blocks it stays in cache. On
        # CUDA it is an epilogue of the one product.
        rows = weight.shape[0]
        if not weight.is_cuda:
            rows = block_rows(weight.shape[1], self.rows.dtype, weight.device)
        for part in blocks(weight.shape[0], rows):
            if accumulate:
                out[part].addmm_(weight[part], self.multiplier).add_(self.addend)
            else:
                torch.addmm(self.addend, weight[part], self.multiplier, out=out[part])

    def _multiply_split(
        self,
        weight: torch.Tensor,
        out: torch.Tensor,
        accumulate: bool,  # noqa: FBT001
    ) -> None:
        """The same for bf16 on tensor cores: W is exact, X in two halves, the sums fp32."""
        high, low = split(self.multiplier.clone())
        for part in blocks(
            weight.shape[0], block_rows(weight.shape[1], self.rows.dtype, weight.device)
        ):
            block = torch.mm(weight[part], high, out_dtype=torch.float32)
            block.add_(torch.mm(weight[part], low, out_dtype=torch.float32)).add_(self.addend)
            out[part] = block.add_(out[part]) if accumulate else block

    def _write_blocks(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        d_weight: torch.Tensor | None,
        d_bias: torch.Tensor | None,
        accumulate: bool,  # noqa: FBT001
    ) -> None:
        """The same by way of a block of the sums' dtype."""
        classes, features = weight.shape
        dtype, size = self.rows.dtype, len(self.addend)
        count = min(block_rows(size, dtype, weight.device), classes)
        scratch = self.rows.new_empty(count, size)
        source = None if weight.dtype == dtype else self.rows.new_empty(count, features)
        for part in blocks(classes, count):
            length = part.stop - part.start
            block, own = scratch[:length], weight[part]
            if source is not None:
                own = source[:length].copy_(own)
            torch.addmm(self.addend, own, self.multiplier[:features], out=block)
            if bias is not None:
                block.addr_(bias[part].to(dtype), self.multiplier[features])
            if d_weight is not None:
                value = block[:, :features]
                d_weight[part] = value.add_(d_weight[part]) if accumulate else value
            if d_bias is not None:
                column = block[:, features]
                d_bias[part] = column.add_(d_bias[part]) if accumulate else column

    def _base(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """Rows of [W, b] X + 1 xᵀ at (n,) classes, (n, P)."""
        features, dtype = weight.shape[1], self.rows.dtype
        out = torch.addmm(self.addend, weight[rows].to(dtype), self.multiplier[:features])
        if bias is not None:
            out.addr_(bias[rows].to(dtype), self.multiplier[features])
        return out

    def _add_rows(self, d_weight: torch.Tensor | None, d_bias: torch.Tensor | None) -> None:
        if d_weight is not None:
            add_rows(d_weight, self.ids, self.rows[:, : d_weight.shape[1]])
        if d_bias is not None:
            add_rows(d_bias, self.ids, self.rows[:, -1])

    def _touched(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        d_weight: torch.Tensor | None,
        d_bias: torch.Tensor | None,
        accumulate: bool,  # noqa: FBT001
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot of each target and the finished, unrounded rows of the slots' classes.

        Targets of one class share a slot. There are as many slots as targets, so that no count has
        to be read back from a device; those left over hold class 0 and are not used.
        """
        order = self.ids.argsort(stable=True)
        ordered = self.ids[order]
        begins = torch.ones_like(ordered)
        begins[1:] = ordered[1:] != ordered[:-1]
        slot_of_ordered = begins.cumsum(0) - 1
        slots = torch.empty_like(order).scatter_(0, order, slot_of_ordered)
        classes = torch.zeros_like(order).scatter_(0, slot_of_ordered, ordered)
        rows = add_rows(self._base(weight, bias, classes), slots, self.rows)
        if accumulate:
            features = weight.shape[1]
            if d_weight is not None:
                rows[:, :features] += d_weight[classes]
            if d_bias is not None:
                rows[:, features] += d_bias[classes]
        return slots, rows

    def _put_rows(
        self,
        slots: torch.Tensor,
        rows: torch.Tensor,
        d_weight: torch.Tensor | None,
        d_bias: torch.Tensor | None,
    ) -> None:
        # Targets of one class write the same bits, in whatever order.
        if d_weight is not None:
            d_weight[self.ids] = rows[:, : d_weight.shape[1]].to(d_weight.dtype)[slots]
        if d_bias is not None:
            d_bias[self.ids] = rows[:, -1].to(d_bias.dtype)[slots]


def add_rows(out: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[ids] += rows`` where ids repeat, in an order that does not change from run to run."""
    if out.is_cuda:  # index_add_ would use atomics there; index_put_ sorts first
        return out.index_put_((ids,), rows, accumulate=True)
    return out.index_add_(0, ids, rows)
