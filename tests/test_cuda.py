"""CUDA tensors through the public functions: the CPU suite's promises, and what only a GPU has."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest

import logitless
from logitless import stats, testing

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Largest error of values in units of their scale, and relative Frobenius error of gradients.
VALUE = {"bfloat16": 2e-3, "float16": 2e-3, "float32": 5e-5, "float64": 1e-10}
GRADIENT = {"bfloat16": 8e-3, "float16": 4e-3, "float32": 5e-5, "float64": 1e-9}
# Shapes: (N, D, V). Tiles cut cleanly, and not at all.
SHAPES = [(256, 128, 1024), (7, 33, 151), (1, 8, 2), (300, 96, 1777), (130, 64, 50257)]
FIELDS = (
    "rest",
    "target",
    "lse",
    "log_prob",
    "entropy",
    "sum",
    "sum_sq",
    "mean",
    "variance",
    "max",
)


def make(
    n: int, d: int, v: int, dtype: Any, *, seed: int = 0, ignored: float = 0.2, bias: bool = False
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=generator)
    w = torch.randn(v, d, generator=generator) * (2.0 / d**0.5)
    b = torch.randn(v, generator=generator) if bias else None
    y = torch.randint(v, (n,), generator=generator)
    if n > 2:
        y = torch.where(torch.rand(n, generator=generator) < ignored, -100, y)
    tensors = [t if t is None else t.to("cuda", dtype).requires_grad_() for t in (e, w, b)]
    return (*tensors, y.cuda())


def dense(e: Any, w: Any, b: Any, *, scale: float = 1.0, softcap: float | None = None) -> Any:
    z = scale * e.detach().double() @ w.detach().double().T
    if b is not None:
        z = z + b.detach().double()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def close(actual: Any, expected: Any, limit: float) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.0e}"


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7, "softcap": 20.0}])
def test_statistics_and_gradients(name: str, shape: Any, options: Any) -> None:
    dtype, bias = DTYPES[name], bool(options)
    e, w, b, y = make(*shape, dtype, bias=bias)
    s = logitless.row_statistics(e, w, y, want=FIELDS, linear_bias=b, **options)
    arrays = [None if t is None else t.detach().double().cpu().numpy() for t in (e, w, b)]
    reference, vjp = testing.row_statistics(
        arrays[0],
        arrays[1],
        y.cpu().numpy(),
        linear_bias=arrays[2],
        ignore_index=-100,
        **options,
    )
    total = 0.0
    cotangents = {}
    generator = torch.Generator().manual_seed(1)
    kept = y >= 0  # of ignored rows only the core fields are promised (0); a loss masks them
    for field in FIELDS:
        value = torch.where(kept, getattr(s, field), 0.0)
        expected = torch.where(kept, torch.from_numpy(reference[field]).cuda(), 0.0)
        size = max(1.0, expected[expected.isfinite()].abs().max().item()) if expected.numel() else 1
        finite = expected.isfinite()
        assert torch.equal(value.double()[~finite], expected[~finite]), field
        worst = (value.double() - expected)[finite].abs().max().item() if finite.any() else 0.0
        assert worst <= VALUE[name] * size, (field, worst, size)
        if finite.all():
            # Variance-like fields grow as V: keep every cotangent's share of the gradient alike.
            g = torch.randn(shape[0], generator=generator, dtype=torch.float64) / size
            g = torch.where(s.kept.cpu(), g, 0.0)
            g = g * kept.cpu()
            cotangents[field] = g.numpy()
            total = total + (value.double() * g.cuda()).sum()
    leaves = [t for t in (e, w, b) if t is not None]
    gradients = torch.autograd.grad(total, leaves)
    expected = vjp(**cotangents)
    for gradient, key in zip(gradients, ("input", "linear_weight", "linear_bias"), strict=False):
        close(gradient, torch.from_numpy(expected[key]).cuda(), GRADIENT[name])


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_statistics_with_parameters(name: str) -> None:
    n, d, v, k = 70, 40, 600, 3
    e, w, _, _ = make(n, d, v, DTYPES[name])
    ids = torch.randint(v, (n, k), device="cuda")
    ids[1, 0] = ids[1, 1]
    ids[2, 2] = -100
    ids[3] = -100
    c = torch.randn(2, v, device="cuda")
    q = torch.rand(n, v, device="cuda")
    want = (
        "rest",
        "target",
        "entropy",
        stats.power_lse(2.0),
        stats.weighted(c),
        stats.dot(q),
        stats.topk(8),
    )
    s = logitless.row_statistics(e, w, ids, want=want)
    z = dense(e, w, None)
    kept = (ids >= 0).any(1)
    z = z[kept]
    p = z.softmax(1)
    limit = VALUE[name] * z.abs().max().item()
    for value, expected in (
        (s.lse, torch.logsumexp(z, 1)),
        (s.power_lse, torch.logsumexp(2 * z, 1)),
        (s.weighted_mean, p @ c.double().T),
        (s.topk_values, z.topk(8, dim=1).values),
        (s.entropy, -(p * z.log_softmax(1)).sum(1)),
    ):
        assert (value[kept].double() - expected).abs().max() <= 2 * limit
    close(s.weighted_sum[kept], z @ c.double().T, GRADIENT[name])
    close(s.dot[kept], (q[kept].double() * z).sum(1), GRADIENT[name])
    total = s.lse.sum() + s.power_lse.sum() + s.weighted_mean.sum() + s.topk_values.sum()
    gradients = torch.autograd.grad(total, [e, w])
    leaf = [t.detach().double().requires_grad_() for t in (e, w)]
    z = (leaf[0] @ leaf[1].T)[kept]
    reference = torch.logsumexp(z, 1).sum() + torch.logsumexp(2 * z, 1).sum()
    reference = reference + (z.softmax(1) @ c.double().T).sum() + z.topk(8, dim=1).values.sum()
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, leaf), strict=True):
        close(gradient, expected, GRADIENT[name])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("memory", ["lean", "fast", 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(name: str, memory: Any, shape: Any) -> None:
    e, w, _, y = make(*shape, DTYPES[name])
    loss = LF.linear_cross_entropy(e, w, y, memory=memory)
    gradients = torch.autograd.grad(loss, [e, w])
    leaf = [t.detach().double().requires_grad_() for t in (e, w)]
    reference = torch.nn.functional.cross_entropy(leaf[0] @ leaf[1].T, y)
    assert abs(loss.item() - reference.item()) <= VALUE[name] * max(1.0, abs(reference.item()))
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, leaf), strict=True):
        assert gradient.dtype == DTYPES[name]
        close(gradient, expected, GRADIENT[name])


def test_options_agree_with_torch() -> None:
    e, w, b, y = make(96, 48, 700, torch.float32, bias=True)
    weight = torch.rand(700, device="cuda") + 0.1
    z = (e @ w.T + b).double()
    for options in (
        {"label_smoothing": 0.1},
        {"weight": weight},
        {"weight": weight, "label_smoothing": 0.2},
        {"reduction": "sum"},
        {"reduction": "none"},
    ):
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        expected = torch.nn.functional.cross_entropy(z, y, **wide)
        actual = LF.linear_cross_entropy(e, w, y, linear_bias=b, **options)
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-4)
    q = torch.softmax(torch.randn(96, 700, device="cuda"), 1)
    expected = torch.nn.functional.cross_entropy(z, q.double())
    actual = LF.linear_cross_entropy(e, w, q, linear_bias=b)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("offset", [-500.0, 500.0])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_rest_far_from_the_target(name: str, offset: float) -> None:
    """The target 500 nats above or below the others."""
    n, d, v = 160, 64, 900
    e, w, _, y = make(n, d, v, DTYPES[name], ignored=0.0)
    with torch.no_grad():
        y.fill_(5)
        e[:, 0], w[:, 0], w[5, 0] = 1.0, 0.0, offset
    s = logitless.row_statistics(e, w, y)
    z = dense(e, w, None)
    z[:, 5] = -torch.inf
    assert (s.rest.double() - torch.logsumexp(z, 1)).abs().max() <= 2e-3
    loss = -s.log_prob.sum()
    (g,) = torch.autograd.grad(loss, [e])
    assert g.isfinite().all()


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_same_bits_a_hundred_times(memory: str) -> None:
    """Also while another stream keeps the device busy."""
    e, w, _, y = make(520, 256, 3001, torch.bfloat16)
    busy, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    first: Any = None
    for round_ in range(100):
        if round_ >= 50:
            with torch.cuda.stream(side):
                busy = busy @ busy * 1e-3
        loss = LF.linear_cross_entropy(e, w, y, memory=memory)
        bits = (loss, *torch.autograd.grad(loss, [e, w]))
        first = first or bits
        assert all(torch.equal(a, b) for a, b in zip(bits, first, strict=True))


def _sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the mode itself a prototype
        torch.cuda.set_sync_debug_mode(mode)


def test_nothing_synchronises() -> None:
    e, w, b, y = make(512, 128, 4096, torch.bfloat16, bias=True)
    scale = torch.tensor(0.9, device="cuda", requires_grad=True)
    for options in ({}, {"memory": "fast"}, {"softcap": 30.0, "logit_scale": scale}):
        for _ in range(2):  # the first call loads kernels
            torch.cuda.synchronize()
            _sync_debug_mode("error")
            try:
                loss = LF.linear_cross_entropy(e, w, y, linear_bias=b, **options)
                loss.backward()
            finally:
                _sync_debug_mode("default")


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_cuda_graph(memory: str, capture: Any) -> None:
    e, w, _, y = make(384, 128, 2000, torch.bfloat16)

    def step() -> tuple[Any, ...]:
        loss = LF.linear_cross_entropy(e, w, y, memory=memory)
        return (loss.detach(), *torch.autograd.grad(loss, [e, w]))

    expected = [t.clone() for t in step()]
    graph, captured = capture(step)
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    with torch.no_grad():
        e.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_first_call_in_a_capture() -> None:
    """A fresh process may begin with a capture: images load without breaking it."""
    script = """
        import torch, logitless.functional as LF
        e = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(500, 64, device="cuda", dtype=torch.bfloat16)
        y = torch.randint(500, (64,), device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = LF.linear_cross_entropy(e, w, y)
        graph.replay()
        assert abs(loss.item() - LF.linear_cross_entropy(e, w, y).item()) < 1e-6
    """
    _run(script)


def test_side_streams_and_threads() -> None:
    e, w, _, y = make(300, 96, 1500, torch.bfloat16)
    expected = torch.autograd.grad(LF.linear_cross_entropy(e, w, y), [e, w])
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            results.append(torch.autograd.grad(LF.linear_cross_entropy(e, w, y), [e, w]))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_memory_stays_in_its_promise(memory: str, peak_bytes: Any) -> None:
    n, d, v = 4096, 1024, 65536
    e, w, _, y = make(n, d, v, torch.bfloat16, ignored=0.0)

    def step() -> Any:
        loss = LF.linear_cross_entropy(e, w, y, memory=memory)
        return torch.autograd.grad(loss, [e, w])

    step()
    gradients = 2 * (n * d + v * d)
    limit = gradients + max(gradients // 4, 256 << 20)
    if memory == "fast":
        limit += 3 * n * v
    assert peak_bytes(step) <= limit


def test_masked_rows_are_left_out() -> None:
    """60% of the tokens ignored: the gradients of the others, as if they were alone."""
    # Large enough that the device, not Python, sets the time.
    e, w, _, y = make(8192, 2048, 65536, torch.bfloat16, ignored=0.0)
    masked = torch.where(torch.arange(8192, device="cuda") % 5 < 3, -100, y)

    keep = masked >= 0
    loss = LF.linear_cross_entropy(e, w, masked)
    d_e, d_w = torch.autograd.grad(loss, [e, w])
    assert not d_e[~keep].any()
    small = e.detach()[keep].requires_grad_()
    expected = torch.autograd.grad(LF.linear_cross_entropy(small, w, y[keep]), [small, w])
    close(d_e[keep], expected[0].double(), 3e-3)
    close(d_w, expected[1].double(), 3e-3)


def test_only_wanted_gradients() -> None:
    e, w, b, y = make(200, 64, 1000, torch.bfloat16, bias=True)
    both = torch.autograd.grad(LF.linear_cross_entropy(e, w, y, linear_bias=b), [e, w, b])
    (d_e,) = torch.autograd.grad(LF.linear_cross_entropy(e, w.detach(), y, linear_bias=b), [e])
    (d_w,) = torch.autograd.grad(LF.linear_cross_entropy(e.detach(), w, y, linear_bias=b), [w])
    close(d_e, both[0].double(), 3e-3)
    close(d_w, both[1].double(), 3e-3)


def test_target_out_of_range_is_nan_in_its_row() -> None:
    e, w, _, y = make(64, 32, 500, torch.bfloat16, ignored=0.0)
    y[7], y[9] = 500, -5
    losses = LF.linear_cross_entropy(e, w, y, reduction="none")
    bad = torch.zeros(64, dtype=torch.bool, device="cuda")
    bad[[7, 9]] = True
    assert losses[bad].isnan().all()
    assert losses[~bad].isfinite().all()
    script = """
        import torch, logitless.functional as LF
        e, w = torch.randn(8, 16, device="cuda"), torch.randn(50, 16, device="cuda")
        y = torch.full((8,), 3, device="cuda"); y[5] = 77
        try:
            LF.linear_cross_entropy(e, w, y)
        except IndexError as error:
            assert "target[5] = 77" in str(error), error
        else:
            raise SystemExit("no error")
    """
    _run(script, LOGITLESS_CHECK="1")


@pytest.mark.parametrize("layout", ["transposed", "strided", "unaligned", "expanded", "leading"])
def test_layouts(layout: str) -> None:
    e, w, _, y = (t if t is None else t.detach() for t in make(60, 33, 301, torch.bfloat16))
    expected = LF.linear_cross_entropy(e, w, y)
    if layout == "transposed":
        e, w = e.T.contiguous().T, w.T.contiguous().T
    elif layout == "strided":
        e, w = torch.stack([e, e], 1)[:, 0], torch.stack([w, w], 2)[..., 1]
    elif layout == "unaligned":
        e = torch.cat([e.flatten()[:1], e.flatten()])[1:].view(60, 33)
    elif layout == "expanded":
        e, y = e[:1].expand(60, 33), y.clone().fill_(3)
        expected = LF.linear_cross_entropy(e.contiguous(), w, y)
    else:
        e, y = e.view(3, 20, 33), y.view(3, 20)
    torch.testing.assert_close(LF.linear_cross_entropy(e, w, y), expected, rtol=1e-5, atol=1e-5)


def test_shift_on_the_device() -> None:
    e, w, _, _ = make(120, 64, 400, torch.bfloat16)
    e = e.detach().view(4, 30, 64).requires_grad_()
    y = torch.randint(400, (4, 30), device="cuda")
    loss = LF.linear_cross_entropy(e, w, y, shift=1)
    expected = LF.linear_cross_entropy(e[:, :-1].contiguous(), w, y[:, 1:].contiguous())
    torch.testing.assert_close(loss, expected)
    (d,) = torch.autograd.grad(loss, [e])
    assert not d[:, -1].any()


def test_more_logits_than_32_bits_count() -> None:
    n, d, v = 40000, 16, 60000
    e, w, _, y = make(n, d, v, torch.bfloat16, ignored=0.0)
    loss = LF.linear_cross_entropy(e, w, y, reduction="none")
    loss.sum().backward()
    rows = torch.tensor([0, n // 2, n - 1], device="cuda")
    z = dense(e[rows], w, None)
    expected = torch.nn.functional.cross_entropy(z, y[rows], reduction="none")
    assert (loss[rows].double() - expected).abs().max() <= 1e-3
    g = z.softmax(1)
    g[torch.arange(3), y[rows]] -= 1
    close(e.grad[rows], g @ w.detach().double(), 8e-3)


def test_empty_and_all_ignored() -> None:
    e, w, _, y = make(16, 32, 100, torch.bfloat16)
    empty = LF.linear_cross_entropy(e[:0], w, y[:0], reduction="sum")
    assert empty.item() == 0.0
    y.fill_(-100)
    assert LF.linear_cross_entropy(e, w, y, reduction="sum").item() == 0.0
    mean = LF.linear_cross_entropy(e, w, y)
    assert mean.isnan()
    d_e, d_w = torch.autograd.grad(LF.linear_cross_entropy(e, w, y, reduction="sum"), [e, w])
    assert not d_e.any()
    assert not d_w.any()


@pytest.mark.filterwarnings("ignore")  # inductor has several of its own
def test_autocast_checkpoint_and_compile() -> None:
    body, head = torch.nn.Linear(32, 64).cuda(), torch.nn.Linear(64, 800, bias=False).cuda()
    x, y = torch.randn(128, 32, device="cuda"), torch.randint(800, (128,), device="cuda")

    def loss() -> Any:
        return LF.linear_cross_entropy(body(x), head.weight, y)

    with torch.autocast("cuda", torch.bfloat16):
        low = loss()
    low.backward()
    assert low.dtype == torch.float32
    assert head.weight.grad.dtype == torch.float32
    expected = loss()
    assert abs(low.item() - expected.item()) <= 5e-2
    checkpointed = torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)
    gradients = [torch.autograd.grad(t, head.weight)[0] for t in (expected, checkpointed)]
    assert torch.equal(*gradients)
    compiled = torch.compile(loss, fullgraph=True)()
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    (g,) = torch.autograd.grad(compiled, head.weight)
    close(g, gradients[0].double(), 1e-3)


def test_sharded_head_on_one_gpu(tmp_path: Any) -> None:
    script = f"""
        import torch, logitless.nn
        from torch.distributed.fsdp import fully_shard
        torch.distributed.init_process_group(
            "nccl", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        head = logitless.nn.LinearCrossEntropyLoss(64, 500, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = torch.randint(500, (40,), device="cuda")
        # Without a backward to come: beside one the sharded head would keep nothing, and recompute.
        expected = head(x, y).detach()
        fully_shard(head)
        loss = head(x, y)
        loss.backward()
        assert torch.equal(loss, expected), (loss, expected)
        assert all(p.grad is not None for p in head.parameters())
        torch.distributed.destroy_process_group()
    """
    _run(script)


def test_use_after_fork_is_refused() -> None:
    script = """
        import os, torch, logitless.functional as LF
        e, w = torch.randn(8, 16, device="cuda"), torch.randn(50, 16, device="cuda")
        y = torch.full((8,), 3, device="cuda")
        LF.linear_cross_entropy(e, w, y)
        child = os.fork()
        if child == 0:
            try:
                LF.linear_cross_entropy(e, w, y)
            except RuntimeError as error:
                os._exit(0 if "fork" in str(error) else 3)
            os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    _run(script)


def test_several_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    e, w, _, y = make(100, 64, 900, torch.bfloat16)
    expected = LF.linear_cross_entropy(e, w, y)
    moved = LF.linear_cross_entropy(e.to("cuda:1"), w.to("cuda:1"), y.to("cuda:1"))
    assert moved.device.index == 1
    assert moved.item() == expected.item()
    with pytest.raises(ValueError, match="device"):
        LF.linear_cross_entropy(e, w.to("cuda:1"), y)


def test_own_loss() -> None:
    @logitless.row_loss(want=("rest", "target"))
    def focal(s: Any, *, gamma: float = 2.0) -> Any:
        log_p = torch.nn.functional.logsigmoid(s.target - s.rest)
        return -((-torch.expm1(log_p)) ** gamma) * log_p

    e, w, _, y = make(90, 48, 700, torch.float32)
    loss = focal(e, w, y, gamma=1.5)
    leaf = [t.detach().double().requires_grad_() for t in (e, w)]
    kept = y >= 0
    log_p = (leaf[0] @ leaf[1].T)[kept].log_softmax(1).gather(1, y[kept][:, None])[:, 0]
    reference = (-((-torch.expm1(log_p)) ** 1.5) * log_p).mean()
    assert abs(loss.item() - reference.item()) <= 1e-4
    gradients = torch.autograd.grad(loss, [e, w])
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, leaf), strict=True):
        close(gradient, expected, 1e-4)


def test_spherical_routes_and_head() -> None:
    from logitless import losses
    from logitless.nn import SphericalHead

    h, w, _, y = make(400, 24, 900, torch.float32)
    stream = losses.zloss(h, w, y, route="stream")
    gram = losses.zloss(h, w, y, route="gram")
    torch.testing.assert_close(gram, stream, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(stream, [h, w]), torch.autograd.grad(gram, [h, w]), strict=True
    ):
        close(a, b.double(), 1e-3)
    head = SphericalHead(900, 24, lr=1.0, device="cuda", dtype=torch.float64)
    dense = head.weight().requires_grad_()
    features = h.detach().double()
    head(features, y).backward()
    head.step()
    (g,) = torch.autograd.grad(losses.zloss(features, dense, y, route="gram"), [dense])
    torch.testing.assert_close(head.weight(), dense - g, rtol=1e-10, atol=1e-12)


def _run(script: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
