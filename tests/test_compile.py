"""torch.compile, fake and meta tensors, dispatch modes: the same numbers through custom ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import logitless

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402
import logitless.nn as ln  # noqa: E402
from logitless import PerRow, RowStatistics, row_loss, stats  # noqa: E402

CLASSES = 9
VECTORS = torch.linspace(-1, 1, 2 * CLASSES).reshape(2, CLASSES)


@row_loss(want=lambda power: ("rest", "target", stats.power_lse(power)), head="cosine")
def own(s: RowStatistics, *, advantage: PerRow, power: float = 2.0) -> torch.Tensor:
    """A loss with everything that a decorator can ask for."""
    return advantage * (s.lse - s.target) + torch.exp(s.power_lse - power * s.lse)


def make() -> tuple[Any, Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 6, 4, generator=generator, requires_grad=True)
    weight = torch.randn(CLASSES, 4, generator=generator, requires_grad=True)
    bias = torch.randn(CLASSES, generator=generator, requires_grad=True)
    target = torch.randint(0, CLASSES, (2, 6), generator=generator)
    target[0, 1] = -100
    return input, weight, bias, target


def everything(input: Any, weight: Any, bias: Any, target: Any) -> Any:
    s = logitless.row_statistics(
        input,
        weight,
        target,
        want=(
            "lse",
            "log_prob",
            "entropy",
            "variance",
            "sum_sq",
            "max",
            stats.power_lse(2, 3),
            stats.weighted(VECTORS),
            stats.topk(3),
        ),
        linear_bias=bias,
        softcap=5.0,
        shift=1,
    )
    rows = s.lse + s.log_prob + s.entropy + s.variance + s.sum_sq + s.max + s.mean
    rows = rows + s.power_lse.sum(-1) + s.weighted_sum.sum(-1) + s.weighted_mean.sum(-1)
    return torch.where(s.kept, rows + s.topk_values.sum(-1), 0.0).sum()


CALLS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda e, w, b, y: LF.linear_cross_entropy(e, w, y, linear_bias=b),
    "options": lambda e, w, b, y: LF.linear_cross_entropy(
        e,
        w,
        y,
        linear_bias=b,
        weight=torch.ones(CLASSES),
        label_smoothing=0.1,
        row_weight=torch.ones(2, 6),
        shift=1,
        z_loss_weight=0.1,
        logit_scale=w.detach().abs().mean(),
    ),
    "probabilities": lambda e, w, b, y: LF.linear_cross_entropy(  # noqa: ARG005
        e, w, torch.ones(2, 6, CLASSES) / CLASSES, linear_bias=b, reduction="sum"
    ),
    "sparse": lambda e, w, b, y: LF.linear_cross_entropy(
        e, w, torch.stack([y, y], -1), target_weight=torch.ones(2, 6, 2), linear_bias=b
    ),
    "own": lambda e, w, b, y: own(e, w, y, advantage=torch.ones(2, 6), linear_bias=b),
    "everything": everything,
    "log_prob": lambda e, w, b, y: sum(
        t.sum() for t in LF.linear_log_prob(e, w, y, linear_bias=b, temperature=0.5)
    ),
}


def gradients(value: Any, leaves: Any) -> Any:
    return torch.autograd.grad(value, leaves)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in CALLS), ("cross_entropy", True), ("everything", True)],
)
def test_compiled_calls_give_the_same_numbers(name: str, dynamic: bool) -> None:
    *leaves, target = make()
    call = CALLS[name]
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found, expected = compiled(*leaves, target), call(*leaves, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor() -> None:
    *leaves, target = make()
    torch.compiler.reset()
    for memory in ("lean", "fast"):

        def call(e: Any, w: Any, b: Any, y: Any, memory: str = memory) -> Any:
            scaled = 2.0 * LF.linear_cross_entropy(e, w, y, linear_bias=b, memory=memory)
            return scaled + everything(e, w, b, y)

        found = torch.compile(call, fullgraph=True)(*leaves, target)
        expected = call(*leaves, target)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_compiled_statistics_come_out_whole() -> None:
    input, weight, _, target = make()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda e, w, y: logitless.row_statistics(e, w, y, want=("rest", "entropy")),
        fullgraph=True,
        backend="aot_eager",
    )
    s = compiled(input, weight, target)
    expected = logitless.row_statistics(input, weight, target, want=("rest", "entropy"))
    assert isinstance(s, RowStatistics)
    torch.testing.assert_close(s.entropy, expected.entropy)
    torch.testing.assert_close(s.kept, expected.kept)


def test_compiled_modules_and_autocast() -> None:
    *_, target = make()
    torch.compiler.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    head = ln.LinearCrossEntropyLoss(4, CLASSES, shift=1)

    def step(x: Any, y: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head(model(x), y)

    x = torch.randn(2, 6, 4)
    parameters = [*model.parameters(), *head.parameters()]
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x, target)
    expected = step(x, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, parameters), gradients(expected, parameters), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_changing_lengths_recompile_once() -> None:
    _, weight, bias, _ = make()
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS["cross_entropy"], fullgraph=True, backend=counter)
    for rows in (5, 6, 7, 8, 9):
        input, target = torch.randn(rows, 4), torch.randint(0, CLASSES, (rows,))
        torch.testing.assert_close(
            compiled(input, weight, bias, target),
            CALLS["cross_entropy"](input, weight, bias, target),
        )
    assert counter.frame_count <= 2


def test_custom_ops_pass_torchs_own_checks() -> None:
    *leaves, target = make()
    packed = ("rest,target,entropy", [], 0, 1, -100, 1.0, 0.0, -1, 7, torch.float32)
    arguments = (*leaves, None, None, target[:, 1:].contiguous(), None, *packed)
    torch.library.opcheck(
        torch.ops.logitless.row_statistics.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_fake_and_meta_tensors_have_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in make()]
        loss = CALLS["options"](*fakes)
        assert loss.shape == ()
    metas = [t.to("meta") for t in make()]
    metas = [t.detach().requires_grad_(t.is_floating_point()) for t in metas]
    input, weight, bias, target = metas
    for memory in ("lean", "fast"):
        rows = LF.linear_cross_entropy(
            input, weight, target, linear_bias=bias, reduction="none", shift=1, memory=memory
        )
        assert rows.is_meta
        assert rows.shape == (2, 5)
        rows.sum().backward()
        assert input.grad.shape == input.shape
        assert weight.grad.is_meta
    s = logitless.row_statistics(input, weight, want=stats.topk(3))
    assert s.topk_ids.shape == (2, 6, 3)
    assert s.topk_ids.dtype == torch.int64


def test_dispatch_modes_see_one_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            op: Any,
            types: Any,
            args: Any = (),
            kwargs: Any = None,
        ) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    *leaves, target = make()
    with Record():
        loss = CALLS["cross_entropy"](*leaves, target)
    assert seen.count("logitless.row_statistics.default") == 1
    torch.testing.assert_close(loss, CALLS["cross_entropy"](*leaves, target))


def test_export() -> None:
    *leaves, target = make()

    class Loss(torch.nn.Module):
        def forward(self, e: Any, w: Any, b: Any, y: Any) -> Any:
            return CALLS["cross_entropy"](e, w, b, y)

    plain = tuple(t.detach() for t in leaves)
    program = torch.export.export(Loss(), (*plain, target))
    torch.testing.assert_close(program.module()(*plain, target), Loss()(*plain, target))
