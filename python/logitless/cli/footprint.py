"""How many bytes each way to a cross entropy holds at its worst moment, computed, not measured.

Letters: N rows, D features, V classes, b bytes of an element. Every method is a short list of
moments, and a moment a list of what is alive in it beyond the inputs; the peak is the largest
moment. The tests compare the peaks with measured ones.

* ``logitless``: what the engine's own plan says; the same numbers size the allocation.
* ``eager``: ``F.cross_entropy(F.linear(input, weight), target)``. The forward holds logits and
  their
  log-softmax; the backward log-softmax, its gradient and the logits' gradient at once: 3 N V b. The
  gradients of the inputs are made after two of the three are gone.
* ``chunked``: ``torch.nn.functional.linear_cross_entropy`` with ``LinearCrossEntropyOptions()``.
  Gradients are made in the forward, chunk by chunk of B rows, B the next power of two of N D / V.
  With 16-bit inputs on a CPU it also holds the weight and its gradient in fp32. This is a lower
  bound: the tensors its source names. Measured on a CPU at N=1024, D=512, V=8192 it holds 1.5 times
  as much in fp32 and 3.8 times as much in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from logitless import _core

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
_CODES = {"fp32": 0, "fp64": 1, "bf16": 2, "fp16": 3}
_MEMORY = {"lean": -1, "fast": -2}
_INPUT_AND_WEIGHT = 3

Moment = dict[str, int]


@dataclass(frozen=True)
class Head:
    """Sizes of a head and where it lives: ``cpu`` or ``cuda``."""

    rows: int
    features: int
    classes: int
    dtype: str
    device: str = "cpu"

    @property
    def item(self) -> int:
        """Bytes of one element of input and weight."""
        return ITEM_BYTES[self.dtype]

    @property
    def inputs(self) -> int:
        """Bytes of hidden states, weight and targets, which every method is given."""
        return (self.rows + self.classes) * self.features * self.item + self.rows * 8

    @property
    def gradients(self) -> Moment:
        """The two gradients that every method must leave behind."""
        return {
            "d weight": self.classes * self.features * self.item,
            "d input": self.rows * self.features * self.item,
        }


@dataclass(frozen=True)
class Footprint:
    """What one method holds beyond the inputs.

    Attributes
    ----------
    method : str
    moments : dict
        Moment -> part -> bytes.
    """

    method: str
    moments: dict[str, Moment]

    @property
    def worst(self) -> Moment:
        """Parts alive at the largest moment."""
        return max(self.moments.values(), key=lambda moment: sum(moment.values()))

    @property
    def peak(self) -> int:
        """Bytes at the largest moment, gradients included where they are alive."""
        return sum(self.worst.values())


def eager(head: Head) -> Footprint:
    """Logits, log-softmax and their gradients, each N x V in the inputs' dtype."""
    block = head.rows * head.classes * head.item
    return Footprint(
        "eager",
        {
            "forward": {"logits": block, "log-softmax": block},
            "backward of the loss": {
                "log-softmax": block,
                "d log-softmax": block,
                "d logits": block,
            },
            "backward of the head": {"d logits": block, **head.gradients},
        },
    )


def chunked(head: Head) -> Footprint:
    """Torch's chunked function with its own choice of chunk size and accumulation policy."""
    half = head.item == 2
    accurate = half and head.device == "cpu"
    rows = chunk_rows(head, accurate)
    block = rows * head.classes
    moment: Moment = {}
    if accurate:
        weight = head.classes * head.features * 4
        moment["logits of a chunk"] = block * 4
        moment["weight, fp32"] = weight
        moment["d weight, fp32"] = weight
        moment["d input, fp32"] = head.rows * head.features * 4
        moment["input of a chunk, fp32"] = rows * head.features * 4
    elif half:
        wide = head.dtype == "bf16"
        moment["logits of a chunk"] = block * (4 if wide else 2)
        moment["their rounded copy"] = block * 2 if wide else 0
        moment["input of a chunk, fp32"] = rows * head.features * 4
    else:
        moment["logits of a chunk"] = block * head.item
    gradients = head.gradients
    if accurate:
        del gradients["d input"]
    return Footprint("chunked", {"forward": {**moment, **gradients}})


def chunk_rows(head: Head, accurate: bool) -> int:  # noqa: FBT001 - private to this page
    """Rows of a chunk that torch's ``"auto"`` picks (its documentation states the rule)."""
    wanted = -(-head.rows // -(-head.classes // head.features))
    rows = min(1 << (wanted - 1).bit_length(), head.rows)
    if not accurate:
        limit = max(1, head.rows * head.classes // (4 * head.features))
        rows = min(rows, 1 << (limit.bit_length() - 1))
    return max(1, rows)


def logitless(head: Head, memory: str) -> Footprint:
    """The engine's plan for cross entropy with both gradients, on as many threads as are set.

    Raises
    ------
    RuntimeError
        A head on ``cuda`` where no engine can plan for one: no kernels, no driver or no device.
    """
    spec = _core.Spec(("rest", "target"), targets=1)
    sizes = (head.rows, head.features, head.classes, _CODES[head.dtype], _MEMORY[memory])
    if head.device == "cuda":
        cuda_plan: Any = getattr(_core, "cuda_plan", None)
        if cuda_plan is None:
            raise RuntimeError("this build has no CUDA engine")
        # The forward holds exponentials in a gradient of the weight in bf16.
        lends = 2 if head.dtype == "bf16" else None
        plan = cuda_plan(spec, *sizes, _INPUT_AND_WEIGHT, lends=lends)
        forward = {"forward workspace": plan.forward_bytes}
        if plan.lent_bytes:
            forward["d weight"] = head.gradients["d weight"]
        backward = {"backward workspace": plan.backward_bytes}
    else:
        plan = _core.plan(spec, *sizes, _INPUT_AND_WEIGHT)
        threads = {"scratch of the threads": _core.get_num_threads() * plan.threads_bytes}
        forward = {**shares(plan.parts, "forward.", plan.forward_bytes), **threads}
        backward = {**shares(plan.parts, "backward.", plan.backward_bytes), **threads}
    kept = {
        "stored logits": plan.store_bytes,
        "row statistics": 2 * head.rows * (8 if head.dtype == "fp64" else 4),
    }
    moments = {"forward": {**forward, **kept}, "backward": {**backward, **kept, **head.gradients}}
    return Footprint(memory, moments)


def shares(parts: dict[str, int], prefix: str, total: int) -> Moment:
    """The parts of a plan under one prefix; what rounding to cache lines adds is one more."""
    found = {name: size for name, size in parts.items() if name.startswith(prefix)}
    return {**found, "alignment": total - sum(found.values())}


METHODS: dict[str, Callable[[Head], Footprint]] = {
    "eager": eager,
    "chunked": chunked,
    "lean": lambda head: logitless(head, "lean"),
    "fast": lambda head: logitless(head, "fast"),
}
"""Every method by the name the tables use; ``lean`` and ``fast`` are logitless."""


def largest_rows(method: str, head: Head, budget: int) -> int:
    """Largest N whose inputs and peak fit `budget` bytes; 0 if none does."""

    def fits(rows: int) -> bool:
        tried = Head(rows, head.features, head.classes, head.dtype, head.device)
        return tried.inputs + METHODS[method](tried).peak <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
