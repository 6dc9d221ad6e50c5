"""Who is measured: the ways to get a cross entropy and its gradients from hidden states and a head.

A contender is a function ``loss(input, weight, target)`` with the mean over rows as its result,
made lazily so that listing contenders imports none of them. Two yardsticks stand beside them: the
matrix products alone, which no exact method can avoid.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.cli.harness.cases import Case, Mode, Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], Any]


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss: see `FromLoss` and `Products`.

    Attributes
    ----------
    name : str
        What the command line and the tables call it.
    about : str
        One line for the legend.
    devices, dtypes : set of str
        Device types it runs on and short names of dtypes it takes; every dtype if empty.
    missing : callable
        Returns why it cannot be used on this machine, or None.
    asked : bool
        Measured only when named: it computes something else than the mean cross entropy.
    specialised : bool
        Compiled anew for every shape, so that only a warm-up at full size warms it up.
    """

    name: str
    about: str
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    dtypes: frozenset[str] = frozenset()
    missing: Callable[[], str | None] = _always
    asked: bool = False
    specialised: bool = False

    def unavailable(self, case: Case) -> str | None:
        """Why it cannot run this case, or None."""
        device = torch.device(case.device).type
        if device not in self.devices:
            return f"does not run on {device}"
        if self.dtypes and case.dtype not in self.dtypes:
            return f"does not take {case.dtype}"
        return self.missing()

    def step(self, problem: Problem, mode: Mode) -> Step:
        """A call that does the work of `mode` once and returns what must stay alive meanwhile."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FromLoss(Contender):
    """A contender made of a loss function; `build` imports and compiles whatever it needs."""

    build: Callable[[], Loss]

    def step(self, problem: Problem, mode: Mode) -> Step:
        """Forward under ``no_grad``, or forward and the gradients that `mode` asks for."""
        loss = self.build()
        e, w, target = problem.input, problem.weight, problem.target
        if mode == "forward":
            return partial(_forward, loss, e.detach(), w.detach(), target)
        if mode == "frozen head":
            return partial(_backward, loss, e, w.detach(), target, (e,))
        return partial(_backward, loss, e, w, target, (e, w))


@dataclass(frozen=True, kw_only=True)
class Products(Contender):
    """The matrix products alone: E Wᵀ, and with gradients also dz W and dzᵀ E.

    On CUDA the classes are padded to a multiple of 64, as a careful user would: cuBLAS is several
    times slower on rows that do not start at aligned addresses.
    """

    def step(self, problem: Problem, mode: Mode) -> Step:
        """The products of `mode`, into buffers made beforehand."""
        e, w = problem.input.detach(), problem.weight.detach()
        if w.is_cuda:
            w = F.pad(w, (0, 0, 0, -w.shape[0] % 64))
        z = torch.empty(e.shape[0], w.shape[0], dtype=e.dtype, device=e.device)
        d_input, d_weight = torch.empty_like(e), torch.empty_like(w)

        def run() -> None:
            torch.mm(e, w.t(), out=z)
            if mode != "forward":
                torch.mm(z, w, out=d_input)
            if mode == "forward+backward":
                torch.mm(z.t(), e, out=d_weight)

        return run


def _forward(loss: Loss, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(input, weight, target)


def _backward(
    loss: Loss, input: Tensor, weight: Tensor, target: Tensor, wanted: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    value = loss(input, weight, target)
    return value, *torch.autograd.grad(value, wanted)


def _eager_loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _eager() -> Loss:
    return _eager_loss


@cache
def _compiled() -> Loss:
    compiled: Loss = torch.compile(_eager_loss, dynamic=False)
    return compiled


def _chunked() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, options=options)


def _logitless(memory: str) -> Loss:
    from logitless import functional

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        value: Tensor = functional.linear_cross_entropy(input, weight, target, memory=memory)
        return value

    return loss


def _log_prob(memory: str) -> Loss:
    from logitless import functional

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        log_prob, entropy = functional.linear_log_prob(input, weight, target, memory=memory)
        assert entropy is not None
        # The shape of a policy gradient with an entropy bonus.
        return -(log_prob + 0.01 * entropy).mean()

    return loss


def _cut_cross_entropy() -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda input, weight, target: function(input, weight, target)


def _liger() -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda input, weight, target: loss(weight, input, target)


def _quack(name: str, **options: object) -> Loss:
    function = getattr(importlib.import_module("quack.linear_cross_entropy"), name)
    # What a release does not know it does not do; its reduction defaults to the mean.
    known = inspect.signature(function).parameters
    options = {key: value for key, value in options.items() if key in known}
    return lambda input, weight, target: function(input, weight, target, **options)


def _installed(module: str, package: str) -> str | None:
    found = importlib.util.find_spec(module) is not None
    return None if found else f"not installed (pip install {package})"


def _has_chunked() -> str | None:
    found = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if found else f"torch {torch.__version__} has no linear_cross_entropy"


def _has_compiler() -> str | None:
    if torch.cuda.is_available():
        return _installed("triton", "triton")
    found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return None if found else "torch.compile needs a C++ compiler, and none is on the path"


_CUDA = frozenset({"cuda"})
_HALF = frozenset({"bf16", "fp16"})
_LISTED: tuple[Contender, ...] = (
    FromLoss(
        "eager",
        "F.cross_entropy(F.linear(input, weight), target)",
        build=_eager,
    ),
    FromLoss(
        "compile",
        "torch.compile of eager",
        missing=_has_compiler,
        specialised=True,
        build=_compiled,
    ),
    FromLoss(
        "chunked",
        "torch's linear_cross_entropy with its own choice of chunks",
        missing=_has_chunked,
        build=_chunked,
    ),
    FromLoss(
        "cce",
        "cut-cross-entropy",
        _CUDA,
        _HALF,
        partial(_installed, "cut_cross_entropy", "cut-cross-entropy"),
        build=_cut_cross_entropy,
    ),
    FromLoss(
        "liger",
        "Liger's fused linear cross entropy",
        _CUDA,
        missing=partial(_installed, "liger_kernel", "liger-kernel"),
        build=_liger,
    ),
    FromLoss(
        "quack",
        "QuACK's chunked linear cross entropy",
        _CUDA,
        _HALF,
        partial(_installed, "quack", "quack-kernels"),
        # Without its search for tiles, which takes minutes a shape.
        build=partial(_quack, "chunked_linear_cross_entropy", tuned=False, use_scaled_exp=False),
    ),
    FromLoss(
        "quack-exp",
        "QuACK's, with stored exponentials (some shapes)",
        _CUDA,
        _HALF,
        partial(_installed, "quack", "quack-kernels"),
        asked=True,
        build=partial(_quack, "scaled_exp_linear_cross_entropy"),
    ),
    FromLoss("lean", 'logitless, memory="lean" (the default)', build=partial(_logitless, "lean")),
    FromLoss("fast", 'logitless, memory="fast"', build=partial(_logitless, "fast")),
    FromLoss(
        "rl",
        'logitless log-probability and entropy, memory="lean"',
        asked=True,
        build=partial(_log_prob, "lean"),
    ),
    FromLoss(
        "rl-fast",
        'logitless log-probability and entropy, memory="fast"',
        asked=True,
        build=partial(_log_prob, "fast"),
    ),
    Products("products", "the matrix products alone: no loss"),
)

CONTENDERS = {contender.name: contender for contender in _LISTED}
"""Every contender by name, in the order of the tables."""
BASELINE = "eager"
"""The contender that ratios are taken against."""
OURS = ("lean", "fast", "rl", "rl-fast")
