"""Is the cost linear in N, D and V? Run ``python bench/linear_cost.py`` for times and slopes.

One size is doubled at a time, the others stay. A slope of 1 between two lines is linear cost; fixed
costs pull it below 1 at the small end.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace

import torch

from logitless.cli.harness.cases import DTYPES, Case, problem
from logitless.cli.harness.contenders import CONTENDERS
from logitless.cli.harness.machine import facts
from logitless.cli.harness.timing import interleaved, summarise

START = Case(512, 256, 8192)
DOUBLINGS = {"rows": 4, "features": 3, "classes": 4}
SMALLEST = {"rows": 128, "features": 128, "classes": 4096}
LETTERS = {"rows": "N", "features": "D", "classes": "V"}


def times(cases: list[Case], seconds: float) -> list[float]:
    """Median seconds of a forward and backward of each case, interleaved."""
    lean = CONTENDERS["lean"]
    steps = {case.label: lean.step(problem(case), "forward+backward") for case in cases}
    found = interleaved(steps, torch.device(cases[0].device), seconds)
    return [summarise(found[case.label]).median for case in cases]


def series(size: str, start: Case) -> list[Case]:
    """`start` with one size doubled from its smallest value on."""
    first = SMALLEST[size]
    return [replace(start, **{size: first * 2**k}) for k in range(DOUBLINGS[size] + 1)]


def main() -> None:
    """Print the Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for a size")
    given = parser.parse_args()
    start = replace(START, dtype=given.dtype, device=given.device)
    print("## Linear cost\n\n`python bench/linear_cost.py`: forward and backward, lean\n")
    for name, value in facts(torch.device(given.device)).items():
        print(f"* {name}: {value}")
    print("\n| doubled | N | D | V | median | slope to the line above |\n|---|---|---|---|---|---|")
    exponents = []
    for size, letter in LETTERS.items():
        cases = series(size, start)
        found = times(cases, given.seconds)
        for index, (case, seconds) in enumerate(zip(cases, found, strict=True)):
            slope = f"{math.log2(seconds / found[index - 1]):.2f}" if index else ""
            sizes = f"{case.rows} | {case.features} | {case.classes}"
            print(f"| {letter} | {sizes} | {seconds * 1e3:.2f} ms | {slope} |")
        whole = statistics.linear_regression(range(len(found)), [math.log2(s) for s in found])
        exponents.append(f"{letter} {whole.slope:.2f}")
    print(f"\nExponents fitted over all lines: {', '.join(exponents)}.")


if __name__ == "__main__":
    main()
