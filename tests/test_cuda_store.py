"""Exponentials that a CUDA forward keeps: any share of the classes, in any memory."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest

from logitless import _core

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402
from logitless._arrays import BF16  # noqa: E402

pytestmark = pytest.mark.gpu

# (N, D, V): fewer rows than features and more; ragged tiles of rows and of classes. More
# exponentials than lean may hold, then fewer.
LARGE = [(1531, 2048, 100_003), (4099, 1024, 65539), (2100, 1032, 70_011)]
SMALL = [(1031, 2048, 30011), (600, 4096, 20011), (300, 96, 9001)]
SHAPES = LARGE + SMALL
# Bytes that buy a share of the middle of them.
MEMORY = 160 << 20
# Relative Frobenius error of a gradient, of which rounding the result to bf16 is 1.7e-3.
LIMIT = 3e-3


def make(n: int, d: int, v: int, *, ignored: float = 0.1, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device="cuda")

    w = (normal(v, d) * (1.5 / d**0.5)).bfloat16()
    e = normal(n, d)
    y = torch.randint(v, (n,), generator=generator, device="cuda")
    e[::2] += 9 / 1.5**2 * w[y[::2]].float()
    y[torch.rand(n, generator=generator, device="cuda") < ignored] = -100
    return e.bfloat16().requires_grad_(), w.requires_grad_(), y


def dense(
    e: Any, w: Any, y: Any, bias: Any = None, *, scale: Any = 1.0, softcap: float | None = None
) -> Any:
    """Row losses in float64; 0 for ignored rows."""
    z = scale * (e @ w.T)
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.nn.functional.cross_entropy(z, y, reduction="none")


def reference(leaves: Any, y: Any, cotangent: Any = None, **options: Any) -> tuple[Any, Any]:
    wide = [t.detach().double().requires_grad_() for t in leaves]
    losses = dense(wide[0], wide[1], y, *wide[2:], **options)
    total = losses.sum() / (y >= 0).sum() if cotangent is None else (losses * cotangent).sum()
    return losses.detach(), torch.autograd.grad(total, wide)


def close(actual: Any, expected: Any, limit: float = LIMIT) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.0e}"


def sizes(n: int, v: int) -> Any:
    """Bytes for about 0, 5, 30 and 80% of the classes, and for all of them."""
    return [-1, *(2 * n * v * percent // 100 for percent in (5, 30, 80)), -2]


def plan(n: int, d: int, v: int, memory: int, **options: Any) -> Any:
    spec = _core.Spec(("rest", "target"), targets=1)
    return _core.cuda_plan(spec, n, d, v, BF16, memory, 3, **options)


@pytest.mark.parametrize("share", range(5))
@pytest.mark.parametrize("shape", SHAPES)
def test_any_share(shape: Any, share: int) -> None:
    memory = sizes(shape[0], shape[2])[share]
    e, w, y = make(*shape)
    named = {-1: "lean", -2: "fast"}.get(memory, memory)
    loss = LF.linear_cross_entropy(e, w, y, memory=named)
    losses, expected = reference((e, w), y)
    assert abs(loss.item() - losses.sum().item() / (y >= 0).sum().item()) <= 1e-4
    for actual, wanted in zip(torch.autograd.grad(loss, [e, w]), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("memory", ["lean", MEMORY, "fast"])
@pytest.mark.parametrize("form", ["few", "all lengths", "buffer"])
@pytest.mark.parametrize("shape", [LARGE[2], SMALL[0]])
def test_frequent_targets(shape: Any, form: str, memory: Any) -> None:
    """Hundreds of rows of one class, among the kept ones and behind them; lists of 1 to 44 rows."""
    n, d, v = shape
    e, w, y = make(*shape)
    y[: n // 4], y[n // 4 : n // 2] = 5, v - 3
    if form == "all lengths":
        lengths = torch.arange(1, 45, device="cuda")
        ids = torch.repeat_interleave(lengths * 3, lengths)
        y[: len(ids)] = ids[torch.randperm(len(ids), device="cuda")]
    cotangent = torch.rand(n, device="cuda")
    buffer = torch.ones(v, d, device="cuda") if form == "buffer" else None
    losses = LF.linear_cross_entropy(e, w, y, memory=memory, reduction="none", grad_buffer=buffer)
    total = (losses * cotangent).sum()
    d_e, d_w = torch.autograd.grad(total, [e, w], allow_unused=buffer is not None)
    _, expected = reference((e, w), y, cotangent.double())
    close(d_e, expected[0])
    close(d_w if buffer is None else buffer - 1, expected[1])


def test_plans_say_what_is_kept() -> None:
    for n, d, v in SHAPES:
        lean = plan(n, d, v, -1, lends=2)
        assert lean.mode == ("partly stored" if (n, d, v) in LARGE else "stored")
        assert lean.on_loan
        assert lean.lent_bytes <= 2 * v * d
        assert plan(n, d, v, -1).mode == "fused"
        assert not plan(n, d, v, -1).store_bytes
    n, d, v = LARGE[1]
    bought = plan(n, d, v, n * v)
    assert bought.mode == "partly stored"
    assert 0.8 * n * v <= bought.store_bytes <= n * v
    assert plan(n, d, v, -2, lends=2).mode == "stored"
    spec = _core.Spec(("rest", "target", "entropy"), targets=1)
    fast = _core.cuda_plan(spec, n, d, v, BF16, -2, 3, lends=2)
    assert fast.mode == "partly stored"
    assert fast.store_bytes >= 2 * n * v


@pytest.mark.parametrize("memory", ["lean", MEMORY, "fast"])
@pytest.mark.parametrize("form", ["bias", "softcap", "scale", "tensor scale", "buffer", "autocast"])
@pytest.mark.parametrize("shape", [(1531, 2056, 100_003), (1100, 2056, 20011)])
def test_forms(shape: Any, form: str, memory: Any) -> None:
    n, d, v = shape
    e, w, y = make(n, d, v)
    leaves, options, exact = [e, w], {}, {}
    if form == "bias":
        leaves.append(torch.randn(v, device="cuda").bfloat16().requires_grad_())
        options["linear_bias"] = leaves[2]
    elif form == "softcap":
        options["softcap"] = exact["softcap"] = 8.0
    elif form == "scale":
        options["logit_scale"] = exact["scale"] = 0.7
    elif form == "tensor scale":
        options["logit_scale"] = torch.tensor(0.7, device="cuda")
        exact["scale"] = options["logit_scale"].double()
    elif form == "buffer":
        options["grad_buffer"] = torch.ones(v, d, device="cuda")
    elif form == "autocast":
        leaves = [t.detach().float().requires_grad_() for t in leaves]
    with torch.autocast("cuda", torch.bfloat16, enabled=form == "autocast"):
        loss = LF.linear_cross_entropy(*leaves[:2], y, memory=memory, **options)
    gradients = list(torch.autograd.grad(loss, leaves, allow_unused=form == "buffer"))
    if form == "buffer":
        assert gradients[1] is None
        gradients[1] = options["grad_buffer"] - 1
    losses, expected = reference(leaves, y, **exact)
    assert abs(loss.item() - losses.sum().item() / (y >= 0).sum().item()) <= 1e-3
    for actual, wanted in zip(gradients, expected, strict=True):
        close(actual, wanted, 4e-3)


@pytest.mark.parametrize("memory", ["lean", MEMORY])
@pytest.mark.parametrize("offset", [-500.0, -70.0, 70.0, 500.0])
@pytest.mark.parametrize("shape", [(1531, 2048, 100_003), (600, 2048, 20011)])
def test_rest_far_from_the_target(shape: Any, offset: float, memory: Any) -> None:
    """Targets far above or below the others, in the kept classes and behind them."""
    n, d, v = shape
    e, w, y = make(n, d, v, ignored=0.0)
    with torch.no_grad():
        e[:, 0], w[:, 0] = 1.0, 0.0
        y[0:9], y[300:309] = 5, v - 3
        w[5, 0] = w[v - 3, 0] = offset
    losses = LF.linear_cross_entropy(e, w, y, memory=memory, reduction="none")
    cotangent = torch.rand(n, device="cuda")
    gradients = torch.autograd.grad((losses * cotangent).sum(), [e, w])
    exact, expected = reference((e, w), y, cotangent.double())
    assert ((losses.double() - exact).abs() <= 2e-3 + 1e-5 * exact.abs()).all()
    for actual, wanted in zip(gradients, expected, strict=True):
        close(actual, wanted, 4e-3)


@pytest.mark.parametrize("shape", [(1531, 2048, 100_003), (600, 2048, 20011)])
def test_classes_that_cannot_be(shape: Any) -> None:
    """A bias of -inf: no gradient there, also where it is the target's."""
    n, d, v = shape
    e, w, y = make(n, d, v, ignored=0.0)
    b = torch.zeros(v, device="cuda", dtype=torch.bfloat16)
    b[7::13] = -torch.inf
    losses = LF.linear_cross_entropy(e, w, y, linear_bias=b, reduction="none")
    out = torch.isinf(b[y])
    assert (losses[out] == torch.inf).all()
    gradients = torch.autograd.grad(losses.sum(), [e, w])
    z = (e.detach().double() @ w.detach().double().T) + b.double()
    g = z.softmax(1)
    g[torch.arange(n, device="cuda"), y] -= 1
    close(gradients[0], g @ w.detach().double(), 4e-3)
    close(gradients[1], g.T @ e.detach().double(), 4e-3)


