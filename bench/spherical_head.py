"""The factored head against dense softmax layers. Run ``python bench/spherical_head.py``.

Three parts, chosen with ``--parts``:

layer
    Forward, backward and update of the last layer alone: V = 793471, D = 512, 200 rows, float32.
model
    The same heads on a 10-gram model: 10 embeddings of 200, hidden layers of 2048, 2048 and 512.
classes
    The factored layer at D = 128, 200 rows, from 10⁴ to 10⁷ classes.

Classes are numbered by frequency, and targets drawn with p ∝ 1/(rank + 2.7), as words are; every
step has a batch of its own. A figure is the median over rounds of the mean over the steps of a
round, which is a multiple of the steps between two closings of an epoch; heads take turns within a
round. TensorFloat-32 is off. Every head has plain SGD on all of its weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from logitless.cli.harness.machine import facts
from logitless.nn import SphericalHead

CLASSES, FEATURES, ROWS = 793471, 512, 200
WORDS, EMBEDDING, HIDDEN = 10, 200, 2048
BATCHES = 64
CUTOFFS = {"few": [2000, 10000], "many": [4000, 40000, 200000]}
SWEEP = [10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7]
LR = 0.1

Step = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass
class Head:
    """A last layer: its loss, its update, and what must follow a replay of a captured step."""

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    update: Callable[[], None]
    replayed: Callable[[], None] = lambda: None
    capturable: bool = True
    sweep: Callable[[], None] | None = None


def factored(classes: int, features: int, device: str, *, compiled: bool = False) -> Head:
    """The head of this library."""
    head = SphericalHead(classes, features, lr=LR, device=device, compile=compiled)
    return Head(head, head.step, head.replayed, sweep=head.matrix.consolidate)


def dense(classes: int, features: int, device: str, *, compiled: bool = False) -> Head:
    """Logits, torch's cross entropy, a dense gradient, an SGD step in place."""
    weight = torch.empty(classes, features, device=device)
    weight.uniform_(-(features**-0.5), features**-0.5).requires_grad_()

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(h @ weight.T, y)

    def update() -> None:
        with torch.no_grad():
            weight.add_(weight.grad, alpha=-LR)
        weight.grad = None

    return Head(torch.compile(loss) if compiled else loss, update)


def adaptive(classes: int, features: int, device: str, cutoffs: list[int]) -> Head:
    """torch.nn.AdaptiveLogSoftmaxWithLoss; it asks how many rows fall into each cluster."""
    layer = torch.nn.AdaptiveLogSoftmaxWithLoss(features, classes, cutoffs).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Head(lambda h, y: layer(h, y).loss, update, capturable=False)


class Body:
    """Everything below the last layer: nothing, or the 10-gram model."""

    def __init__(self, classes: int, features: int, device: str, *, model: bool) -> None:
        self.parameters: list[torch.Tensor] = []
        if not model:
            self.input = torch.randn(ROWS, features, device=device)
            return
        self.table = torch.randn(classes, EMBEDDING, device=device) * 0.1
        layers: list[torch.nn.Module] = []
        width = WORDS * EMBEDDING
        for size in (HIDDEN, HIDDEN, features):
            layers += [torch.nn.Linear(width, size, device=device), torch.nn.ReLU()]
            width = size
        self.layers = torch.nn.Sequential(*layers)
        self.parameters = list(self.layers.parameters())

    def step(self, head: Head, x: torch.Tensor, y: torch.Tensor) -> None:
        """One training step."""
        leaf = (self.table[x] if self.parameters else self.input).detach().requires_grad_()
        h = self.layers(leaf.flatten(1)) if self.parameters else leaf
        head.loss(h, y).backward()
        head.update()
        if self.parameters:
            with torch.no_grad():
                gradients = [p.grad for p in self.parameters]
                torch._foreach_add_(self.parameters, gradients, alpha=-LR)
                self.table.index_add_(0, x.flatten(), leaf.grad.flatten(0, 1), alpha=-LR)
            for parameter in self.parameters:
                parameter.grad = None


