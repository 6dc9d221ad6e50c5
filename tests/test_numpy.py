"""The NumPy face against the dense float64 references."""

from __future__ import annotations

import doctest
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitless.numpy as ln
from logitless import testing

GRADIENTS = ("input", "linear_weight", "linear_bias")


def largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def check_loss(arguments: tuple[Any, ...], label: str = "", **options: Any) -> ln.CrossEntropy:
    """Compare a call with its reference, loss and gradients."""
    ours = {k: v for k, v in options.items() if k != "memory"}
    reference = testing.linear_cross_entropy(*arguments, **ours)
    found = ln.linear_cross_entropy(*arguments, **options)
    dtype = arguments[0].dtype
    assert found.loss.dtype == (np.float64 if dtype == np.float64 else np.float32)
    scale = max(1.0, largest(reference.magnitudes["loss"]))
    testing.assert_close(found.loss, reference.loss, "loss", dtype, label=label, scale=scale)
    for name in GRADIENTS:
        gradient = getattr(found, name)
        if name == "linear_bias" and options.get("linear_bias") is None:
            assert gradient is None
            continue
        assert gradient.dtype == dtype
        testing.assert_close(
            gradient,
            reference.gradients[name],
            "gradient",
            dtype,
            label=f"{name} {label}",
            scale=largest(reference.magnitudes[name]),
        )
    return found


# Linear cross entropy -----------------------------------------------------------------------------


@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 40),
    classes=st.integers(1, 300),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.5]),
    z_loss=st.sampled_from([0.0, 0.01]),
)
def test_every_option_of_index_targets(
    rows: int,
    features: int,
    classes: int,
    dtype: str,
    seed: int,
    bias: bool,
    weighted: bool,
    smoothing: float,
    reduction: str,
    softcap: float | None,
    scale: float,
    z_loss: float,
) -> None:
    case = testing.make_case(rows, features, classes, dtype=dtype, seed=seed)
    weight = np.random.default_rng(seed).random(classes) + 0.1
    check_loss(
        (case.input, case.linear_weight, case.target),
        linear_bias=case.linear_bias if bias else None,
        weight=weight if weighted else None,
        label_smoothing=smoothing,
        reduction=reduction,
        softcap=softcap,
        logit_scale=scale,
        z_loss_weight=z_loss,
    )


