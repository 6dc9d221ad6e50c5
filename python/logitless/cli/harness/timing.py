"""Clocks. Two ways to time the same calls, because they answer different questions.

*Interleaved*: in every round each contender runs once, in random order, and ratios are taken within
a round. A neighbour on the machine, the clock frequency and the temperature then touch both sides
of a ratio. *Sustained*: each contender runs alone, back to back, for a while; this is what training
sees, and on a GPU near its power limit it ranks differently from interleaved calls.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from logitless.cli.harness.contenders import Step

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of a list of times, in seconds, and how many there were."""

    median: float
    lower: float
    upper: float
    count: int

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.upper - self.lower) / self.median


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and the interval that holds the true median in 95 of 100 cases."""

    median: float
    lower: float
    upper: float


def timed(step: Step, device: torch.device) -> float:
    """Seconds one call takes, from a quiet device to a quiet device."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        result = step()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - begin
    # Freed after the clock stopped: returning a result's memory belongs to its owner, not the call.
    del result
    return seconds


def interleaved(
    steps: Mapping[str, Step],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int] = (5, 200),
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Times:
    """Time every step once a round, in random order, after one warm-up call each.

    Parameters
    ----------
    seconds : float
        Start no further round once this much time is spent.
    rounds : (int, int)
        Fewest and most rounds, whatever the time.
    tick : callable
        Called after every timed call, for a progress display.

    Returns
    -------
    dict
        Seconds by contender; the k-th entries of all lists belong to the same round.
    """
    order = list(steps)
    shuffler = random.Random(seed)
    times: Times = {name: [] for name in order}
    for name in order:
        timed(steps[name], device)
        tick()
    begin = time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        shuffler.shuffle(order)
        for name in order:
            times[name].append(timed(steps[name], device))
            tick()
    return times


def sustained(
    steps: Mapping[str, Step],
    device: torch.device,
    seconds: float,
    calls: tuple[int, int] = (5, 2000),
    tick: Callable[[], None] = lambda: None,
) -> Times:
    """Time every step alone, back to back for `seconds` after as long a warm-up of up to 0.2 s.

    On CUDA the calls are queued in batches and each entry is a batch's time over its calls, so that
    launch gaps do not count.
    """
    times: Times = {}
    for name, step in steps.items():
        spend(step, device, min(seconds, 0.2))
        batch = batch_size(step, device)
        values: list[float] = []
        begin = time.perf_counter()
        while len(values) < calls[1] and (
            len(values) < calls[0] or time.perf_counter() - begin < seconds
        ):
            values.append(timed(partial(repeat, step, batch), device) / batch)
            tick()
        times[name] = values
    return times


def repeat(step: Step, count: int) -> Any:
    """Call a step `count` times and return the last result."""
    for _ in range(count - 1):
        step()
    return step()


def spend(step: Step, device: torch.device, seconds: float) -> None:
    """Run a step for about `seconds`, at least once."""
    begin = time.perf_counter()
    while True:
        timed(step, device)
        if time.perf_counter() - begin > seconds:
            return


def batch_size(step: Step, device: torch.device) -> int:
    """How many calls make one timed batch: about 10 ms of them on CUDA, one elsewhere."""
    if device.type != "cuda":
        return 1
    return max(1, min(100, round(0.01 / timed(step, device))))


def summarise(times: list[float]) -> Summary:
    """Median and quartiles."""
    if len(times) < 2:
        return Summary(times[0], times[0], times[0], len(times))
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Summary(median, lower, upper, len(times))


def paired_ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Median of ``ours[k] / theirs[k]`` with the order statistics that bound it at 95%.

    The rank of the bound is that of the binomial's normal approximation; with fewer than six rounds
    the bounds are the extremes.
    """
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    count = len(ratios)
    rank = max(0, int(count / 2 - 0.98 * count**0.5))
    return Ratio(statistics.median(ratios), ratios[rank], ratios[count - 1 - rank])


def unpaired_ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Ratio of medians, with the ratios of opposite quartiles as bounds."""
    a, b = summarise(ours), summarise(theirs)
    return Ratio(a.median / b.median, a.lower / b.upper, a.upper / b.lower)
