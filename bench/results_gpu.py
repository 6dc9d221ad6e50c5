"""Sections of RESULTS.md from the runs of ``bench/gpu.py --json``."""

from __future__ import annotations

from statistics import median
from typing import Any

Report = dict[str, Any]

# Item, its title, and what its sustained time is a multiple of.
ITEMS = (
    ("forward", "forward / mm", "mm"),
    ("lean", "lean / 3 GEMMs", "gemms"),
    ("fast", "fast / 3 GEMMs", "gemms"),
    ("frozen", "frozen head / 3 GEMMs", "gemms"),
    ("rl lean", "log-prob + entropy, lean / lean", "lean"),
    ("rl fast", "the same, fast / fast", "fast"),
)
OURS = ("lean", "fast")
YARDSTICKS = ("mm", "gemms", "forward", "frozen", "rl forward", "rl lean", "rl fast")


def section(run: Report) -> str:
    """A run of the table or of the edges."""
    body = edges(run) if "edges" in run else [*products(run), "", *rivals(run)]
    options = {
        k: v for k, v in run["options"].items() if k in ("seconds", "warm", "passes", "rounds")
    }
    chosen = " ".join(f"--{name} {value}" for name, value in options.items())
    edge = "--edge " if "edges" in run else ""
    title = "GPU: extremes" if edge else "GPU"
    head = [f"## {title}", "", f"`python bench/gpu.py {edge}{chosen} --json FILE`", ""]
    machine = [f"* device: {run['device']}", f"* torch: {run['torch']}"]
    return "\n".join([*head, *machine, "", *body, ""])


def products(run: Report) -> list[str]:
    """Our items as multiples of the cuBLAS products, sustained and interleaved."""
    shapes = run["shapes"]
    items = [item for item in ITEMS if item[0] in shapes[0]["sustained"]]
    lines = [
        "Multiples of cuBLAS's time, sustained (each item alone, back to back; in parentheses the",
        "multiple of `mm`, interleaved). `mm` is torch.mm of E·Wᵀ, `3 GEMMs` that and the two",
        "products of the gradients, on classes padded to 64.",
        "",
        f"| N, D, V | mm ms | {' | '.join(title for _, title, _ in items)} |",
        "|---" * (len(items) + 2) + "|",
    ]
    for report in shapes:
        alone, together = report["sustained"], report["interleaved"]
        cells = [", ".join(map(str, report["shape"])), f"{median(alone['mm']):.3f}"]
        for name, _, base in items:
            beside = f" ({together[name] / together['mm']:.3f})" if base != name[3:] else ""
            cells.append(f"{over(alone, name, base):.3f}{beside}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Relative Frobenius errors of the gradients against fp32 arithmetic (rounding an exact",
        "gradient to bf16 is 1.66e-3):",
        "",
        f"| N, D, V = 8192, 1024, 32768 | {' | '.join(run['errors'])} |",
        "|---" * (len(run["errors"]) + 1) + "|",
    ]
    for index, gradient in enumerate(("dE", "dW")):
        cells = (f"{pair[index]:.2e}" for pair in run["errors"].values())
        lines.append(f"| {gradient} | {' | '.join(cells)} |")
    return lines


def rivals(run: Report) -> list[str]:
    """Forward and backward of every library: sustained time, and peak above the inputs."""
    shapes = run["shapes"]
    names = list(dict.fromkeys(n for report in shapes for n in report["sustained"]))
    names = [name for name in names if name not in YARDSTICKS]
    names.sort(key=lambda name: name in OURS)
    lines = [
        "Forward and backward, sustained; peak above the inputs, gradients included:",
        "",
        f"| N, D, V | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for report in shapes:
        cells = [", ".join(map(str, report["shape"]))]
        for name in names:
            times, peak = report["sustained"].get(name), report["peak_mib"].get(name)
            text = "" if times is None else f"{median(times):.2f} ms"
            cells.append(text if peak is None else f"{text}, {peak / 1024:.2f} GiB")
        lines.append(f"| {' | '.join(cells)} |")
    reasons = {f"`{k}`: `{v}`" for report in shapes for k, v in report["missing"].items()}
    return [*lines, *(["", "Not there: " + "; ".join(sorted(reasons)) + "."] if reasons else [])]


def edges(run: Report) -> list[str]:
    """One size at a time taken to its extremes."""
    lines = [
        "Sustained times in ms. A small case is the host's time to launch: torch eager stands",
        "beside it, and CUDA graphs leave the host out.",
        "",
        "| N, D, V | mm | forward | x mm | eager | lean | x eager | 3 GEMMs, graph | lean, graph |"
        " x 3 GEMMs | peak MiB of lean |",
        "|---" * 11 + "|",
    ]
    for report in run["edges"]:
        time, peak = report["sustained"], report["peak_mib"]["lean"]
        cells = [", ".join(map(str, report["shape"]))]
        for name, base in (("forward", "mm"), ("lean", "eager"), ("lean graph", "gemms graph")):
            cells += [f"{time[base]:.4f}", f"{time[name]:.4f}", f"{time[name] / time[base]:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {peak:.1f} |")
    return lines


def over(alone: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the passes of the ratio within a pass."""
    pairs = zip(alone[name], alone[base], strict=True)
    return median(mine / other for mine, other in pairs)
