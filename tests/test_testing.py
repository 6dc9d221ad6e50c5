"""The references themselves: against finite differences, torch, and closed forms."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

from logitless import testing
from logitless.testing import _dense, _tolerances

STEP = 1e-6


def directional(function: Any, point: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Central difference of `function` at `point` along `direction`."""
    ahead, behind = function(point + STEP * direction), function(point - STEP * direction)
    return (ahead - behind) / (2 * STEP)


@pytest.mark.parametrize("name", testing.FIELDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("extra", [(), (2,)])
def test_gradients_of_fields_by_finite_differences(
    name: str, softcap: float | None, extra: tuple[int, ...], rng: np.random.Generator
) -> None:
    rows, features, classes = 4, 3, 6
    point: dict[str, Any] = {
        "input": rng.standard_normal((rows, features)),
        "linear_weight": rng.standard_normal((classes, *extra, features)),
        "linear_bias": rng.standard_normal((classes, *extra)),
        "logit_scale": np.float64(0.7),
        "dense": rng.standard_normal((rows, *extra, classes)),
    }
    target = rng.integers(0, classes, (rows, *extra))
    target[1] = -100

    def evaluate(**changed: Any) -> tuple[dict[str, np.ndarray], Any]:
        return testing.row_statistics(
            **{**point, **changed},
            target=target,
            fields=(name,),
            ignore_index=-100,
            softcap=softcap,
            powers=(2.0, 0.5),
            vectors=np.linspace(-1, 1, 2 * classes).reshape(2, classes),
            topk=3,
        )

    stats, vjp = evaluate()
    assert not stats[name][1].any() or name in ("argmax", "topk_ids")
    if name in ("argmax", "topk_ids"):
        with pytest.raises(TypeError, match="ids"):
            vjp(**{name: stats[name]})
        return
    cotangent = rng.standard_normal(stats[name].shape)
    gradients = vjp(**{name: cotangent})
    for argument, value in point.items():
        direction = np.asarray(rng.standard_normal(value.shape))
        slope = directional(
            lambda moved, argument=argument: evaluate(**{argument: moved})[0][name],
            value,
            direction,
        )
        expected = (slope * cotangent).sum()
        found = (gradients[argument].reshape(direction.shape) * direction).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8, err_msg=argument)


