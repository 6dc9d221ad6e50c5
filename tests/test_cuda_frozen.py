"""A head without a gradient of its own: the forward keeps sums, the backward scales them."""

from __future__ import annotations

from typing import Any

import pytest

import logitless
from logitless import _core, stats

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
# Rounding a gradient to bf16 is 1.66e-3 of its norm; the target's part, the largest, has no other
# rounding. The exponentials have one of their own: seen where there is nothing else, or no average.
ERROR, REST_ERROR = 2.5e-3, 6e-3
SHAPES = [(256, 128, 1024), (7, 33, 151), (1, 8, 2), (1, 8, 1), (300, 96, 1777), (700, 40, 50257)]


def make(
    n: int, d: int, v: int, *, ignored: float = 0.2, bias: bool = False, spread: float = 2.0
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(n + v)
    e = torch.randn(n, d, generator=generator)
    w = torch.randn(v, d, generator=generator) * (spread / d**0.5)
    b = torch.randn(v, generator=generator) if bias else None
    y = torch.randint(v, (n,), generator=generator)
    if n > 2:
        y = torch.where(torch.rand(n, generator=generator) < ignored, -100, y)
    e, w, b = (t if t is None else t.to("cuda", BF16) for t in (e, w, b))
    return e.requires_grad_(), w, b, y.cuda()


def reference(
    e: Any, w: Any, y: Any, b: Any = None, scale: float = 1.0, softcap: float | None = None
) -> tuple[Any, Any]:
    """Loss and gradient in float64."""
    leaf = e.detach().double().requires_grad_()
    z = scale * leaf @ w.double().T
    z = z if b is None else z + b.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z, y)
    return loss.detach(), torch.autograd.grad(loss, [leaf])[0]


def error(actual: Any, expected: Any) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def plan(n: int, d: int, v: int, memory: int = -1, gradients: int = 1) -> Any:
    spec = _core.Spec(("rest", "target"), targets=1)
    return _core.cuda_plan(spec, n, d, v, 2, memory, gradients)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if plan(64, 64, 640).mode != "frozen":
        pytest.skip("no kernels of the frozen head for this device")


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", ["plain", "bias", "scale", "softcap"])
def test_gradient(shape: Any, memory: str, options: str) -> None:
    e, w, b, y = make(*shape, bias=options in ("bias", "softcap"))
    keywords: dict[str, Any] = {}
    if options in ("scale", "softcap"):
        keywords["logit_scale"] = 1.5
    if options == "softcap":
        keywords["softcap"] = 3.0
    loss = LF.linear_cross_entropy(e, w, y, linear_bias=b, memory=memory, **keywords)
    (gradient,) = torch.autograd.grad(loss, [e])
    value, expected = reference(
        e, w, y, b, keywords.get("logit_scale", 1.0), keywords.get("softcap")
    )
    assert abs(loss.item() - value.item()) <= 2e-3 * max(1.0, abs(value.item()))
    # Rows of W that the copy engine cannot read (D % 8) go through a copy, and are recomputed.
    averaged = shape[1] % 8 == 0 and shape[0] > 1
    assert error(gradient, expected) <= (ERROR if averaged else REST_ERROR)
    assert not gradient[y < 0].any()


@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_rows_out_of_reach_of_their_target(offset: float) -> None:
    """Targets 500 nats off in some blocks of 256 rows, and in others not."""
    n, d, v = 1100, 64, 3000
    e, w, _, y = make(n, d, v, ignored=0.1)
    with torch.no_grad():
        far = torch.zeros(n, dtype=torch.bool, device="cuda")
        far[[3, 300, 301, 1099]] = True
        y[far] = 5
        y[~far & (y == 5)] = 6
        e[:, 0], w[:, 0], w[5, 0] = 0.0, 0.0, offset
        e[far, 0] = 1.0
    loss = LF.linear_cross_entropy(e, w, y, reduction="none")
    leaf = e.detach().double().requires_grad_()
    z = leaf @ w.double().T
    expected = torch.nn.functional.cross_entropy(z, y, reduction="none")
    assert (loss.double() - expected).abs().max() <= 1e-3 * expected.abs().max()
    # Where the target has all the probability, cross entropy's gradient vanishes: the rest alone.
    s = logitless.row_statistics(e, w, y, ignore_index=-100)
    kept = y >= 0
    (gradient,) = torch.autograd.grad(s.rest[kept].sum(), [e])
    masked = z.scatter(1, y.clamp(min=0)[:, None], -torch.inf)
    (wide,) = torch.autograd.grad(masked.logsumexp(1)[kept].sum(), [leaf])
    assert error(gradient, wide) <= REST_ERROR
    assert error(gradient[far], wide[far]) <= REST_ERROR


