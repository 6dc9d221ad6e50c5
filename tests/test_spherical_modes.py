"""Spherical losses under torch.compile, checkpointing, autocast, torch.func and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from logitless import losses, spherical  # noqa: E402
from logitless.spherical.gram import gram, is_fresh  # noqa: E402

ROUTES = ["gram", "stream"]


def problem(device: str = "cpu", n: int = 40, d: int = 8, v: int = 300) -> tuple[Any, Any, Any]:
    h = torch.randn(n, d, device=device, requires_grad=True)
    w = torch.randn(v, d, device=device, requires_grad=True)
    y = torch.randint(v, (n,), device=device)
    y[3] = -100
    return h, w, y


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def step(route: str, h: Any, w: Any, y: Any, **options: Any) -> tuple[Any, ...]:
    loss = losses.zloss(h, w, y, route=route, a=0.5, b=2.0, **options)
    return (loss.detach(), *torch.autograd.grad(loss, [h, w]))


# torch.compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["gram", "stream", "auto"])
@pytest.mark.parametrize("bias", [False, True])
def test_compiles_without_a_graph_break(route: str, bias: bool) -> None:
    torch._dynamo.reset()
    h, w, y = problem()
    b = torch.randn(300, requires_grad=True) if bias else None
    scale = torch.tensor(0.7, requires_grad=True)
    leaves = [t for t in (h, w, b, scale) if t is not None]

    def loss(h: Any, w: Any, b: Any, scale: Any, y: Any) -> Any:
        return losses.zloss(h, w, y, linear_bias=b, logit_scale=scale, route=route)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = torch.autograd.grad(loss(h, w, b, scale, y), leaves)
        close(torch.autograd.grad(compiled(h, w, b, scale, y), leaves), expected)
        with torch.no_grad():
            w.add_(0.3)  # the second call must see the new weight


@pytest.mark.parametrize("route", ROUTES)
def test_compiled_calls_refuse_ids_out_of_range(route: str) -> None:
    torch._dynamo.reset()
    h, w, y = problem()
    y[0] = 300
    compiled = torch.compile(
        lambda h, w, y: losses.zloss(h, w, y, route=route), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(IndexError, match=r"300"):
        compiled(h, w, y)


def test_a_compiled_backward_does_not_pass_an_accumulator_by() -> None:
    torch._dynamo.reset()
    h, w, y = problem()
    compiled = torch.compile(
        lambda h, w, y: losses.zloss(h, w, y, route="gram"), backend="aot_eager"
    )
    with spherical.accumulate(w), pytest.raises(RuntimeError, match=r"torch\.compile"):
        compiled(h, w, y).backward()


def test_fake_tensors_have_the_right_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        h, w = torch.empty(6, 4, requires_grad=True), torch.empty(50, 4, requires_grad=True)
        y = torch.zeros(6, dtype=torch.int64)
        loss = losses.zloss(h, w, y, route="gram", reduction="none")
        assert loss.shape == (6,)
        gradients = torch.autograd.grad(loss.sum(), [h, w])
    assert [tuple(g.shape) for g in gradients] == [(6, 4), (50, 4)]


# Other modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_no_grad_keeps_nothing_and_agrees(route: str) -> None:
    h, w, y = problem()
    with torch.no_grad():
        value = losses.zloss(h, w, y, route=route)
    assert not value.requires_grad
    torch.testing.assert_close(value, losses.zloss(h, w, y, route=route).detach())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(route: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    h, w, y = problem()
    loss = checkpoint(
        lambda h, w: losses.zloss(h, w, y, route=route, a=0.5, b=2.0),
        h,
        w,
        use_reentrant=reentrant,
    )
    loss.backward()
    close(
        (loss.detach(), h.grad, w.grad),
        step(route, *(t.detach().requires_grad_() if t is not y else y for t in (h, w, y))),
    )


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_keeps_statistics_wide(route: str) -> None:
    h, w, y = problem()
    expected = step(route, h, w, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(route, h, w, y)
    assert found[0].dtype == torch.float32
    close(found, expected, 1e-5 if route == "gram" else 3e-2)


def test_torch_func_gets_the_streamed_route() -> None:
    h, w, y = problem()

    def loss(w: Any, route: str) -> Any:
        return losses.zloss(h.detach(), w, y, route=route)

    found = torch.func.grad(lambda w: loss(w, "auto"))(w.detach())
    (expected,) = torch.autograd.grad(loss(w, "stream"), [w])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("route", ROUTES)
def test_inference_tensors_work(route: str) -> None:
    with torch.inference_mode():
        h, w, y = torch.randn(40, 8), torch.randn(300, 8), torch.randint(300, (40,))
        value = losses.zloss(h, w, y, route=route)
    assert torch.isfinite(value)


# CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("route", ROUTES)
def test_a_captured_step_follows_the_weight(route: str) -> None:
    """Every replay must see the weight that the replay before it left behind."""
    h, w, y = problem("cuda", n=64)
    h.requires_grad_(False)

    def train(w: Any) -> Any:
        loss = losses.zloss(h, w, y, route=route)
        (gradient,) = torch.autograd.grad(loss, [w])
        with torch.no_grad():
            w.sub_(5.0 * gradient)
        return loss.detach()

    eager = w.detach().clone().requires_grad_()
    expected = [train(eager) for _ in range(6)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [train(w).clone() for _ in range(2)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = train(w)
    for _ in range(4):
        graph.replay()
        found.append(static.clone())
    close(found, expected)
    close([w], [eager])


@pytest.mark.gpu
def test_an_eager_call_after_replays_is_not_stale() -> None:
    h, w, y = problem("cuda")
    losses.zloss(h, w, y, route="gram")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        losses.zloss(h, w, y, route="gram")
        w.mul_(1.5).add_(0.1)
    for _ in range(3):
        graph.replay()
        assert not is_fresh(w)
        found = losses.zloss(h, w, y, route="gram")
        torch.testing.assert_close(found, losses.zloss(h, w, y, route="stream"))


@pytest.mark.gpu
def test_another_stream_makes_its_own_matrix() -> None:
    _, w, _ = problem("cuda")
    first = gram(w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert not is_fresh(w)
        torch.testing.assert_close(gram(w).centred, first.centred)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_waits_for_the_device(dtype: Any, bias: bool) -> None:
    h, w, y = problem("cuda")
    h, w = (t.detach().to(dtype).requires_grad_() for t in (h, w))
    b = torch.randn(300, device="cuda", dtype=dtype).requires_grad_() if bias else None
    step("gram", h, w, y, linear_bias=b)
    spherical.invalidate(w)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step("gram", h, w, y, linear_bias=b)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_id_out_of_range_makes_its_row_nan() -> None:
    h, w, y = problem("cuda")
    y[5], y[7] = 300, -1
    rows = losses.zloss(h, w, y, route="gram", reduction="none")
    assert rows.isnan().nonzero().flatten().tolist() == [5, 7]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_training_on_cuda(mode: str | None) -> None:
    torch._dynamo.reset()
    h, w, y = problem("cuda")
    eager = w.detach().clone().requires_grad_()
    compiled = torch.compile(
        lambda h, w, y: losses.zloss(h, w, y, route="gram"), fullgraph=True, mode=mode
    )
    for _ in range(4):
        loss = compiled(h, w, y)
        (gradient,) = torch.autograd.grad(loss, [w])
        expected = losses.zloss(h, eager, y, route="gram")
        torch.testing.assert_close(loss, expected)
        (reference,) = torch.autograd.grad(expected, [eager])
        with torch.no_grad():
            w.sub_(5.0 * gradient)
            eager.sub_(5.0 * reference)
    torch.testing.assert_close(w, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_on_cuda(dtype: Any) -> None:
    """Several blocks and a mean that is not small: fp32 sums; for bf16 the tensor cores' own."""
    w = (torch.randn(70_000, 1000, device="cuda") + 0.5).to(dtype)
    found = gram(w)
    wide = w.double()
    wide -= wide.mean(0)
    expected = wide.T @ wide
    error = (found.centred.double() - expected).abs().max() / expected.abs().max()
    # 32768 rounded additions in a row, or as many truncated ones by 16 (see `add_square_split`).
    assert error < (2e-5 if dtype == torch.float32 else 1.5e-4)
    torch.testing.assert_close(found.mean.double(), w.double().mean(0), rtol=1e-5, atol=1e-6)
