"""Two runs from one seed in lock-step: same batches, same schedule, another head.

Lock-step makes the comparison paired: whatever the machine does during a step, it does to both
runs. The autograd graph is cut at the hidden states, which changes no gradient and lets the head be
timed alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from logitless.cli.harness.memory import PeakMeter
from logitless.cli.lm.corpus import Corpus
from logitless.cli.lm.heads import HEADS, Head
from logitless.cli.lm.model import Body, Shape

MEASURED_STEPS = 4
"""The first steps measure the head's memory; the clock counts from the step after them."""
WARM_UP_STEPS = 10
DECAY = 0.4


@dataclass(frozen=True)
class Settings:
    """What both runs share."""

    tokens: int
    steps: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    limit: float
    rate: float = 2e-3


@dataclass(frozen=True)
class Seconds:
    """How long the parts of one step took."""

    body_forward: float
    head: float
    body_backward: float
    optimizer: float

    @property
    def body(self) -> float:
        """Forward and backward of everything before the head."""
        return self.body_forward + self.body_backward

    @property
    def step(self) -> float:
        """All of it."""
        return self.body + self.head + self.optimizer


class Stopwatch:
    """Laps between points at which the device is idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = self.now()

    def now(self) -> float:
        """The time, once the device has finished what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the previous lap."""
        previous, self.last = self.last, self.now()
        return self.last - previous


@dataclass
class Run:
    """One model in training, with its records.

    Attributes
    ----------
    losses : list of float
        Training loss before each step.
    seconds : list of Seconds
        Of every step after the first `MEASURED_STEPS`.
    head_peak : int
        Largest growth of memory during the head's forward and backward, in bytes; the head's
        gradients are made in it and count.
    validation : float
        Mean cross entropy on held-out files; nan until the end.
    failure : str
        Why the run stopped early; empty if it did not.
    """

    name: str
    head: Head
    body: Body
    optimizer: torch.optim.Optimizer
    settings: Settings
    losses: list[float] = field(default_factory=list)
    seconds: list[Seconds] = field(default_factory=list)
    head_peak: int = 0
    validation: float = float("nan")
    failure: str = ""

    def step(self, inputs: Tensor, targets: Tensor, rate: float) -> None:
        """One optimiser step on a batch (B, T), its parts timed and its head's memory measured."""
        device = self.settings.device
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        watch = Stopwatch(device)
        with self.autocast():
            hidden = self.body(inputs)
        cut = hidden.detach().requires_grad_()
        body_forward = watch.lap()

        measuring = len(self.losses) < MEASURED_STEPS
        meter = PeakMeter(device)
        if measuring:
            meter.start()
        with self.autocast():
            loss = self.head(cut, self.body.embedding.weight, targets)
        loss.backward()
        if measuring:
            growth = meter.stop()
            # The very first call also loads code; it counts only while there is no other.
            self.head_peak = growth if len(self.losses) < 2 else max(self.head_peak, growth)
        head = watch.lap()

        hidden.backward(cut.grad)
        body_backward = watch.lap()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        optimizer = watch.lap()
        self.losses.append(loss.item())
        if not measuring:
            self.seconds.append(Seconds(body_forward, head, body_backward, optimizer))

    def validate(self, inputs: Tensor, targets: Tensor, sequences: int) -> None:
        """Set `validation`, a few sequences at a time."""
        total = 0.0
        with torch.no_grad(), self.autocast():
            pairs = zip(
                torch.split(inputs, sequences), torch.split(targets, sequences), strict=True
            )
            for part, wanted in pairs:
                loss = self.head(self.body(part), self.body.embedding.weight, wanted)
                total += loss.item() * part.shape[0]
        self.validation = total / inputs.shape[0]

    def autocast(self) -> AbstractContextManager[object]:
        """Half precision where the user asked for it; parameters stay fp32."""
        if self.settings.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.settings.device.type, self.settings.dtype)

    def typical(self) -> Seconds | None:
        """Median of each part over the timed steps."""
        if not self.seconds:
            return None
        columns = (
            torch.tensor([getattr(each, part.name) for each in self.seconds]).median().item()
            for part in fields(Seconds)
        )
        return Seconds(*columns)


def make_run(name: str, shape: Shape, settings: Settings) -> Run:
    """A fresh model from the seed; every run of a name starts from the same weights."""
    torch.manual_seed(settings.seed)
    body = Body(shape).to(settings.device)
    optimizer = torch.optim.AdamW(
        body.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    return Run(name, HEADS[name], body, optimizer, settings)


def train(runs: list[Run], corpus: Corpus, settings: Settings) -> Iterator[int]:
    """Advance all runs by one step per iteration; yields the number of the step just done.

    A run whose head does not fit in memory is dropped with its reason, and the others go on. The
    schedule is linear warm-up, constant, linear decay; where the time limit cuts training short,
    the decay follows the clock instead of the step count.
    """
    context = runs[0].body.shape.context
    batches = corpus.batches(settings.tokens // context, context, settings.seed)
    begin = time.perf_counter()
    for number in range(settings.steps):
        elapsed = (time.perf_counter() - begin) / settings.limit
        if elapsed >= 1:
            return
        rate = settings.rate * schedule(number, max(number / settings.steps, elapsed))
        inputs, targets = (part.to(settings.device) for part in next(batches))
        alive = [run for run in runs if not run.failure]
        # The one that goes second finds warm caches: they take turns.
        for run in alive if number % 2 else reversed(alive):
            try:
                run.step(inputs, targets, rate)
            except torch.OutOfMemoryError as error:
                run.failure = f"out of memory at step {number}: {str(error).splitlines()[0]}"
                run.optimizer.zero_grad(set_to_none=True)
        if all(run.failure for run in runs):
            return
        yield number


def schedule(step: int, progress: float) -> float:
    """Share of the full learning rate: linear up over the first steps, linear down at the end."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, max(0.0, (1 - progress) / DECAY))


def largest_difference(first: Run, second: Run) -> float:
    """Largest absolute difference of the two loss curves where both have a value."""
    pairs = zip(first.losses, second.losses, strict=False)
    return max((abs(a - b) for a, b in pairs), default=float("nan"))
