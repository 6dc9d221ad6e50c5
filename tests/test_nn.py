"""Modules that own the head."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402
import logitless.nn as ln  # noqa: E402


def make(**options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    module = ln.LinearCrossEntropyLoss(5, 7, dtype=torch.float64, **options)
    shape = (4, *module.out_features)
    return module, torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 7, shape)


@pytest.mark.smoke
@pytest.mark.parametrize("out_features", [(), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_a_linear_layer(out_features: tuple[int, ...], bias: bool) -> None:
    module, input, target = make(out_features=out_features, bias=bias, label_smoothing=0.1)
    loss = module(input, target)
    logits = module.linear(input).reshape(4, 7, *out_features)
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    parameters = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    )


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has none")
def test_state_dicts_go_both_ways() -> None:
    weight = torch.rand(7, dtype=torch.float64)
    options: dict[str, Any] = {"bias": True, "weight": weight, "dtype": torch.float64}
    ours = ln.LinearCrossEntropyLoss(5, 7, **options)
    theirs = torch.nn.LinearCrossEntropyLoss(5, 7, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    input, target = torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 7, (4,))
    torch.testing.assert_close(ours(input, target), theirs(input, target))
    torch.manual_seed(1)
    a = torch.nn.LinearCrossEntropyLoss(5, 7).linear.weight
    torch.manual_seed(1)
    assert torch.equal(a, ln.LinearCrossEntropyLoss(5, 7).linear.weight)


def test_options_beyond_torchs() -> None:
    module, _, _ = make(shift=1, softcap=3.0, z_loss_weight=0.1, logit_scale=0.5)
    input = torch.randn(2, 6, 5, dtype=torch.float64)
    target = torch.randint(0, 7, (2, 6))
    weights = torch.rand(2, 6)
    loss, s = module(input, target, row_weight=weights, denominator=3, return_statistics=True)
    expected = LF.linear_cross_entropy(
        input,
        module.linear.weight,
        target,
        shift=1,
        softcap=3.0,
        z_loss_weight=0.1,
        logit_scale=0.5,
        row_weight=weights,
        denominator=3,
    )
    assert torch.equal(loss, expected)
    assert s.lse.shape == (2, 5)


def test_a_trained_scale_is_a_parameter() -> None:
    scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    module, input, target = make(logit_scale=scale)
    assert "logit_scale" in dict(module.named_parameters())
    module(input, target).backward()
    assert scale.grad is not None
    module, *_ = make(logit_scale=torch.tensor(2.0))
    assert "logit_scale" in dict(module.named_buffers())


def test_pickle_copy_repr_and_dtype() -> None:
    module, input, target = make(bias=True, shift=0, reduction="sum")
    expected = module(input, target)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(input, target), expected)
    assert "in_features=5, num_classes=7, bias=True, reduction='sum'" in repr(module)
    assert module.bfloat16()(input.bfloat16(), target).dtype == torch.float32


def test_arguments_are_checked_when_made() -> None:
    for options in (
        {"reduction": "avg"},
        {"label_smoothing": 1.5},
        {"softcap": -1.0},
        {"memory": "tiny"},
        {"weight": torch.ones(3)},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ln.LinearCrossEntropyLoss(5, 7, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_under_fully_sharded_data_parallel(tmp_path: Any) -> None:
    """FSDP unshards the weight for `forward`: everything happens inside it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        module = ln.LinearCrossEntropyLoss(8, 16)
        plain = copy.deepcopy(module)
        fully_shard(module, mesh=mesh)
        input, target = torch.randn(6, 8), torch.randint(0, 16, (6,))
        loss = module(input, target)
        loss.backward()
        expected = plain(input, target)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        gradient = module.linear.weight.grad.full_tensor()
        torch.testing.assert_close(gradient, plain.linear.weight.grad)
        with pytest.raises(TypeError, match=r"full_tensor\(\)"):
            LF.linear_cross_entropy(input, module.linear.weight, target)
    finally:
        dist.destroy_process_group()
