"""The table of a GPU: cross entropy beside the cuBLAS products that it contains, and its rivals.

    python bench/gpu.py [--json FILE]                    about four minutes
    python bench/gpu.py --items mm,gemms,forward,lean --shapes 8192,4096,128256
    python bench/gpu.py --edge [--json FILE]             one size at a time taken to its extremes

For each shape, in bf16: `mm` is torch.mm of E·Wᵀ, `gemms` that and the two products of the
gradients (on classes padded to 64, as cuBLAS needs). Every item is timed twice. *Interleaved*: once
a round in random order, medians of the rounds; all items share a clock (rivals apart, two rounds).
*Sustained*: alone and back to back for `--seconds` after a warm-up, as a training loop does; a
power-limited card lowers its clock under a heavy kernel. Passes take the items in another random
order each, cuBLAS among them, so that nobody is always measured on the cooler card; a ratio is the
median over the passes of the ratio within a pass, and the spread is that of the item's passes.
Memory is the peak above what was there before one call (gradients included).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from gpu_edge import edges
from gpu_items import OURS, RIVALS, errors, items
from gpu_timing import interleaved, peak, ratio, sustained

SHAPES = (
    (8192, 2304, 256000),
    (8192, 4096, 128256),
    (8192, 3584, 152064),
    (8192, 5120, 131072),
    (8192, 1024, 65536),
    (8192, 3072, 32064),
    (8192, 768, 50257),
)
YARDSTICKS = ("mm", "gemms")
FORWARDS = ("forward", "rl forward")
Shape = tuple[int, int, int]
Report = dict[str, Any]


def parse(text: str) -> Shape:
    """A shape from the command line."""
    rows, features, classes = map(int, text.split(","))
    return rows, features, classes


def measure(shape: Shape, wanted: list[str], options: argparse.Namespace) -> Report:
    """Every item of a shape."""
    torch._dynamo.reset()
    runs, missing = items(*shape, wanted)
    peaks = {name: peak(run) for name, run in runs.items() if name not in YARDSTICKS}
    mine = {name: run for name, run in runs.items() if name not in RIVALS}
    together = interleaved(mine, options.rounds)
    alone = sustained(mine, options.seconds, options.warm, options.passes, together)
    rivals = {name: run for name, run in runs.items() if name in RIVALS}
    together |= interleaved(rivals, 2)
    alone |= sustained(rivals, options.seconds, options.warm, 1, together)
    return {
        "shape": shape,
        "interleaved": together,
        "sustained": alone,
        "peak_mib": peaks,
        "missing": missing,
    }


def show(report: Report) -> None:
    """One shape, a line an item."""
    together, alone, peaks = report["interleaved"], report["sustained"], report["peak_mib"]
    print(f"{report['shape']}: interleaved ms, x mm | sustained ms (spread), x mm, x gemms | MiB")
    for name in together:
        once, (ms, spread) = together[name], summary(alone[name])
        cells = [
            f"{once:8.3f} {once / together['mm']:6.3f}" if "mm" in together else f"{once:8.3f}"
        ]
        cells.append(f"{ms:8.3f} ({spread:4.1%})")
        cells += [f"{ratio(alone, name, base):6.3f}" for base in YARDSTICKS if base in alone]
        print(f"  {name:10s}", " ".join(cells), f"{peaks[name]:8.0f}" if name in peaks else "")
    for name, why in report["missing"].items():
        print(f"  {name:10s} {why}")
    print(flush=True)


def summary(values: list[float]) -> tuple[float, float]:
    """Median, and range as a share of it."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return middle, (ordered[-1] - ordered[0]) / middle


def overview(reports: list[Report]) -> None:
    """The ratios that the goals are about, a line a shape."""
    names = [n for n in reports[0]["sustained"] if n not in YARDSTICKS]
    print("x mm (forward) or x gemms, sustained / interleaved x mm:")
    print(f"{'D, V':14s}", *(f"{name:>15s}" for name in names))
    for report in reports:
        alone, together = report["sustained"], report["interleaved"]
        if not set(YARDSTICKS) <= set(alone):
            return
        cells = []
        for name in names:
            if name in alone:
                base = "mm" if name in FORWARDS else "gemms"
                pair = f"{ratio(alone, name, base):.3f} / {together[name] / together['mm']:.3f}"
                cells.append(f"{pair:>15s}")
            else:
                cells.append(f"{'-':>15s}")
        print(f"{report['shape'][1]}, {report['shape'][2]:<8d}", *cells)


def save(report: Report) -> None:
    """Write what is known so far to the file that was asked for."""
    if path := report["options"]["json"]:
        Path(path).write_text(json.dumps(report, indent=1))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a sustained measurement")
    parser.add_argument("--warm", type=float, default=0.25, help="seconds of the item before it")
    parser.add_argument("--passes", type=int, default=3, help="sustained, of all but rivals")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved")
    parser.add_argument("--items", default="all", help=f"of {', '.join((*OURS, *RIVALS))}; ours")
    parser.add_argument("--shapes", nargs="*", type=parse, help="N,D,V ...")
    parser.add_argument("--edge", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    random.seed(0)
    groups = {"all": [*OURS, *RIVALS], "ours": list(OURS)}
    wanted = groups.get(options.items) or options.items.split(",")
    unknown = set(wanted) - {*OURS, *RIVALS}
    if unknown:
        parser.error(f"--items: {', '.join(sorted(unknown))}: expected {', '.join(groups['all'])}")
    report: Report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["options"] = vars(options)
    print(f"{report['device']}, torch {report['torch']}")
    if options.edge:
        report["edges"] = edges(options.warm, options.seconds)
    else:
        report["errors"] = errors(wanted)
        for name, (d_input, d_weight) in report["errors"].items():
            print(f"against fp32: {name:10s} dE {d_input:.2e} dW {d_weight:.2e}", flush=True)
        torch.cuda.empty_cache()
        report["shapes"] = []
        for shape in options.shapes or SHAPES:
            report["shapes"].append(measure(shape, wanted, options))
            show(report["shapes"][-1])
            torch.cuda.empty_cache()
            save(report)  # what was measured is kept, whatever happens to the next shape
        overview(report["shapes"])
    save(report)


if __name__ == "__main__":
    main()
