"""Row statistics and read-outs of the NumPy face against the dense float64 references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import logitless.numpy as ln
from logitless import stats, testing

GRADIENTS = ("input", "linear_weight", "linear_bias")

PLAIN = (
    "rest",
    "target",
    "lse",
    "log_prob",
    "entropy",
    "mean_logit",
    "rest_entropy",
    "sum",
    "sum_sq",
    "mean",
    "variance",
    "max",
    "argmax",
)


def everything(
    rng: np.random.Generator, rows: tuple[int, ...], classes: int, extra: tuple[int, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A want of every statistic, and the same parameters as the reference takes them."""
    vectors = rng.standard_normal((2, classes))
    vectors[0, 0] = 0.0
    q = rng.standard_normal((*rows, classes, *extra))
    want = (
        *PLAIN,
        stats.power_lse(2, 3.5),
        stats.rest_power(2, 3.5),
        stats.weighted(vectors),
        stats.dot(q),
        stats.topk(min(4, classes)),
    )
    moved = np.moveaxis(q, len(rows), -1)
    options = {
        "powers": (2.0, 3.5),
        "vectors": vectors,
        "dense": moved,
        "topk": min(4, classes),
    }
    return want, options


@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("extra", [(), (2, 2)])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_every_field_and_its_gradient(
    dtype: str,
    targets: int | None,
    extra: tuple[int, ...],
    softcap: float | None,
    rng: np.random.Generator,
) -> None:
    rows, features, classes = 6, 5, 11
    input = testing.to_dtype(rng.standard_normal((rows, features)), dtype)
    weight = testing.to_dtype(rng.standard_normal((classes, *extra, features)), dtype)
    bias = testing.to_dtype(rng.standard_normal((classes, *extra)), dtype)
    columns = () if targets is None else (targets,)
    target = rng.integers(0, classes, (rows, *extra, *columns))
    target[1] = -1
    target[(2, ..., *(0,) * len(columns))] = target[(2, ..., *(-1,) * len(columns))]
    want, options = everything(rng, (rows,), classes, extra)
    common = dict(linear_bias=bias, ignore_index=-1, logit_scale=0.8, softcap=softcap)
    found, vjp = ln.row_statistics(
        input,
        weight,
        target,
        want=want,
        gradients=("input", "linear_weight", "linear_bias", "logit_scale", "dot"),
        **common,
    )
    reference, reference_vjp = testing.row_statistics(input, weight, target, **common, **options)
    for name in found:
        value = getattr(found, name)
        if name == "log_prob" and targets == 3:
            np.testing.assert_allclose(
                value,
                np.where(target == -1, 0, reference["target"] - reference["lse"][..., None]),
                atol=1e-5,
            )
            continue
        if name in ("argmax", "topk_ids"):
            np.testing.assert_array_equal(value, reference[name])
            continue
        expected = reference[name]
        if name == "log_prob":
            expected = expected.reshape(value.shape)
        testing.assert_close(value, expected, name, dtype, label=name)
        g = rng.standard_normal(value.shape).astype(np.float32)
        gradients = vjp(**{name: g})
        reference_g = g.reshape(reference[name].shape)
        expected_gradients = reference_vjp(**{name: reference_g})
        for argument in GRADIENTS:
            testing.assert_close(
                getattr(gradients, argument),
                expected_gradients[argument],
                "gradient",
                dtype,
                scale=max(1.0, float(np.abs(expected_gradients[argument]).max())),
                label=f"{name} by {argument}",
            )
        testing.assert_close(
            gradients.logit_scale,
            expected_gradients["logit_scale"],
            "sum",
            dtype,
            scale=100.0,
            label=f"{name} by logit_scale",
        )
        if name == "dot":
            dense = np.moveaxis(expected_gradients["dense"], -1, 1)
            testing.assert_close(gradients.dot, dense, "logit", dtype, label="dot by q")


