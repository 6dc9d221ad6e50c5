"""Gradients that are sums of cancelling terms, and sums that are cut into slices."""

from __future__ import annotations

from typing import Any

import pytest

import logitless
from logitless import testing

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

pytestmark = pytest.mark.gpu

# Logits of half-precision operands are exact sums in float: an exponential is right to about 1e-5
# of itself at a logit of 30, whatever 16 bits would make of it (4e-3).
FLOAT = 2e-5


def make(n: int, d: int, v: int, dtype: Any, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=generator).to("cuda", dtype)
    w = (torch.randn(v, d, generator=generator) * (2.0 / d**0.5)).to("cuda", dtype)
    b = torch.randn(v, generator=generator).to("cuda", dtype)
    return e.requires_grad_(), w.requires_grad_(), b.requires_grad_()


def error(actual: Any, expected: Any) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def typical(z: Any, count: int) -> tuple[Any, Any]:
    """Targets drawn from the model: sums over rows of p - 1[y] cancel. And p."""
    p = z.softmax(1)
    generator = torch.Generator("cuda").manual_seed(3)
    y = torch.multinomial(p.float(), 1, generator=generator)[:, 0]
    assert y.shape == (count,)
    return y, p


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}])
@pytest.mark.parametrize("shape", [(600, 64, 300), (257, 40, 1777), (3000, 128, 193)])
def test_bias_and_scale_of_cancelling_columns(name: str, options: Any, shape: Any) -> None:
    dtype = getattr(torch, name)
    n = shape[0]
    e, w, b = make(*shape, dtype)
    scale = torch.tensor(0.9, device="cuda", requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (e, w, b, scale)]

    def logits() -> Any:
        x = wide[3] * wide[0] @ wide[1].T + wide[2]
        cap = options.get("softcap")
        return cap * torch.tanh(x / cap) if cap else x

    y, p = typical(logits().detach(), n)
    y[::7] = -100
    kept = y >= 0
    count = kept.sum()
    # `rest` and `target` in float32 outputs, so that nothing is rounded on the way.
    s = logitless.row_statistics(
        e, w, y, linear_bias=b, logit_scale=scale, ignore_index=-100, **options
    )
    loss = -torch.nn.functional.logsigmoid(s.target - s.rest)[kept].sum() / count
    d_bias, d_scale = torch.autograd.grad(loss, [b, scale])
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits(), y), [wide[2], wide[3]]
    )
    # In units of the terms that cancel; the bias' gradient is stored in 16 bits.
    terms = p[kept].sum(0) / count
    rounding = 2.0**-8 if name == "bfloat16" else 2.0**-11
    limit = FLOAT * terms + rounding * expected[0].abs() + 1e-7
    assert ((d_bias.double() - expected[0]).abs() <= limit).all()
    products = (wide[0] @ wide[1].T).detach().abs()
    size = (p * products)[kept].sum() / count
    assert (d_scale.double() - expected[1]).abs() <= FLOAT * size


def test_stored_bias_of_cancelling_columns() -> None:
    """Stored exponentials have 16 bits; the targets' part, which they cancel, has 24."""
    n, d, v = 2000, 64, 300
    e, w, b = make(n, d, v, torch.bfloat16)
    z = e.detach().double() @ w.detach().double().T + b.detach().double()
    y, p = typical(z, n)
    loss = LF.linear_cross_entropy(e, w, y, linear_bias=b, memory="fast", reduction="sum")
    (d_bias,) = torch.autograd.grad(loss, [b])
    terms = torch.bincount(y, minlength=v)
    expected = p.sum(0) - terms
    # Roundings of n shares, each by up to 2^-9, in no particular direction.
    limit = 4 * 2.0**-9 * p.square().sum(0).sqrt() + 2.0**-8 * expected.abs() + 1e-4
    assert ((d_bias.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_tiled_bias_of_cancelling_columns(name: str) -> None:
    """Several targets go through tiles of logits."""
    n, d, v = 700, 48, 500
    e, w, b = make(n, d, v, getattr(torch, name))
    ids = torch.randint(v, (n, 2), device="cuda")
    s = logitless.row_statistics(e, w, ids, want=("rest",), linear_bias=b)
    (d_bias,) = torch.autograd.grad(s.rest.sum(), [b])
    z = e.detach().double() @ w.detach().double().T + b.detach().double()
    z = z.scatter(1, ids, -torch.inf)
    expected = z.softmax(1).sum(0)
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0}[name]
    assert ((d_bias.double() - expected).abs() <= (FLOAT + rounding) * expected).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_tiled_scale_of_cancelling_rows(name: str, softcap: float | None) -> None:
    """Two targets, one of them padding, go through tiles; a cross entropy's gradient cancels."""
    n, d, v = 500, 48, 3000
    e, w, b = make(n, d, v, getattr(torch, name))
    scale = torch.tensor(0.9, device="cuda", requires_grad=True)
    wide = [t.detach().double() for t in (e, w, b)]
    factor = torch.tensor(0.9, device="cuda").double().requires_grad_()
    products = wide[0] @ wide[1].T
    z = factor * products + wide[2]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    y, p = typical(z.detach(), n)
    ids = torch.stack([y, torch.full_like(y, -100)], 1)
    s = logitless.row_statistics(
        e, w, ids, linear_bias=b, logit_scale=scale, softcap=softcap, ignore_index=-100
    )
    loss = torch.nn.functional.softplus(s.rest - s.target[:, 0]).sum()
    (d_scale,) = torch.autograd.grad(loss, [scale])
    total = torch.nn.functional.cross_entropy(z, y, reduction="sum")
    (expected,) = torch.autograd.grad(total, [factor])
    assert (d_scale.double() - expected).abs() <= FLOAT * (p * products.abs()).sum()


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("rows", [1, 7, 128, 300, 700])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_few_rows_and_many_classes(name: str, rows: int, memory: str) -> None:
    """The input's gradient is summed in slices of the classes."""
    d, v = 256, 20011
    e, w, _ = make(rows, d, v, getattr(torch, name), seed=rows)
    y = torch.randint(v, (rows,), device="cuda")
    if rows > 1:
        y[0] = -100
    loss = LF.linear_cross_entropy(e, w, y, memory=memory)
    gradients = torch.autograd.grad(loss, [e, w])
    again = LF.linear_cross_entropy(e, w, y, memory=memory)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients, torch.autograd.grad(again, [e, w]), strict=True)
    )
    arrays = [t.detach().double().cpu().numpy() for t in (e, w)]
    kept = (y >= 0).sum().item()
    reference, vjp = testing.row_statistics(*arrays, y.cpu().numpy(), ignore_index=-100)
    q = 1.0 / (1.0 + torch.exp(torch.tensor(reference["target"] - reference["rest"])))
    q = torch.where((y >= 0).cpu(), q.double() / kept, 0.0).numpy()
    expected = vjp(rest=q, target=-q)
    limit = {"bfloat16": 8e-3, "float16": 4e-3, "float32": 5e-5}[name]
    for gradient, key in zip(gradients, ("input", "linear_weight"), strict=True):
        assert error(gradient, torch.from_numpy(expected[key]).cuda()) <= limit
