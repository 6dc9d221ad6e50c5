"""Measure cases: time, memory and error of every contender, as rows of plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from logitless.cli.harness import accuracy, memory, timing
from logitless.cli.harness.cases import Case, Mode, Problem, problem
from logitless.cli.harness.contenders import BASELINE, CONTENDERS, Contender, Products, Step

Clock = Literal["interleaved", "sustained"]
CPU_REFERENCE_LIMIT = 2e11
"""N D V above which a CPU would spend minutes on the float64 reference; larger cases skip it."""


@dataclass(frozen=True)
class Options:
    """How to measure: who, which work, which clock, and what else besides the time."""

    contenders: tuple[str, ...]
    modes: tuple[Mode, ...]
    clock: Clock = "interleaved"
    seconds: float = 10.0
    memory: bool = True
    error: bool = True
    seed: int = 0


@dataclass
class Row:
    """What was found for one contender at one case and mode; None where it was not measured.

    `ratio` is the time relative to eager (paired by round when interleaved), `peak_bytes` the
    growth of memory with gradients, `reason` why there is no time and `peak_reason` why there is no
    peak.
    """

    case: Case
    mode: Mode
    contender: str
    reason: str = ""
    time: timing.Summary | None = None
    ratio: timing.Ratio | None = None
    peak_bytes: int | None = None
    peak_reason: str = ""
    error: accuracy.Errors | None = None

    def plain(self) -> dict[str, Any]:
        """The row as JSON-ready data."""
        return asdict(self)


@dataclass
class Measurement:
    """The rows of one case and mode while they are being filled."""

    problem: Problem
    mode: Mode
    options: Options
    say: Callable[[str], None]
    rows: dict[str, Row] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.problem.input.device

    def prepare(self) -> None:
        """Build each contender's step and run it once; whoever fails is kept with the reason."""
        for name in self.options.contenders:
            contender = CONTENDERS[name]
            row = self.rows[name] = Row(self.problem.case, self.mode, name)
            row.reason = contender.unavailable(self.problem.case) or ""
            if row.reason:
                continue
            self.say(f"{name}: first call")
            try:
                step = contender.step(self.problem, self.mode)
                result = step()
            except Exception as error:  # a rival's failure is a result, whatever its type
                row.reason = first_line(error)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            self.steps[name] = step
            del result

    def time(self) -> None:
        """Fill in the times and the ratios to the baseline."""
        self.say("timing")
        options = self.options
        if options.clock == "interleaved":
            times = timing.interleaved(self.steps, self.device, options.seconds, seed=options.seed)
        else:
            alone = max(0.5, options.seconds / max(1, len(self.steps)))
            times = timing.sustained(self.steps, self.device, alone)
        base = times.get(BASELINE)
        for name, values in times.items():
            self.rows[name].time = timing.summarise(values)
            if base is None:
                continue
            if options.clock == "interleaved":
                self.rows[name].ratio = timing.paired_ratio(values, base)
            else:
                self.rows[name].ratio = timing.unpaired_ratio(values, base)

    def measure_memory(self, name: str) -> None:
        """Fill in the peak: in a fresh process on a CPU, from the allocator on CUDA."""
        if name not in self.steps or isinstance(CONTENDERS[name], Products):
            return
        self.say(f"{name}: memory")
        row = self.rows[name]
        if self.device.type == "cpu":
            try:
                row.peak_bytes = memory.clean_growth(row.case, name, row.mode, self.options.seed)
            except RuntimeError as error:
                row.peak_reason = str(error)
            return
        meter = memory.PeakMeter(self.device)
        meter.start()
        result = self.steps[name]()
        row.peak_bytes = meter.stop()
        del result

    def measure_errors(self) -> None:
        """Fill in errors against float64 for every contender that returned both gradients."""
        case = self.problem.case
        work = case.rows * case.features * case.classes
        if self.mode != "forward+backward":
            return
        if self.device.type == "cpu" and work > CPU_REFERENCE_LIMIT:
            return
        self.say("float64 reference")
        exact = accuracy.reference(self.problem)
        for name, step in self.steps.items():
            if not (isinstance(CONTENDERS[name], Products) or CONTENDERS[name].asked):
                self.rows[name].error = accuracy.errors(step(), exact)


def measure(
    cases: Sequence[Case],
    options: Options,
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[list[Row]]:
    """Measure every case in every mode; yields the rows of one case and mode as they are done.

    Parameters
    ----------
    say : callable
        Told what is being done.
    advance : callable
        Called `stages` times in all.
    """
    for case in cases:
        inputs = problem(case, options.seed)
        for mode in options.modes:
            prefix = f"{case.label} {mode}: "

            def tell(text: str, prefix: str = prefix) -> None:
                say(prefix + text)

            work = Measurement(inputs, mode, options, tell)
            work.prepare()
            advance()
            work.time()
            advance()
            if options.memory:
                for name in options.contenders:
                    work.measure_memory(name)
                    advance()
            if options.error:
                work.measure_errors()
            advance()
            yield list(work.rows.values())
            torch.compiler.reset()


def stages(cases: Sequence[Case], options: Options) -> int:
    """How often `measure` calls `advance`."""
    each = 3 + (len(options.contenders) if options.memory else 0)
    return len(cases) * len(options.modes) * each


def usable(names: Sequence[str], device: str) -> tuple[str, ...]:
    """The contenders among `names` that run on a device type, in table order.

    Without names: all that compute the mean cross entropy.
    """
    return tuple(
        name
        for name, contender in CONTENDERS.items()
        if (name in names if names else not contender.asked) and runs_on(contender, device)
    )


def runs_on(contender: Contender, device: str) -> bool:
    """Whether the contender supports a device type at all."""
    return torch.device(device).type in contender.devices


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, short enough for a table."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:120]
