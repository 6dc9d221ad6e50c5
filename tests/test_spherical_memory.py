"""Spherical losses allocate what their plan says: counted by torch's own allocators."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.profiler import ProfilerActivity, profile  # noqa: E402

from logitless import losses, spherical  # noqa: E402

CASES: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"k": 3},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "bias": True, "k": 2},
    {"dtype": torch.float64},
    {"n": 300, "d": 16, "v": 200_000},
    {"n": 4000, "d": 24, "v": 500},
    {"frozen": True},
    {"strided": True},
    {"loss": "squared_error", "k": 2},
    {"loss": "squentropy", "v": 3000},
    {"loss": "taylor_softmax", "scale": 0.5},
]


def problem(
    device: str,
    n: int = 500,
    d: int = 64,
    v: int = 20_000,
    k: int = 1,
    dtype: Any = torch.float32,
    *,
    bias: bool = False,
    frozen: bool = False,
    strided: bool = False,
    loss: str = "zloss",
    scale: float = 1.0,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    h = torch.randn(n, 2 * d if strided else d, device=device).to(dtype)[:, -d:]
    w = torch.randn(v, d, device=device).to(dtype)
    h = h.detach().requires_grad_()
    w.requires_grad_(not frozen)
    y = torch.randint(v, (n, k) if k > 1 else (n,), device=device)
    options: dict[str, Any] = {}
    if bias:
        options["linear_bias"] = torch.randn(v, device=device).to(dtype).requires_grad_()
    call = dict(options, logit_scale=scale) if scale != 1.0 else options
    return getattr(losses, loss), (h, w, y), {"plan": options, "call": call}


def step(loss: Any, tensors: tuple[Any, ...], options: dict[str, Any], route: str) -> Any:
    value = loss(*tensors, route=route, **options)
    wanted = [t for t in (*tensors, options.get("linear_bias")) if t is not None]
    return torch.autograd.grad(value, [t for t in wanted if t.requires_grad])


def peak_on_cpu(run: Any) -> int:
    """Largest sum of what torch's CPU allocator handed out and did not get back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    sizes = sorted(
        (e.start_ns(), e.nbytes())
        for e in found.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    del kept
    now = peak = 0
    for _, size in sizes:
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("route", ["gram", "stream"])
def test_a_step_on_the_cpu_stays_within_its_plan(case: dict[str, Any], route: str) -> None:
    loss, tensors, options = problem("cpu", **case)
    step(loss, tensors, options["call"], route)
    plan = spherical.plan(loss, *tensors, route=route, **options["plan"])
    assert plan.route == route
    spherical.invalidate(tensors[1])
    peak = peak_on_cpu(lambda: step(loss, tensors, options["call"], route))
    assert peak <= plan.peak_bytes
    if route == "gram" and case.get("loss") != "squentropy":
        assert plan.peak_bytes <= 1.35 * peak


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("route", ["gram", "stream"])
def test_a_step_on_cuda_stays_within_its_plan(case: dict[str, Any], route: str) -> None:
    loss, tensors, options = problem("cuda", **case)
    step(loss, tensors, options["call"], route)  # workspaces of the matrix library come first
    plan = spherical.plan(loss, *tensors, route=route, **options["plan"])
    spherical.invalidate(tensors[1])
    torch.cuda.synchronize()
    # What was asked for: blocks that the allocator hands out may be up to 1 MiB larger.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    kept = step(loss, tensors, options["call"], route)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del kept
    assert peak <= plan.peak_bytes


def test_plans_grow_with_rows_and_classes_apart() -> None:
    def peak(n: int, v: int, route: str) -> int:
        h = torch.empty(n, 64, device="meta")
        w = torch.empty(v, 64, device="meta")
        y = torch.empty(n, dtype=torch.int64, device="meta")
        return spherical.plan(losses.zloss, h, w, y, route=route).workspace_bytes

    for route in ("gram", "stream"):
        # Without gradients: twice the classes cost nothing beside the block's size.
        assert peak(4096, 2_000_000, route) <= 1.01 * peak(4096, 1_000_000, route)
    assert peak(2**16, 2**20, "gram") < 2**36 // 100  # far from anything of N x V


def test_plan_refuses_what_the_loss_refuses() -> None:
    h, w = torch.empty(8, 4), torch.empty(100, 4)
    y = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="spherical loss"):
        spherical.plan(torch.nn.functional.cross_entropy, h, w, y)
    with pytest.raises(ValueError, match="route = 'dense'"):
        spherical.plan(losses.zloss, h, w, y, route="dense")
    with pytest.raises(ValueError, match="last dimension of 4"):
        spherical.plan(losses.zloss, h, torch.empty(100, 5), y)