def test_cotangents_add_and_numbers_spread(rng: np.random.Generator) -> None:
    case = testing.make_case(7, 5, 11, dtype="float64")
    found, vjp = ln.row_statistics(
        case.input,
        case.linear_weight,
        case.target,
        want=("log_prob", "entropy"),
        ignore_index=-100,
        gradients="input",
    )
    g = rng.standard_normal(found.log_prob.shape)
    both = vjp(log_prob=g, entropy=0.5)
    apart = vjp(log_prob=g).input + vjp(entropy=np.full(7, 0.5)).input
    np.testing.assert_allclose(both.input, apart, rtol=1e-12, atol=1e-15)
    assert both.linear_weight is None


def test_statistics_without_a_target(dtype: str) -> None:
    case = testing.make_case(7, 5, 11, dtype=dtype)
    found, vjp = ln.row_statistics(
        case.input, case.linear_weight, want=("lse", "entropy", stats.power_lse(2))
    )
    reference, reference_vjp = testing.row_statistics(case.input, case.linear_weight, powers=(2.0,))
    testing.assert_close(found.lse, reference["lse"], "lse", dtype)
    testing.assert_close(found.entropy, reference["entropy"], "entropy", dtype)
    testing.assert_close(found.power_lse, reference["power_lse"][:, 0], "power_lse", dtype)
    testing.assert_close(
        vjp(entropy=1.0, power_lse=2.0).input,
        reference_vjp(entropy=1.0, power_lse=2.0)["input"],
        "gradient",
        dtype,
    )


@pytest.mark.parametrize("margin", [10.0, 40.0, 80.0])
def test_entropy_of_a_peaked_row_keeps_its_digits(margin: float) -> None:
    input = np.array([[1.0]], np.float32)
    weight = np.array([[100.0 + margin], [100.0], [101.0]], np.float32)
    for target in (None, np.array([0]), np.array([1])):
        found, _ = ln.row_statistics(input, weight, target, want="entropy")
        expected, _ = testing.row_statistics(input, weight, target, fields=("entropy",))
        np.testing.assert_allclose(found.entropy, expected["entropy"], rtol=1e-4)


def test_fields_that_were_not_wanted() -> None:
    case = testing.make_case(3, 5, 11)
    found, vjp = ln.row_statistics(case.input, case.linear_weight, want="lse", gradients="input")
    with pytest.raises(AttributeError, match="want="):
        _ = found.entropy
    with pytest.raises(TypeError, match="entropy"):
        vjp(entropy=1.0)
    with pytest.raises(ValueError, match=r"lse.shape = \(2,\)"):
        vjp(lse=np.ones(2))
    assert list(found) == ["lse"]
    with pytest.raises(AttributeError, match="help"):
        _ = found.softmax
    assert "lse" in repr(found)
    assert "lse" in dir(found)


# Special values ---------------------------------------------------------------------------------

