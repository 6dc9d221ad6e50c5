"""The edge table: from a base that fits, one size at a time taken to its extremes.

Times are sustained, of a call back to back with itself. A small one is the host's time to launch:
torch eager stands beside it, and both are timed again as CUDA graphs, which leave the host out.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_items import items
from gpu_timing import Run, elapsed, interleaved, peak, sustained

from logitless.cli.harness.cases import PRESETS

ITEMS = ["mm", "gemms", "forward", "eager", "lean"]
COLUMNS = ("mm", "forward", "eager", "lean", "gemms graph", "lean graph")


def edges(warm: float, seconds: float) -> list[dict[str, Any]]:
    """Measure and print every case of the preset."""
    reports = []
    print(f"{'N, D, V (ms, sustained)':24s}", *(f"{name:>11s}" for name in COLUMNS), "  lean MiB")
    for case in PRESETS["gpu-edge"]:
        shape = (case.rows, case.features, case.classes)
        runs, _ = items(*shape, ITEMS)
        peaks = {name: peak(runs[name]) for name in ("forward", "lean")}
        runs |= {f"{name} graph": graph(runs[name]) for name in ("gemms", "lean")}
        guess = interleaved(runs, 3)
        guess = {name: max(elapsed(run, 3), guess[name]) for name, run in runs.items()}
        times = {k: v[0] for k, v in sustained(runs, seconds, warm, 1, guess).items()}
        reports.append({"shape": shape, "sustained": times, "peak_mib": peaks})
        cells = (f"{times[name]:11.4f}" for name in COLUMNS)
        print(f"{', '.join(map(str, shape)):24s}", *cells, f"{peaks['lean']:10.1f}", flush=True)
        del runs
        torch.cuda.empty_cache()
    return reports


def graph(run: Run) -> Run:
    """Capture a call; the result replays it."""
    run()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = run()

    def replay() -> Any:
        captured.replay()
        return results  # alive as long as the graph, whose memory it is

    return replay