@pytest.mark.parametrize("memory", ["lean", MEMORY])
@pytest.mark.parametrize("every", [2, 3, 17])
@pytest.mark.parametrize("shape", [(1531, 2056, 100_003), (1100, 2056, 20011)])
def test_uneven_and_zero_cotangents(shape: Any, every: int, memory: Any) -> None:
    """Rows without a cotangent, so many that the others are made again, and fewer."""
    n = shape[0]
    e, w, y = make(*shape, ignored=0.6)
    cotangent = torch.rand(n, device="cuda") * torch.logspace(-6, 2, n, device="cuda")
    cotangent[::every] = 0.0
    losses = LF.linear_cross_entropy(e, w, y, memory=memory, reduction="none")
    gradients = torch.autograd.grad((losses * cotangent).sum(), [e, w])
    assert not gradients[0][::every].any()
    assert not gradients[0][y < 0].any()
    _, expected = reference((e, w), y, cotangent.double())
    for actual, wanted in zip(gradients, expected, strict=True):
        close(actual, wanted, 4e-3)


@pytest.mark.parametrize("shape", [(1531, 2056, 100_003), (1100, 2056, 20011)])
def test_no_cotangent_at_all(shape: Any) -> None:
    e, w, y = make(*shape, ignored=1.0)
    for ids in (y, y.clamp(min=0)):
        losses = LF.linear_cross_entropy(e, w, ids, reduction="none")
        gradients = torch.autograd.grad((losses * 0.0).sum(), [e, w])
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("memory", ["lean", MEMORY, "fast"])
@pytest.mark.parametrize("form", ["plain", "bias", "far", "softcap", "masked"])
@pytest.mark.parametrize("shape", [SMALL[0], (2100, 1032, 30011)])
def test_entropy(shape: Any, form: str, memory: Any) -> None:
    n, _, v = shape
    e, w, y = make(*shape)
    leaves, options = [e, w], {}
    generator = torch.Generator("cuda").manual_seed(5)
    g = torch.randn(2, n, generator=generator, device="cuda") * (y >= 0)
    if form == "bias":
        leaves.append(torch.randn(v, device="cuda").bfloat16().requires_grad_())
        options["linear_bias"] = leaves[2]
    elif form == "softcap":
        options["softcap"] = 8.0
    elif form == "masked":
        g *= torch.rand(n, generator=generator, device="cuda") < 0.3
    elif form == "far":
        with torch.no_grad():
            e[:, 0], w[:, 0] = 1.0, 0.0
            y[0:9], y[300:309] = 5, v - 3
            w[5, 0], w[v - 3, 0] = -90.0, 80.0
    s = LF.linear_log_prob(e, w, y, memory=memory, **options)
    kept = y >= 0
    total = (
        torch.where(kept, s.log_prob, 0.0) * g[0] + torch.where(kept, s.entropy, 0.0) * g[1]
    ).sum()
    gradients = torch.autograd.grad(total, leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z = wide[0] @ wide[1].T + (wide[2] if form == "bias" else 0.0)
    if form == "softcap":
        z = 8.0 * torch.tanh(z / 8.0)
    log_p = z.log_softmax(1)
    exact = -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(1)
    chosen = log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
    assert (s.entropy.double() - exact)[kept].abs().max() <= 2e-3
    assert (s.log_prob.double() - chosen)[kept].abs().max() <= 2e-3
    total = ((chosen * g[0] + exact * g[1]) * kept).sum()
    for actual, wanted in zip(gradients, torch.autograd.grad(total, wide), strict=True):
        close(actual, wanted, 4e-3)


@pytest.mark.parametrize("memory", ["lean", MEMORY])
@pytest.mark.parametrize("shape", [LARGE[0], SMALL[0]])
def test_a_second_backward(shape: Any, memory: Any) -> None:
    e, w, y = make(*shape)
    loss = LF.linear_cross_entropy(e, w, y, memory=memory)
    first = torch.autograd.grad(loss, [e, w], retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss, [e, w], retain_graph=True)
    third = torch.autograd.grad(loss, [e, w])
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        close(c, a.double(), 4e-3)


@pytest.mark.parametrize("shape", [LARGE[0], SMALL[0]])
def test_needs_that_changed(shape: Any) -> None:
    e, w, y = make(*shape)
    _, expected = reference((e, w), y)
    for index, leaf in enumerate((e, w)):
        loss = LF.linear_cross_entropy(e, w, y)
        (g,) = torch.autograd.grad(loss, [leaf], retain_graph=True)
        close(g, expected[index])
        (g,) = torch.autograd.grad(loss, [(e, w)[1 - index]])
        close(g, expected[1 - index])
    loss = LF.linear_cross_entropy(e.detach(), w, y)
    (g,) = torch.autograd.grad(loss, [w])
    close(g, expected[1])


def test_double_backward() -> None:
    e, w, y = make(600, 2048, 20011)
    loss = LF.linear_cross_entropy(e, w, y)
    (g,) = torch.autograd.grad(loss, [e], create_graph=True)
    (h,) = torch.autograd.grad(g.float().square().sum(), [e])
    wide = [t.detach().double().requires_grad_() for t in (e, w)]
    z = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, y)
    (g,) = torch.autograd.grad(z, [wide[0]], create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), [wide[0]])
    close(h, expected, 2e-2)


