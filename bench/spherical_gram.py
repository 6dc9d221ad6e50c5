"""The Gram route beside the dense layer: ``python bench/spherical_gram.py [--device cuda]``.

Prints Markdown: for each N, V, D the time of the layer's forward and backward with the Z-loss
(loss, d input and d weight, fp32 without TF32), for

* *dense*: logits, then the same loss in eager torch; *log-softmax*: torch's cross entropy;
* *compiled*: the dense Z-loss under torch.compile (``--compile``);
* *stream* and *gram*: logitless. Gram computes its matrix anew in each step, as after an optimiser.

*of model* is what the speed-up over *dense* (and over *log-softmax*) is of the flop model,
6NVD / (4VD² + 6ND²). Then the same step with AdamW's update (fused), which reads and writes the
weight, its gradient and two moments and is the same for all.

``--break-even`` times stream and gram over N for several D and prints where they cross: the numbers
behind `logitless.spherical.choice`.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from logitless import losses, spherical
from logitless.cli.harness.machine import facts
from logitless.cli.harness.timing import interleaved, summarise
from logitless.spherical.choice import choose

SHAPES = {
    "cpu": [
        (1024, 32768, 256),
        (2048, 32768, 256),
        (8192, 32768, 256),
        (2048, 32768, 512),
        (4096, 50257, 768),
        (2048, 200_000, 128),
    ],
    "cuda": [
        (2048, 32768, 256),
        (8192, 32768, 256),
        (8192, 50257, 768),
        (8192, 128256, 512),
        (8192, 128256, 1024),
        (2048, 793471, 512),
        (4096, 793471, 512),
        (4096, 1_000_000, 128),
        (8192, 128256, 4096),
    ],
}
BREAK_EVEN_CLASSES = {"cpu": 30_000, "cuda": 150_000}
BREAK_EVEN_FEATURES = {"cpu": (64, 256, 512), "cuda": (128, 512, 1024)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
Step = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """Random features, a weight and targets."""

    input: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor

    @staticmethod
    def random(rows: int, classes: int, features: int, device: str, dtype: torch.dtype) -> Layer:
        """Features of unit size and a weight that gives logits of unit size."""
        torch.manual_seed(0)
        input = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(classes, features, device=device) / features**0.5).to(dtype)
        return Layer(input, weight.requires_grad_(), torch.randint(classes, (rows,), device=device))

    def step(self, loss: Callable[..., torch.Tensor], *, forget: bool = False) -> Step:
        """A forward and backward; ``forget`` drops the cached Gram matrix first."""

        def run() -> Any:
            if forget:
                spherical.invalidate(self.weight)
            value = loss(self.input, self.weight, self.target)
            return torch.autograd.grad(value, (self.input, self.weight))

        return run

    def training(self, loss: Callable[..., torch.Tensor]) -> Step:
        """The same with AdamW's update of the weight, which makes the matrix stale by itself."""
        weight = self.weight.detach().clone().requires_grad_()
        optimiser = torch.optim.AdamW([weight], lr=1e-6, fused=True)

        def run() -> None:
            optimiser.zero_grad(set_to_none=True)
            loss(self.input, weight, self.target).backward()
            self.input.grad = None
            optimiser.step()

        return run


