"""The edge table: from a base that fits, one size at a time taken to its extremes.

Times are sustained, of a call back to back with itself; a small one is the host's time to launch.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_items import items
from gpu_timing import elapsed, interleaved, peak, sustained

from logitless.cli.harness.cases import PRESETS

ITEMS = ["mm", "gemms", "forward", "lean"]


def edges(warm: float, seconds: float) -> list[dict[str, Any]]:
    """Measure and print every case of the preset."""
    reports = []
    print(
        f"{'N, D, V':20s} {'mm':>9s} {'forward':>9s} {'x mm':>6s} {'gemms':>9s} {'lean':>9s}",
        end="",
    )
    print(f" {'x gemms':>7s} {'lean MiB':>9s}   (ms, sustained)")
    for case in PRESETS["gpu-edge"]:
        shape = (case.rows, case.features, case.classes)
        runs, _ = items(*shape, ITEMS)
        guess = interleaved(runs, 3)
        guess = {name: max(elapsed(run, 3), guess[name]) for name, run in runs.items()}
        times = {k: v[0] for k, v in sustained(runs, seconds, warm, 1, guess).items()}
        peaks = {name: peak(runs[name]) for name in ("forward", "lean")}
        reports.append({"shape": shape, "sustained": times, "peak_mib": peaks})
        ratios = times["forward"] / times["mm"], times["lean"] / times["gemms"]
        print(
            f"{', '.join(map(str, shape)):20s} {times['mm']:9.4f} {times['forward']:9.4f}"
            f" {ratios[0]:6.2f} {times['gemms']:9.4f} {times['lean']:9.4f} {ratios[1]:7.2f}"
            f" {peaks['lean']:9.1f}",
            flush=True,
        )
        del runs
        torch.cuda.empty_cache()
    return reports
