"""The routes of the spherical losses agree with each other and with dense float64, on any shape."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from logitless import losses, spherical  # noqa: E402

NAMES = ["zloss", "spherical_softmax", "taylor_softmax", "squared_error", "squentropy"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 6e-2}


def dense_loss(name: str, z: Any, ids: Any, weight: Any, **hyper: float) -> Any:
    """Mean of the losses of dense float64 logits (N, V) over rows with an id; weights 0 at -1."""
    kept = (ids >= 0).any(1)
    z, ids, weight = z[kept], ids[kept], torch.where(ids >= 0, weight, 0.0)[kept]
    t = z.gather(1, ids.clamp(min=0))
    if name == "zloss":
        a, b = hyper["a"], hyper["b"]
        zeta = (t - z.mean(1, keepdim=True)) / (z.std(1, unbiased=False, keepdim=True) + 1e-12)
        each = torch.nn.functional.softplus(a * (b - zeta)) / a
    elif name == "spherical_softmax":
        each = -torch.log((t**2 + 1e-6) / (z**2 + 1e-6).sum(1, keepdim=True))
    elif name == "taylor_softmax":
        each = -torch.log((1 + t + t**2 / 2) / (1 + z + z**2 / 2).sum(1, keepdim=True))
    elif name == "squentropy":
        square = ((z**2).sum(1, keepdim=True) - t**2) / max(z.shape[1] - 1, 1)
        each = torch.logsumexp(z, 1, keepdim=True) - t + square
    else:
        onehot = torch.zeros_like(z).scatter_add(1, ids.clamp(min=0), weight)
        return ((z - onehot) ** 2).sum() / len(z)
    return (each * weight).sum() / len(z)


def lay_out(values: Any, layout: str) -> Any:
    """The same matrix in another memory layout, as a leaf."""
    if layout == "columns":
        values = values.T.contiguous().T
    elif layout == "every second":
        whole = values.new_zeros(values.shape[0], 2 * values.shape[1])
        whole[:, ::2] = values
        values = whole[:, ::2]
    elif layout == "padded":
        whole = values.new_zeros(values.shape[0], values.shape[1] + 3)
        whole[:, : values.shape[1]] = values
        values = whole[:, : values.shape[1]]
    return values.detach().requires_grad_()


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    layouts = st.sampled_from(["rows", "columns", "every second", "padded"])
    return {
        "name": draw(st.sampled_from(NAMES)),
        "v": draw(st.integers(2, 90)),
        "d": draw(st.integers(1, 40)),
        "n": draw(st.integers(1, 50)),
        "k": draw(st.sampled_from([1, 1, 2, 3])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "bias": draw(st.booleans()),
        "classes_used": draw(st.integers(1, 90)),  # few: many rows of the same class
        "ignored": draw(st.sampled_from([0.0, 0.3])),
        "layouts": (draw(layouts), draw(layouts)),
        "scale": draw(st.sampled_from([1.0, 0.5, "tensor"])),
        "seed": draw(st.integers(0, 2**16)),
    }


def make(p: dict[str, Any], device: str = "cpu") -> tuple[Any, Any, Any, Any, Any, Any]:
    generator = torch.Generator().manual_seed(p["seed"])

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(device, p["dtype"])

    h = lay_out(normal(p["n"], p["d"]), p["layouts"][0])
    w = lay_out(normal(p["v"], p["d"]), p["layouts"][1])
    b = normal(p["v"]).requires_grad_() if p["bias"] else None
    used = min(p["classes_used"], p["v"])
    ids = torch.randint(used, (p["n"], p["k"]), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < p["ignored"]] = -100
    ids[0] = ids[0].clamp(min=0)  # one row at least
    weight = None
    if p["k"] > 1:
        weight = torch.randn(ids.shape, generator=generator, dtype=torch.float64).to(device)
    scale: Any = p["scale"]
    if scale == "tensor":
        scale = torch.tensor(0.7, dtype=p["dtype"], device=device, requires_grad=True)
    return h, w, b, ids.to(device), weight, scale


def check(p: dict[str, Any], device: str = "cpu") -> None:
    h, w, b, ids, weight, scale = make(p, device)
    hyper = {"a": 0.3, "b": 4.0} if p["name"] == "zloss" else {}
    leaves = [t for t in (h, w, b, scale) if isinstance(t, torch.Tensor)]
    found = {}
    for route in ("gram", "stream"):
        loss = getattr(losses, p["name"])(
            h,
            w,
            ids if p["k"] > 1 else ids[:, 0],
            linear_bias=b,
            target_weight=weight,
            logit_scale=scale,
            route=route,
            **hyper,
        )
        found[route] = (loss.detach(), *torch.autograd.grad(loss, leaves))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    number = wide[-1] if isinstance(scale, torch.Tensor) else scale
    z = number * wide[0] @ wide[1].T + (0.0 if b is None else wide[2])
    use = torch.ones(ids.shape, dtype=torch.float64, device=device) if weight is None else weight
    reference = dense_loss(p["name"], z, ids, use, **hyper)
    expected = (reference.detach(), *torch.autograd.grad(reference, wide))
    # Where a gradient is a small difference of large terms, its error is that of the terms: judge
    # it by the size of all gradients together, as an optimiser's step would.
    size = max(float(e.norm()) for e in expected[1:]) + abs(float(expected[0]))
    sigma = float(z.detach().std(1, unbiased=False).min())
    if sigma < 0.05 or not 0 < size < 1e4:
        return  # ill-conditioned: the Z-loss divides by σ, the spherical softmax by z_y
    for route, values in found.items():
        for got, want in zip(values, expected, strict=True):
            error = float((got.double() - want).norm())
            assert error <= TOLERANCE[p["dtype"]] * size, (route, error, size)


@given(problems())
def test_routes_agree_with_dense_float64(p: dict[str, Any]) -> None:
    check(p)


@pytest.mark.gpu
@given(problems())
def test_routes_agree_with_dense_float64_on_cuda(p: dict[str, Any]) -> None:
    check(p, "cuda")


@pytest.mark.parametrize("route", ["gram", "stream"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_rows_ignored(name: str, route: str, reduction: str) -> None:
    h, w = torch.randn(6, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    y = torch.full((6,), -100)
    loss = getattr(losses, name)(h, w, y, route=route, reduction=reduction)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), [h, w]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("route", ["gram", "stream"])
def test_no_rows(route: str) -> None:
    h, w = torch.randn(0, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64)
    loss = losses.zloss(h, w, y, route=route, reduction="sum")
    assert loss.item() == 0.0
    assert [g.abs().sum().item() for g in torch.autograd.grad(loss, [h, w])] == [0.0, 0.0]


@pytest.mark.parametrize("route", ["gram", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_rows_may_hold_anything(route: str, dtype: Any) -> None:
    h, w = torch.randn(6, 4).to(dtype), torch.randn(30, 4).to(dtype).requires_grad_()
    y = torch.randint(30, (6,))
    y[2], h[2] = -100, float("nan")
    y[4], h[4] = -100, float("inf")
    h.requires_grad_()
    gradients = torch.autograd.grad(losses.zloss(h, w, y, route=route), [h, w])
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert gradients[0][[2, 4]].abs().sum() == 0


@pytest.mark.parametrize("route", ["gram", "stream"])
def test_same_input_same_bits(route: str) -> None:
    h, w = torch.randn(200, 16, requires_grad=True), torch.randn(999, 16, requires_grad=True)
    y = torch.randint(5, (200,))
    results = []
    for _ in range(2):
        spherical.invalidate(w)
        loss = losses.zloss(h, w, y, route=route)
        results.append((loss.detach(), *torch.autograd.grad(loss, [h, w])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_accumulated_parts_are_written_like_a_backward(dtype: Any, bias: bool) -> None:
    h, w = torch.randn(64, 12).to(dtype), torch.randn(5000, 12).to(dtype).requires_grad_()
    b = torch.randn(5000).to(dtype).requires_grad_() if bias else None
    y = torch.randint(40, (64,))
    leaves = [t for t in (w, b) if t is not None]
    options: dict[str, Any] = {"linear_bias": b, "route": "gram", "a": 0.3, "b": 3.0}
    whole = torch.autograd.grad(losses.zloss(h, w, y, **options), leaves)
    with spherical.accumulate(w, b) as collected:
        losses.zloss(h, w, y, **options).backward()
    collected.write()
    for leaf, expected in zip(leaves, whole, strict=True):
        assert torch.equal(leaf.grad, expected)
    collected.write()
    for leaf, expected in zip(leaves, whole, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * expected, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("route", ["gram", "stream"])
def test_equal_logits_leave_the_zloss_undefined_but_finite_in_the_forward(route: str) -> None:
    h, w = torch.randn(3, 4), torch.zeros(30, 4)
    y = torch.randint(30, (3,))
    assert torch.isfinite(losses.zloss(h, w, y, route=route))
