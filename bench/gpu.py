"""The table of a GPU: cross entropy beside the cuBLAS products that it contains.

    python bench/gpu.py [--seconds 0.5] [--rounds 12] [--json FILE]

For each shape, in bf16: `mm` is torch.mm of E·Wᵀ, `gemms` that and the two products of the
gradients. Each item is timed twice: *interleaved*, once a round in random order, the median of the
rounds (all items share a clock); and *sustained*, back to back alone for `--seconds` after as much
of warming up (a power-limited card lowers its clock under a heavy kernel: what a training loop
sees). Ratios are to `mm` interleaved and to `gemms` sustained; `forward` is to `mm` in both.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import logitless.functional as LF

SHAPES = [
    (8192, 2304, 256000),
    (8192, 4096, 128256),
    (8192, 3584, 152064),
    (8192, 5120, 131072),
    (8192, 1024, 65536),
    (8192, 3072, 32064),
    (8192, 768, 50257),
]
Run = Callable[[], Any]


def problem(rows: int, features: int, classes: int) -> tuple[Any, ...]:
    """Random head with half of the rows confident, and one row in a hundred ignored."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight = (normal(classes, features) * 1.5 / features**0.5).bfloat16()
    input = normal(rows, features)
    target = torch.randint(classes, (rows,), generator=generator, device="cuda")
    input[::2] += 9 / 1.5**2 * weight[target[::2]].float()
    target[torch.rand(rows, generator=generator, device="cuda") < 0.01] = -100
    return input.bfloat16().requires_grad_(), weight.requires_grad_(), target


def items(rows: int, features: int, classes: int) -> dict[str, Run]:
    """What is timed, by name."""
    input, weight, target = problem(rows, features, classes)
    # cuBLAS leaves its fast path where rows of the logits are not 16-byte aligned: pad for it.
    padded = -(-classes // 64) * 64
    head = torch.zeros(padded, features, device="cuda", dtype=torch.bfloat16)
    head[:classes] = weight.detach()
    hidden = input.detach()
    logits = torch.empty(rows, padded, device="cuda", dtype=torch.bfloat16).normal_()

    def step(**options: Any) -> Any:
        loss = LF.linear_cross_entropy(input, weight, target, ignore_index=-100, **options)
        return torch.autograd.grad(loss, (input, weight))

    def frozen() -> Any:
        fixed = weight.detach()
        loss = LF.linear_cross_entropy(input, fixed, target, ignore_index=-100)
        return torch.autograd.grad(loss, input)

    def policy(**options: Any) -> Any:
        s = LF.linear_log_prob(input, weight, target, ignore_index=-100, **options)
        total = s.log_prob.sum() + 0.01 * s.entropy.sum()
        return torch.autograd.grad(total, (input, weight))

    def forward() -> Any:
        with torch.no_grad():
            return LF.linear_cross_entropy(input, weight, target, ignore_index=-100)

    def gemms() -> Any:
        torch.mm(hidden, head.T, out=product)
        torch.mm(logits, head, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_head)

    product, d_hidden, d_head = (torch.empty_like(x) for x in (logits, hidden, head))
    return {
        "mm": lambda: torch.mm(hidden, head.T, out=product),
        "gemms": gemms,
        "forward": forward,
        "lean": step,
        "fast": lambda: step(memory="fast"),
        "frozen": frozen,
        "rl lean": policy,
    }


def elapsed(run: Run, times: int = 1) -> float:
    """Milliseconds of one of `times` runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median time of each item, one of each a round, in random order."""
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in order:
        runs[name]()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(elapsed(runs[name]))
    return {name: median(values) for name, values in times.items()}


def sustained(run: Run, seconds: float) -> float:
    """Time of one run among many, after as many to warm up."""
    times = max(3, int(seconds * 1e3 / elapsed(run)))
    elapsed(run, times)
    return elapsed(run, times)


def errors(rows: int = 2048, features: int = 1024, classes: int = 32768) -> dict[str, float]:
    """Relative Frobenius error of the gradients against fp32 arithmetic on the same inputs."""
    input, weight, target = problem(rows, features, classes)
    leaves = [x.detach().float().requires_grad_() for x in (input, weight)]
    loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, target)
    expected = torch.autograd.grad(loss, leaves)
    found = {}
    for memory in ("lean", "fast"):
        mine = LF.linear_cross_entropy(input, weight, target, ignore_index=-100, memory=memory)
        got = torch.autograd.grad(mine, (input, weight))
        for name, a, b in zip(("dE", "dW"), got, expected, strict=True):
            found[f"{memory} {name}"] = float((a.float() - b).norm() / b.norm())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    random.seed(0)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{report['device']}, torch {report['torch']}")
    print("errors against fp32:", {k: f"{v:.2e}" for k, v in errors().items()})
    report["shapes"] = []
    for shape in SHAPES:
        runs = items(*shape)
        together = interleaved(runs, arguments.rounds)
        alone = {name: sustained(run, arguments.seconds) for name, run in runs.items()}
        report["shapes"].append({"shape": shape, "interleaved": together, "sustained": alone})
        print(f"{shape}: mm {together['mm']:.3f} | {alone['mm']:.3f} ms", flush=True)
        for name in list(runs)[1:]:
            base = "mm" if name in ("forward", "gemms") else "gemms"
            print(
                f"    {name:8s} {together[name]:8.3f} ms = {together[name] / together['mm']:.3f} mm"
                f" | {alone[name]:8.3f} ms = {alone[name] / alone[base]:.3f} {base}"
            )
        del runs
        torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
