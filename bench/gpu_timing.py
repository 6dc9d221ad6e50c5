"""How an item is timed on a GPU, and how much memory it takes: see gpu.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Run = Callable[[], Any]


def elapsed(run: Run, times: int = 1) -> float:
    """Milliseconds of one of `times` runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / times


def interleaved(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median time of each item, one of each a round, in random order.

    The rounds are enqueued without waiting, so that the time between launches is the device's.
    """
    for run in runs.values():
        run()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pair[0].record()
            runs[name]()
            pair[1].record()
            events[name].append((pair[0], pair[1]))
    torch.cuda.synchronize()
    return {name: median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def sustained(
    runs: Mapping[str, Run],
    seconds: float,
    warm: float,
    passes: int,
    guess: Mapping[str, float],
) -> dict[str, list[float]]:
    """Time of one run among many of the same, for each pass; passes differ in the items' order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(passes):
        for name in random.sample(list(runs), len(runs)):
            run, each = runs[name], guess[name] * 1e-3
            elapsed(run, max(2, round(warm / each)))
            times[name].append(elapsed(run, max(3, round(seconds / each))))
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the passes of an item's time by another's of the same pass."""
    mine, other = times[name], times[base]
    if len(mine) != len(other):  # rivals have one pass
        return median(mine) / median(other)
    return median(a / b for a, b in zip(mine, other, strict=True))


def peak(run: Run) -> float:
    """MiB that one call adds, at its highest, to what is there before it."""
    run()  # compiles, loads, and what a library keeps for good
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20
