"""`linear_cross_entropy` against torch's own and the float64 reference; the smaller functions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitless import testing

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

F = torch.nn.functional

REDUCTIONS = ("none", "mean", "sum")


def normal(seed: int, *shape: int, dtype: Any = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ids_of(seed: int, shape: tuple[int, ...], classes: int, ignored: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, classes, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < ignored, -100, ids)


def torch_reference(
    input: Any, linear_weight: Any, target: Any, *, linear_bias: Any = None, **options: Any
) -> Any:
    """What torch documents `linear_cross_entropy` to be (its own function needs torch 2.13)."""
    classes, *positions, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(-1, features), bias)
    logits = logits.reshape(*input.shape[:-1], classes, *positions)
    return F.cross_entropy(logits, target, **options)


def check_against_torch(
    input: Any, linear_weight: Any, target: Any, *, linear_bias: Any = None, **options: Any
) -> None:
    leaves = [t for t in (input, linear_weight, target, linear_bias) if t is not None]
    leaves = [t.requires_grad_() for t in leaves if t.is_floating_point()]
    arguments = {"linear_bias": linear_bias, **options}
    expected = torch_reference(input, linear_weight, target, **arguments)
    found = LF.linear_cross_entropy(input, linear_weight, target, **arguments)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, equal_nan=True)
    cotangent = torch.randn_like(expected)
    a = torch.autograd.grad(found, leaves, cotangent)
    b = torch.autograd.grad(expected, leaves, cotangent)
    torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.smoke
@given(
    kind=st.sampled_from(["ids", "probabilities"]),
    lead=st.sampled_from([(), (1,), (6,), (0,)]),
    positions=st.sampled_from([(), (2,), (2, 3)]),
    classes=st.sampled_from([1, 2, 7]),
    reduction=st.sampled_from(REDUCTIONS),
    bias=st.booleans(),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 50),
)
def test_agrees_with_torch(
    kind: str,
    lead: tuple[int, ...],
    positions: tuple[int, ...],
    classes: int,
    reduction: str,
    bias: bool,
    weighted: bool,
    label_smoothing: float,
    ignored: float,
    seed: int,
) -> None:
    if not lead:
        positions = ()
    if kind == "ids":
        target = ids_of(seed, (*lead, *positions), classes, ignored)
        if not lead and ignored < 1.0:
            target = target.clamp(min=0)
    else:
        target = normal(seed + 1, *lead, classes, *positions)  # signed, of any sum
    check_against_torch(
        normal(seed, *lead, 4),
        normal(seed + 2, classes, *positions, 4),
        target,
        linear_bias=normal(seed + 3, classes, *positions) if bias else None,
        weight=normal(seed + 4, classes).abs() if weighted else None,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none")
def test_signature_begins_as_torchs_does() -> None:
    ours = inspect.signature(LF.linear_cross_entropy).parameters
    for name, parameter in inspect.signature(F.linear_cross_entropy).parameters.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default
    input, weight, target = normal(0, 5, 3), normal(1, 4, 3), ids_of(2, (5,), 4)
    options = torch.nn.LinearCrossEntropyOptions()
    torch.testing.assert_close(
        LF.linear_cross_entropy(input, weight, target, options=options),
        F.linear_cross_entropy(input, weight, target),
    )


@pytest.mark.parametrize("ignore_index", [-1, 0, 3])
def test_explicit_ignore_index(ignore_index: int) -> None:
    target = torch.tensor([0, 1, 2, 3, 3])
    target = torch.where(target == 2, torch.tensor(ignore_index), target)
    for reduction in REDUCTIONS:
        check_against_torch(
            normal(0, 5, 3), normal(1, 4, 3), target, reduction=reduction, ignore_index=ignore_index
        )


@given(
    kind=st.sampled_from(["ids", "sparse", "probabilities"]),
    lead=st.sampled_from([(5,), (2, 4), (2, 1, 3)]),
    positions=st.sampled_from([(), (2,)]),
    reduction=st.sampled_from(REDUCTIONS),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    row_weight=st.booleans(),
    denominator=st.sampled_from([None, 3.5]),
    softcap=st.sampled_from([None, 3.0]),
    shift=st.sampled_from([0, 1, 2]),
    z_loss_weight=st.sampled_from([0.0, 0.1]),
    memory=st.sampled_from(["lean", "fast"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 50),
)
def test_everything_together_agrees_with_the_reference(
    kind: str,
    lead: tuple[int, ...],
    positions: tuple[int, ...],
    reduction: str,
    weighted: bool,
    label_smoothing: float,
    row_weight: bool,
    denominator: float | None,
    softcap: float | None,
    shift: int,
    z_loss_weight: float,
    memory: str,
    dtype: Any,
    seed: int,
) -> None:
    classes, features = 9, 4
    input = normal(seed, *lead, features, dtype=dtype).requires_grad_()
    weight = normal(seed + 1, classes, *positions, features, dtype=dtype).requires_grad_()
    bias = normal(seed + 2, classes, *positions, dtype=dtype).requires_grad_()
    scale = torch.tensor(0.9, dtype=dtype, requires_grad=True)
    leaves = [input, weight, bias, scale]
    rows = (*lead, *positions)
    options: dict[str, Any] = {
        "reduction": reduction,
        "weight": normal(seed + 3, classes).abs().to(dtype) if weighted else None,
        "label_smoothing": label_smoothing,
        "row_weight": normal(seed + 4, *rows, dtype=dtype) if row_weight else None,
        "denominator": denominator if reduction == "mean" else None,
        "softcap": softcap,
        "shift": shift if lead[-1] > shift else 0,
        "z_loss_weight": z_loss_weight,
    }
    if kind == "ids":
        target = ids_of(seed, rows, classes)
    elif kind == "sparse":
        target = ids_of(seed, (*rows, 3), classes)
        options["target_weight"] = normal(seed + 5, *rows, 3, dtype=dtype)
    else:
        target = normal(seed + 6, *lead, classes, *positions, dtype=dtype).requires_grad_()
        leaves.append(target)
    found = LF.linear_cross_entropy(
        input, weight, target, linear_bias=bias, logit_scale=scale, memory=memory, **options
    )
    cotangent = torch.randn_like(found)
    plain = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = testing.linear_cross_entropy(
        input.detach(),
        weight.detach(),
        target.detach(),
        linear_bias=bias.detach(),
        logit_scale=scale.item(),
        ignore_index=None if kind == "probabilities" else -100,
        cotangent=cotangent.numpy(),
        **plain,
    )
    testing.assert_close(found, expected.loss, "loss", dtype, factor=4.0)
    gradients = torch.autograd.grad(found, leaves, cotangent)
    names = ("input", "linear_weight", "linear_bias", "logit_scale", "target")
    for gradient, name in zip(gradients, names, strict=False):
        assert gradient.dtype == dtype
        reference = expected.gradients[name]
        size = max(1.0, float(abs(reference).max()))
        testing.assert_close(
            gradient, reference, "gradient", dtype, label=name, scale=size, factor=4.0
        )


def test_complement_form_at_a_margin_of_87() -> None:
    weight = torch.tensor([[87.0], [0.0]], requires_grad=True)
    input = torch.ones(1, 1)
    exact = torch.tensor(-87.0, dtype=torch.float64).exp()
    one_hot = torch.tensor([[1.0, 0.0]])
    for target, extra in (
        (torch.tensor([0]), {}),
        (torch.tensor([0]), {"denominator": 1.0}),
        (torch.tensor([[0, -100]]), {"target_weight": torch.ones(1, 2)}),
        (one_hot, {}),
    ):
        loss = LF.linear_cross_entropy(input, weight, target, **extra)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
        (gradient,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(gradient[1, 0].double(), exact, rtol=1e-5, atol=0.0)
    assert F.cross_entropy(input @ weight.T, torch.tensor([0])) == 0.0


def test_a_common_offset_of_the_logits_costs_no_digits() -> None:
    input, weight = normal(0, 6, 4, dtype=torch.float32), normal(1, 8, 4, dtype=torch.float32)
    target = torch.arange(6)
    plain = LF.linear_cross_entropy(input, weight, target, linear_bias=torch.zeros(8))
    offset = LF.linear_cross_entropy(input, weight, target, linear_bias=torch.full((8,), 4096.0))
    torch.testing.assert_close(offset, plain, rtol=2e-3, atol=2e-3)


def test_duplicates_add_and_padding_does_not_count() -> None:
    input, weight = normal(0, 4, 3), normal(1, 6, 3)
    ids = torch.tensor([[2, 2, 5]] * 4)
    a = LF.linear_cross_entropy(
        input, weight, ids, target_weight=torch.tensor([[0.5, 0.25, 1.0]] * 4, dtype=torch.float64)
    )
    padded = torch.tensor([[2, 5, -100]] * 4)
    b = LF.linear_cross_entropy(
        input, weight, padded, target_weight=torch.tensor([[0.75, 1.0, 9.0]] * 4)
    )
    torch.testing.assert_close(a, b)
    dense = torch.zeros(4, 6, dtype=torch.float64)
    dense[:, 2], dense[:, 5] = 0.75, 1.0
    torch.testing.assert_close(a, LF.linear_cross_entropy(input, weight, dense))


def test_all_rows_ignored_and_no_rows() -> None:
    weight = normal(1, 6, 3).requires_grad_()
    for rows in (0, 4):
        input = normal(0, rows, 3).requires_grad_()
        target = torch.full((rows,), -100)
        for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
            for extra in ({}, {"row_weight": torch.ones(rows)}):
                loss = LF.linear_cross_entropy(input, weight, target, reduction=reduction, **extra)
                torch.testing.assert_close(loss.item(), expected, equal_nan=True)
                loss.backward()
                assert torch.equal(input.grad, torch.zeros_like(input))
                assert torch.equal(weight.grad, torch.zeros_like(weight))
                weight.grad = input.grad = None
        loss = LF.linear_cross_entropy(input, weight, target, reduction="none")
        assert torch.equal(loss, torch.zeros(rows, dtype=torch.float64))


def test_an_ignored_row_may_hold_anything() -> None:
    input = normal(0, 3, 4)
    input[1] = torch.nan
    input = input.requires_grad_()
    target = torch.tensor([1, -100, 2])
    for extra in (
        {},
        {"label_smoothing": 0.1},
        {"row_weight": torch.tensor([1.0, torch.nan, 1.0])},
    ):
        loss = LF.linear_cross_entropy(input, normal(1, 5, 4), target, **extra)
        (gradient,) = torch.autograd.grad(loss, input)
        assert loss.isfinite()
        assert torch.equal(gradient[1], torch.zeros(4, dtype=torch.float64))
        assert gradient[0].isfinite().all()


def test_a_masked_class_contributes_nothing() -> None:
    bias = torch.zeros(5, dtype=torch.float64)
    bias[3] = -torch.inf
    input, weight, target = normal(0, 4, 3), normal(1, 5, 3), torch.tensor([0, 1, 2, 4])
    q = torch.rand(4, 5, dtype=torch.float64)
    q[:, 3] = 0
    keep = torch.tensor([0, 1, 2, 4])
    renamed = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(
        LF.linear_cross_entropy(input, weight, target, linear_bias=bias),
        LF.linear_cross_entropy(input, weight[keep], renamed),
    )
    torch.testing.assert_close(
        LF.linear_cross_entropy(input, weight, q, linear_bias=bias),
        LF.linear_cross_entropy(input, weight[keep], q[:, keep]),
    )
    target[0] = 3
    assert LF.linear_cross_entropy(input, weight, target, linear_bias=bias) == torch.inf


def test_numpy_numbers_are_numbers() -> None:
    import numpy as np

    input, weight, target = normal(0, 2, 5, 3), normal(1, 6, 3), ids_of(2, (2, 5), 6)
    torch.testing.assert_close(
        LF.linear_cross_entropy(
            input,
            weight,
            target,
            logit_scale=np.float32(0.5),
            softcap=np.float64(3.0),
            shift=np.int64(1),
        ),
        LF.linear_cross_entropy(input, weight, target, logit_scale=0.5, softcap=3.0, shift=1),
    )


def test_denominator_tensor_and_gradient_accumulation() -> None:
    input, weight = normal(0, 8, 3), normal(1, 6, 3)
    target = ids_of(3, (8,), 6)
    whole = LF.linear_cross_entropy(input, weight, target)
    count = (target != -100).sum()
    halves = [
        LF.linear_cross_entropy(input[h], weight, target[h], denominator=count)
        for h in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_return_statistics() -> None:
    input, weight, target = normal(0, 2, 5, 3), normal(1, 6, 3), ids_of(2, (2, 5), 6)
    loss, s = LF.linear_cross_entropy(input, weight, target, shift=1, return_statistics=True)
    assert s.lse.shape == (2, 4)
    torch.testing.assert_close(loss, -s.log_prob[s.kept].mean())


def test_log_prob_and_entropy() -> None:
    input, weight, bias = normal(0, 2, 5, 3), normal(1, 6, 3), normal(2, 6)
    input.requires_grad_()
    target = ids_of(3, (2, 5), 6)
    found = LF.linear_log_prob(
        input, weight, target, linear_bias=bias, temperature=0.7, softcap=4.0, shift=1
    )
    z = 4.0 * torch.tanh((input @ weight.T + bias) / 4.0) / 0.7
    log_p = torch.log_softmax(z[:, :-1], -1)
    kept = target[:, 1:] != -100
    gathered = log_p.gather(-1, target[:, 1:, None].clamp(min=0)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(found.log_prob, torch.where(kept, gathered, 0.0))
    torch.testing.assert_close(found.entropy, torch.where(kept, entropy, 0.0))
    a = torch.autograd.grad(found.log_prob.sum() + found.entropy.sum(), input)
    b = torch.autograd.grad(torch.where(kept, gathered + entropy, 0.0).sum(), input)
    torch.testing.assert_close(a, b)
    assert LF.linear_log_prob(input, weight, target, entropy=False).entropy is None
    candidates = LF.linear_log_prob(input, weight, target[..., None].expand(2, 5, 2))
    assert candidates.log_prob.shape == (2, 5, 2)
    with pytest.raises(ValueError, match="temperature"):
        LF.linear_log_prob(input, weight, target, temperature=0.0)


def test_readouts() -> None:
    input, weight, bias = normal(0, 2, 5, 3), normal(1, 7, 3), normal(2, 7)
    z = input @ weight.T + bias
    lse = LF.linear_logsumexp(input, weight, linear_bias=bias)
    torch.testing.assert_close(lse, z.logsumexp(-1))
    assert torch.equal(LF.linear_argmax(input, weight, linear_bias=bias), z.argmax(-1))
    top = LF.linear_topk(input, weight, 3, linear_bias=bias)
    torch.testing.assert_close(top.values, z.topk(3).values)
    assert torch.equal(top.indices, z.topk(3).indices)


def test_accuracy() -> None:
    input, weight = normal(0, 2, 8, 3), normal(1, 7, 3)
    target = ids_of(2, (2, 8), 7)
    z = input @ weight.T
    kept = target != -100
    hits = (z.argmax(-1) == target) & kept
    found = LF.linear_accuracy(input, weight, target)
    torch.testing.assert_close(found, (hits.sum() / kept.sum()).double())
    found = LF.linear_accuracy(input, weight, target, topk=3, reduction="none")
    expected = (z.topk(3).indices == target[..., None]).any(-1)
    assert torch.equal(found, expected.double())
    several = torch.stack([target, z.argmax(-1)], -1)
    assert LF.linear_accuracy(input, weight, several, reduction="sum") == 16
    empty = LF.linear_accuracy(input, weight, torch.full((2, 8), -100))
    assert empty.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_return_float_and_half_gradients(dtype: Any) -> None:
    input = normal(0, 40, 16, dtype=dtype).requires_grad_()
    weight = normal(1, 50, 16, dtype=dtype).requires_grad_()
    target = ids_of(2, (40,), 50)
    loss = LF.linear_cross_entropy(input, weight, target)
    assert loss.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (input, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(
        torch.autograd.grad(loss, (input, weight)), torch.autograd.grad(expected, wide), strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-4)


@pytest.mark.slow
def test_small_calls_cost_little_python() -> None:
    """60 µs of Python a forward at (64, 64, 1000): the median of what the engine does not take."""
    import time

    from logitless import _core
    from logitless.ops import device

    input = normal(0, 64, 64, dtype=torch.float32).requires_grad_()
    weight = normal(1, 1000, 64, dtype=torch.float32).requires_grad_()
    target = torch.randint(0, 1000, (64,))

    class Timed:
        spent = 0.0

        def cross_entropy_forward(self, *arguments: Any) -> int:
            start = time.perf_counter()
            result = _core.cross_entropy_forward(*arguments)
            self.spent = time.perf_counter() - start
            return result

    timed = Timed()
    original, device._CPU = device._CPU, timed
    times = []
    try:
        for _ in range(300):
            start = time.perf_counter()
            LF.linear_cross_entropy(input, weight, target)
            times.append(time.perf_counter() - start - timed.spent)
    finally:
        device._CPU = original
    assert sorted(times)[len(times) // 2] < 120e-6  # twice the goal: shared machines are noisy


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.ones(6)}])
def test_infinite_logits_give_what_torch_gives(value: float, options: dict[str, Any]) -> None:
    input, weight, target = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 2, 2, 5])
    bias = torch.zeros(6)
    bias[2] = value
    z = torch.nn.functional.linear(input, weight, bias)
    expected = torch.nn.functional.cross_entropy(z, target, reduction="none", **options)
    loss = LF.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction="none", **options
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
