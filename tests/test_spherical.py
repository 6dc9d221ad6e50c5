"""The spherical family on an ordinary weight: streamed, by Gram, and gradients in their parts."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from logitless import losses, spherical  # noqa: E402
from logitless.spherical.choice import choose  # noqa: E402
from logitless.spherical.gram import gram, is_fresh  # noqa: E402

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def dense_rows(name, z, ids, weight, **hyper):
    """One loss a row of dense float64 logits (N, V) and ids (N, K), weights 0 at padding."""
    v = z.shape[1]
    t = z.gather(1, ids.clamp(min=0))
    if name == "zloss":
        a, b, epsilon = hyper.get("a", 1.0), hyper.get("b", 0.0), 1e-12
        sigma = z.var(1, unbiased=False, keepdim=True).sqrt() + epsilon
        loss = torch.nn.functional.softplus(a * (b - (t - z.mean(1, keepdim=True)) / sigma)) / a
    elif name == "spherical_softmax":
        loss = -torch.log((t**2 + 1e-6) / (z**2 + 1e-6).sum(1, keepdim=True))
    elif name == "taylor_softmax":
        loss = -torch.log((1 + t + t**2 / 2) / (1 + z + z**2 / 2).sum(1, keepdim=True))
    elif name == "squentropy":
        square = (z**2).sum(1, keepdim=True) - t**2
        loss = torch.logsumexp(z, 1, keepdim=True) - t + square / max(v - 1, 1)
    else:
        onehot = torch.zeros_like(z).scatter_add_(1, ids.clamp(min=0), weight)
        return ((z - onehot) ** 2).sum(1)
    return (loss * weight).sum(1)


def problem(dtype, *, n=24, d=7, v=301, k=1, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    w = (torch.randn(v, d, generator=generator) + 0.5).to(dtype).requires_grad_()
    b = torch.randn(v, generator=generator).to(dtype).requires_grad_() if bias else None
    ids = torch.randint(v, (n, k), generator=generator)
    ids[3] = -100
    if k > 1:
        ids[4, 1] = -100
        ids[5, 0] = ids[5, 1]
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) if k > 1 else None
    return h, w, b, ids, weight


@pytest.mark.parametrize("route", ["stream", "gram"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "name", ["zloss", "spherical_softmax", "taylor_softmax", "squared_error", "squentropy"]
)
def test_agrees_with_dense_float64(name, several, dtype, route):
    k, bias = (3, True) if several else (1, False)
    h, w, b, ids, weight = problem(dtype, k=k, bias=bias)
    loss, s = getattr(losses, name)(
        h,
        w,
        ids if several else ids[:, 0],
        linear_bias=b,
        target_weight=weight,
        logit_scale=0.7,
        route=route,
        return_statistics=True,
    )
    assert s.route == route
    inputs = [h, w] + ([b] if bias else [])
    gradients = torch.autograd.grad(loss, inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    z = 0.7 * wide[0] @ wide[1].T + (wide[2] if bias else 0.0)
    kept = (ids >= 0).any(1)
    use = torch.where(ids >= 0, torch.ones_like(ids) if weight is None else weight, 0.0).double()
    reference = dense_rows(name, z[kept], ids[kept], use[kept]).mean()
    expected = torch.autograd.grad(reference, wide)
    limit = TOLERANCE[dtype]
    assert abs(loss.item() - reference.item()) <= limit * max(1.0, abs(reference.item()))
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= limit * want.norm()


def test_variance_keeps_its_digits_at_a_large_mean():
    h = torch.rand(64, 16) + 1.0
    w = torch.randn(1000, 16) * 0.01 + 100.0
    y = torch.randint(1000, (64,))
    z = h.double() @ w.double().T
    _, s = losses.zloss(h, w, y, route="gram", return_statistics=True)
    relative = (s.variance.double() / z.var(1, unbiased=False) - 1).abs().max()
    assert relative < 1e-4


@pytest.mark.smoke
def test_auto_follows_rows_against_features():
    assert choose(1000, 100, 10_000) == "gram"
    assert choose(10, 100, 10_000) == "stream"
    assert choose(10, 100, 10_000, fresh=True, gradients=(True, False)) == "gram"
    assert choose(256, 1024, 100_000, device="cuda") == "gram"
    assert choose(8, 64, 1000, device="cuda") == "stream"  # launches would decide
    assert choose(1000, 1024, 100_000, device="cuda", dtype=torch.bfloat16) == "stream"
    h, w, _, ids, _ = problem(torch.float32, n=24, d=7)
    _, s = losses.zloss(h, w, ids[:, 0], return_statistics=True)
    assert s.route == "gram"
    _, s = losses.squentropy(h, w, ids[:, 0], return_statistics=True)
    assert s.route == "stream"  # it visits the classes anyway
    h, w, _, ids, _ = problem(torch.float32, n=8, d=64)
    _, s = losses.zloss(h, w, ids[:, 0], return_statistics=True)
    assert s.route == "stream"


def test_gram_is_cached_by_version():
    w = torch.nn.Parameter(torch.randn(50, 4))
    first = gram(w)
    assert gram(w) is first
    assert is_fresh(w)
    with torch.no_grad():
        w.add_(1.0)
    assert not is_fresh(w)
    assert gram(w) is not first
    w.data.mul_(2.0)  # the version counter does not see this edit
    spherical.invalidate(w)
    wide = w.detach().double()
    centred = wide - wide.mean(0)
    torch.testing.assert_close(gram(w).centred.double(), centred.T @ centred, rtol=1e-5, atol=1e-4)


@pytest.mark.smoke
def test_cache_follows_an_optimiser_and_load_state_dict():
    linear = torch.nn.Linear(6, 40, bias=False)
    optimiser = torch.optim.AdamW(linear.parameters(), lr=0.1)
    h, y = torch.randn(30, 6), torch.randint(40, (30,))
    for _ in range(3):
        optimiser.zero_grad()
        gram_loss = losses.zloss(h, linear.weight, y, route="gram")
        stream_loss = losses.zloss(h, linear.weight, y, route="stream")
        torch.testing.assert_close(gram_loss, stream_loss, rtol=1e-5, atol=1e-5)
        gram_loss.backward()
        optimiser.step()
    linear.load_state_dict({"weight": torch.randn(40, 6)})
    torch.testing.assert_close(
        losses.zloss(h, linear.weight, y, route="gram"),
        losses.zloss(h, linear.weight, y, route="stream"),
        rtol=1e-5,
        atol=1e-5,
    )


def test_accumulate_equals_one_large_batch():
    h, w, b, ids, _ = problem(torch.float64, n=40, bias=True)
    whole = torch.autograd.grad(
        losses.zloss(h, w, ids[:, 0], linear_bias=b, reduction="sum", route="gram"), [w, b]
    )
    with spherical.accumulate(w, b) as collected:
        for part in (slice(0, 10), slice(10, 40)):
            losses.zloss(
                h[part], w, ids[part, 0], linear_bias=b, reduction="sum", route="gram"
            ).backward()
        assert w.grad is None
    collected.write()
    torch.testing.assert_close(w.grad, whole[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(b.grad, whole[1], rtol=1e-11, atol=1e-12)
    collected.write()  # as a second backward would
    torch.testing.assert_close(w.grad, 2 * whole[0], rtol=1e-11, atol=1e-12)


RANK = """
import sys
from pathlib import Path
import torch
from logitless import losses, spherical

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
)
h, w, ids = torch.load(folder / "problem.pt")
w.requires_grad_()
part = slice(0, 10) if rank == 0 else slice(10, 40)
with spherical.accumulate(w) as collected:
    losses.zloss(h[part], w, ids[part, 0], reduction="sum", route="gram").backward()