@given(data=st.data())
def test_any_shape_layout_and_target(data: st.DataObject) -> None:
    """Leading axes, extra dimensions, memory layouts, kinds of target and options, all at once."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6), label="seed"))
    dtype = draw(st.sampled_from(["float32", "float64", "float16"]), label="dtype")
    leading = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="leading"))
    extra = tuple(draw(st.lists(st.integers(1, 3), max_size=2), label="extra"))
    features = draw(st.integers(1, 20), label="features")
    classes = draw(st.integers(1, 150), label="classes")
    names = st.sampled_from(["contiguous", "fortran", "strided", "negative", "window", "unaligned"])

    def array(shape: tuple[int, ...], name: str) -> np.ndarray:
        values = rng.standard_normal(shape).astype(dtype)
        return dict(testing.layouts(values))[draw(names, label=name)]

    input = array((*leading, features), "input")
    weight = array((classes, *extra, features), "weight")
    options: dict[str, Any] = {
        "shift": draw(st.integers(0, leading[-1] - 1), label="shift"),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.2]), label="smoothing"),
        "memory": draw(st.sampled_from(["lean", "fast", 5000]), label="memory"),
    }
    if draw(st.booleans(), label="bias"):
        options["linear_bias"] = array((classes, *extra), "bias layout")
    if draw(st.booleans(), label="row weights"):
        options["row_weight"] = rng.standard_normal((*leading, *extra))
    kind = draw(st.sampled_from(["index", "sparse", "probability"]), label="kind")
    if kind == "probability":
        target = array((*leading, classes, *extra), "target")
    else:
        columns = (draw(st.integers(1, 5), label="K"),) if kind == "sparse" else ()
        target = rng.integers(0, classes, (*leading, *extra, *columns))
        target[rng.random(target.shape) < 0.2] = -100
        if kind == "sparse":
            options["target_weight"] = rng.standard_normal(target.shape)
        target = dict(testing.layouts(target))[draw(names, label="target layout")]
    check_loss((input, weight, target), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", [(), (2,), (2, 3)])
@pytest.mark.parametrize("kind", ["index", "sparse", "probability"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss_weight": 0.05}])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_kind_of_target_with_extra_dimensions(
    dtype: str,
    reduction: str,
    extra: tuple[int, ...],
    kind: str,
    options: dict[str, Any],
    weighted: bool,
    rng: np.random.Generator,
) -> None:
    rows, features, classes = 6, 5, 7
    input = testing.to_dtype(rng.standard_normal((rows, features)), dtype)
    weight = testing.to_dtype(rng.standard_normal((classes, *extra, features)), dtype)
    bias = testing.to_dtype(rng.standard_normal((classes, *extra)), dtype)
    options = dict(
        options, reduction=reduction, linear_bias=bias, row_weight=rng.random((rows, *extra))
    )
    if weighted:
        options["weight"] = rng.random(classes)
    if reduction == "none":
        options["cotangent"] = rng.standard_normal((rows, *extra))
    if kind == "probability":
        target = rng.standard_normal((rows, classes, *extra)).astype(np.float32)
    elif kind == "index":
        target = rng.integers(0, classes, (rows, *extra))
        target[1] = -100
    else:
        target = rng.integers(0, classes, (rows, *extra, 3))
        target[1] = -100
        target[2, ..., 1] = -100
        target[3, ..., 2] = target[3, ..., 0]
        options["target_weight"] = rng.standard_normal(target.shape)
    check_loss((input, weight, target), **options)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_leading_dimensions_and_shift(
    leading: tuple[int, ...], shift: int, sparse: bool, rng: np.random.Generator
) -> None:
    case = testing.make_case(6, 4, 9, leading=leading, targets=2 if sparse else None)
    options: dict[str, Any] = {"row_weight": rng.random((*leading, 6))}
    if sparse:
        options["target_weight"] = rng.standard_normal(case.target.shape)
    for reduction in ("none", "mean"):
        found = check_loss(
            (case.input, case.linear_weight, case.target),
            shift=shift,
            reduction=reduction,
            **options,
        )
        assert found.input is not None
        assert not found.input[..., 6 - shift :, :].any()
    assert found.loss.shape == ()


def test_a_single_row() -> None:
    case = testing.make_case(1, 4, 9)
    for target in (np.int64(3), np.array(3), np.array(3, np.uint8)):
        found = check_loss((case.input[0], case.linear_weight, target), reduction="none")
        assert found.loss.shape == ()


@pytest.mark.parametrize("denominator", [7, 3.5])
def test_denominator_replaces_the_mean(denominator: float) -> None:
    case = testing.make_case(8, 4, 9)
    arguments = (case.input, case.linear_weight, case.target)
    check_loss(arguments, denominator=denominator, z_loss_weight=0.1, weight=np.arange(9.0))


@pytest.mark.parametrize("target_dtype", ["int64", "int32", "uint8", "int8", ">i4"])
def test_integer_dtypes_of_the_target(target_dtype: str) -> None:
    case = testing.make_case(8, 4, 9, ignored=0.0)
    check_loss((case.input, case.linear_weight, case.target.astype(target_dtype)))


def test_layouts_are_read_in_place_and_give_the_same_result(dtype: str) -> None:
    case = testing.make_case(9, 6, 13, dtype=dtype)
    arguments = (case.input, case.linear_weight, case.target)
    expected = ln.linear_cross_entropy(*arguments, linear_bias=case.linear_bias)
    for name, input in testing.layouts(case.input):
        for weight_name, weight in testing.layouts(case.linear_weight):
            found = check_loss((input, weight, case.target), label=f"{name}, {weight_name}")
            assert found.input is not None
            assert found.input.shape == case.input.shape
    for name, bias in testing.layouts(case.linear_bias):
        found = check_loss(arguments, label=name, linear_bias=bias)
        np.testing.assert_array_equal(found.loss, expected.loss)
    for name, target in testing.layouts(case.target):
        found = ln.linear_cross_entropy(case.input, case.linear_weight, target)
        again = ln.linear_cross_entropy(*arguments)
        np.testing.assert_array_equal(found.loss, again.loss, err_msg=name)


def test_broadcast_and_byte_swapped_arrays() -> None:
    case = testing.make_case(5, 4, 9)
    same = np.broadcast_to(case.input[:1], case.input.shape)
    check_loss((same, case.linear_weight, case.target))
    check_loss((case.input.astype(">f4").astype("<f4"), case.linear_weight, case.target))
    swapped = case.input.astype(">f4")
    found = ln.linear_cross_entropy(swapped, case.linear_weight.astype(">f4"), case.target)
    expected = ln.linear_cross_entropy(case.input, case.linear_weight, case.target)
    np.testing.assert_array_equal(found.loss, expected.loss)
    np.testing.assert_array_equal(found.input, expected.input)
    record = np.zeros(5, [("pad", "i1"), ("x", "f4", (4,))])
    record["x"] = case.input
    found = ln.linear_cross_entropy(record["x"], case.linear_weight, case.target)
    np.testing.assert_array_equal(found.loss, expected.loss)


def test_arguments_are_left_alone() -> None:
    case = testing.make_case(9, 6, 13)
    arrays = (case.input, case.linear_weight, case.target, case.linear_bias)
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    ln.linear_cross_entropy(*arrays[:3], linear_bias=arrays[3], label_smoothing=0.1)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("gradients", [(), ("input",), ("linear_weight",), ("linear_bias",)])
def test_only_wanted_gradients(gradients: tuple[str, ...]) -> None:
    case = testing.make_case(9, 6, 13)
    arguments = (case.input, case.linear_weight, case.target)
    everything = ln.linear_cross_entropy(*arguments, linear_bias=case.linear_bias)
    found = ln.linear_cross_entropy(*arguments, linear_bias=case.linear_bias, gradients=gradients)
    np.testing.assert_array_equal(found.loss, everything.loss)
    for name in GRADIENTS:
        if name in gradients:
            np.testing.assert_array_equal(getattr(found, name), getattr(everything, name))
        else:
            assert getattr(found, name) is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_and_fully_ignored_batches(reduction: str) -> None:
    case = testing.make_case(4, 6, 13, ignored=1.0)
    for rows in (0, 4):
        arguments = (case.input[:rows], case.linear_weight, case.target[:rows])
        found = ln.linear_cross_entropy(
            *arguments, linear_bias=case.linear_bias, reduction=reduction
        )
        expected = testing.linear_cross_entropy(*arguments, reduction=reduction)
        np.testing.assert_array_equal(found.loss, expected.loss)
        for gradient in found[1:]:
            assert gradient is not None
            assert not gradient.any()


@pytest.mark.parametrize("memory", ["lean", "fast", 10_000])
def test_memory_does_not_change_the_result(memory: str | int) -> None:
    case = testing.make_case(40, 8, 1000)
    check_loss((case.input, case.linear_weight, case.target), memory=memory)


@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0, 87.0])
def test_the_loss_of_a_confident_row_keeps_its_digits(margin: float) -> None:
    """`lse - target` is 0 in float32 from a margin of 18 nats on."""
    input = np.array([[1.0]], np.float32)
    weight = np.array([[margin], [0.0], [0.0]], np.float32)
    found = ln.linear_cross_entropy(input, weight, np.array([0]))
    np.testing.assert_allclose(found.loss, np.log1p(2 * np.exp(-margin)), rtol=2e-6)
    np.testing.assert_allclose(found.linear_weight[0], -2 * np.exp(-margin), rtol=1e-5)


@pytest.mark.parametrize("margin", [-500.0, 500.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_margins_stay_finite(margin: float, dtype: str) -> None:
    input = np.array([[1.0]], dtype)
    weight = np.array([[margin], [0.0], [0.0]], dtype)
    found = check_loss((input, weight, np.array([0])))
    assert np.isfinite(found.loss)
    assert all(np.isfinite(gradient).all() for gradient in found[1:3])


@pytest.mark.parametrize("margin", [20.0, 60.0, 85.0])
def test_a_one_hot_distribution_keeps_the_digits_of_a_class_id(margin: float) -> None:
    input = np.array([[1.0]], np.float32)
    weight = np.array([[0.0], [margin], [0.0]], np.float32)
    one_hot = np.array([[0.0, 1.0, 0.0]], np.float32)
    found = ln.linear_cross_entropy(input, weight, one_hot)
    np.testing.assert_allclose(found.loss, 2 * np.exp(-margin), rtol=2e-6)


def test_probability_on_a_masked_class_is_an_infinite_loss() -> None:
    case = testing.make_case(2, 3, 5)
    bias = np.array([0.0, -np.inf, 0.0, 0.0, 0.0], np.float32)
    q = np.array([[0.1, 0.8, 0.1, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0, 0.0]], np.float32)
    found = ln.linear_cross_entropy(
        case.input, case.linear_weight, q, linear_bias=bias, reduction="none", gradients=()
    )
    assert found.loss[0] == np.inf
    assert np.isfinite(found.loss[1])


def test_a_smoothing_of_one_does_not_look_at_the_target() -> None:
    case = testing.make_case(4, 3, 5, ignored=0.0)
    bias = np.zeros(5, np.float32)
    options = {"linear_bias": bias, "label_smoothing": 1.0}
    first = ln.linear_cross_entropy(
        case.input, case.linear_weight, np.array([0, 1, 2, 3]), **options
    )
    second = ln.linear_cross_entropy(
        case.input, case.linear_weight, np.array([4, 0, 0, 1]), **options
    )
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-6)
    np.testing.assert_allclose(first.linear_weight, second.linear_weight, atol=1e-6)


# Not-a-number and infinities ----------------------------------------------------------------------


def test_nan_stays_in_its_rows() -> None:
    case = testing.make_case(6, 4, 9, ignored=0.0)
    case.input[2, 1] = np.nan
    found = ln.linear_cross_entropy(case.input, case.linear_weight, case.target, reduction="none")
    assert np.isnan(found.loss).tolist() == [False, False, True, False, False, False]
    assert np.isnan(found.input[2]).all()
    assert not np.isnan(np.delete(found.input, 2, axis=0)).any()
    assert np.isnan(found.linear_weight).all()


def test_nan_in_an_ignored_row_is_not_read() -> None:
    case = testing.make_case(6, 4, 9, ignored=0.0)
    case.input[2] = np.nan
    case.target[2] = -100
    found = ln.linear_cross_entropy(case.input, case.linear_weight, case.target)
    assert np.isfinite(found.loss)
    assert all(np.isfinite(gradient).all() for gradient in found[1:3])


def test_a_bias_of_minus_infinity_masks_a_class() -> None:
    case = testing.make_case(6, 4, 9, ignored=0.0)
    keep = np.arange(9) != 4
    case.target[case.target == 4] = 0
    bias = np.where(keep, case.linear_bias, -np.inf).astype(np.float32)
    found = ln.linear_cross_entropy(case.input, case.linear_weight, case.target, linear_bias=bias)
    fewer = ln.linear_cross_entropy(
        case.input,
        case.linear_weight[keep],
        case.target - (case.target > 4),
        linear_bias=bias[keep],
    )
    np.testing.assert_allclose(found.loss, fewer.loss, rtol=1e-6)
    np.testing.assert_allclose(found.input, fewer.input, rtol=1e-4, atol=1e-7)
    assert not found.linear_weight[4].any()
    stats_, _ = ln.row_statistics(
        case.input, case.linear_weight, linear_bias=bias, want=("lse", "entropy", "mean_logit")
    )
    assert all(np.isfinite(getattr(stats_, name)).all() for name in stats_)


def test_infinite_logits_give_what_torch_gives() -> None:
    torch = pytest.importorskip("torch")
    case = testing.make_case(6, 4, 9, ignored=0.0)
    for value in (np.inf, -np.inf):
        bias = case.linear_bias.copy()
        bias[2] = value
        case.target[:2] = 2
        expected = torch.nn.functional.cross_entropy(
            torch.from_numpy(case.input @ case.linear_weight.T + bias),
            torch.from_numpy(case.target),
            reduction="none",
        )
        found = ln.linear_cross_entropy(
            case.input,
            case.linear_weight,
            case.target,
            linear_bias=bias,
            reduction="none",
            gradients=(),
        )
        np.testing.assert_allclose(found.loss, expected.numpy(), rtol=1e-5)


# Errors -------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "input": np.zeros((3, 4), np.float32),
    "linear_weight": np.zeros((5, 4), np.float32),
    "target": np.zeros(3, np.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": np.zeros((3, 5), np.float32)}, ValueError, "linear_weight.shape"),
        ({"input": [[1.0, 2.0, 3.0, 4.0]]}, TypeError, "numpy.ndarray"),
        ({"input": np.zeros((3, 4), np.int32)}, TypeError, "input.dtype"),
        ({"input": np.zeros((3, 4), complex)}, TypeError, "input.dtype"),
        ({"input": np.ma.ones((3, 4))}, TypeError, "MaskedArray"),
        ({"input": np.zeros((3, 4))}, TypeError, "linear_weight.dtype"),
        ({"linear_weight": np.zeros(4, np.float32)}, ValueError, "two dimensions"),
        ({"linear_weight": np.zeros((0, 4), np.float32)}, ValueError, "at least one class"),
        ({"linear_bias": np.zeros(4, np.float32)}, ValueError, "linear_bias.shape"),
        ({"linear_bias": np.zeros(5)}, TypeError, "linear_bias.dtype"),
        ({"weight": np.zeros(4)}, ValueError, "weight.shape"),
        ({"target": np.zeros(2, np.int64)}, ValueError, "target.shape"),
        ({"target": np.zeros(3, bool)}, TypeError, "target.dtype"),
        ({"target": np.zeros((3, 2), np.int64)}, ValueError, "target_weight"),
        ({"target": np.array([0, 5, 1])}, IndexError, "5"),
        ({"target": np.array([0, -1, 1])}, IndexError, "-1"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"shift": 3}, ValueError, "shift"),
        ({"shift": -1}, ValueError, "shift"),
        ({"memory": "huge"}, ValueError, "memory"),
        ({"gradients": ("weights",)}, ValueError, "weights"),
        ({"target": None}, TypeError, "target"),
        ({"logit_scale": "2"}, TypeError, "logit_scale"),
        ({"logit_scale": np.ones(2)}, TypeError, "logit_scale"),
        ({"denominator": 3, "reduction": "sum"}, ValueError, "denominator"),
        ({"cotangent": np.ones(3)}, ValueError, "cotangent.shape"),
        ({"row_weight": np.ones(2)}, ValueError, "row_weight.shape"),
        ({"target": np.zeros((3, 5), np.float32), "ignore_index": 0}, ValueError, "ignore_index"),
    ],
)
def test_errors_name_argument_and_remedy(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = {**GOOD, **change}
    with pytest.raises(error, match=words):
        ln.linear_cross_entropy(**arguments)


def test_an_id_out_of_range_is_named_where_it_is() -> None:
    weight = np.zeros((5, 2, 4), np.float32)
    target = np.zeros((3, 2), np.int64)
    target[1, 1], target[2, 0] = 5, -7
    with pytest.raises(IndexError, match=r"target\[1, 1\] = 5 .*\[0, 5\)"):
        ln.linear_cross_entropy(GOOD["input"], weight, target)
    target[1, 1], target[2, 0] = 0, -100
    ln.linear_cross_entropy(GOOD["input"], weight, target)
    with pytest.raises(IndexError, match=r"target\[2.*\] = -100 "):
        ln.linear_cross_entropy(GOOD["input"], weight, target, ignore_index=0)


def test_more_errors() -> None:
    input, weight = GOOD["input"], GOOD["linear_weight"]
    with pytest.raises(ValueError, match="topk = 6"):
        ln.linear_topk(input, weight, 6)
    with pytest.raises(ValueError, match=r"one of"):
        ln.row_statistics(input, weight, want="softmax")
    with pytest.raises(ValueError, match="temperature"):
        ln.linear_log_prob(input, weight, GOOD["target"], temperature=0.0)
    with pytest.raises(TypeError, match=r"stats\.dot"):
        ln.row_statistics(input, weight, np.zeros((3, 5)), want="lse")


@pytest.mark.parametrize("name", ["_losses", "_statistics", "_readout", "_logsumexp"])
def test_examples_in_the_documentation(name: str) -> None:
    failed, attempted = doctest.testmod(import_module(f"logitless.numpy.{name}"))
    assert attempted > 0
    assert failed == 0