def words(classes: int, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Ids drawn like words, by inversion of the distribution."""
    total = math.log((classes + 2.7) / 2.7)
    ranks = torch.exp(torch.rand(shape, dtype=torch.float64) * total) * 2.7 - 2.7
    return ranks.long().clamp(0, classes - 1).to(device)


def stepper(body: Body, head: Head, classes: int, device: str, *, captured: bool) -> Step:
    """A function of a batch; with ``captured``, one replay of everything."""
    if not captured:
        return lambda x, y: body.step(head, x, y)
    x, y = words(classes, (ROWS, WORDS), device), words(classes, (ROWS,), device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body.step(head, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body.step(head, x, y)

    def replay(new_x: torch.Tensor, new_y: torch.Tensor) -> None:
        if body.parameters:
            x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        head.replayed()

    replay.body = body  # type: ignore[attr-defined]  # the graph works in its tensors
    return replay


def seconds_of(step: Step, batches: list[tuple[torch.Tensor, torch.Tensor]], steps: int) -> float:
    """Mean seconds of ``steps`` steps, launches included."""
    cuda = batches[0][0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(steps):
        step(*batches[i % len(batches)])
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def compare(given: argparse.Namespace, *, model: bool) -> dict[str, float]:
    """Median seconds a step of every head."""
    device, classes, features = given.device, given.classes, FEATURES
    batches = [
        (words(classes, (ROWS, WORDS), device), words(classes, (ROWS,), device))
        for _ in range(BATCHES)
    ]
    makers: dict[str, Callable[[], Head]] = {
        "factored": lambda: factored(classes, features, device),
        "factored, torch.compile": lambda: factored(classes, features, device, compiled=True),
        "dense": lambda: dense(classes, features, device),
        "dense, torch.compile": lambda: dense(classes, features, device, compiled=True),
    }
    for name, wanted in CUTOFFS.items():
        cutoffs = [cutoff for cutoff in wanted if cutoff < classes]
        makers[f"adaptive, {name} clusters"] = lambda c=cutoffs: adaptive(
            classes, features, device, c
        )
    if device == "cpu":  # fixed sizes cost more there than kernels do
        del makers["factored, torch.compile"]
    steps: dict[str, Step] = {}
    sweeps = []
    for name, make in makers.items():
        for graph in (False, True) if device == "cuda" else (False,):
            head = make()
            if head.sweep is not None:
                sweeps.append(head.sweep)
            if graph and not head.capturable:
                continue
            body = Body(classes, features, device, model=model)
            label = name + (", graph" if graph else "")
            steps[label] = stepper(body, head, classes, device, captured=graph)
    found = turns(steps, batches, given)
    # Rounds are too short to meet one: what it adds to every step, if it were spread out.
    found["its sweep over all classes, shared"] = seconds_of(lambda *_: sweeps[0](), batches, 1) / (
        classes / ROWS
    )
    return found


def turns(
    steps: dict[str, Step],
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    given: argparse.Namespace,
) -> dict[str, float]:
    """Median seconds a step; the contenders take turns, each for about the same time."""
    counts = {}
    for label, step in steps.items():
        seconds_of(step, batches, 2)  # compiles, allocates
        slow = seconds_of(step, batches, 2)
        counts[label] = max(1, min(512, int(given.seconds / slow)))
        if counts[label] > 64:
            counts[label] = counts[label] // 64 * 64
        print(f"  {label}: about {slow * 1e3:.3f} ms, {counts[label]} steps a round", flush=True)
    found: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(given.rounds):
        for label, step in steps.items():
            found[label].append(seconds_of(step, batches, counts[label]))
    return {label: median(times) for label, times in found.items()}


def sweep(given: argparse.Namespace) -> dict[int, float]:
    """Median seconds a step at growing numbers of classes; steps as many as fill two epochs."""
    device, features = given.device, 128
    result = {}
    for classes in SWEEP:
        batches = [
            (words(10, (1, 1), device), words(classes, (ROWS,), device)) for _ in range(BATCHES)
        ]
        body = Body(classes, features, device, model=False)
        head = factored(classes, features, device)
        step = stepper(body, head, classes, device, captured=device == "cuda")
        seconds_of(step, batches, 256)
        result[classes] = median(seconds_of(step, batches, 512) for _ in range(given.rounds))
        print(f"  V = {classes}: {result[classes] * 1e3:.3f} ms", flush=True)
        del head, step, body
    return result


def table(title: str, found: dict[str, float]) -> str:
    """A Markdown table of heads, and what the factored one gains over each."""
    best = min(seconds for name, seconds in found.items() if name.startswith("factored"))
    lines = [f"\n### {title}\n", "| head | ms a step | times the fastest |", "|---|---|---|"]
    lines += [f"| {n} | {s * 1e3:.3f} | {s / best:.2f} |" for n, s in found.items()]
    return "\n".join(lines)


def draw(found: dict[int, float], path: Path) -> None:
    """Milliseconds by number of classes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    axes.plot(list(found), [s * 1e3 for s in found.values()], "o-")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.5e3 * max(found.values()))
    axes.set_xlabel("classes")
    axes.set_ylabel("ms a step")
    axes.set_title("Forward, backward and update: D = 128, 200 rows", fontsize=10)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the chosen parts; print Markdown, write JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=["layer", "model", "classes"])
    parser.add_argument("--classes", type=int, default=CLASSES, help="of layer and model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a head in a round")
    parser.add_argument("--output", type=Path, help="prefix of the .json, .md and .png")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    record: dict[str, object] = {"facts": facts(torch.device(given.device))}
    command = f"python bench/spherical_head.py --device {given.device}"
    page = [f"## The factored head\n\n`{command}`: medians of {given.rounds} rounds, float32\n"]
    page += [f"* {name}: {value}" for name, value in record["facts"].items()]  # type: ignore[attr-defined]
    for name, model in (("layer", False), ("model", True)):
        if name in given.parts:
            found = compare(given, model=model)
            record[name] = found
            what = "10-gram model" if model else "Layer"
            title = f"{what}, V = {given.classes}, D = {FEATURES}, {ROWS} rows"
            page.append(table(title, found))
    if "classes" in given.parts:
        by_classes = sweep(given)
        record["classes"] = by_classes
        page.append(f"\n### Layer, D = 128, {ROWS} rows\n\n| V | ms a step |\n|---|---|")
        page += [f"| {v} | {s * 1e3:.3f} |" for v, s in by_classes.items()]
        if given.output:
            draw(by_classes, given.output.with_suffix(".png"))
    text = "\n".join(page)
    print(text)
    if given.output:
        given.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        given.output.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