collected.all_reduce()
collected.write()
torch.save(w.grad, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_all_reduce_sends_the_parts(tmp_path):
    h, w, _, ids, _ = problem(torch.float64, n=40)
    torch.save((h.detach(), w.detach(), ids), tmp_path / "problem.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path)]) for r in (0, 1)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    loss = losses.zloss(h, w, ids[:, 0], reduction="sum", route="gram")
    (whole,) = torch.autograd.grad(loss, [w])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole, rtol=1e-11, atol=1e-12)


def test_refusals_name_the_remedy():
    h, w, _, ids, _ = problem(torch.float32)
    y = ids[:, 0]
    with pytest.raises(ValueError, match="route = 'dense'"):
        losses.zloss(h, w, y, route="dense")
    with pytest.raises(ValueError, match="softcap"):
        losses.zloss(h, w, y, route="gram", softcap=30.0)
    with pytest.raises(IndexError, match=r"target\[2\] = 301"):
        losses.zloss(h, w, torch.tensor([0, 1, 301] + [0] * 21), route="gram")
    with spherical.accumulate(w) as collected:
        with pytest.raises(RuntimeError, match="nothing was collected"):
            collected.write()
        with pytest.raises(RuntimeError, match="do not nest"):
            spherical.accumulate(w).__enter__()


def test_second_derivative_says_which_route_has_one():
    h, w, _, ids, _ = problem(torch.float64)
    loss = losses.zloss(h, w, ids[:, 0], route="gram")
    with pytest.raises(NotImplementedError, match=r"route='stream'"):
        torch.autograd.grad(loss, [h], create_graph=True)
    loss = losses.zloss(h, w, ids[:, 0], route="stream")
    (g,) = torch.autograd.grad(loss, [h], create_graph=True)
    g.sum().backward()


@pytest.mark.parametrize("shift", [0, 2])
def test_leading_dimensions_and_shift(shift):
    h, w = torch.randn(3, 9, 5, requires_grad=True), torch.randn(60, 5, requires_grad=True)
    y = torch.randint(60, (3, 9))
    results = []
    for route in ("stream", "gram"):
        rows = losses.taylor_softmax(h, w, y, shift=shift, route=route, reduction="none")
        assert rows.shape == (3, 9 - shift)
        results.append((rows, *torch.autograd.grad(rows.sum(), [h, w])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_class_has_no_square_part():
    h, w = torch.randn(4, 3), torch.randn(1, 3)
    y = torch.zeros(4, dtype=torch.int64)
    for route in ("stream", "gram"):
        assert torch.equal(losses.squentropy(h, w, y, route=route), torch.tensor(0.0))
