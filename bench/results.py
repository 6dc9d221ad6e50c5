"""Write RESULTS.md from what was measured: ``python bench/results.py``.

``logitless bench --json bench/results/NAME.json`` and ``bench/gpu.py --json`` leave a run there;
the other scripts of this folder print Markdown that is kept beside it. This page only puts them
together, so that no number is ever typed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from results_gpu import section as gpu_section

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "results"
PAGE = FOLDER / "RESULTS.md"
BASELINE = "eager"

HEAD = """# Measured results

Written by `python bench/results.py` from the runs in `bench/results/`; each section begins with the
command that makes it again. Ratios are times relative to torch eager on the same threads,
`F.cross_entropy(F.linear(input, weight), target)`: below 1 is faster. Interleaved runs call every
contender once a round in random order, and a ratio is the median over rounds of the ratio within a
round. Memory is the growth of resident memory during one call in a fresh process (on CUDA: of
the caching allocator); its columns show the part beyond the gradients as a share of eager's peak.
Errors are relative Frobenius errors against float64. `lean` (the default) and `fast` are the memory
modes of logitless; `products` is the matrix products alone, which no exact method avoids.
"""

Row = dict[str, Any]


def main() -> None:
    """Render every run found."""
    sections = [HEAD]
    for path in sorted(SOURCE.iterdir()):
        if path.suffix == ".json":
            run = json.loads(path.read_text())
            kernels = "shapes" in run or "edges" in run
            sections.append(gpu_section(run) if kernels else section(path.stem, run))
        elif path.suffix == ".md":
            sections.append(path.read_text().strip() + "\n")
    PAGE.write_text("\n".join(sections), encoding="utf-8")


def section(name: str, run: dict[str, Any]) -> str:
    """One run: command, machine, a line a shape, then everything."""
    lines = [f"## {name.replace('_', ' ')}", "", f"`{run['command']}` ({run['clock']})", ""]
    lines += [f"* {fact}: {value}" for fact, value in run["machine"].items()]
    lines += ["", *summary(run["rows"]), "", "<details><summary>every number</summary>", ""]
    lines += [*details(run["rows"]), "", "</details>", ""]
    return "\n".join(lines)


def summary(rows: list[Row]) -> list[str]:
    """A line a shape: ratios of every contender, memory and error of the lean mode."""
    present = dict.fromkeys(row["contender"] for row in rows if row["time"])
    names = [name for name in present if name != BASELINE]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    table: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        table.setdefault(shape(row["case"]), {})[row["mode"], row["contender"]] = row
    # Without a backward to prepare, both modes of ours do the same.
    columns = [
        (mode, name) for mode in modes for name in names if (mode, name) != ("forward", "fast")
    ]
    titles = [f"{name}, {mode}" for mode, name in columns]
    titles += [f"memory of {name}" for name in ("lean", "fast") if name in names]
    lines = [f"| N, D, V | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for label, cells in table.items():
        values = [ratio(cells.get(column)) for column in columns]
        values += [share(cells, modes[-1], name) for name in ("lean", "fast") if name in names]
        lines.append(f"| {label} | {' | '.join(values)} |")
    return lines


def shape(case: Row) -> str:
    """``1024, 512, 32768 fp32``."""
    return f"{case['rows']}, {case['features']}, {case['classes']} {case['dtype']}"


def ratio(row: Row | None) -> str:
    """Time over eager's; ours in bold."""
    if row is None or not row["ratio"]:
        return ""
    text = f"{row['ratio']['median']:.2f}"
    return f"**{text}**" if row["contender"] in ("lean", "fast") else text


def share(cells: dict[tuple[str, str], Row], mode: str, name: str) -> str:
    """Peak beyond the gradients as a share of eager's peak."""
    base, row = cells.get((mode, BASELINE)), cells.get((mode, name))
    if not base or not row or not base["peak_bytes"] or row["peak_bytes"] is None:
        return ""
    case = row["case"]
    item = {"fp32": 4, "fp64": 8}.get(case["dtype"], 2)
    gradients = case["rows"] * case["features"] * item
    if mode == "forward":
        gradients = 0
    elif mode == "forward+backward":
        gradients += case["classes"] * case["features"] * item
    beyond = max(0, row["peak_bytes"] - gradients)
    return f"{beyond / base['peak_bytes']:.1%}"


def milliseconds(seconds: float) -> str:
    """Three digits at least: ``0.0542 ms``, ``1460 ms``."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def details(rows: list[Row]) -> list[str]:
    """Every row with time, quartile spread, interval of the ratio, peak and errors."""
    lines = ["| N, D, V | work | | median | spread | x eager (95%) | peak MiB | error dE, dW |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        cells = [shape(row["case"]), row["mode"], row["contender"]]
        if not row["time"]:
            lines.append(f"| {' | '.join(cells)} | {row['reason']} | | | | |")
            continue
        time, relative, error = row["time"], row["ratio"], row["error"]
        cells.append(milliseconds(time["median"]))
        cells.append(f"{(time['upper'] - time['lower']) / time['median']:.0%}")
        cells.append(
            f"{relative['median']:.2f} ({relative['lower']:.2f}-{relative['upper']:.2f})"
            if relative
            else ""
        )
        cells.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}")
        cells.append(f"{error['d_input']:.1e}, {error['d_weight']:.1e}" if error else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