@pytest.mark.parametrize("kind", ["index", "sparse", "probability"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_of_the_loss_by_finite_differences(
    kind: str, shift: int, reduction: str, rng: np.random.Generator
) -> None:
    lead, features, classes = (2, 5), 3, 6
    point: dict[str, Any] = {
        "input": rng.standard_normal((*lead, features)),
        "linear_weight": rng.standard_normal((classes, features)),
        "linear_bias": rng.standard_normal(classes),
        "logit_scale": np.float64(0.7),
    }
    options: dict[str, Any] = {
        "weight": rng.random(classes),
        "label_smoothing": 0.1,
        "z_loss_weight": 0.2,
        "row_weight": rng.standard_normal(lead),
        "softcap": 4.0,
        "reduction": reduction,
        "shift": shift,
    }
    name = "target"
    if kind == "index":
        target = rng.integers(0, classes, lead)
        target[0, 3] = -100
        options["target"] = target
    elif kind == "sparse":
        target = rng.integers(0, classes, (*lead, 3))
        target[0, 3], target[1, 2, 1] = -100, -100
        options["target"] = target
        point["target_weight"] = rng.standard_normal(target.shape)
        name = "target_weight"
    else:
        point["target"] = rng.standard_normal((*lead, classes))
    reference = testing.linear_cross_entropy(**point, **options)
    cotangent = rng.standard_normal(reference.loss.shape)
    reference = testing.linear_cross_entropy(**point, **options, cotangent=cotangent)
    for argument, value in point.items():
        direction = np.asarray(rng.standard_normal(value.shape))
        slope = directional(
            lambda moved, argument=argument: (
                testing.linear_cross_entropy(**{**point, argument: moved}, **options).loss
            ),
            value,
            direction,
        )
        gradient = reference.gradients["target" if argument == name else argument]
        found = (gradient.reshape(direction.shape) * direction).sum()
        expected = (slope * cotangent).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8, err_msg=argument)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extra", [(), (2,), (2, 3)])
def test_the_loss_is_torchs(
    kind: str, reduction: str, smoothing: float, weighted: bool, extra: tuple[int, ...]
) -> None:
    torch = pytest.importorskip("torch")
    rows, features, classes = 6, 4, 7
    double = {"dtype": torch.float64}
    input = torch.randn(rows, features, **double, requires_grad=True)
    weight = torch.randn(classes, *extra, features, **double, requires_grad=True)
    bias = torch.randn(classes, *extra, **double, requires_grad=True)
    class_weight = torch.rand(classes, **double) if weighted else None
    wanted = [input, weight, bias]
    if kind == "index":
        target = torch.randint(0, classes, (rows, *extra))
        target[0] = -100
    else:
        target = torch.randn(rows, classes, *extra, **double, requires_grad=True)
        wanted.append(target)
    logits = torch.nn.functional.linear(input, weight.reshape(-1, features), bias.reshape(-1))
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(rows, classes, *extra),
        target,
        weight=class_weight,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    cotangent = torch.randn_like(loss)
    expected = torch.autograd.grad(loss, wanted, cotangent)
    reference = testing.linear_cross_entropy(
        input,
        weight,
        target,
        linear_bias=bias,
        weight=class_weight,
        reduction=reduction,
        label_smoothing=smoothing,
        cotangent=cotangent,
    )
    np.testing.assert_allclose(reference.loss, loss.detach().numpy(), rtol=1e-12, atol=1e-13)
    names = ("input", "linear_weight", "linear_bias", "target")
    for name, gradient in zip(names, expected, strict=False):
        np.testing.assert_allclose(
            reference.gradients[name], gradient.numpy(), rtol=1e-10, atol=1e-12, err_msg=name
        )


def test_log_softmax_keeps_relative_accuracy_at_any_margin() -> None:
    for margin in (1.0, 40.0, 300.0, 700.0):
        log_p, lse = _dense.log_softmax(np.array([[margin, 0.0, 0.0]]))
        np.testing.assert_allclose(log_p[0, 0], -np.log1p(2 * np.exp(-margin)), rtol=1e-14)
        np.testing.assert_allclose(lse, margin + np.log1p(2 * np.exp(-margin)), rtol=1e-15)


def test_log_softmax_at_infinities() -> None:
    inf = np.inf
    z = np.array([[-inf, 0.0, 0.0], [-inf, -inf, -inf], [inf, 0.0, -inf], [np.nan, 0.0, 0.0]])
    _, lse = _dense.log_softmax(z)
    np.testing.assert_array_equal(lse, [np.log(2), -inf, inf, np.nan])
    _, of_none = _dense.log_softmax(z, np.zeros(z.shape, bool))
    assert np.isneginf(of_none).all()


def test_assert_close_says_what_is_wrong_and_where() -> None:
    expected = np.array([1.0, 2.0, np.nan, np.inf])
    testing.assert_close(expected, expected, "rest", "float32")
    testing.assert_close(expected * (1 + 1e-7), expected, "loss", "float32")
    off = expected.copy()
    off[1] += 1e-3
    with pytest.raises(AssertionError, match=r"1 of 4 elements .* worst at \(1,\)"):
        testing.assert_close(off, expected, "rest", "float32", label="here")
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close(off[:2], expected, "rest", "float32")
    off = expected.copy()
    off[2] = 0.0
    with pytest.raises(AssertionError, match="worst at"):
        testing.assert_close(off, expected, "rest", "float32")
    testing.assert_close(1.0 + 5e-4, 1.0, "gradient", "float16")
    with pytest.raises(AssertionError):
        testing.assert_close(1.0 + 5e-4, 1.0, "gradient", "float32")


def test_the_table_has_every_field_for_every_dtype() -> None:
    integers = {"argmax", "topk_ids"}
    for dtype in testing.TOLERANCES:
        for name in set(testing.FIELDS) - integers:
            assert testing.tolerance(dtype, name).rtol > 0


def test_layouts_hold_the_values_they_were_given(rng: np.random.Generator) -> None:
    array = rng.standard_normal((4, 6)).astype(np.float32)
    names = []
    for name, view in testing.layouts(array):
        np.testing.assert_array_equal(view, array)
        names.append(name)
        assert (view.base is None) == (name in ("contiguous", "readonly")) or name == "fortran"
    assert "unaligned" in names
    assert dict(testing.layouts(np.ones((3, 2))))["broadcast"].strides[0] == 0
    unaligned = dict(testing.layouts(array))["unaligned"]
    assert not unaligned.flags.aligned


def test_cases_have_the_promised_shapes_and_repeat() -> None:
    case = testing.make_case(5, 3, 7, leading=(2, 4), targets=3, seed=1, ignored=0.5)
    assert case.input.shape == (2, 4, 5, 3)
    assert case.target.shape == (2, 4, 5, 3)
    assert (case.target == case.ignore_index).any()
    np.testing.assert_array_equal(
        case.input, testing.make_case(5, 3, 7, leading=(2, 4), seed=1).input
    )


def test_an_id_out_of_range_raises() -> None:
    case = testing.make_case(3, 3, 7, ignored=0.0)
    with pytest.raises(IndexError, match="7"):
        testing.row_statistics(case.input, case.linear_weight, case.target + 7)


@pytest.mark.parametrize("module", [_tolerances, testing])
def test_examples_in_the_documentation(module: Any) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
