"""Cross entropy of class ids on CUDA: one launch for the losses of the rows and their reduction."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

pytestmark = pytest.mark.gpu

TOLERANCE = {"bfloat16": 8e-3, "float32": 2e-5, "float64": 1e-11}


def make(name: str, lead: tuple[int, ...], features: int = 96, classes: int = 1777) -> Any:
    """Input, weight and targets; a row in five ignored, a row in three sure of its target."""
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(*lead, features, generator=generator, dtype=torch.float64)
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64) / 10
    y = torch.randint(classes, lead, generator=generator)
    rows, ids = e.view(-1, features), y.view(-1)
    rows[::3] += 30 * w[ids[::3]]
    ids[::5] = -100
    dtype = getattr(torch, name)
    return e.to("cuda", dtype).requires_grad_(), w.to("cuda", dtype).requires_grad_(), y.cuda()


def dense(e: Any, w: Any, y: Any, reduction: str, z_loss_weight: float) -> Any:
    """The same loss and gradients in float64, from logits."""
    leaves = [x.detach().double().requires_grad_() for x in (e, w)]
    z = (leaves[0] @ leaves[1].T).flatten(0, -2)
    kept = y.flatten() != -100
    losses = torch.nn.functional.cross_entropy(z, y.flatten(), reduction="none")
    losses = losses + torch.where(kept, z_loss_weight * z.logsumexp(1) ** 2, 0.0)
    if reduction == "none":
        return losses.view(y.shape), leaves
    return (losses.sum() / kept.sum() if reduction == "mean" else losses.sum()), leaves


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("z_loss_weight", [0.0, 1e-2])
@pytest.mark.parametrize("lead", [(3,), (4, 65), (2100,)])
def test_against_logits(name: str, reduction: str, z_loss_weight: float, lead: Any) -> None:
    e, w, y = make(name, lead)
    found = LF.linear_cross_entropy(e, w, y, reduction=reduction, z_loss_weight=z_loss_weight)
    wanted, leaves = dense(e, w, y, reduction, z_loss_weight)
    assert found.shape == wanted.shape
    most = 1e-4 if name == "bfloat16" else TOLERANCE[name]
    assert (found - wanted).norm() <= most * wanted.norm()
    cotangent = torch.randn(wanted.shape, device="cuda", dtype=torch.float64)
    if reduction == "none":  # of any strides
        cotangent = cotangent[..., None].expand(*cotangent.shape, 2)[..., 0]
    got = torch.autograd.grad(found, (e, w), cotangent.to(found.dtype))
    for mine, exact in zip(got, torch.autograd.grad(wanted, leaves, cotangent), strict=True):
        assert (mine.double() - exact).norm() <= TOLERANCE[name] * exact.norm()


def test_sure_rows_keep_their_digits() -> None:
    e, w, y = make("float32", (64,))
    with torch.no_grad():
        e[:, :] = 60 * w[y.clamp(min=0)]
    found = LF.linear_cross_entropy(e, w, y, reduction="none").detach()
    z = e.detach().double() @ w.detach().double().T
    target = z.gather(1, y.clamp(min=0)[:, None])
    others = z.scatter(1, y.clamp(min=0)[:, None], -torch.inf)
    wanted = torch.log1p(torch.exp(others.logsumexp(1) - target[:, 0]))
    kept = y != -100
    assert wanted[kept].max() < 1e-7  # torch's own, in float32, is 0
    assert ((found - wanted).abs() <= 1e-3 * wanted)[kept].all()


def test_no_kept_row() -> None:
    e, w, y = make("float32", (7,))
    y.fill_(-100)
    assert LF.linear_cross_entropy(e, w, y).isnan()
    assert LF.linear_cross_entropy(e, w, y, reduction="sum") == 0
    gradients = torch.autograd.grad(LF.linear_cross_entropy(e, w, y), (e, w))
    assert all((g == 0).all() for g in gradients)


def test_differentiable_twice() -> None:
    e, w, y = make("float64", (20,), features=16, classes=50)

    def product(loss: Any, leaves: Any) -> Any:
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    wanted, leaves = dense(e, w, y, "mean", 1e-2)
    found = LF.linear_cross_entropy(e, w, y, z_loss_weight=1e-2)
    for a, b in zip(product(found, (e, w)), product(wanted, leaves), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("lead", [(3,), (4, 65), (2100,)])
def test_nothing_is_kept_without_gradients(reduction: str, lead: Any) -> None:
    """The statistics are scratch then: the loss is all that a forward leaves."""
    e, w, y = make("bfloat16", lead)
    options: Any = {"reduction": reduction, "z_loss_weight": 1e-2}
    wanted = LF.linear_cross_entropy(e, w, y, memory=0, **options).detach()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        found = LF.linear_cross_entropy(e, w, y, **options)
    assert torch.cuda.memory_allocated() - before <= max(512, 4 * found.numel() + 512)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_twice_through_what_was_lent() -> None:
    """A graph of the backward recomputes, whatever the forward keeps for one without."""
    e, w, y = make("bfloat16", (300,), features=64, classes=9001)
    once = torch.autograd.grad(LF.linear_cross_entropy(e, w, y), (e, w))
    loss = LF.linear_cross_entropy(e, w, y)
    twice = torch.autograd.grad(loss, (e, w), create_graph=True)
    for a, b in zip(twice, once, strict=True):
        assert (a - b).norm() <= 8e-3 * b.norm()
    second = torch.autograd.grad(sum(g.float().square().sum() for g in twice), (e, w))
    assert all(g.isfinite().all() for g in second)


def test_few_launches() -> None:
    """The loss is a launch each way: a step of a small head would feel more."""
    e, w, y = make("bfloat16", (512,))

    def step() -> None:
        torch.autograd.grad(LF.linear_cross_entropy(e, w, y), (e, w))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("loss_" in name for name in names) == 2
    assert sum("at::native" in name for name in names) <= 2  # the gradient of 1
