"""What a forward may use that its backward will own: a CUDA store in the gradients' memory.

A backward of cross entropy recomputes exponentials that the forward had in its hands. Lean keeps as
many as fit into memory that the backward needs anyway: that of its tiles, and the gradient of the
weight, which is allocated by the forward instead. Until the backward writes it, its end holds
exponentials; each chunk of them is consumed before the gradient's rows reach it. Where all of them
fit into lean's quarter of the gradients, or 256 MiB, nothing is recomputed.

So a loan is good for one backward. A second one through the same graph recomputes everything, and
so does whatever cannot know that the first is the last: torch.compile, torch.func, checkpointing
and other hooks on saved tensors, and calls beside one whose backward is still to come (their loans
together would be more than the gradients take). What recomputes agrees to rounding with what does
not, not to the last bit: a program that does the same gets the same bits.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from logitless import _core
from logitless._arrays import torch_handle
from logitless._extras import torch

if TYPE_CHECKING:
    from logitless.ops.call import Call

__all__ = ["Loan", "offer"]

_CUDA: Any = _core  # there only where the extension was built with it
_WEIGHT = 2  # of Call.gradients

_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

# The loan of each device whose backward has not come.
_running: dict[int, weakref.ref[Loan]] = {}


class Loan:
    """The memory that one forward and one backward share.

    `lends` is that of `_core.cuda_plan`: bytes of an element of d_weight, 0 without one.
    """

    __slots__ = ("__weakref__", "d_weight", "lends", "store")

    def __init__(self, lends: int) -> None:
        self.lends = lends
        self.store: torch.Tensor | None = None
        self.d_weight: torch.Tensor | None = None

    def take(self, plan: Any, weight: torch.Tensor) -> bool:
        """Allocate what a plan makes of the loan; False if it has no use for it."""
        if not plan.on_loan:
            return False
        self.store = torch.empty(plan.store_bytes, dtype=torch.uint8, device=weight.device)
        if plan.lent_bytes:
            self.d_weight = torch.empty_like(weight)
        _running[weight.device.index] = weakref.ref(self)
        return True


def offer(call: Call, weight: torch.Tensor, grad_buffer: torch.Tensor | None) -> Loan | None:
    """Return an empty loan for a call whose backward may end it; None where nothing can be lent."""
    if (
        not weight.is_cuda
        or not call.gradients & _WEIGHT
        or call.dtype is not torch.bfloat16
        or call.memory == 0
        or call.positions
        or (call.softcap and "entropy" in call.core)
    ):
        return None
    if grad_buffer is not None and not _CUDA.cuda_describable(torch_handle(grad_buffer)):
        return None  # products cannot add to it in place
    running = _running.get(weight.device.index)
    if _hooks is None or _hooks(False) is not None or (running is not None and running()):
        return None
    whole = grad_buffer is None and weight.is_contiguous()
    return Loan(weight.element_size() if whole and weight.dtype in _ELEMENTS else 0)


# Types of d_weight that a product writes directly.
_ELEMENTS = (torch.bfloat16, torch.float32)
