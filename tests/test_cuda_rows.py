"""Which rows take part: listed, packed or left in their places, and written back there."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
# Logits of bf16 operands with float sums; bf16 gradients, rounded on the way where memory is short.
LOGIT_ERROR, GRADIENT_ERROR = 2e-5, 4e-3


def make(n: int, d: int, v: int, ignored: float) -> tuple[Any, ...]:
    """A head, of which a share of the rows, at least one if any, is ignored and full of nan."""
    generator = torch.Generator().manual_seed(n + v)
    e = torch.randn(n, d, generator=generator)
    w = torch.randn(v, d, generator=generator) * (2.0 / d**0.5)
    y = torch.randint(v, (n,), generator=generator)
    out = torch.rand(n, generator=generator) < ignored
    if ignored and not out.any():
        out[n // 2] = True
    y[out], e[out] = -100, float("nan")
    return e.to("cuda", BF16), w.to("cuda", BF16), y.cuda(), out.cuda()


def losses(e: Any, w: Any, y: Any, out: Any) -> Any:
    """Of each row, in float64."""
    z = torch.where(out[:, None], 0, e).double() @ w.double().T
    return torch.nn.functional.cross_entropy(z, y, reduction="none")


# 700 rows are three blocks of 256: a few ignored ones stay where they are, many are packed away.
# Features that no tensor map describes are packed in any case.
@pytest.mark.parametrize("ignored", [0.0, 0.001, 0.01, 0.6, 1.0])
@pytest.mark.parametrize(
    "shape", [(700, 64, 1777), (700, 33, 151), (1, 8, 2), (256, 64, 193), (9000, 40, 501)]
)
def test_forward(shape: tuple[int, int, int], ignored: float) -> None:
    e, w, y, out = make(*shape, ignored)
    with torch.no_grad():
        loss = LF.linear_cross_entropy(e, w, y, reduction="none", ignore_index=-100)
    expected = losses(e, w, y, out)
    assert (loss[out] == 0).all()
    torch.testing.assert_close(loss.double(), expected, rtol=LOGIT_ERROR, atol=LOGIT_ERROR)


@pytest.mark.parametrize("ignored", [0.01, 0.6])
def test_forward_with_a_scale_and_an_id_out_of_range(ignored: float) -> None:
    e, w, y, out = make(700, 64, 1777, ignored)
    wrong = int((~out).nonzero()[3])
    expected = losses(1.5 * e.double(), w, y, out)
    y[wrong] = 1777
    bias = torch.randn(1777, device="cuda", dtype=BF16)
    with torch.no_grad():
        scaled = LF.linear_cross_entropy(
            e, w, y, reduction="none", ignore_index=-100, logit_scale=1.5
        )
        biased = LF.linear_cross_entropy(
            e, w, y, reduction="none", ignore_index=-100, linear_bias=bias
        )
    assert torch.isnan(scaled[wrong])
    assert torch.isnan(biased[wrong])
    others = torch.arange(700, device="cuda") != wrong
    torch.testing.assert_close(
        scaled[others].double(), expected[others], rtol=LOGIT_ERROR, atol=LOGIT_ERROR
    )
    z = torch.where(out[:, None], 0, e).double() @ w.double().T + bias.double()
    target = torch.where(others, y, -100)
    plain = torch.nn.functional.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(
        biased[others].double(), plain[others], rtol=LOGIT_ERROR, atol=LOGIT_ERROR
    )


@pytest.mark.parametrize("memory", ["lean", "fast", 0])
@pytest.mark.parametrize("ignored", [0.0, 0.01, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(700, 64, 1777), (1300, 200, 640), (300, 33, 151)])
def test_gradients_come_back_to_their_rows(
    shape: tuple[int, int, int], ignored: float, memory: str | int
) -> None:
    e, w, y, out = make(*shape, ignored)
    e.requires_grad_()
    w.requires_grad_()
    # What the gradients' memory held before.
    torch.full_like(e, float("nan")), torch.full_like(w, float("nan"))
    loss = LF.linear_cross_entropy(e, w, y, reduction="sum", ignore_index=-100, memory=memory)
    gradients = torch.autograd.grad(loss, [e, w])
    leaves = [
        torch.where(out[:, None], 0, e.detach()).double().requires_grad_(),
        w.detach().double().requires_grad_(),
    ]
    dense = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, y, reduction="sum")
    assert (gradients[0][out] == 0).all()
    for actual, expected in zip(gradients, torch.autograd.grad(dense, leaves), strict=True):
        scale = expected.norm().clamp(min=1e-30)
        assert (actual.double() - expected).norm() / scale < GRADIENT_ERROR
