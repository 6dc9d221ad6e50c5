"""The picture of ``logitless bench``: time and memory relative to eager, shape by shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from logitless.cli._console import bytes_text, seconds_text
from logitless.cli._figure import COLOURS, INK, SOFT, bare, figure, headline
from logitless.cli.harness.cases import Case
from logitless.cli.harness.contenders import BASELINE, OURS
from logitless.cli.harness.run import Row

HEIGHT = 0.23
Value = Callable[[Row], float | None]


def draw(rows: list[Row], machine: dict[str, str], path: Path) -> None:
    """Draw the rows of the last mode that was measured to `path`."""
    mode = rows[-1].mode
    kept = [row for row in rows if row.mode == mode and row.time is not None]
    names = [name for name in dict.fromkeys(row.contender for row in kept) if name != "products"]
    cases = list(dict.fromkeys(row.case for row in kept))
    bars = len(cases) * (len(names) + 1)
    with figure(10.4, 1.5 + max(2.2, bars * HEIGHT), path) as drawn:
        headline(
            drawn,
            f"{mode.capitalize()} of a linear cross entropy, relative to eager torch",
            machine.get("GPU", machine["processor"]) + f"; {machine['versions']}",
        )
        time, memory = drawn.subplots(1, 2, width_ratios=(1.5, 1))
        time.set_title("Time")
        draw_bars(time, kept, cases, names, median, seconds_text)
        time.set_yticks(
            [middle(index, names) for index in range(len(cases))],
            [label(case) for case in cases],
            color=INK,
        )
        memory.set_title("Peak memory, gradients included")
        draw_bars(memory, kept, cases, names, lambda row: row.peak_bytes, bytes_text)
        memory.set_yticks([])


def label(case: Case) -> str:
    """Shape on two lines."""
    return f"{case.rows} x {case.features} x {case.classes}\n{case.dtype}"


def median(row: Row) -> float | None:
    """Median time of a row in seconds."""
    return None if row.time is None else row.time.median


def middle(index: int, names: list[str]) -> float:
    """Vertical centre of the group of bars of a case."""
    return index * (len(names) + 1) + (len(names) - 1) / 2


def draw_bars(
    axes: Axes,
    rows: list[Row],
    cases: list[Case],
    names: list[str],
    value: Value,
    text: Callable[[float], str],
) -> None:
    """Bars of value / eager's value, each with the value itself beside it; long ones are cut."""
    found = {(row.case, row.contender): row for row in rows}
    limit = 1.6
    for index, case in enumerate(cases):
        base = value(found[case, BASELINE]) if (case, BASELINE) in found else None
        for offset, name in enumerate(names):
            row = found.get((case, name))
            mine = None if row is None else value(row)
            if mine is None or not base:
                continue
            ratio = row.ratio.median if row and row.ratio and value is median else mine / base
            at = index * (len(names) + 1) + offset
            axes.barh(at, min(ratio, limit), color=COLOURS[name], height=0.86)
            axes.text(
                min(ratio, limit) + 0.015,
                at,
                f"{name}  {ratio:.2f}  {text(mine)}",
                va="center",
                fontsize=8,
                color=INK if name in OURS else SOFT,
                fontweight="bold" if name in OURS else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    axes.axvline(1.0, color=SOFT, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.set_xlim(0, limit + 0.75)
    axes.set_ylim(len(cases) * (len(names) + 1) - 0.8, -0.8)
    bare(axes, keep="left")
    axes.spines["left"].set_visible(False)
