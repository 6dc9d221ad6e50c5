"""Where the time of a small call goes: ``python bench/small_call.py`` prints a Markdown table."""

from __future__ import annotations

import torch

from logitless.cli.harness.cases import MODES, problem
from logitless.cli.harness.contenders import CONTENDERS
from logitless.cli.harness.machine import facts
from logitless.cli.harness.overhead import SMALL, python_seconds
from logitless.cli.harness.timing import interleaved, summarise

ROUNDS = (500, 2000)


def main() -> None:
    """Print the table."""
    cpu = torch.device("cpu")
    print("## A small call\n\n`python bench/small_call.py`\n")
    for name, value in facts(cpu).items():
        print(f"* {name}: {value}")
    print(f"\n{SMALL.label}, microseconds a call:\n")
    print("| | eager | logitless | of which Python |\n|---|---|---|---|")
    for mode in MODES[:2]:
        steps = {name: CONTENDERS[name].step(problem(SMALL), mode) for name in ("eager", "lean")}
        found = interleaved(steps, cpu, seconds=1.0, rounds=ROUNDS)
        eager, lean = (summarise(found[name]).median * 1e6 for name in ("eager", "lean"))
        print(f"| {mode} | {eager:.0f} | {lean:.0f} | {python_seconds(mode=mode) * 1e6:.0f} |")


if __name__ == "__main__":
    main()