def test_most_rows_ignored() -> None:
    e, w, _, y = make(2048, 256, 9000, ignored=0.6)
    loss = LF.linear_cross_entropy(e, w, y)
    (gradient,) = torch.autograd.grad(loss, [e])
    assert error(gradient, reference(e, w, y)[1]) <= ERROR
    y.fill_(-100)
    total = LF.linear_cross_entropy(e, w, y, reduction="sum")
    assert not torch.autograd.grad(total, [e])[0].any()


def test_chunks_of_classes() -> None:
    """Lean's share is too small for all classes at once; a byte budget's sums too large."""
    n, d, v = 4096, 1024, 40000
    assert plan(n, d, v).chunks[0] < v
    assert plan(n, d, v, 1000).mode == "fused"
    e, w, _, y = make(n, d, v, spread=4.0)
    gradients = [
        torch.autograd.grad(LF.linear_cross_entropy(e, w, y, memory=memory), [e])[0]
        for memory in ("lean", "fast", 1000)
    ]
    rows = slice(0, 512)
    kept = (y >= 0).sum()
    z = e.detach()[rows].double() @ w.double().T
    p = z.softmax(1)
    live = y[rows] >= 0
    p[live, y[rows][live]] -= 1
    expected = live[:, None] * (p @ w.double()) / kept
    for gradient in gradients:
        assert error(gradient[rows], expected) <= REST_ERROR
    assert error(gradients[0][rows], expected) <= ERROR


def test_layouts_of_the_input() -> None:
    e, w, _, y = make(60, 40, 301, ignored=0.0)
    expected = torch.autograd.grad(LF.linear_cross_entropy(e, w, y), [e])[0]
    strided = torch.stack([e.detach()] * 2, 2).requires_grad_()
    (g,) = torch.autograd.grad(LF.linear_cross_entropy(strided[..., 1], w, y), [strided])
    assert torch.equal(g[..., 1], expected)
    wide = torch.cat([w, w], 1)[:, :40]  # rows that are not adjacent
    assert torch.equal(torch.autograd.grad(LF.linear_cross_entropy(e, wide, y), [e])[0], expected)
    shifted = e.detach().view(4, 15, 40).requires_grad_()
    loss = LF.linear_cross_entropy(shifted, w, y.view(4, 15), shift=1)
    (g,) = torch.autograd.grad(loss, [shifted])
    alone = shifted.detach()[:, :-1].reshape(-1, 40).requires_grad_()
    value = LF.linear_cross_entropy(alone, w, y.view(4, 15)[:, 1:].reshape(-1))
    assert torch.equal(g[:, :-1].reshape(-1, 40), torch.autograd.grad(value, [alone])[0])
    assert not g[:, -1].any()


def test_target_out_of_range_is_nan_in_its_row() -> None:
    e, w, _, y = make(64, 32, 500, ignored=0.0)
    y[7], y[9] = 500, -5
    losses = LF.linear_cross_entropy(e, w, y, reduction="none")
    (g,) = torch.autograd.grad(losses.sum(), [e])
    bad = torch.zeros(64, dtype=torch.bool, device="cuda")
    bad[[7, 9]] = True
    assert g[bad].isnan().all()
    assert g[~bad].isfinite().all()