def dense_zloss(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The Z-loss of stored logits."""
    logits = input @ weight.T
    variance, mean = torch.var_mean(logits, 1, correction=0)
    own = logits.gather(1, target[:, None])[:, 0]
    return F.softplus((mean - own) / (variance.sqrt() + 1e-12)).mean()


def log_softmax(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Torch's cross entropy of stored logits."""
    return F.cross_entropy(input @ weight.T, target)


def by_route(route: str) -> Callable[..., torch.Tensor]:
    """The library's Z-loss by one route."""
    return lambda *tensors: losses.zloss(*tensors, route=route)


def captured(step: Step) -> Step:
    """Replay of the step as a CUDA graph: without the time that Python takes to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def model(rows: int, classes: int, features: int) -> float:
    """Speed-up over the dense layer if flops were all: 6NVD / (4VD² + 6ND²)."""
    dense = 6 * rows * classes * features
    return dense / (4 * classes * features**2 + 6 * rows * features**2)


def medians(steps: dict[str, Step], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, interleaved."""
    found = interleaved(steps, torch.device(device), seconds, rounds=(3, 60))
    return {name: summarise(times).median * 1e3 for name, times in found.items()}


def layer_times(
    shape: tuple[int, int, int], device: str, seconds: float, *, compiled: bool, graph: bool
) -> dict[str, float]:
    """Milliseconds of every contender at one (N, V, D)."""
    layer = Layer.random(*shape, device, torch.float32)
    steps = {
        "dense": layer.step(dense_zloss),
        "log-softmax": layer.step(log_softmax),
        "stream": layer.step(by_route("stream")),
        "gram": layer.step(by_route("gram"), forget=True),
    }
    if compiled:
        steps["compiled"] = layer.step(torch.compile(dense_zloss))
    found = medians(steps, device, seconds)
    if graph:
        found["replay"] = medians({"": captured(steps["gram"])}, device, seconds / 4)[""]
    steps = {
        "dense AdamW": layer.training(dense_zloss),
        "gram AdamW": layer.training(by_route("gram")),
    }
    found |= medians(steps, device, seconds)
    del layer, steps
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def layer_table(
    shapes: list[tuple[int, int, int]], device: str, seconds: float, *, compiled: bool
) -> None:
    """Print the table of layers and whole steps."""
    graph = device == "cuda"
    columns = ["dense", "log-softmax", *(["compiled"] if compiled else []), "stream", "gram"]
    columns += ["replay"] if graph else []
    head = ["N, V, D", *columns, "model", "of model: dense", "log-softmax"]
    head += ["AdamW step: dense", "gram", "speed-up"]
    print("\nMilliseconds; *replay* is gram as a CUDA graph.\n" if graph else "\nMilliseconds.\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for shape in shapes:
        found = layer_times(shape, device, seconds, compiled=compiled, graph=graph)
        expected = model(*shape)
        cells = [", ".join(map(str, shape)), *(f"{found[name]:.2f}" for name in columns)]
        cells += [f"{expected:.2f}"]
        cells += [f"{found[n] / found['gram'] / expected:.2f}" for n in ("dense", "log-softmax")]
        cells += [f"{found[name]:.2f}" for name in ("dense AdamW", "gram AdamW")]
        cells += [f"{found['dense AdamW'] / found['gram AdamW']:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def break_even(device: str, seconds: float, dtypes: list[str]) -> None:
    """Print, over N / D, gram's time over stream's, where it is 1, and what `choose` says."""
    ratios = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    classes = BREAK_EVEN_CLASSES[device]
    for kind, forget in (("matrix computed, both gradients", True), ("matrix cached", False)):
        print(f"\nTime of gram / stream at V = {classes}, {kind}, by N / D:\n")
        print("| dtype | D | " + " | ".join(f"{r:g}" for r in ratios) + " | crosses at | choose |")
        print("|" + "---|" * (len(ratios) + 4))
        for name in dtypes:
            for features in BREAK_EVEN_FEATURES[device]:
                row = []
                for ratio in ratios:
                    rows = max(1, int(ratio * features))
                    layer = Layer.random(rows, classes, features, device, DTYPES[name])
                    steps = {
                        "stream": layer.step(by_route("stream")),
                        "gram": layer.step(by_route("gram"), forget=forget),
                    }
                    found = medians(steps, device, seconds)
                    row.append(found["gram"] / found["stream"])
                chosen = threshold(features, classes, device, DTYPES[name], fresh=not forget)
                cells = [name, str(features), *(f"{x:.2f}" for x in row)]
                cells += [crossing(ratios, row), f"{chosen:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


def crossing(ratios: tuple[float, ...], values: list[float]) -> str:
    """N / D where the interpolated ratio of times is 1, in logarithms."""
    if values[0] <= 1:
        return f"< {ratios[0]:g}"
    for (a, x), (b, y) in zip(
        zip(ratios, values, strict=True), zip(ratios[1:], values[1:], strict=True), strict=False
    ):
        if y <= 1 < x:
            share = math.log(x) / (math.log(x) - math.log(y))
            return f"{math.exp(math.log(a) + share * math.log(b / a)):.2f}"
    return f"> {ratios[-1]:g}"


def threshold(
    features: int, classes: int, device: str, dtype: torch.dtype, *, fresh: bool
) -> float:
    """Smallest N / D at which `choose` takes the Gram route."""
    rows = 1
    while rows < 64 * features and (
        choose(rows, features, classes, device=device, dtype=dtype, fresh=fresh) == "stream"
    ):
        rows += max(1, rows // 50)
    return rows / features


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for a line")
    parser.add_argument("--compile", action="store_true", help="the dense loss compiled as well")
    parser.add_argument("--break-even", action="store_true", help="only where the routes cross")
    parser.add_argument("--dtypes", default="fp32,bf16", help="of the break-even, e.g. fp32,fp64")
    parser.add_argument("--shapes", nargs="+", help="N,V,D of the table")
    parser.add_argument("--threads", type=int, help="of torch")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    command = "python bench/spherical_gram.py"
    command += f" --device {given.device}" + (" --break-even" if given.break_even else "")
    print(f"## The Gram route on {given.device}\n\n`{command}`\n")
    for name, value in facts(torch.device(given.device)).items():
        print(f"* {name}: {value}")
    if given.break_even:
        break_even(given.device, given.seconds, given.dtypes.split(","))
    else:
        shapes = SHAPES[given.device]
        if given.shapes:
            shapes = [tuple(map(int, shape.split(","))) for shape in given.shapes]
        layer_table(shapes, given.device, given.seconds, compiled=given.compile)


if __name__ == "__main__":
    main()