@pytest.mark.parametrize("shape", [LARGE[0], SMALL[0]])
def test_calls_side_by_side(shape: Any) -> None:
    """Two forwards before their backwards: one of them has the loan."""
    e, w, y = make(*shape)
    other = torch.where(y >= 0, (y + 1) % w.shape[0], y)
    a, b = LF.linear_cross_entropy(e, w, y), LF.linear_cross_entropy(e, w, other)
    for loss, ids in ((b, other), (a, y)):
        gradients = torch.autograd.grad(loss, [e, w])
        for actual, wanted in zip(gradients, reference((e, w), ids)[1], strict=True):
            close(actual, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory", ["lean", MEMORY])
@pytest.mark.parametrize("way", ["checkpoint", "reentrant", "compile", "func", "hooks"])
def test_ways_round_autograd(way: str, memory: Any) -> None:
    e, w, y = make(*LARGE[1])
    _, expected = reference((e, w), y)

    def loss(e: Any, w: Any) -> Any:
        return LF.linear_cross_entropy(e, w, y, memory=memory)

    if way == "func":
        gradients = torch.func.grad(loss, argnums=(0, 1))(e.detach(), w.detach())
    elif way == "hooks":
        with torch.autograd.graph.save_on_cpu():
            value = loss(e, w)
        gradients = torch.autograd.grad(value, [e, w])
    else:
        if way == "compile":
            value = torch.compile(loss, fullgraph=True)(e, w)
        else:
            value = torch.utils.checkpoint.checkpoint(loss, e, w, use_reentrant=way == "reentrant")
        value.backward()
        gradients = (e.grad, w.grad)
    for actual, wanted in zip(gradients, expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("memory", ["lean", MEMORY])
@pytest.mark.parametrize("shape", [LARGE[0], SMALL[0]])
def test_graph_and_same_bits(shape: Any, memory: Any) -> None:
    e, w, y = make(*shape)

    def step() -> Any:
        loss = LF.linear_cross_entropy(e, w, y, memory=memory)
        return (loss.detach(), *torch.autograd.grad(loss, [e, w]))

    expected = [t.clone() for t in step()]
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("shape", [(1530, 2056, 100_003), (1030, 2056, 20011)])
def test_shifted_targets(shape: Any) -> None:
    n, d = shape[:2]
    e, w, y = make(*shape)
    e, y = e.detach().view(5, n // 5, d).requires_grad_(), y.view(5, n // 5)
    loss = LF.linear_cross_entropy(e, w, y, shift=1)
    d_e, d_w = torch.autograd.grad(loss, [e, w])
    flat = e.detach()[:, :-1].reshape(-1, d).contiguous()
    _, expected = reference((flat, w), y[:, 1:].reshape(-1))
    assert not d_e[:, -1].any()
    close(d_e[:, :-1].reshape(-1, d), expected[0])
    close(d_w, expected[1])


@pytest.mark.parametrize("memory", ["lean", 200 << 20])
@pytest.mark.parametrize(
    "shape", [(4096, 1024, 65536), (2048, 2048, 65536), (8192, 1024, 50257), (1024, 1024, 32768)]
)
def test_memory_is_the_plan(shape: Any, memory: Any) -> None:
    n, d, v = shape
    e, w, y = make(*shape, ignored=0.0)
    bytes_ = -1 if memory == "lean" else memory
    sizes = plan(n, d, v, bytes_, lends=2)
    gradients = 2 * d * (n + v)

    def step() -> Any:
        loss = LF.linear_cross_entropy(e, w, y, memory=memory)
        return torch.autograd.grad(loss, [e, w])

    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    # Row statistics, losses, cotangents; torch's allocator hands out whole MiB.
    rows = 64 * n + (4 << 20)
    assert peak <= gradients + sizes.store_bytes + sizes.backward_bytes + rows
    if memory == "lean":
        assert peak <= gradients + max(gradients // 4, 256 << 20)
    # The thread of the backward lets go of the gradients a moment after it has handed them over.
    for _ in range(200):
        if torch.cuda.memory_allocated() <= before + rows:
            break
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() <= before + rows


def test_waiting_calls_keep_nothing() -> None:
    """Many forwards before their backwards: one store at most."""
    n, d, v = SMALL[0]
    e, w, y = make(n, d, v)
    one = plan(n, d, v, -1, lends=2).store_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    losses = [LF.linear_cross_entropy(e, w, y) for _ in range(5)]
    assert torch.cuda.memory_allocated() - before <= one + (5 << 20)
    gradients = [torch.autograd.grad(loss, [e, w]) for loss in losses]
    for pair in gradients[1:]:
        for a, b in zip(pair, gradients[0], strict=True):
            close(a, b.double())


def test_a_buffer_that_products_cannot_write() -> None:
    e, w, y = make(*SMALL[0])
    buffer = torch.zeros(w.shape[1], w.shape[0], device="cuda").T
    LF.linear_cross_entropy(e, w, y, grad_buffer=buffer).backward()
    _, expected = reference((e, w), y)
    close(e.grad, expected[0])
    close(buffer, expected[1])


def test_nothing_is_lent_without_gradients() -> None:
    e, w, y = make(*SMALL[0])
    LF.linear_cross_entropy(e.detach(), w.detach(), y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        loss = LF.linear_cross_entropy(e, w, y)
    assert torch.cuda.memory_allocated() - before <= 1 << 20
    del loss