def test_same_bits_twenty_times() -> None:
    e, w, _, y = make(1030, 256, 30000)
    first: Any = None
    for _ in range(20):
        loss = LF.linear_cross_entropy(e, w, y)
        bits = (loss, *torch.autograd.grad(loss, [e]))
        first = first or bits
        assert all(torch.equal(a, b) for a, b in zip(bits, first, strict=True))


def test_graph(capture: Any) -> None:
    e, w, _, y = make(384, 128, 2000)

    def step() -> tuple[Any, ...]:
        loss = LF.linear_cross_entropy(e, w, y)
        return (loss.detach(), *torch.autograd.grad(loss, [e]))

    graph, captured = capture(step)
    with torch.no_grad():
        e.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_memory_is_the_plans(peak_bytes: Any) -> None:
    n, d, v = 4096, 2048, 65536
    e, w, _, y = make(n, d, v, ignored=0.0)
    found, gradient = plan(n, d, v), 2 * n * d

    def step() -> Any:
        s = logitless.row_statistics(e, w, y, ignore_index=-100)
        return torch.autograd.grad(s.rest.sum() - s.target.sum(), [e])

    step()
    # Fields and cotangents; and remainders of less than a megabyte, which torch does not split off.
    vectors = 128 * n + (4 << 20)
    forward = found.store_bytes + found.forward_bytes
    assert forward <= gradient + (256 << 20)
    assert max(forward, found.store_bytes + gradient) <= peak_bytes(step)
    assert peak_bytes(step) <= max(forward, found.store_bytes + gradient) + vectors

    def alone() -> Any:
        with torch.no_grad():
            return logitless.row_statistics(e, w, y, ignore_index=-100).rest

    assert peak_bytes(alone) <= plan(n, d, v, gradients=0).forward_bytes + vectors
    assert plan(n, d, v, gradients=0).store_bytes == 0


@pytest.mark.filterwarnings("ignore")  # inductor has several of its own
def test_checkpoint_retained_graphs_and_compile() -> None:
    e, w, _, y = make(300, 64, 2000)

    def loss(e: Any) -> Any:
        return LF.linear_cross_entropy(e, w, y)

    value = loss(e)
    (expected,) = torch.autograd.grad(value, [e], retain_graph=True)
    assert torch.equal(torch.autograd.grad(value, [e])[0], expected)
    again = torch.utils.checkpoint.checkpoint(loss, e, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, [e])[0], expected)
    compiled = torch.compile(loss, fullgraph=True)
    assert error(torch.autograd.grad(compiled(e), [e])[0], expected.double()) <= 1e-3
    # Without numbers for its sizes a compiled call recomputes.
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    assert error(torch.autograd.grad(compiled(e), [e])[0], expected.double()) <= REST_ERROR
    (slope,) = torch.autograd.grad(loss(e), [e], create_graph=True)
    (second,) = torch.autograd.grad(slope.float().square().sum(), [e])
    assert second.isfinite().all()
    assert second.any()


def test_a_store_of_a_softcap_serves_the_weight_too() -> None:
    e, w, b, y = make(300, 96, 1777, bias=True)
    w.requires_grad_()
    b.requires_grad_()
    loss = LF.linear_cross_entropy(e, w, y, linear_bias=b, softcap=3.0, memory="fast")
    gradients = torch.autograd.grad(loss, [e, w, b])
    leaves = [t.detach().double().requires_grad_() for t in (e, w, b)]
    z = 3.0 * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / 3.0)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), leaves)
    for gradient, wide in zip(gradients, expected, strict=True):
        assert error(gradient, wide) <= 5e-3


def test_other_statistics_recompute() -> None:
    e, w, _, y = make(200, 64, 1500)
    s = logitless.row_statistics(e, w, y, want=("rest", "target", "entropy"), ignore_index=-100)
    assert torch.autograd.grad(s.entropy.sum() + s.rest.sum(), [e])[0].isfinite().all()
    ids = torch.randint(1500, (200, 3), device="cuda")
    s = logitless.row_statistics(e, w, ids, want=("rest", "target", stats.topk(2)))
    assert torch.autograd.grad(s.rest.sum(), [e])[0].isfinite().all()
