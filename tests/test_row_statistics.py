"""`row_statistics` against the dense float64 references: values, gradients, layouts, options."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitless
from logitless import stats, testing
from logitless._core import Spec

torch = pytest.importorskip("torch")

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PLAIN = (
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


def make(
    seed: int, lead: tuple[int, ...], features: int, classes: int, *, dtype: Any = torch.float64
) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(*lead, features), normal(classes, features), normal(classes)


def ids_of(seed: int, shape: tuple[int, ...], classes: int, ignored: float = 0.25) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, classes, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < ignored, -100, ids)


@pytest.mark.smoke
@given(
    lead=st.sampled_from([(), (1,), (7,), (2, 3), (2, 2, 3), (0,), (33,)]),
    features=st.integers(1, 20),
    classes=st.sampled_from([1, 2, 5, 17, 40, 131]),
    targets=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from(sorted(DTYPES)),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.7]),
    shift=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    lead: tuple[int, ...],
    features: int,
    classes: int,
    targets: int | None,
    dtype: str,
    bias: bool,
    softcap: float | None,
    scale: float,
    shift: int,
    seed: int,
) -> None:
    if not lead or lead[-1] <= shift:
        shift = 0
    input, weight, b = make(seed, lead, features, classes, dtype=DTYPES[dtype])
    target = ids_of(seed, lead if targets is None else (*lead, targets), classes)
    vectors = make(seed + 1, (2,), classes, 1, dtype=DTYPES[dtype])[0].to(
        torch.float64 if dtype == "float64" else torch.float32
    )
    k = min(3, classes)
    options: dict[str, Any] = {
        "linear_bias": b if bias else None,
        "softcap": softcap,
        "logit_scale": scale,
        "shift": shift,
    }
    s = logitless.row_statistics(
        input,
        weight,
        target,
        want=(*PLAIN, stats.power_lse(2, 3), stats.weighted(vectors), stats.topk(k)),
        **options,
    )
    names = [n for n in (*PLAIN, "power_lse", "weighted_sum", "weighted_mean", "topk_values")]
    if targets is not None:
        names.remove("log_prob")
    expected, _ = testing.row_statistics(
        input,
        weight,
        target,
        fields=names,
        ignore_index=-100,
        powers=(2, 3),
        vectors=vectors,
        topk=k,
        **options,
    )
    kept = s.kept
    assert kept.shape == s.lse.shape == ((*lead[:-1], lead[-1] - shift) if lead else ())
    for name in names:
        found = getattr(s, name)
        reference = torch.as_tensor(expected[name])
        if name == "target":
            assert found.shape == (kept.shape if targets is None else (*kept.shape, targets))
        # Skipped rows hold whatever is safe.
        found, reference = found[kept], reference[kept]
        size = max(1.0, float(reference.abs().nan_to_num(posinf=0.0).max())) if len(found) else 1.0
        testing.assert_close(found.reshape(reference.shape), reference, name, dtype, scale=size)


@given(
    name=st.sampled_from(
        [*PLAIN, "power_lse", "rest_power", "weighted_sum", "weighted_mean", "dot"]
    ),
    targets=st.sampled_from([None, 1, 3]),
    softcap=st.sampled_from([None, 4.0]),
    lead=st.sampled_from([(6,), (2, 4), (40,)]),
    seed=st.integers(0, 100),
)
def test_gradients_agree_with_the_reference(
    name: str, targets: int | None, softcap: float | None, lead: tuple[int, ...], seed: int
) -> None:
    if name == "log_prob" and targets is not None:
        name = "lse"
    input, weight, bias = make(seed, lead, 5, 9)
    scale = torch.tensor(0.8, dtype=torch.float64)
    dense = make(seed + 2, lead, 9, 1)[0]
    vectors = make(seed + 1, (2,), 9, 1)[0]
    leaves = [t.requires_grad_() for t in (input, weight, bias, scale, dense)]
    target = ids_of(seed, lead if targets is None else (*lead, targets), 9)
    want = {
        "power_lse": stats.power_lse(2, 3),
        "rest_power": stats.rest_power(2, 3),
        "weighted_sum": stats.weighted(vectors),
        "weighted_mean": stats.weighted(vectors),
        "dot": stats.dot(dense),
    }.get(name, name)
    s = logitless.row_statistics(
        input, weight, target, want=[want], linear_bias=bias, logit_scale=scale, softcap=softcap
    )
    value = getattr(s, name)
    cotangent = torch.randn_like(value) * s.kept.reshape(
        *s.kept.shape, *(1,) * (value.dim() - len(lead))
    )
    found = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    _, vjp = testing.row_statistics(
        *(t.detach() for t in (input, weight)),
        target,
        fields=[name],
        ignore_index=-100,
        linear_bias=bias.detach(),
        logit_scale=scale.item(),
        softcap=softcap,
        powers=(2, 3),
        vectors=vectors,
        dense=dense.detach(),
    )
    if name == "target" and targets is None:
        cotangent = cotangent.reshape(torch.as_tensor(_[name]).shape)
    expected = vjp(**{name: cotangent.numpy()})
    for gradient, key in zip(
        found, ("input", "linear_weight", "linear_bias", "logit_scale", "dense"), strict=True
    ):
        if gradient is not None:
            testing.assert_close(gradient, expected[key], "gradient", "float64", label=key)


def test_fields_of_the_core_are_known_without_it() -> None:
    everything = stats.CORE_ORDER
    spec = Spec(everything, powers=(2.0, 3.0), vectors=2, topk=4, targets=3)
    assert stats.core_fields(everything, (2.0, 3.0), 2, 4, 3) == spec.fields


def test_one_power_and_one_vector_have_the_rows_shape() -> None:
    input, weight, _ = make(0, (4, 3), 5, 7)
    c = torch.rand(7)
    s = logitless.row_statistics(input, weight, want=(stats.power_lse(2), stats.weighted(c)))
    assert s.power_lse.shape == s.weighted_sum.shape == s.weighted_mean.shape == (4, 3)
    z = input @ weight.T
    torch.testing.assert_close(s.power_lse, torch.logsumexp(2 * z, -1))
    torch.testing.assert_close(s.weighted_mean, (z.softmax(-1) * c).sum(-1))


def test_powers_of_two_statistics_are_kept_apart() -> None:
    input, weight, _ = make(1, (4,), 5, 7)
    target = torch.tensor([0, 1, 2, 3])
    s = logitless.row_statistics(
        input, weight, target, want=(stats.power_lse(2), stats.rest_power(3, 2))
    )
    z = input @ weight.T
    rest = z.scatter(1, target[:, None], -torch.inf)
    torch.testing.assert_close(s.power_lse, torch.logsumexp(2 * z, -1))
    expected = torch.stack([torch.logsumexp(m * rest, -1) for m in (3, 2)], -1)
    torch.testing.assert_close(s.rest_power, expected)


def test_positions_of_a_head_are_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (4, 2, 3), generator=generator)
    s = logitless.row_statistics(
        input, weight, target, linear_bias=bias, want=("lse", "log_prob", stats.topk(2))
    )
    z = torch.einsum("nd,vabd->nabv", input, weight) + bias.movedim(0, -1)
    torch.testing.assert_close(s.lse, z.logsumexp(-1))
    torch.testing.assert_close(s.topk_values, z.topk(2).values)
    expected = torch.log_softmax(z, -1).gather(-1, target[..., None]).squeeze(-1)
    torch.testing.assert_close(s.log_prob, expected)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(s.log_prob, (input, weight, bias), cotangent)
    for a, b in zip(
        found, torch.autograd.grad(expected, (input, weight, bias), cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory", ["lean", "fast", 0, 10_000, 10**9])
def test_memory_changes_no_more_than_rounding(memory: Any) -> None:
    input, weight, bias = (t.requires_grad_() for t in make(4, (70,), 33, 300, dtype=torch.float32))
    target = ids_of(4, (70,), 300)

    def run(memory: Any) -> list[Any]:
        s = logitless.row_statistics(
            input,
            weight,
            target,
            want=("rest", "target", "entropy"),
            linear_bias=bias,
            memory=memory,
        )
        loss = (s.rest - s.target + 0.1 * s.entropy)[s.kept].sum()
        return [loss.detach(), *torch.autograd.grad(loss, (input, weight, bias))]

    for a, b in zip(run(memory), run("lean"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_layout_gives_the_same_numbers() -> None:
    input, weight, bias = make(5, (6, 4), 8, 10, dtype=torch.float32)
    target = ids_of(5, (6, 4), 10)
    plain = logitless.row_statistics(input, weight, target, linear_bias=bias)

    def strided(t: Any) -> Any:
        return torch.empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)

    def transposed(t: Any) -> Any:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    def unaligned(t: Any) -> Any:
        raw = torch.empty(4 * t.numel() + 1, dtype=torch.uint8)
        view = torch.frombuffer(memoryview(raw.numpy())[1:], dtype=t.dtype).view(t.shape)
        return view.copy_(t)

    def negated(t: Any) -> Any:
        return torch.complex(torch.zeros_like(t), -t).conj().imag

    for change in (strided, transposed, unaligned, negated):
        changed = [change(t) for t in (input, weight, bias)]
        for t, original in zip(changed, (input, weight, bias), strict=True):
            assert torch.equal(t, original)
        s = logitless.row_statistics(changed[0], changed[1], target, linear_bias=changed[2])
        assert torch.equal(s.rest, plain.rest), change.__name__
        assert torch.equal(s.target, plain.target), change.__name__


def test_expanded_inputs_and_permuted_leading_dimensions() -> None:
    _, weight, bias = make(6, (1,), 8, 10)
    row = torch.randn(8, dtype=torch.float64, requires_grad=True)
    s = logitless.row_statistics(row.expand(5, 8), weight, want="lse", linear_bias=bias)
    torch.testing.assert_close(s.lse, ((row @ weight.T) + bias).logsumexp(-1).expand(5))
    (gradient,) = torch.autograd.grad(s.lse.sum(), row)
    (expected,) = torch.autograd.grad(5 * ((row @ weight.T) + bias).logsumexp(-1), row)
    torch.testing.assert_close(gradient, expected)
    cube = torch.randn(2, 3, 4, 8, dtype=torch.float64).permute(2, 0, 1, 3)
    s = logitless.row_statistics(cube, weight, want="lse")
    torch.testing.assert_close(s.lse, (cube @ weight.T).logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_integer_dtypes_of_ids(dtype: Any) -> None:
    input, weight, _ = make(7, (6,), 4, 9)
    target = torch.randint(0, 9, (6,))
    a = logitless.row_statistics(input, weight, target)
    b = logitless.row_statistics(input, weight, target.to(dtype))
    assert torch.equal(a.target, b.target)


def test_nan_and_infinities_go_where_torch_sends_them() -> None:
    input, weight, bias = make(8, (4,), 3, 6)
    bias[2] = -torch.inf
    input[1, 0] = torch.nan
    target = torch.tensor([0, 1, 2, 3])
    s = logitless.row_statistics(
        input, weight, target, want=("lse", "entropy", "max"), linear_bias=bias
    )
    z = input @ weight.T + bias
    torch.testing.assert_close(s.lse, z.logsumexp(-1), equal_nan=True)
    assert s.log_prob[2] == -torch.inf
    assert s.max[1].isnan()
    p = z.softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(s.entropy[[0, 2, 3]], entropy[[0, 2, 3]])


def test_complement_form_to_the_last_digit() -> None:
    # One class far ahead of all others: 1 - p is e^-87.
    weight = torch.tensor([[87.0], [0.0]])
    s = logitless.row_statistics(torch.ones(1, 1), weight, torch.tensor([0]))
    expected = torch.tensor([-87.0], dtype=torch.float64).exp().neg()
    torch.testing.assert_close(s.log_prob.double(), expected, rtol=1e-5, atol=0.0)
    several = logitless.row_statistics(
        torch.ones(1, 1), torch.tensor([[87.0], [0.0], [-3.0]]), torch.tensor([[0, 2]])
    )
    expected = -(torch.tensor(-87.0, dtype=torch.float64).exp() * (1 + math.exp(-3.0)))
    torch.testing.assert_close(several.log_prob[0, 0].double(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(several.log_prob[0, 1], torch.tensor(-90.0))


def test_repeated_ids_count_once() -> None:
    input, weight, _ = make(9, (3,), 4, 8)
    once = logitless.row_statistics(input, weight, torch.tensor([[1, 5, -100]] * 3))
    twice = logitless.row_statistics(input, weight, torch.tensor([[5, 1, 5]] * 3))
    torch.testing.assert_close(once.lse, twice.lse)
    torch.testing.assert_close(once.target_lse, twice.target_lse)
    torch.testing.assert_close(once.log_prob[:, 0], twice.log_prob[:, 1])
    torch.testing.assert_close(twice.log_prob[:, 0], twice.log_prob[:, 2])


def test_unwanted_fields_name_the_remedy() -> None:
    input, weight, _ = make(10, (3,), 4, 8)
    s = logitless.row_statistics(input, weight, torch.tensor([1, 2, 3]))
    with pytest.raises(AttributeError, match=r"add 'entropy' to want="):
        _ = s.entropy
    with pytest.raises(AttributeError, match=r"stats\.topk\(8\)"):
        _ = s.topk_ids
    assert s.lse.shape == (3,)  # follows from what is there
    s = logitless.row_statistics(input, weight, want="lse")
    for name in ("rest", "target"):
        with pytest.raises(AttributeError, match="'lse'"):
            getattr(s, name)
    for name in ("rest", "target"):
        with pytest.raises(ValueError, match="'lse'"):
            logitless.row_statistics(input, weight, want=name)
    assert not hasattr(s, "no_such_thing")


def test_statistics_are_a_pytree() -> None:
    input, weight, _ = make(11, (3,), 4, 8)
    s = logitless.row_statistics(
        input.requires_grad_(), weight, torch.tensor([[1, 2]] * 3), want=("lse", stats.power_lse(2))
    )
    doubled = torch.utils._pytree.tree_map(lambda t: t.detach(), s)
    assert isinstance(doubled, logitless.RowStatistics)
    assert not doubled.lse.requires_grad
    torch.testing.assert_close(doubled.power_lse, s.power_lse.detach())
    assert "rest=(3,)" in repr(s)


def test_target_weights_travel_along() -> None:
    input, weight, _ = make(12, (2, 5), 4, 8)
    ids, q = ids_of(12, (2, 5, 3), 8, 0.4), torch.randn(2, 5, 3)
    s = logitless.row_statistics(input, weight, ids, target_weight=q, shift=2)
    assert s.target_weight.shape == (2, 3, 3)
    assert torch.equal(s.target_weight == 0, ids[:, 2:] == -100)
    assert torch.equal(s.target_ids, ids[:, 2:])


def test_statistic_objects() -> None:
    assert stats.topk(3) == stats.topk(3)
    assert hash(stats.power_lse(2)) == hash(stats.power_lse(2.0))
    assert stats.topk(3) != stats.topk(4)
    assert repr(stats.power_lse(2, 0.5)) == "stats.power_lse(2, 0.5)"
    assert "shape (7,)" in repr(stats.weighted(torch.ones(7)))
    assert pickle.loads(pickle.dumps(stats.topk(3))) == stats.topk(3)


def test_entropy_of_peaked_rows_keeps_its_digits() -> None:
    weight = torch.tensor([[20.0], [0.0], [-1.0], [0.5]])
    z = weight.double().squeeze(1)
    # log p of the first class by log1p: float64 alone would lose it too.
    rest = z[1:].logsumexp(0)
    log_p = torch.cat([-torch.nn.functional.softplus(rest - z[:1], threshold=60.0), z[1:] - z[0]])
    log_p[1:] += log_p[0]
    exact = -(log_p.exp() * log_p).sum()
    for target in (None, [0], [1], [[0, 2]], [[1, 2]], [[2, 0, 0]]):
        head = weight.clone().requires_grad_()
        ids = None if target is None else torch.tensor(target)
        s = logitless.row_statistics(torch.ones(1, 1), head, ids, want="entropy")
        torch.testing.assert_close(s.entropy[0].double(), exact, rtol=1e-5, atol=0.0)
        (gradient,) = torch.autograd.grad(s.entropy.sum(), head)
        expected = -(log_p.exp() * (log_p + exact))
        torch.testing.assert_close(gradient[:, 0].double(), expected, rtol=0.1, atol=1e-11)
