"""Times single kernels beside cuBLAS, in two regimes.

``python bench/kernels/timing.py --kernels target/kernels 8192,4096,128256 ...`` prints for each
shape N, D, V the median of launches *interleaved* in random order, and the time of each item
*sustained*, alone for half a second: a power-limited card ranks kernels differently in the two (an
item that burns more power slows only itself down in the second).

``--only`` keeps kernels whose name contains it. ``--group 8,11`` times each that reads weights with
that many rows of 256 in a group of the raster. ``--only DE+DW`` times two kernels one after the
other, and the second beside the first: ``--early 16`` clusters, which the last wave of the first
leaves idle, begin with ``--head 11`` tiles each.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import Kernels, Launch

DEVICE = "cuda"
PLANES = {
    "online_rest": 2,
    "repair": 2,
    "online": 3,
    "statistics": 7,
    "store_exp": 1,
    "store_moment": 2,
}


Items = dict[str, Callable[[], object]]


def items(
    kernels: Kernels, n: int, d: int, v: int, pattern: str, groups: list[int], early: int, head: int
) -> Items:
    """cuBLAS's three products, and every bf16 kernel whose name contains the pattern."""
    w = (torch.randn(v, d, device=DEVICE) * (1.5 / math.sqrt(d))).bfloat16()
    target = torch.randint(0, v, (n,), device=DEVICE)
    e = torch.randn(n, d, device=DEVICE)
    e[: n // 2] += 4.0 * w[target[: n // 2]].float()  # half of the rows know their target
    e = e.bfloat16()
    z = e @ w.t()
    rest = torch.cat([rows.float().logsumexp(1) for rows in z.split(256)])
    coef = torch.zeros(5, n, device=DEVICE)
    coef[0], coef[4] = 1.0, -1.0
    x, de, dw = (e.new_empty(shape) for shape in ((n, v), (n, d), (v, d)))
    de32, dw32 = torch.empty(n, d, device=DEVICE), torch.empty(v, d, device=DEVICE)
    part = torch.empty(7, -(-v // 64), n, device=DEVICE)
    # The shift that the library uses: a row drops less than 2^-10 of its probability.
    shift = 116.0 - math.ceil(math.log2(v))
    logits: dict[str, Any] = {
        "ref": rest,
        "target": target.int(),
        "coef": coef,
        "shift": shift,
        "softcap": 30.0,
    }
    logits |= {"part": part, "part_plane": part.stride(0)}
    order = torch.argsort(target, stable=True)
    start = torch.zeros(v + 1, device=DEVICE, dtype=torch.int32)
    start[1:] = torch.bincount(target, minlength=v).cumsum(0)
    lists: dict[str, Any] = {
        "onehot_w": e,
        "onehot_ld": d,
        "onehot_g": torch.randn(n, device=DEVICE),
    }
    lists |= {"onehot_start": start, "onehot_rows": order.int()}
    out: Items = {"E Wt": lambda: torch.mm(e, w.t(), out=z)}
    for name, kernel in kernels.table.items():
        makes_x = name.startswith("gradient_ce_bf16_p")
        wanted = name in pattern.split("+") if "+" in pattern else pattern in name
        if not makes_x and (kernel["dtype"] != "bf16" or not wanted):
            continue
        operation = kernel["operation"]
        if operation in PLANES or operation.startswith("gradient"):
            store = None if operation in PLANES and not operation.startswith("store") else x
            out[name] = Launch(kernels, name, (n, v, d), e, w, store, **logits)
            for group in groups:
                clusters = max(256 * group // (kernel["m"] * kernel["cluster"]), 1)
                out[f"{name} group {group}"] = Launch(
                    kernels, name, (n, v, d), e, w, store, **logits, group=clusters
                )
        elif operation.startswith("dw"):
            result = dw32 if operation.endswith("f32") else dw
            out[name] = Launch(kernels, name, (v, d, n), x, e, result, ld_row=v)
            out[f"{name} + targets"] = Launch(
                kernels, name, (v, d, n), x, e, result, ld_row=v, **lists
            )
        elif operation == "de":
            hot: dict[str, Any] = {
                "onehot_w": w,
                "onehot_g": rest,
                "onehot_ld": d,
                "target": target.int(),
            }
            out[name] = Launch(kernels, name, (n, d, v), x, w, de, coef=coef, **hot)
        elif operation == "de_f32":
            out[name] = Launch(kernels, name, (n, d, v), x, w, de32)
    for name, run in out.items():
        if name.startswith("gradient_ce_bf16_"):
            run()  # the products that follow work on a real gradient
    if "+" in pattern:
        first, second = pattern.split("+")
        out[f"{first}, {second}"] = after(out[first], out[second])
        for some, tiles in sorted({(0, 0), (early, 0), (early, head)}):
            beside = Launch(
                kernels,
                second,
                (v, d, n),
                x,
                e,
                dw,
                ld_row=v,
                beside=True,
                early=some,
                head=tiles,
            )
            out[f"  beside, {some} early, {tiles} ahead"] = after(out[first], beside)
    out["X W"] = lambda: torch.mm(x, w, out=de)
    out["Xt E"] = lambda: torch.mm(x.t(), e, out=dw)
    return out


def after(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    """Both, one launch behind the other."""

    def run() -> None:
        first()
        second()

    return run


def interleaved(table: Items, repeats: int) -> dict[str, float]:
    """Median milliseconds, items in a new random order each round."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {k: [] for k in table}
    for _ in range(repeats + 2):
        for name in random.sample(list(table), len(table)):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            table[name]()
            last.record()
            events[name].append((first, last))
    torch.cuda.synchronize()
    return {k: statistics.median(a.elapsed_time(b) for a, b in v[2:]) for k, v in events.items()}


def sustained(run: Callable[[], object], guess: float, seconds: float = 0.5) -> float:
    """Milliseconds a launch over the last 60% of half a second."""
    count = max(6, int(1e3 * seconds / guess))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    skip = int(0.4 * count)
    return float(events[skip].elapsed_time(events[-1])) / (count - skip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--group", default="")
    parser.add_argument("--early", type=int, default=0)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("shapes", nargs="+")
    arguments = parser.parse_args()
    kernels = Kernels(arguments.kernels)
    for shape in arguments.shapes:
        n, d, v = map(int, shape.split(","))
        groups = [int(group) for group in arguments.group.split(",") if group]
        table = items(kernels, n, d, v, arguments.only, groups, arguments.early, arguments.head)
        first = interleaved(table, arguments.repeats)
        second = {name: sustained(run, first[name]) for name, run in table.items()}
        print(f"\n{shape}{'':26s} interleaved ms, /E Wt, TFLOP/s     sustained ms, /E Wt, TFLOP/s")
        for name in table:
            cells = []
            for times in (first, second):
                ms = times[name]
                cells.append(f"{ms:9.3f} {ms / times['E Wt']:6.3f} {2e-9 * n * d * v / ms:6.0f}")
            print(f"{name:36s}", "       ".join(cells), flush=True)
        table.clear()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
