"""`SphericalHead`: a classifier that is trained without ever visiting its classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from logitless._check import argument_error, check_reduction
from logitless._extras import torch
from logitless.losses._reduce import reduce
from logitless.ops.row_statistics import RowStatistics
from logitless.spherical import checks, records, scores
from logitless.spherical.factored import FactoredMatrix, capturing
from logitless.spherical.losses import SphericalLoss, spherical_loss
from logitless.spherical.refusals import Refusals
from logitless.spherical.updates import Settings, apply_step

__all__ = ["SphericalHead"]


class SphericalHead(torch.nn.Module):
    """A linear head with a spherical loss, in two factors and updated exactly in O(D²) a row.

    W = A·U + 1·ωᵀ, with A (V, D) and D-sized state. A forward, backward and step of N rows cost
    about 25ND² flops whatever V is; only rows of A that were somebody's target are touched. The
    updates are those of the dense optimiser, to rounding (Vincent, de Brébisson, Bouthillier 2015;
    hot rows instead of inverses, momentum, clipping and Muon in this form are this library's).

    Parameters
    ----------
    num_classes, features
        V and D.
    loss
        "zloss", "spherical_softmax", "taylor_softmax", "squared_error"; or a module of one with its
        hyper-parameters, e.g. ``losses.zloss.module(a=0.1, b=28.0)``.
    bias
        Whether logits have a bias: one more feature that is always 1, trained like the others.
    optimizer
        "sgd", "momentum" (heavy ball: B ← μB + ∇W, W ← (1 − lr·λ)W − lr·B) or "muon" (the same with
        B replaced by its exact polar factor; no momentum if ``momentum`` is 0).
    lr, momentum, weight_decay, clip_norm, trust_ratio
        Step size (mutable: ``head.lr``), μ, decoupled λ, limit of ‖∇W‖ as in
        torch.nn.utils.clip_grad_norm_, and the LARS ratio lr·ratio·‖W‖/(‖∇W‖ + λ‖W‖).
    reduction
        "mean" over kept rows, "sum" or "none".
    fused
        Whether backward itself takes the step; otherwise call :meth:`step` after backward.
    compile
        Whether the O(D²) work goes through torch.compile. On CUDA it makes 48 kernels of 137, once
        the first steps have taken half a minute; on a CPU, where kernels are cheap, it costs time.
    process_group
        Ranks over which a step averages the gradients, as DistributedDataParallel would: each rank
        sends its rows, N·(D + 4) numbers. Without one, a step in a multi-rank job is refused.
    device, dtype
        Of A: float32 or float64. The D×D state is float64.

    Notes
    -----
    Memory: V·D numbers for A (twice that with momentum), at most 16V bytes of places, the hot rows
    of some steps in float64, and O(log V) float64 D×D matrices.
    The weight is no ``nn.Parameter``: other optimisers must not touch it. Adam and its kin square
    single elements of the gradient, which no O(D²) form can follow.

    On CUDA the host never waits for the device (only Muon does, in ``torch.linalg.eigh``), and a
    CUDA graph may hold forward, backward and step: take one step of the batch size first, capture,
    and call :meth:`replayed` after every replay. Results are the same bits from run to run.

    Examples
    --------
    >>> head = SphericalHead(793471, 512, loss="zloss", lr=0.1)      # doctest: +SKIP
    >>> loss = head(body(x), y); loss.backward(); head.step()        # doctest: +SKIP
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        *,
        loss: str | torch.nn.Module = "zloss",
        bias: bool = False,
        optimizer: str = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        trust_ratio: float | None = None,
        reduction: str = "mean",
        fused: bool = False,
        compile: bool = False,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive("num_classes", num_classes)
        checks.check_positive("features", features)
        self.num_classes, self.features, self.has_bias = num_classes, features, bias
        self.loss: SphericalLoss = spherical_loss(loss)
        self.optimizer = checks.check_optimizer(optimizer)
        self.momentum = checks.check_number("momentum", momentum, maximum=1.0)
        if optimizer == "momentum" and momentum == 0.0:
            raise argument_error("momentum", 0.0, "a number in (0, 1)", "optimizer='sgd' has none")
        if optimizer == "sgd" and momentum != 0.0:
            raise argument_error("momentum", momentum, "0 for 'sgd'", "use optimizer='momentum'")
        lr = checks.check_number("lr", lr)
        self._velocity_scale = lr if lr > 0 else 1.0
        self.weight_decay = checks.check_number("weight_decay", weight_decay)
        self.clip_norm = checks.check_optional("clip_norm", clip_norm)
        self.trust_ratio = checks.check_optional("trust_ratio", trust_ratio)
        check_reduction(reduction)
        self.reduction, self.fused, self.process_group = reduction, fused, process_group
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise argument_error(
                "dtype", dtype, "float32 or float64", "half types would lose the sparse updates"
            )
        self.matrix = FactoredMatrix(self._initial(device, dtype), compile=compile)
        self._pending: list[records.Record] = []
        self.steps = 0
        self._lr, self._rate = lr, torch.tensor(lr, dtype=torch.float64, device=device)
        self._refusals = Refusals(self.matrix.storage.device)

    # ------------------------------------------------------------------ the loss

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        *,
        target_weight: torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        denominator: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of (..., D) features against (...) ids, or (..., K) ids a row.

        In training mode, the backward of the result leaves what :meth:`step` needs; several
        backwards add up. In eval mode or under ``no_grad`` nothing is recorded.
        """
        ids, several = checks.target_ids(input, target, ignore_index, self.num_classes)
        mean, variance, logits = self._logits(input, ids, sink=True)
        given = (self, ids, several, target_weight, row_weight, denominator)
        loss: torch.Tensor = records.run(_losses, self.matrix.compile)(
            mean, variance, logits, *given
        )
        return loss

    def _logits(
        self, input: torch.Tensor, ids: torch.Tensor, *, sink: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and variance of the logits, of the rows' shape, and the target logits (..., K)."""
        receive = self._receive if sink and self.training and torch.is_grad_enabled() else None
        flat = self._widen(input)
        if receive is not None and not flat.requires_grad:
            flat = flat.detach().requires_grad_()  # the weight learns even where the body is frozen
        mean, variance, logits = records.FactoredStatistics.apply(
            flat, ids.reshape(flat.shape[0], -1), self.matrix, receive
        )
        shape = input.shape[:-1]
        return mean.view(shape), variance.view(shape), logits.view(*shape, logits.shape[1])

    def _rows(
        self,
        mean: torch.Tensor,
        variance: torch.Tensor,
        logits: torch.Tensor,
        ids: torch.Tensor,
        several: bool,  # noqa: FBT001
        target_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RowStatistics]:
        """One loss a row, and the statistics it was made of."""
        v, wanted = self.num_classes, self.loss.request.core
        values = {"target": logits}
        if "sum" in wanted:
            values["sum"] = mean * v
        if "sum_sq" in wanted:
            values["sum_sq"] = (variance + mean * mean) * v
        if "variance" in wanted:
            values |= {"mean": mean, "variance": variance}
        s = RowStatistics(
            values,
            reading=self.loss.request.reading,
            classes=v,
            vectors=None,
            ids=ids,
            several=several,
            ignore_index=-1,
            target_weight=target_weight,
            route="factored",
        )
        return self.loss.rows(s), s

    # ------------------------------------------------------------------ the update

    @property
    def lr(self) -> float:
        """The step size. Setting it reaches captured steps too: they read it on the device."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        if value != self._lr:
            self._lr = checks.check_number("lr", value)
            self._rate.fill_(self._lr)

    @torch.no_grad()
    def step(self, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Apply what backward has recorded since the last step; nothing if nothing was.

        Nothing is read from a CUDA device, so that forward, backward and step can be captured as
        one CUDA graph, after one eager step of the same batch size. Then tell every replay by
        :meth:`replayed`.

        Parameters
        ----------
        grad_scale
            What the loss was multiplied by before backward (``GradScaler.get_scale()``).

        Raises
        ------
        FloatingPointError
            A recorded feature or cotangent is not finite: the rows are dropped, the state is as
            before. On CUDA it is a later call that raises: ``step``, ``replayed``, ``diagnostics``
            or ``state_dict``, the last two with certainty.
        """
        group = self._group()
        if not capturing(self.matrix.stack):
            self._check_refusals()
        if group is None and not self._pending:
            return
        record = records.combine(self._pending, self.matrix, self._width)
        self._pending.clear()
        if group is not None:
            record = records.gather(record, self.matrix, group)
        if isinstance(grad_scale, torch.Tensor):
            record = record.scaled(grad_scale.to(torch.float64).reciprocal())
        elif grad_scale != 1.0:
            record = record.scaled(1.0 / grad_scale)
        if record.ids.numel() == 0:
            return
        self._refusals.add(apply_step(self.matrix, record, self._settings()))
        self.steps += not capturing(self.matrix.stack)

    def replayed(self, times: int = 1) -> None:
        """Tell that a CUDA graph with a captured ``step`` was replayed, after each replay.

        The host then knows when hot rows are to be written back, and does so every few calls
        without waiting for the device. Replays that were not told are refused once there is no
        room left; the error says so.
        """
        self.matrix.replayed(times)
        self.steps += times
        self._check_refusals()

    def _check_refusals(self, *, wait: bool = False) -> None:
        try:
            self._refusals.check(wait=wait)
        except RuntimeError:  # no room: make some, so that the next replay may go on
            self.matrix.close()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001
        """Forget what backward has recorded since the last step."""
        super().zero_grad(set_to_none)
        self._pending.clear()

    def _receive(self, record: records.Record) -> None:
        self._pending.append(record)
        if self.fused:
            self.step()

    def _settings(self) -> Settings:
        return Settings(
            lr=self._rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            trust_ratio=self.trust_ratio,
            muon=self.optimizer == "muon",
            velocity_scale=self._velocity_scale,
        )

    def _group(self) -> Any:
        distributed = torch.distributed
        if self.process_group is not None:
            return self.process_group
        initialised = distributed.is_available() and distributed.is_initialized()
        if initialised and distributed.get_world_size() > 1:
            raise RuntimeError(
                "SphericalHead.step in a job of several ranks: each would train its own weight; "
                "pass process_group=torch.distributed.group.WORLD so that steps are shared"
            )
        return None

    # ------------------------------------------------------------------ the weight

    @property
    def _dtype(self) -> torch.dtype:
        return self.matrix.factor.dtype

    @property
    def _width(self) -> int:
        return self.features + self.has_bias

    def weight(self) -> torch.Tensor:
        """Materialise W, (V, D), in A's dtype: 2VD² flops."""
        return self.matrix.dense()[:, : self.features].contiguous()

    def bias(self) -> torch.Tensor | None:
        """Materialise the bias, (V,); None without one."""
        return self.matrix.dense()[:, self.features].contiguous() if self.has_bias else None

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, **arguments: Any) -> SphericalHead:
        """Make a head from a dense layer: its weight, its bias, its device."""
        weight = linear.weight.detach()
        arguments.setdefault(
            "dtype", torch.float64 if weight.dtype == torch.float64 else torch.float32
        )
        arguments.setdefault("device", weight.device)
        head = cls(*weight.shape, bias=linear.bias is not None, **arguments)
        head.load_dense(weight, None if linear.bias is None else linear.bias.detach())
        return head

    def to_linear(self) -> torch.nn.Linear:
        """Make a dense layer of the weight as it is now."""
        dense = self.matrix.dense()
        linear = torch.nn.Linear(
            self.features, self.num_classes, self.has_bias, device=dense.device, dtype=dense.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(dense[:, : self.features])
            if self.has_bias:
                linear.bias.copy_(dense[:, self.features])
        return linear

    def load_dense(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Start over from a dense (V, D) weight and (V,) bias; velocity and records are dropped."""
        expected = (self.num_classes, self.features)
        if tuple(weight.shape) != expected:
            raise argument_error(
                "weight.shape", tuple(weight.shape), str(expected), "check V and D"
            )
        if (bias is not None) != self.has_bias:
            raise argument_error(
                "bias",
                "given" if bias is not None else None,
                f"bias={self.has_bias}",
                "match the head",
            )
        with torch.no_grad():
            factor = self.matrix.factor.zero_()
            factor[:, : self.features] = weight
            if bias is not None:
                factor[:, self.features] = bias
            self.matrix.restart()
        self._pending.clear()

    @property
    def _heavy_ball(self) -> bool:
        return self.momentum > 0.0

    def _initial(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Storage of a weight uniform in ±1/√D as nn.Linear, centred: mean logits start at 0."""
        bound = 1.0 / math.sqrt(self.features)
        size = (self.num_classes + 1, self._width * (1 + self._heavy_ball))
        storage = torch.zeros(size, device=device, dtype=dtype)
        weight = storage[:-1, : self._width].uniform_(-bound, bound)
        if self.num_classes > 1:
            weight -= weight.mean(0)
        return storage

    def diagnostics(self) -> dict[str, float]:
        """Live epochs, hot rows, sweeps over all classes, ‖W‖, steps taken, rows for the next one.

        ``condition`` is that of U, the product of the epoch's right multiplications. Nothing
        inverts U, so that even inf (a step with an eigenvalue of lr·X at 1) costs no digit. Waits
        for the device and raises what it refused.
        """
        self._check_refusals(wait=True)
        d = self._width
        return {
            "condition": float(torch.linalg.cond(self.matrix.mix)),
            "epochs": float(len(self.matrix.epochs.live)),
            "hot_rows": float(self.matrix.filled),
            "sweeps": float(self.matrix.sweeps),
            "weight_norm": float(self.matrix.gram.diagonal()[:d].sum().clamp(min=0).sqrt()),
            "steps": float(self.steps),
            "pending_rows": float(sum(r.features.shape[0] for r in self._pending)),
        }

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def topk(self, input: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k most likely classes of (..., D) features: (scores, ids), (..., k) each.

        Streams over A without N×V. Scores are log-probabilities for the two spherical softmaxes and
        logits otherwise.
        """
        return scores.topk(self, input, k)

    @torch.no_grad()
    def rank(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Rank of the target among all classes, 1 = most likely; int64 of target's shape."""
        return scores.rank(self, input, target)

    @torch.no_grad()
    def log_prob(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Log-probability of the target; the two spherical softmaxes only."""
        if self.loss.name not in ("spherical_softmax", "taylor_softmax"):
            raise argument_error(
                "loss",
                repr(self.loss.name),
                "a probabilistic loss",
                "the others define no probability",
            )
        ids, several = checks.target_ids(input, target, -100, self.num_classes)
        if several:
            raise argument_error(
                "target.shape", tuple(target.shape), "(...): one id a row", "index K"
            )
        losses, _ = self._rows(*self._logits(input, ids, sink=False), ids, several)
        return -losses.to(self._dtype)

    # ------------------------------------------------------------------ module plumbing

    def get_extra_state(self) -> dict[str, Any]:
        """The factored state; part of ``state_dict``."""
        self._check_refusals(wait=True)
        return {"matrix": self.matrix.state(), "steps": self.steps, "scale": self._velocity_scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the factored state; part of ``load_state_dict``."""
        shape = tuple(state["matrix"]["storage"].shape)
        if shape != tuple(self.matrix.storage.shape):
            raise argument_error(
                "state_dict",
                f"storage of shape {shape}",
                str(tuple(self.matrix.storage.shape)),
                "make the head with the same num_classes, features, bias and optimizer",
            )
        self.matrix.restore(state["matrix"])
        self.steps, self._velocity_scale = state["steps"], state["scale"]
        self._pending.clear()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if prefix + "weight" in state_dict:  # a plain dense checkpoint
            bias = state_dict.get(prefix + "bias")
            self.load_dense(state_dict[prefix + "weight"], bias)
            names = ("weight", "bias")
            state_dict = {k: v for k, v in state_dict.items() if k[len(prefix) :] not in names}
            state_dict[prefix + "_extra_state"] = self.get_extra_state()
            unexpected = arguments[3]
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            unexpected[:] = [k for k in unexpected if k[len(prefix) :] not in names]
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *arguments: Any) -> SphericalHead:
        """Move with the module; the float64 state keeps its dtype when the module is cast."""
        super()._apply(fn, *arguments)  # type: ignore[no-untyped-call]
        self.matrix.move(fn)
        device = self.matrix.storage.device
        self._rate, self._refusals = self._rate.to(device), Refusals(device)
        return self

    def extra_repr(self) -> str:
        """What the head was made with."""
        return (
            f"{self.num_classes}, {self.features}, loss={self.loss.name!r}, bias={self.has_bias}, "
            f"optimizer={self.optimizer!r}, lr={self.lr}"
        )

    def _widen(self, input: torch.Tensor) -> torch.Tensor:
        """(..., D) to (N, D or D + 1) float64, differentiable."""
        if input.shape[-1] != self.features:
            raise argument_error(
                "input.shape", tuple(input.shape), f"(..., {self.features})", "match features"
            )
        flat = input.reshape(-1, self.features).to(torch.float64)
        return torch.nn.functional.pad(flat, (0, 1), value=1.0) if self.has_bias else flat


def _losses(
    mean: torch.Tensor,
    variance: torch.Tensor,
    logits: torch.Tensor,
    head: SphericalHead,
    ids: torch.Tensor,
    several: bool,  # noqa: FBT001
    target_weight: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    denominator: float | torch.Tensor | None,
) -> torch.Tensor:
    """The reduced loss, float32 or float64 as A is."""
    losses, s = head._rows(mean, variance, logits, ids, several, target_weight)
    if row_weight is not None:
        row_weight = row_weight.to(losses)
    return reduce(losses, s.kept, head.reduction, row_weight, denominator).to(head._dtype)
