"""Many rows on CUDA: the call is cut into blocks of rows, and nothing but its memory shows it."""

from __future__ import annotations

from typing import Any

import pytest

from logitless import _core

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402
from logitless._arrays import BF16, F32  # noqa: E402

pytestmark = pytest.mark.gpu

# Rows enough that the sums of the input's gradient alone are more than lean has.
BATCH, LENGTH, FEATURES, CLASSES = 4, 32_769, 1024, 2048
ROWS = BATCH * (LENGTH - 1)
LEAN = 256 << 20


def make(dtype: Any) -> tuple[Any, ...]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden = normal(BATCH, LENGTH, FEATURES).to(dtype)
    weight = (normal(CLASSES, FEATURES) * (1.5 / FEATURES**0.5)).to(dtype)
    bias = normal(CLASSES).to(dtype)
    target = torch.randint(CLASSES, (BATCH, LENGTH), generator=generator, device="cuda")
    target[torch.rand(BATCH, LENGTH, generator=generator, device="cuda") < 0.3] = -100
    scale = torch.tensor(0.9, device="cuda")
    return *(t.requires_grad_() for t in (hidden, weight, bias, scale)), target


def reference(leaves: Any, target: Any) -> Any:
    """Gradients in float64, some rows at a time."""
    hidden, weight, bias, scale = (t.detach().double() for t in leaves)
    weight, bias, scale = (t.requires_grad_() for t in (weight, bias, scale))
    rows, ids = hidden[:, :-1].reshape(-1, FEATURES), target[:, 1:].reshape(-1)
    count, pieces, total = (ids >= 0).sum(), [], 0.0
    for first in range(0, ROWS, 16_384):
        part = rows[first : first + 16_384].requires_grad_()
        logits = scale * (part @ weight.T) + bias
        loss = torch.nn.functional.cross_entropy(
            logits, ids[first : first + 16_384], reduction="sum"
        )
        (loss / count).backward()
        pieces.append(part.grad)
        total += (loss / count).detach()
    d_hidden = torch.zeros_like(hidden)
    d_hidden[:, :-1] = torch.cat(pieces).view(BATCH, LENGTH - 1, FEATURES)
    return total, (d_hidden, weight.grad, bias.grad, scale.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients(dtype: Any) -> None:
    *leaves, target = make(dtype)
    hidden, weight, bias, scale = leaves

    def step() -> Any:
        loss = LF.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, logit_scale=scale, shift=1
        )
        return loss, torch.autograd.grad(loss, leaves)

    loss, found = step()
    expected_loss, expected = reference(leaves, target)
    limit = 3e-3 if dtype == torch.bfloat16 else 2e-5
    assert abs(loss.double() - expected_loss) <= 1e-5 * expected_loss
    for name, a, b in zip(("hidden", "weight", "bias", "scale"), found, expected, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= limit, f"{name}: {error:.2e}"
    again = step()[1]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_sums_of_the_weight_may_be_the_callers() -> None:
    hidden, weight, _, _, target = make(torch.bfloat16)
    fixed = weight.detach()
    buffer = torch.ones(CLASSES, FEATURES, device="cuda")
    loss = LF.linear_cross_entropy(hidden, fixed, target, shift=1, grad_buffer=buffer)
    loss.backward()
    plain = LF.linear_cross_entropy(hidden, weight, target, shift=1)
    expected = torch.autograd.grad(plain, weight)[0].double()
    error = (buffer.double() - 1 - expected).norm() / expected.norm()
    assert error <= 3e-3


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, BF16), (torch.float32, F32)])
def test_memory_is_leans(dtype: Any, code: int, peak_bytes: Any) -> None:
    hidden, weight, *_, target = make(dtype)
    spec = _core.Spec(("rest", "target"), targets=1)
    plan = _core.cuda_plan(spec, ROWS, FEATURES, CLASSES, code, -1, 3)
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    budget = max(LEAN, gradients // 4)
    assert max(plan.forward_bytes, plan.backward_bytes) <= budget

    def step() -> Any:
        loss = LF.linear_cross_entropy(hidden, weight, target, shift=1)
        return torch.autograd.grad(loss, (hidden, weight))

    step()
    peak = peak_bytes(step)
    # Ids, statistics and their cotangents: 8 + 6 x 4 bytes a row, and the allocator's rounding.
    assert peak <= gradients + budget + 40 * ROWS + (4 << 20)


def test_graph() -> None:
    hidden, weight, *_, target = make(torch.bfloat16)

    def step() -> Any:
        loss = LF.linear_cross_entropy(hidden, weight, target, shift=1)
        # A loss with its graph would tie the leaves to the stream of the first step.
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
