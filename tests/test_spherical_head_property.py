"""`SphericalHead` at random sizes, targets and optimisers against a dense weight in float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from logitless import losses  # noqa: E402
from logitless.nn import SphericalHead  # noqa: E402
from logitless.spherical import epochs, factored  # noqa: E402

OPTIMIZERS = st.sampled_from(
    [
        {},
        {"weight_decay": 0.01},
        {"clip_norm": 0.02},
        {"trust_ratio": 0.05, "weight_decay": 0.01},
        {"optimizer": "momentum", "momentum": 0.8, "weight_decay": 0.01},
        {"optimizer": "momentum", "momentum": 0.5, "clip_norm": 0.05},
        {"optimizer": "muon"},
        {"optimizer": "muon", "momentum": 0.5, "weight_decay": 0.01},
    ]
)


class Dense:
    """The optimisers written out on a dense [W, b]."""

    def __init__(self, head: SphericalHead) -> None:
        weight, bias = head.weight(), head.bias()
        self.p = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        self.velocity = torch.zeros_like(self.p)

    def step(self, s: SphericalHead, g: torch.Tensor) -> None:
        lr = s.lr
        if s.clip_norm is not None:
            g = g * min(1.0, s.clip_norm / (g.norm().item() + 1e-6))
        if s.trust_ratio is not None and g.norm() > 0:
            w = self.p.norm()
            lr *= (s.trust_ratio * w / (g.norm() + s.weight_decay * w)).item()
        self.velocity = s.momentum * self.velocity + g
        direction = self.velocity
        if s.optimizer == "muon":
            u, sigma, v = torch.linalg.svd(direction, full_matrices=False)
            kept = (sigma > 3e-7 * sigma[0]) & (sigma > 0)
            direction = (u * kept) @ v
        self.p = (1 - lr * s.weight_decay) * self.p - lr * direction


@given(
    v=st.integers(2, 400),
    d=st.integers(1, 9),
    n=st.integers(1, 14),
    k=st.sampled_from([None, 1, 3]),
    name=st.sampled_from(["zloss", "spherical_softmax", "taylor_softmax", "squared_error"]),
    arguments=OPTIMIZERS,
    bias=st.booleans(),
    distinct=st.integers(1, 400),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    as_on_a_device=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_dense_weight_agrees(
    v, d, n, k, name, arguments, bias, distinct, ignored, as_on_a_device, seed
):
    torch.manual_seed(seed)
    # A logit near 0 magnifies rounding errors by 1/√ε in every step.
    hyper = {"epsilon": 0.1} if name == "spherical_softmax" else {}
    loss_module = getattr(losses, name).module(**hyper)
    arguments = {"lr": 0.02, "loss": loss_module, "bias": bias, **arguments}
    head = SphericalHead(v, d, dtype=torch.float64, **arguments)
    # The polar factor of a gradient that is nearly singular magnifies rounding errors.
    tolerance = 1e-5 if head.optimizer == "muon" else 1e-8
    dense = Dense(head)
    head.load_dense(head.weight(), head.bias())
    function = getattr(losses, name)
    patched = pytest.MonkeyPatch()
    if as_on_a_device:  # no row is counted, as on CUDA
        for module in (epochs, factored):
            patched.setattr(module, "counts_are_free", lambda _: False)
    with patched.context():
        for step in range(20):
            rows = 1 + (n - 1 if step % 3 else n // 2)  # batches of two sizes
            h = torch.randn(rows, d, dtype=torch.float64)
            y = torch.randint(min(v, distinct), (rows,) if k is None else (rows, k))
            y[torch.rand(y.shape) < (ignored if step % 5 else 0.0)] = -100
            weight = None if k is None else torch.randn(rows, k, dtype=torch.float64)
            keywords = {"target_weight": weight, **hyper}
            here, there = h.clone().requires_grad_(), h.clone().requires_grad_()
            p = dense.p.clone().requires_grad_()
            w, b = (p[:, :d], p[:, d]) if bias else (p, None)
            expected = function(
                there, w, y, linear_bias=b, route="stream", reduction="sum", **keywords
            )
            loss = head(here, y, target_weight=weight)
            count = max(1, int((y >= 0).sum() if k is None else (y >= 0).any(1).sum()))
            if not (y >= 0).any():
                assert loss.isnan()  # 0/0, as in torch
            else:
                torch.testing.assert_close(
                    loss * count, expected.detach(), rtol=1e-7, atol=tolerance
                )
            g_h, g = torch.autograd.grad(expected / count, [there, p])
            loss.backward()
            torch.testing.assert_close(here.grad, g_h, rtol=1e-6, atol=tolerance)
            head.step()
            dense.step(head, g)
            if name == "zloss" and v < 3:
                return  # σ can vanish: one step is enough
    final = head.weight() if not bias else torch.cat([head.weight(), head.bias()[:, None]], 1)
    torch.testing.assert_close(final, dense.p, rtol=1e-7, atol=tolerance)


def test_sizes_at_which_lists_span_blocks_and_slots_run_out(monkeypatch):
    monkeypatch.setattr(epochs, "BLOCK", 16)
    monkeypatch.setattr(epochs, "CUDA_BLOCK", 3)
    monkeypatch.setattr(epochs, "RADIX", 2)
    for module in (epochs, factored):
        monkeypatch.setattr(module, "counts_are_free", lambda _: False)
    head = SphericalHead(3000, 3, loss="squared_error", lr=0.01, dtype=torch.float64)
    head.matrix.epochs.reserve = lambda _: None  # maps are appended as they are needed
    w = head.weight()
    for _ in range(300):
        h, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3000, (5,))
        head(h, y).backward()
        head.step()
        p = w.requires_grad_()
        (g,) = torch.autograd.grad(losses.squared_error(h, p, y, route="stream"), [p])
        w = (w - 0.01 * g).detach()
    assert head.diagnostics()["epochs"] >= 4
    torch.testing.assert_close(head.weight(), w, rtol=1e-10, atol=1e-12)
    head.matrix.consolidate()
    torch.testing.assert_close(head.weight(), w, rtol=1e-10, atol=1e-12)
    assert torch.equal(head.matrix.factor, head.weight())