SPECIAL = {
    "-inf": (-np.inf,),
    "inf": (np.inf,),
    "nan": (np.nan,),
    "two of inf": (np.inf, np.inf),
    "two of -inf": (-np.inf, -np.inf),
    "both signs": (np.inf, -np.inf),
    "nan and inf": (np.nan, np.inf),
    "all but one": (-np.inf,) * 39,
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("target", [None, 0, 1, 39])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values_in_every_statistic(
    special: str, target: int | None, softcap: float | None, dtype: str, rng: np.random.Generator
) -> None:
    classes = 40
    bias = rng.standard_normal(classes)
    bias[: len(SPECIAL[special])] = SPECIAL[special]
    case = testing.make_case(3, 2, classes, dtype=dtype)
    vectors = np.linspace(0.0, 1.0, classes)
    plain = [name for name in PLAIN if name not in ("rest", "target", "log_prob", "rest_entropy")]
    with_target = ["rest", "target", "log_prob"] if target is not None else []
    parameters = [stats.topk(3), stats.power_lse(2), stats.weighted(vectors)]
    ids = None if target is None else np.full(3, target)
    found, _ = ln.row_statistics(
        case.input,
        case.linear_weight,
        ids,
        want=[*plain, *with_target, *parameters],
        linear_bias=bias.astype(dtype),
        softcap=softcap,
        gradients=(),
    )
    expected, _ = testing.row_statistics(
        case.input,
        case.linear_weight,
        ids,
        linear_bias=bias.astype(dtype),
        softcap=softcap,
        powers=(2.0,),
        vectors=vectors,
        topk=3,
    )
    for name in found:
        value = getattr(found, name)
        np.testing.assert_allclose(
            value, expected[name].reshape(value.shape), rtol=1e-4, atol=1e-5, err_msg=name
        )


# Read-outs ----------------------------------------------------------------------------------------


def test_read_outs_agree_with_dense_logits(dtype: str) -> None:
    case = testing.make_case(6, 5, 20, dtype=dtype, leading=(2,))
    head = testing.DenseHead(case.input, case.linear_weight, case.linear_bias)
    z = head.z.reshape(2, 6, 20)
    options = {"linear_bias": case.linear_bias}
    arguments = (case.input, case.linear_weight)
    np.testing.assert_array_equal(ln.linear_argmax(*arguments, **options), z.argmax(axis=-1))
    top = ln.linear_topk(*arguments, 3, **options)
    np.testing.assert_array_equal(top.indices, np.argsort(-z, axis=-1)[..., :3])
    testing.assert_close(top.values, -np.sort(-z, axis=-1)[..., :3], "logit", dtype)
    lse = np.log(np.exp(z).sum(axis=-1))
    testing.assert_close(ln.linear_logsumexp(*arguments, **options), lse, "lse", dtype)
    kept = case.target != -100
    hits = (z.argmax(axis=-1) == case.target)[kept]
    found = ln.linear_accuracy(*arguments, case.target, **options)
    np.testing.assert_allclose(found, hits.mean(), rtol=1e-6)
    assert ln.linear_accuracy(*arguments, case.target, **options, reduction="sum") == hits.sum()
    each = ln.linear_accuracy(*arguments, case.target, **options, reduction="none")
    np.testing.assert_array_equal(each[kept], hits)
    assert not each[~kept].any()
    hits5 = (np.argsort(-z, axis=-1)[..., :5] == case.target[..., None]).any(-1)[kept]
    found = ln.linear_accuracy(*arguments, case.target, topk=5, **options)
    np.testing.assert_allclose(found, hits5.mean(), rtol=1e-6)
    several = np.stack([case.target, (case.target + 1) % 20], axis=-1)
    several[~kept] = -100
    hits = (z.argmax(axis=-1)[..., None] == several).any(-1)[kept]
    found = ln.linear_accuracy(*arguments, several, **options)
    np.testing.assert_allclose(found, hits.mean(), rtol=1e-6)
    nothing = ln.linear_accuracy(*arguments, np.full_like(case.target, -100), **options)
    assert np.isnan(nothing)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_prob_with_temperature(temperature: float, softcap: float | None) -> None:
    case = testing.make_case(6, 5, 20)
    head = testing.DenseHead(case.input, case.linear_weight, case.linear_bias, softcap=softcap)
    z = head.z / temperature
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    found = ln.linear_log_prob(
        case.input,
        case.linear_weight,
        case.target,
        linear_bias=case.linear_bias,
        temperature=temperature,
        softcap=softcap,
    )
    kept = case.target != -100
    at_target = np.take_along_axis(log_p, np.where(kept, case.target, 0)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found.log_prob, np.where(kept, at_target, 0.0), rtol=2e-5, atol=1e-6)
    entropy = np.where(kept, -(np.exp(log_p) * log_p).sum(axis=1), 0.0)
    np.testing.assert_allclose(found.entropy, entropy, rtol=2e-5, atol=1e-6)
