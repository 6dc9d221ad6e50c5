"""`row_loss`: losses of one's own, as anyone would write them."""

from __future__ import annotations

import inspect
import pickle
import pydoc
from typing import Any

import pytest

import logitless

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402
from logitless import PerRow, RowStatistics, row_loss, stats  # noqa: E402

logsigmoid = torch.nn.functional.logsigmoid


@row_loss(want=("rest", "target"))
def focal(s: RowStatistics, *, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss  −(1 − p_y)^γ log p_y  (Lin et al. 2017)."""
    log_p = logsigmoid(s.target - s.rest)
    return -((-torch.expm1(log_p)) ** gamma) * log_p


@row_loss(want=lambda power: ("rest", "target", stats.power_lse(power)))
def powered(s: RowStatistics, *, power: float, offset: float = 0.0) -> torch.Tensor:
    """Cross entropy plus Σ p^m."""
    return -s.log_prob + torch.exp(s.power_lse - power * s.lse) + offset


@row_loss(want=("rest", "target"))
def policy(
    s: RowStatistics, *, advantage: PerRow, old_log_prob: PerRow | None = None
) -> torch.Tensor:
    """Policy gradient."""
    ratio = 1.0 if old_log_prob is None else torch.exp(s.log_prob - old_log_prob)
    return -advantage * s.log_prob * ratio


@row_loss(want=("rest", "target"), head="cosine")
def angular(s: RowStatistics, *, margin: float = 0.2, scale: float = 8.0) -> torch.Tensor:
    """CosFace."""
    return torch.nn.functional.softplus(s.rest - s.target + 0.0 * scale + margin)


def make(seed: int = 0, lead: tuple[int, ...] = (2, 6)) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(*lead, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 9, lead, generator=generator)
    target.view(-1)[::4] = -100
    return input, weight, target


def dense_focal(input: Any, weight: Any, target: Any, gamma: float) -> Any:
    log_p = torch.log_softmax(input @ weight.T, -1)
    log_p = log_p.gather(-1, target[..., None].clamp(min=0)).squeeze(-1)
    return -((1 - log_p.exp()) ** gamma) * log_p


@pytest.mark.smoke
@pytest.mark.parametrize("shift", [0, 1])
def test_focal_as_in_the_design(shift: int) -> None:
    input, weight, target = make()
    kept = (target != -100)[:, shift:]
    dense = dense_focal(input[:, : 6 - shift], weight, target[:, shift:], 1.5)
    rows = torch.where(kept, dense, 0.0)
    for reduction, expected in (
        ("none", rows),
        ("sum", rows.sum()),
        ("mean", rows.sum() / kept.sum()),
    ):
        found = focal(input, weight, target, gamma=1.5, reduction=reduction, shift=shift)
        torch.testing.assert_close(found, expected)
        cotangent = torch.randn_like(expected)
        a = torch.autograd.grad(found, (input, weight), cotangent)
        b = torch.autograd.grad(expected, (input, weight), cotangent, retain_graph=True)
        torch.testing.assert_close(a, b)


def test_cross_entropy_is_a_row_loss() -> None:
    @row_loss(want="log_prob")
    def cross_entropy(s: RowStatistics) -> torch.Tensor:
        return -s.log_prob

    input, weight, target = make()
    weights = torch.randn(2, 6, dtype=torch.float64)
    for options in ({}, {"row_weight": weights}, {"softcap": 2.0}, {"denominator": 5}):
        a = cross_entropy(input, weight, target, **options)
        b = LF.linear_cross_entropy(input, weight, target, **options)
        torch.testing.assert_close(a, b)


def test_want_depends_on_hyper_parameters() -> None:
    input, weight, target = make()
    z = (input @ weight.T).detach()
    log_p = torch.log_softmax(z, -1)
    rows = powered(input, weight, target, power=3, reduction="none", offset=1.0)
    gathered = log_p.gather(-1, target[..., None].clamp(min=0)).squeeze(-1)
    expected = -gathered + (3 * log_p).exp().sum(-1) + 1.0
    torch.testing.assert_close(rows, torch.where(target != -100, expected, 0.0))
    with pytest.raises(TypeError, match="missing the required keyword argument 'power'"):
        powered(input, weight, target)


def test_per_row_keywords_are_shifted_and_masked() -> None:
    input, weight, target = make()
    advantage = torch.randn(2, 6, dtype=torch.float64)
    poisoned = torch.where(target == -100, torch.nan, advantage).requires_grad_()
    loss = policy(input, weight, target, advantage=poisoned, shift=2)
    s = logitless.row_statistics(input, weight, target, shift=2)
    expected = (-advantage[:, 2:] * s.log_prob)[s.kept].mean()
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (input, weight, poisoned))
    assert all(g.isfinite().all() for g in gradients)
    with pytest.raises(ValueError, match=r"advantage\.shape"):
        policy(input, weight, target, advantage=advantage[:, 2:], shift=2)
    with pytest.raises(TypeError, match="advantage"):
        policy(input, weight, target)


def test_rows_from_statistics() -> None:
    input, weight, target = make()
    loss, s = focal(input, weight, target, gamma=1.0, return_statistics=True, reduction="none")
    assert isinstance(s, RowStatistics)
    assert torch.equal(focal.rows(s, gamma=1.0), loss)
    advantage = torch.rand(2, 6, dtype=torch.float64)
    torch.testing.assert_close(
        policy.rows(s, advantage=advantage),
        policy(input, weight, target, advantage=advantage, reduction="none"),
    )


def test_heads() -> None:
    input, weight, target = make()
    unit = torch.nn.functional.normalize
    s = logitless.row_statistics(unit(input, dim=-1), unit(weight, dim=-1), target)
    expected = torch.nn.functional.softplus(s.rest - s.target + 0.2)[s.kept].mean()
    torch.testing.assert_close(angular(input, weight, target), expected)

    @row_loss(want=("lse", "target"), head=lambda kind: kind)
    def prototypes(s: RowStatistics, *, kind: str = "distance") -> torch.Tensor:  # noqa: ARG001
        return s.lse - s.target

    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    z = -torch.cdist(input.reshape(-1, 4), weight).square().reshape(2, 6, 9) + bias
    expected = torch.nn.functional.cross_entropy(z.flatten(0, 1), target.flatten())
    loss = prototypes(input, weight, target, linear_bias=bias)
    torch.testing.assert_close(loss, expected)
    leaves = (input, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    )

    @row_loss(want=("lse", "target"), head=lambda e, w, b: (2 * e, w, b))
    def doubled(s: RowStatistics) -> torch.Tensor:
        return s.lse - s.target

    torch.testing.assert_close(
        doubled(input, weight, target),
        LF.linear_cross_entropy(input, weight, target, logit_scale=2.0),
    )
    with pytest.raises(ValueError, match="cosine, distance"):
        row_loss(want="lse", head="euclid")(lambda s: s.lse)


def test_signature_defaults_and_documentation() -> None:
    parameters = inspect.signature(focal).parameters
    assert list(parameters)[:4] == ["input", "linear_weight", "target", "gamma"]
    assert parameters["gamma"].default == 2.0
    assert parameters["gamma"].kind is inspect.Parameter.KEYWORD_ONLY
    assert {"row_weight", "reduction", "shift", "memory", "return_statistics"} <= set(parameters)
    text = pydoc.render_doc(focal, renderer=pydoc.plaintext)
    for part in (
        "focal(input",
        "gamma",
        "= 2.0",
        "Lin et al. 2017",
        "Parameters",
        "ignore_index",
    ):
        assert part in text
    assert focal.__module__ == __name__
    assert focal.__doc__.startswith("Focal loss")
    assert "statistics" in inspect.signature(focal.rows).parameters
    assert next(iter(inspect.signature(focal.module).parameters)) == "gamma"
    assert "advantage" in inspect.signature(policy.module.forward).parameters


def test_module() -> None:
    input, weight, target = make()
    module = focal.module(gamma=1.5, reduction="sum", shift=1, softcap=3.0)
    expected = focal(input, weight, target, gamma=1.5, reduction="sum", shift=1, softcap=3.0)
    assert torch.equal(module(input, weight, target), expected)
    assert repr(module) == "FocalLoss(gamma=1.5, reduction='sum', softcap=3.0, shift=1)"
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is focal.module
    assert torch.equal(again(input, weight, target), expected)
    scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    trained = focal.module(logit_scale=scale)
    assert list(trained.parameters()) == [scale]
    trained(input, weight, target).backward()
    assert scale.grad is not None
    advantage = torch.ones(2, 6, dtype=torch.float64)
    loss = policy.module()(input, weight, target, advantage=advantage, row_weight=advantage)
    torch.testing.assert_close(loss, LF.linear_cross_entropy(input, weight, target))
    with pytest.raises(TypeError, match="when calling"):
        policy.module(advantage=advantage)
    with pytest.raises(ValueError, match="reduction"):
        focal.module(reduction="max")
    with pytest.raises(TypeError, match="gamme"):
        focal.module(gamme=1.0)


def test_decoration_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="reserved"):

        @row_loss(want="lse")
        def first(s: RowStatistics, *, reduction: str) -> torch.Tensor:  # noqa: ARG001
            return s.lse

    with pytest.raises(ValueError, match="reserved"):

        @row_loss(want="lse")
        def second(s: RowStatistics, *, forward: float = 1.0) -> torch.Tensor:  # noqa: ARG001
            return s.lse

    with pytest.raises(ValueError, match="keywords"):

        @row_loss(want="lse")
        def third(s: RowStatistics, **rest: float) -> torch.Tensor:  # noqa: ARG001
            return s.lse

    with pytest.raises(ValueError, match="no_such"):
        row_loss(want=("lse", "no_such"))(lambda s: s.lse)


def test_a_row_function_must_return_one_loss_a_row() -> None:
    @row_loss(want=stats.topk(3))
    def wrong(s: RowStatistics) -> torch.Tensor:
        return s.topk_values

    input, weight, target = make()
    with pytest.raises(ValueError, match="one loss a row"):
        wrong(input, weight, target)


def test_unknown_keywords_name_the_known_ones() -> None:
    input, weight, target = make()
    with pytest.raises(TypeError, match=r"gama.*gamma, input"):
        focal(input, weight, target, gama=1.0)


def test_losses_without_a_target() -> None:
    @row_loss(want=("lse", "entropy"))
    def regulariser(s: RowStatistics, *, strength: float = 0.1) -> torch.Tensor:
        return strength * (s.lse.square() - s.entropy)

    input, weight, _ = make()
    z = input @ weight.T
    p = z.softmax(-1)
    expected = 0.1 * (z.logsumexp(-1).square() + (p * p.log()).sum(-1))
    torch.testing.assert_close(regulariser(input, weight, None), expected.mean())
