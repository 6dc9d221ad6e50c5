"""Derivatives: gradcheck of every statistic, second derivatives, torch.func, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import logitless
from logitless import stats

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

gradcheck = torch.autograd.gradcheck
gradgradcheck = torch.autograd.gradgradcheck

CLASSES = 6
VECTORS = torch.linspace(-1, 1, 2 * CLASSES, dtype=torch.float64).reshape(2, CLASSES)
# Field, and what to ask for it (given dense weights).
FIELDS: dict[str, Callable[[Any], Any]] = {
    **{
        name: (lambda q, name=name: name)  # noqa: ARG005
        for name in (
            "rest",
            "target",
            "lse",
            "log_prob",
            "entropy",
            "rest_entropy",
            "mean_logit",
            "sum",
            "sum_sq",
            "mean",
            "variance",
            "max",
        )
    },
    "power_lse": lambda q: stats.power_lse(2, 0.5),  # noqa: ARG005
    "rest_power": lambda q: stats.rest_power(2),  # noqa: ARG005
    "weighted_sum": lambda q: stats.weighted_sum(VECTORS),  # noqa: ARG005
    "weighted_mean": lambda q: stats.weighted_mean(VECTORS),  # noqa: ARG005
    "dot": stats.dot,
    "topk_values": lambda q: stats.topk(2),  # noqa: ARG005
}
NEED_TARGET = ("rest", "target", "log_prob", "rest_entropy", "rest_power")
TARGETS = {
    "one": torch.tensor([1, -100, 3, 0]),
    "several": torch.tensor([[1, 1, 4], [2, -100, -100], [-100] * 3, [5, 3, 0]]),
    "none": None,
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cross_entropy_is_one_node(device: str) -> None:
    """What autograd does for a node costs more than the rest of a small call."""
    e = torch.randn(4, 3, device=device, requires_grad=True)
    w = torch.randn(CLASSES, 3, device=device, requires_grad=True)
    loss = LF.linear_cross_entropy(e, w, torch.arange(4, device=device))
    behind = [node for node, _ in loss.grad_fn.next_functions if node is not None]
    assert [node.name() for node in behind] == ["torch::autograd::AccumulateGrad"] * 2


def leaves() -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return [normal(4, 3), normal(CLASSES, 3), normal(CLASSES), normal(), normal(4, CLASSES)]


def statistic(name: str, kind: str, softcap: float | None = None) -> Callable[..., Any]:
    def run(input: Any, weight: Any, bias: Any, scale: Any, q: Any) -> Any:
        s = logitless.row_statistics(
            input,
            weight,
            TARGETS[kind],
            want=[FIELDS[name](q)],
            linear_bias=bias,
            logit_scale=scale,
            softcap=softcap,
        )
        return getattr(s, name)[s.kept]

    return run


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", FIELDS)
def test_gradcheck_of_each_statistic(name: str, kind: str) -> None:
    if kind == "none" and name in NEED_TARGET:
        pytest.skip("needs a target")
    softcap = 2.0 if kind == "one" else None
    assert gradcheck(statistic(name, kind, softcap), leaves(), fast_mode=True)


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("name", FIELDS)
def test_gradgradcheck_of_each_statistic(name: str, kind: str) -> None:
    softcap = 2.0 if kind == "one" else None
    assert gradgradcheck(statistic(name, kind, softcap), leaves(), fast_mode=True)


def everything(input: Any, weight: Any, bias: Any, scale: Any, q: Any) -> Any:
    want = [
        make(q) for name, make in FIELDS.items() if name not in ("weighted_sum", "weighted_mean")
    ]
    s = logitless.row_statistics(
        input,
        weight,
        TARGETS["one"],
        want=[*want, stats.weighted(VECTORS)],
        linear_bias=bias,
        logit_scale=scale,
    )
    columns = [getattr(s, name)[s.kept] for name in FIELDS]
    return torch.cat([c.reshape(c.shape[0], -1) for c in columns], dim=1)


def test_all_statistics_together() -> None:
    assert gradcheck(everything, leaves(), fast_mode=True)
    assert gradgradcheck(everything, leaves(), fast_mode=True)


def test_second_derivative_of_heads_with_positions_and_shift() -> None:
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (2, 4, 2), generator=generator)
    target[0, 1, 0] = -100

    def run(input: Any, weight: Any) -> Any:
        s = logitless.row_statistics(input, weight, target, want=("lse", "entropy"), shift=1)
        return s.lse * s.entropy

    assert gradcheck(run, (input, weight), fast_mode=True)
    assert gradgradcheck(run, (input, weight), fast_mode=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_derivative_of_cross_entropy(reduction: str) -> None:
    input, weight, bias, scale, _ = leaves()

    def run(*tensors: Any) -> Any:
        return LF.linear_cross_entropy(
            *tensors[:2],
            TARGETS["one"],
            linear_bias=tensors[2],
            logit_scale=tensors[3],
            reduction=reduction,
            z_loss_weight=0.1,
        )

    assert gradcheck(run, (input, weight, bias, scale), fast_mode=True)
    assert gradgradcheck(run, (input, weight, bias, scale), fast_mode=True)


def test_second_derivative_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from logitless.ops import double_backward

    monkeypatch.setattr(double_backward, "_CHUNK_BYTES", 1)  # a chunk a row
    assert gradgradcheck(everything, leaves(), fast_mode=True)


def test_third_derivative_is_refused() -> None:
    input, weight, *_ = leaves()
    loss = LF.linear_cross_entropy(input, weight, TARGETS["one"])
    (first,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), input)


@pytest.mark.smoke
def test_only_wanted_gradients_are_computed() -> None:
    input, weight, bias, *_ = leaves()
    loss = LF.linear_cross_entropy(
        input.detach(), weight.detach(), TARGETS["one"], linear_bias=bias
    )
    loss.backward()
    assert bias.grad is not None
    loss = LF.linear_cross_entropy(input, weight.detach(), TARGETS["one"])
    loss.backward()
    assert input.grad is not None
    with torch.no_grad():
        assert not LF.linear_cross_entropy(input, weight, TARGETS["one"]).requires_grad
    with torch.inference_mode():
        value = LF.linear_cross_entropy(input, weight, TARGETS["one"])
    torch.testing.assert_close(value, LF.linear_cross_entropy(input, weight, TARGETS["one"]))


def test_retained_graphs_give_the_same_gradients_again() -> None:
    for memory in ("lean", "fast"):
        input, weight, *_ = leaves()
        loss = LF.linear_cross_entropy(input, weight, TARGETS["one"], memory=memory)
        first = torch.autograd.grad(loss, (input, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (input, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    input, weight, *_ = leaves()

    def run(input: Any, weight: Any) -> Any:
        s = logitless.row_statistics(input, weight, TARGETS["one"])
        return (s.rest - s.target).sum() + LF.linear_cross_entropy(input, weight, TARGETS["one"])

    expected = torch.autograd.grad(run(input, weight), (input, weight))
    loss = checkpoint(run, input, weight, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close((input.grad, weight.grad), expected)


def test_func_grad_and_functional_call() -> None:
    input, weight, bias, *_ = leaves()
    target = TARGETS["one"]

    def loss(weight: Any) -> Any:
        return LF.linear_cross_entropy(input.detach(), weight, target)

    expected = torch.autograd.grad(loss(weight), weight)[0]
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected)
    value, vjp = torch.func.vjp(loss, weight.detach())
    torch.testing.assert_close(vjp(torch.ones_like(value))[0], expected)

    def curvature(weight: Any) -> Any:
        return torch.func.grad(loss)(weight).square().sum()

    (slope,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), weight)
    torch.testing.assert_close(torch.func.grad(curvature)(weight.detach()), expected)

    head = torch.nn.Linear(3, CLASSES, dtype=torch.float64)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, input: Any, target: Any) -> Any:
            return LF.linear_cross_entropy(
                input, self.head.weight, target, linear_bias=self.head.bias
            )

    parameters = {"head.weight": weight.detach(), "head.bias": bias.detach()}
    gradients = torch.func.grad(
        lambda p: torch.func.functional_call(Model(), p, (input.detach(), target))
    )(parameters)
    loss_value = LF.linear_cross_entropy(input, weight, target, linear_bias=bias)
    expected = torch.autograd.grad(loss_value, (weight, bias))
    torch.testing.assert_close(tuple(gradients.values()), expected)


# torch itself scripts its forward-mode formulas on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_forward_mode_and_vmap_say_what_to_do() -> None:
    input, weight, *_ = (t.detach() for t in leaves())

    def loss(input: Any) -> Any:
        return LF.linear_cross_entropy(input, weight, TARGETS["one"])

    with pytest.raises(NotImplementedError, match="reverse mode"):
        torch.func.jvp(loss, (input,), (input,))
    with pytest.raises(NotImplementedError, match="leading dimensions"):
        torch.func.vmap(lambda x: logitless.row_statistics(x, weight, want="lse").lse)(
            input.expand(3, 4, 3)
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, input)
        with pytest.raises(NotImplementedError, match="reverse mode"):
            loss(dual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_and_accumulates_in_float(dtype: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    input = torch.randn(40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(30, 16, generator=generator, requires_grad=True)
    bias = torch.randn(30, generator=generator, requires_grad=True)
    target = torch.randint(0, 30, (40,), generator=generator)
    with torch.autocast("cpu", dtype=dtype):
        loss = LF.linear_cross_entropy(input, weight, target, linear_bias=bias)
        rows = logitless.row_statistics(input, weight, target, linear_bias=bias)
        mixed = LF.linear_cross_entropy(input.to(dtype), weight, target, linear_bias=bias)
    assert loss.dtype == rows.rest.dtype == torch.float32
    torch.testing.assert_close(mixed, loss, rtol=1e-5, atol=0.0)
    gradients = torch.autograd.grad(loss, (input, weight, bias))
    assert all(g.dtype == torch.float32 for g in gradients)
    halves = [t.detach().to(dtype).float().requires_grad_() for t in (input, weight, bias)]
    expected = torch.nn.functional.cross_entropy(halves[0] @ halves[1].T + halves[2], target)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    # Nearer to float32 sums than a gradient that passed through the half type would be.
    for found, wanted in zip(gradients, torch.autograd.grad(expected, halves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-4)
    doubles = [t.detach().double() for t in (input, weight)]
    with torch.autocast("cpu", dtype=dtype):
        assert LF.linear_cross_entropy(*doubles, target).dtype == torch.float64


def test_ties_give_the_lowest_id_the_whole_gradient() -> None:
    input = torch.ones(1, 2)
    weight = torch.ones(3, 2, requires_grad=True)
    s = logitless.row_statistics(input, weight, want=("max", stats.topk(2)))
    assert s.argmax.tolist() == [0]
    assert s.topk_ids.tolist() == [[0, 1]]
    (gradient,) = torch.autograd.grad(s.max.sum(), weight)
    assert torch.equal(gradient, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_backward_in_another_thread() -> None:
    import threading

    input, weight, *_ = leaves()
    loss = LF.linear_cross_entropy(input, weight, TARGETS["one"])
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("positions", [(), (2,)])
def test_grad_buffer_takes_the_weights_gradient(positions: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(6, 4, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(7, *positions, 4, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(0, 7, (6, *positions), generator=generator)
    buffer = torch.ones(weight.shape)
    calls = (
        lambda **o: LF.linear_cross_entropy(input, weight, target, **o),
        lambda **o: LF.linear_cross_entropy(input, weight, target, label_smoothing=0.1, **o),
        lambda **o: logitless.row_statistics(input, weight, target, want="lse", **o).lse.sum(),
    )
    for call in calls:
        buffer.fill_(1.0)
        loss = call(grad_buffer=buffer)
        loss.backward(retain_graph=True)
        assert weight.grad is None
        (d_input,) = torch.autograd.grad(call(), input)
        assert torch.equal(input.grad, d_input)
        expected = torch.autograd.grad(call(), weight)[0].float()
        torch.testing.assert_close(buffer - 1.0, expected, rtol=1e-2, atol=1e-3)
        assert not torch.equal(buffer - 1.0, expected)  # not rounded to bfloat16
        loss.backward()
        torch.testing.assert_close(buffer - 1.0, 2 * expected, rtol=1e-2, atol=2e-3)
        input.grad = None
    with pytest.raises(NotImplementedError, match="grad_buffer"):
        torch.autograd.grad(calls[0](grad_buffer=buffer), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="grad_buffer"):
        torch.func.grad(lambda x: LF.linear_cross_entropy(x, weight, target, grad_buffer=buffer))(
            input
        )
    for wrong in (buffer.double(), buffer[1:], buffer.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="grad_buffer"):
            calls[0](grad_buffer=wrong)
