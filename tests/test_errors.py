"""What is refused: before any work, by name, with the value, what was expected and the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import logitless
from logitless import _check, stats

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402


def good() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "input": torch.randn(4, 3),
        "linear_weight": torch.randn(6, 3),
        "target": torch.tensor([0, 1, 2, 5]),
    }


def refused(
    changes: dict[str, Any], *parts: str, errors: tuple[type[Exception], ...] = (RuntimeError,)
) -> None:
    """The call fails with all of `errors` (one type may be several), naming all `parts`."""
    arguments = good() | changes
    tensors = [arguments.pop(name) for name in ("input", "linear_weight", "target")]
    with pytest.raises(errors[0]) as caught:
        LF.linear_cross_entropy(*tensors, **arguments)
    for error in errors:
        assert isinstance(caught.value, error), (type(caught.value), error)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


VALUE = (RuntimeError, ValueError)
TYPE = (RuntimeError, TypeError)


def test_shapes() -> None:
    refused({"input": torch.randn(4, 5)}, "linear_weight.shape", "(6, 3)", "5", errors=VALUE)
    refused({"input": torch.tensor(1.0)}, "input.shape", "at least one dimension", errors=VALUE)
    refused({"linear_weight": torch.randn(6)}, "linear_weight.shape", errors=VALUE)
    refused({"linear_weight": torch.randn(0, 3)}, "at least one class", errors=VALUE)
    refused({"linear_bias": torch.randn(5)}, "linear_bias.shape", "(6,)", errors=VALUE)
    refused({"weight": torch.ones(5)}, "weight.shape", "(6,)", errors=VALUE)
    refused({"target": torch.tensor([0, 1])}, "target.shape", "(4,)", errors=VALUE)
    refused({"row_weight": torch.ones(3)}, "row_weight.shape", "(4,)", errors=VALUE)
    refused({"target": torch.rand(4, 5)}, "target.shape", "(4, 6)", errors=VALUE)
    refused({"target": torch.rand(4)}, "target.shape", "target.long()", errors=VALUE)
    refused({"target": torch.zeros(4, 2).long()}, "target_weight", errors=VALUE)
    refused(
        {"target": torch.zeros(4, 2).long(), "target_weight": torch.ones(4, 3)},
        "target_weight.shape",
        errors=VALUE,
    )
    refused(
        {"target": torch.rand(4, 6), "target_weight": torch.ones(4, 6)},
        "target_weight",
        errors=VALUE,
    )
    refused(
        {"input": torch.randn(3), "linear_weight": torch.randn(6, 2, 3)}, "unsqueeze", errors=VALUE
    )


def test_dtypes() -> None:
    refused({"target": torch.zeros(4, dtype=torch.bool)}, "target.dtype", "bool", errors=TYPE)
    refused({"target": torch.zeros(4, dtype=torch.cfloat)}, "target.dtype", errors=TYPE)
    refused({"input": torch.ones(4, 3).long()}, "input.dtype", "int64", errors=TYPE)
    refused({"input": torch.ones(4, 3, dtype=torch.cfloat)}, "input.dtype", errors=TYPE)
    refused({"linear_weight": torch.randn(6, 3).double()}, "linear_weight.dtype", errors=TYPE)
    refused({"linear_bias": torch.randn(6).half()}, "linear_bias.dtype", errors=TYPE)
    refused({"weight": torch.ones(6).long()}, "weight.dtype", errors=TYPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused({"linear_weight": torch.randn(6, 3).double()}, "linear_weight.dtype", errors=TYPE)


def test_ids_out_of_range_are_named_with_their_row() -> None:
    for value in (6, -1, 10**12):
        for extra in ({}, {"row_weight": torch.ones(4)}):
            refused(
                {"target": torch.tensor([0, 1, value, 7]), **extra},
                str(value),
                "2",
                errors=(IndexError,),
            )
    refused({"target": torch.tensor([0, -100, 1, 2]), "ignore_index": 0}, errors=(IndexError,))


@pytest.mark.smoke
def test_options() -> None:
    refused({"reduction": "avg"}, "reduction = 'avg'", "'none', 'mean' or 'sum'", errors=VALUE)
    for value in (-0.1, 1.1, float("nan")):
        refused({"label_smoothing": value}, "label_smoothing", "[0, 1]", errors=VALUE)
    for value in (0.0, -2.0, float("inf"), float("nan")):
        refused({"softcap": value}, "softcap", "positive", errors=VALUE)
    refused({"softcap": "30"}, "softcap", errors=TYPE)
    refused({"memory": "tiny"}, "memory = 'tiny'", "lean", errors=VALUE)
    refused({"memory": -5}, "memory", errors=VALUE)
    refused({"logit_scale": torch.ones(2)}, "logit_scale", "0-d", errors=VALUE)
    refused({"logit_scale": "1"}, "logit_scale", errors=TYPE)
    refused({"denominator": torch.ones(2)}, "denominator", "0-d", errors=VALUE)
    refused({"denominator": 3.0, "reduction": "sum"}, "denominator", errors=VALUE)
    refused({"weight": torch.ones(6, requires_grad=True)}, "weight.requires_grad", errors=VALUE)
    refused(
        {"target": torch.rand(4, 6), "ignore_index": -100},
        "ignore_index",
        "class probabilities",
        errors=VALUE,
    )


def test_shift() -> None:
    for shift in (-1, 4, 5):
        refused({"shift": shift}, f"shift = {shift}", "0 <= shift < 4", errors=VALUE)
    refused({"shift": 0.5}, "shift", errors=TYPE)
    refused({"input": torch.randn(3), "target": torch.tensor(1), "shift": 1}, "shift", errors=VALUE)


def test_objects_that_are_no_tensors() -> None:
    refused({"input": np.ones((4, 3))}, "numpy.ndarray", "logitless.numpy", errors=TYPE)
    refused({"linear_weight": [[1.0]]}, "list", errors=TYPE)
    refused({"target": [0, 1, 2, 3]}, "target", errors=TYPE)
    refused({"weight": [1.0] * 6}, "weight", errors=TYPE)
    refused({"row_weight": 2.0}, "row_weight", errors=TYPE)
    refused({"target": None}, "target", errors=TYPE)


@pytest.mark.filterwarnings("ignore")
def test_layouts_and_subclasses() -> None:
    refused(
        {"linear_weight": torch.eye(6, 3).to_sparse()}, "linear_weight", "to_dense", errors=TYPE
    )
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(2, 3)])
    refused({"input": nested}, "nested", "to_padded_tensor", errors=TYPE)
    jagged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=torch.jagged)
    refused({"input": jagged}, "nested", errors=TYPE)
    quantised = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    refused({"input": quantised}, "input.dtype", "dequantize", errors=TYPE)


def test_devices() -> None:
    refused({"target": torch.zeros(4, dtype=torch.long, device="meta")}, "target.device", "meta")
    refused({"linear_weight": torch.randn(6, 3, device="meta")}, "linear_weight.device", "cpu")
    refused({"row_weight": torch.ones(4, device="meta")}, "row_weight.device")


def test_statistics() -> None:
    input, weight, target = good().values()

    def call(want: Any, **options: Any) -> None:
        logitless.row_statistics(input, weight, target, want=want, **options)

    for want, part in (
        ("variances", "variances"),
        ((), "at least one"),
        ("topk", "stats.topk(8)"),
        ("power_lse", "stats.power_lse(2)"),
        (stats.topk(7), "at most 6"),
        ((stats.topk(2), stats.topk(3)), "two different"),
        ((stats.power_lse(2), stats.power_lse(3)), "several powers"),
        (stats.weighted(torch.ones(5)), "(6,)"),
        (stats.weighted(torch.tensor(1.0)), "(6,)"),
        (stats.weighted(torch.ones(6, requires_grad=True)), "detach"),
        (stats.dot(torch.ones(4, 5)), "(4, 6)"),
    ):
        with pytest.raises(_check.ArgumentError) as caught:
            call(want)
        assert part in str(caught.value), str(caught.value)
    for want in (3, [3], [["rest"]]):
        with pytest.raises(TypeError, match="want"):
            call(want)
    for make in (
        lambda: stats.topk(0),
        lambda: stats.topk(65),
        lambda: stats.power_lse(),
        lambda: stats.power_lse(-1),
        lambda: stats.power_lse(float("inf")),
    ):
        with pytest.raises(ValueError, match="stats"):
            make()
    for make in (lambda: stats.topk(2.0), lambda: stats.power_lse("2"), lambda: stats.dot(3)):
        with pytest.raises(TypeError, match="stats"):
            make()
    with pytest.raises(TypeError, match=r"stats\.dot"):
        logitless.row_statistics(input, weight, torch.rand(4, 6))


def test_nothing_is_computed_before_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from logitless.ops import device

    def fail(*_: Any) -> None:
        raise AssertionError("the engine was called")

    class Refuse:
        forward = backward = cross_entropy_forward = staticmethod(fail)

    monkeypatch.setattr(device, "_CPU", Refuse())
    test_shapes()
    test_dtypes()
    test_options()
    test_shift()


def test_read_only_memory_is_read() -> None:
    array = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    array.setflags(write=False)
    _, weight, target = good().values()
    with pytest.warns(UserWarning, match="not writable"):
        input = torch.from_numpy(array)
    loss = LF.linear_cross_entropy(input, weight, target)
    expected = LF.linear_cross_entropy(torch.tensor(array), weight, target)
    assert torch.equal(loss, expected)


@pytest.mark.gpu
def test_mixed_devices() -> None:
    refused({"input": torch.randn(4, 3, device="cuda")}, "linear_weight.device", errors=VALUE)
