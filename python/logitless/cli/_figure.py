"""The look of every figure: colours, axes without clutter, small files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1e293b"
SOFT = "#64748b"
GRID = "#e2e8f0"
COLOURS = {
    "eager": "#94a3b8",
    "compile": "#7c8da5",
    "chunked": "#b8c4d6",
    "cce": "#9aa6c4",
    "liger": "#a9b8b0",
    "quack": "#c2b8a3",
    "products": "#e2e8f0",
    "lean": "#ea580c",
    "fast": "#fb923c",
    "rl": "#c2410c",
    "rl-fast": "#f59e0b",
}
"""Colour of each contender: ours warm, everyone else's a shade of slate."""

STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 144,
    "savefig.dpi": 144,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@contextmanager
def figure(width: float, height: float, path: Path) -> Iterator[Figure]:
    """Yield a figure of that many inches in the house style and save it to `path` at the end.

    The object-oriented interface is used throughout: no window system is touched and no global
    figure list grows.
    """
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, pil_kwargs={"optimize": True} if path.suffix == ".png" else {})


def headline(drawn: Figure, title: str, subtitle: str) -> None:
    """Two lines above the axes: what was found, and under which conditions."""
    drawn.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=14, fontweight="bold")
    drawn.text(0.012, 0.925, subtitle, ha="left", va="top", color=SOFT, fontsize=9)


def bare(axes: Axes, *, keep: str = "") -> None:
    """Remove the frame and the ticks of the axes that carry no information."""
    for side in ("left", "bottom"):
        if side not in keep:
            axes.spines[side].set_visible(False)
    if "bottom" not in keep:
        axes.set_xticks([])
    if "left" not in keep:
        axes.set_yticks([])


def note(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Text in data coordinates, vertically centred."""
    axes.text(x, y, text, va=options.pop("va", "center"), **options)
