"""What gpu.py times: cuBLAS's products, the library's losses, and others' losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import Run

import logitless.functional as LF
from logitless.cli.harness.contenders import CONTENDERS, FromLoss

OURS = ("mm", "gemms", "forward", "lean", "fast", "frozen", "rl forward", "rl lean", "rl fast")
RIVALS = ("eager", "compile", "chunked", "cce", "liger", "quack", "quack-exp")
GRADIENTS = ("lean", "fast", *RIVALS)  # items whose result is dE and dW of the cross entropy


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


def products(input: Any, weight: Any) -> tuple[Run, Run]:
    """E·Wᵀ, and all three products of a loss with gradients, into buffers made beforehand."""
    # cuBLAS leaves its fast path where rows of the logits are not 16-byte aligned: pad for it.
    rows, (classes, features) = input.shape[0], weight.shape
    padded = -(-classes // 64) * 64
    head = torch.zeros(padded, features, device="cuda", dtype=torch.bfloat16)
    head[:classes] = weight.detach()
    hidden = input.detach()
    logits = torch.empty(rows, padded, device="cuda", dtype=torch.bfloat16).normal_()
    product, d_hidden, d_head = (torch.empty_like(x) for x in (logits, hidden, head))

    def gemms() -> None:
        torch.mm(hidden, head.T, out=product)
        torch.mm(logits, head, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_head)

    return lambda: torch.mm(hidden, head.T, out=product), gemms


def items(
    rows: int, features: int, classes: int, wanted: list[str]
) -> tuple[dict[str, Run], dict[str, str]]:
    """What is timed, by name; and why the rest is not."""
    input, weight, target = problem(rows, features, classes)
    fixed = weight.detach()
    mm, gemms = products(input, weight)

    def loss(weight: Any = weight, **options: Any) -> Any:
        return LF.linear_cross_entropy(input, weight, target, ignore_index=-100, **options)

    def policy(**options: Any) -> Any:
        s = LF.linear_log_prob(input, weight, target, ignore_index=-100, **options)
        assert s.entropy is not None
        return s.log_prob.sum() + 0.01 * s.entropy.sum()

    def without_graph(value: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return value()

    def step(value: Callable[..., Any], *wanted: Any, **options: Any) -> Any:
        return torch.autograd.grad(value(**options), wanted)

    both = (input, weight)
    found: dict[str, Run] = {
        "mm": mm,
        "gemms": gemms,
        "forward": partial(without_graph, loss),
        "lean": partial(step, loss, *both),
        "fast": partial(step, loss, *both, memory="fast"),
        "frozen": partial(step, partial(loss, fixed), input),
        "rl forward": partial(without_graph, policy),
        "rl lean": partial(step, policy, *both),
        "rl fast": partial(step, policy, *both, memory="fast"),
    }
    missing: dict[str, str] = {}
    for name in set(wanted) & set(RIVALS):
        rival = CONTENDERS[name]
        assert isinstance(rival, FromLoss)
        why = rival.missing()
        try:
            if why is None:
                run = partial(step, partial(rival.build(), *both, target), *both)
                run()
                found[name] = run
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:70] if str(error) else ''}"
        if why is not None:
            missing[name] = why
    return {name: found[name] for name in wanted if name in found}, missing


def errors(
    wanted: list[str], rows: int = 8192, features: int = 1024, classes: int = 32768
) -> dict[str, tuple[float, float]]:
    """Relative Frobenius errors of dE and dW against fp32 arithmetic on the same inputs."""
    input, weight, target = problem(rows, features, classes)
    leaves = [x.detach().float().requires_grad_() for x in (input, weight)]
    value = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, target)
    expected = torch.autograd.grad(value, leaves)
    del value
    runs, _ = items(rows, features, classes, [n for n in wanted if n in GRADIENTS])
    found = {}
    for name, run in runs.items():
        pairs = zip(run(), expected, strict=True)
        d_input, d_weight = (float((a.float() - b).norm() / b.norm()) for a, b in pairs)
        found[name] = (d_input, d_weight)
    return found
