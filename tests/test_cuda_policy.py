"""Log-probability and entropy on CUDA: one launch each way behind the statistics."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import logitless  # noqa: E402
import logitless.functional as LF  # noqa: E402
from logitless import _core  # noqa: E402
from logitless._arrays import torch_handle  # noqa: E402
from logitless.ops import policy  # noqa: E402

pytestmark = pytest.mark.gpu

_CORE: Any = _core
NAMES = ["bfloat16", "float32", "float64"]
VALUES = {"bfloat16": 2e-3, "float32": 2e-5, "float64": 1e-11}
GRADIENTS = {"bfloat16": 1e-2, "float32": 1e-4, "float64": 1e-10}


def make(name: str, lead: tuple[int, ...], features: int = 96, classes: int = 1777) -> Any:
    """Input, weight and targets; a row in five ignored, a row in three sure of its target."""
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(*lead, features, generator=generator, dtype=torch.float64)
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64) / 10
    y = torch.randint(classes, lead, generator=generator)
    rows, ids = e.view(-1, features), y.view(-1)
    rows[::3] += 10 * w[ids[::3]]
    ids[1::5] = -100
    dtype = getattr(torch, name)
    return e.to("cuda", dtype).requires_grad_(), w.to("cuda", dtype).requires_grad_(), y.cuda()


def dense(e: Any, w: Any, y: Any, bias: Any = None) -> Any:
    """The same in float64, from logits, and the leaves of it."""
    leaves = [x.detach().double().requires_grad_() for x in (e, w)]
    z = leaves[0] @ leaves[1].T
    log_p = (z if bias is None else z + bias.double()).log_softmax(-1)
    kept = y != -100
    log_prob = log_p.gather(-1, torch.where(kept, y, 0)[..., None])[..., 0]
    finite = torch.where(log_p > -torch.inf, log_p, 0.0)  # nan stays
    entropy = -(log_p.exp() * torch.where(log_p.isnan(), log_p, finite)).sum(-1)
    return torch.where(kept, log_prob, 0.0), torch.where(kept, entropy, 0.0), leaves


def takes_one_launch(e: Any, w: Any, y: Any) -> bool:
    with torch.no_grad():
        return policy.applies(logitless.row_statistics(e, w, y))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (3,), (4, 65), (2100,)])
def test_against_logits(name: str, lead: Any) -> None:
    e, w, y = make(name, lead)
    assert takes_one_launch(e, w, y)
    found = LF.linear_log_prob(e, w, y)
    *wanted, leaves = dense(e, w, y)
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        assert (mine - exact).norm() <= VALUES[name] * exact.norm()
    g = torch.randn(2, *lead, 2, device="cuda", dtype=torch.float64)[..., 0]  # of any strides
    for used in ([0], [1], [0, 1]):
        got = torch.autograd.grad(
            [found[i] for i in used],
            (e, w),
            [g[i].to(found[i].dtype) for i in used],
            retain_graph=True,
        )
        exact = torch.autograd.grad(
            [wanted[i] for i in used], leaves, [g[i] for i in used], retain_graph=True
        )
        for a, b in zip(got, exact, strict=True):
            assert (a.double() - b).norm() <= GRADIENTS[name] * b.norm()


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_options_as_on_the_cpu(name: str) -> None:
    """Temperature, softcap, shift and an own ignored id: what lies before the launch."""
    e, w, y = make(name, (4, 33), features=32, classes=300)
    y = torch.where(y == -100, 7, y)
    options: Any = {"temperature": 0.7, "softcap": 20.0, "shift": 1, "ignore_index": 7}

    def run(device: str) -> Any:
        leaves = [x.detach().to(device).requires_grad_() for x in (e, w)]
        found = LF.linear_log_prob(*leaves, y.to(device), **options)
        total = (found.log_prob * 0.3 + found.entropy.square()).sum()
        return [*found, *torch.autograd.grad(total, leaves)]

    for a, b in zip(run("cuda"), run("cpu"), strict=True):
        assert (a.cpu() - b).norm() <= GRADIENTS[name] * b.norm()


def test_sure_rows_keep_their_digits() -> None:
    e, w, y = make("float32", (64,))
    with torch.no_grad():
        e[:, :] = 60 * w[y.clamp(min=0)]
    found = LF.linear_log_prob(e, w, y)
    z = e.detach().double() @ w.detach().double().T
    chosen = y.clamp(min=0)[:, None]
    others = z.scatter(1, chosen, -torch.inf)
    x = others.logsumexp(1) - z.gather(1, chosen)[:, 0]
    q = others.softmax(1)
    among = -(q * torch.where(q > 0, q.log(), 0.0)).sum(1)
    softplus = torch.nn.functional.softplus
    rest = torch.sigmoid(x)
    entropy = rest * (softplus(-x, threshold=40.0) + among) + torch.sigmoid(-x) * softplus(x)
    kept = y != -100
    assert x[kept].max() < -16  # torch's own, in float32, is 0
    log_prob = -torch.log1p(torch.exp(x))
    assert ((found.log_prob - log_prob).abs() <= -1e-3 * log_prob)[kept].all()
    assert ((found.entropy - entropy).abs() <= 1e-3 * entropy)[kept].all()
    assert not found.log_prob[~kept].any()
    assert not found.entropy[~kept].any()


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_infinite_classes(name: str, value: float) -> None:
    """A masked class as the target, beside it, and all others masked; a logit of +inf is nan."""
    e, w, y = make(name, (6,), features=16, classes=20)
    y[:] = torch.tensor([3, 4, -100, 3, 5, 19])
    bias = torch.zeros(20, device="cuda", dtype=e.dtype)
    bias[3] = value
    found = LF.linear_log_prob(e, w, y, linear_bias=bias)
    *wanted, _ = dense(e, w, y, bias)
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
    bias[:] = -torch.inf
    bias[4] = 0.0
    alone = LF.linear_log_prob(e, w, y.fill_(4), linear_bias=bias)
    assert not alone.log_prob.any()
    assert not alone.entropy.any()
    gradients = torch.autograd.grad(alone.log_prob.sum() + alone.entropy.sum(), (e, w))
    assert all((g == 0).all() for g in gradients)


def test_target_out_of_range() -> None:
    e, w, y = make("float32", (9,), features=16, classes=50)
    y[1] = 50
    found = LF.linear_log_prob(e, w, y)
    wrong = torch.arange(9, device="cuda") == 1
    assert torch.equal(found.log_prob.isnan(), wrong)
    assert found.entropy[~wrong].isfinite().all()


@pytest.mark.parametrize("used", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.2)])
def test_differentiable_twice(used: Any) -> None:
    e, w, y = make("float64", (20,), features=16, classes=50)

    def product(log_prob: Any, entropy: Any, leaves: Any) -> Any:
        values = zip(used, (log_prob, entropy), strict=True)
        value = sum(c * t.square().sum() for c, t in values if c)
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    *wanted, leaves = dense(e, w, y)
    found = LF.linear_log_prob(e, w, y)
    pairs = zip(product(*found, (e, w)), product(*wanted, leaves), strict=True)
    assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in pairs)


def test_graph(capture: Any) -> None:
    e, w, y = make("bfloat16", (300,))

    def step() -> Any:
        found = LF.linear_log_prob(e, w, y)
        total = found.log_prob.sum() - 0.1 * found.entropy.sum()
        return [*(t.detach() for t in found), *torch.autograd.grad(total, (e, w))]

    expected = step()
    graph, captured = capture(step)
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("name", ["rest", "target", "rest_entropy", "ids", "log_prob", "entropy"])
def test_refusals(name: str) -> None:
    """The compiled call checks what it is given before any work."""
    tensors = {n: torch.zeros(4, device="cuda") for n in ("rest", "target", "rest_entropy")}
    tensors["ids"] = torch.zeros(4, device="cuda", dtype=torch.int64)
    tensors |= {n: torch.zeros(4, device="cuda") for n in ("log_prob", "entropy")}

    def call() -> None:
        *statistics, log_prob, entropy = map(torch_handle, tensors.values())
        _CORE.cuda_policy_forward(*statistics, -100, log_prob, entropy, 0, 0)

    tensors[name] = tensors[name].to(torch.bfloat16)
    with pytest.raises(TypeError, match=name):
        call()
    if name != "rest":
        tensors[name] = torch.zeros(3, device="cuda", dtype=torch.float32)
        if name == "ids":
            tensors[name] = tensors[name].long()
        with pytest.raises(ValueError, match=name):
            call()


def test_several_heads_and_candidates_go_their_own_way() -> None:
    e, w, y = make("float32", (6,), features=16, classes=40)
    heads = torch.stack((w.detach(), w.detach() / 2), dim=1)
    both = LF.linear_log_prob(e, heads, torch.stack((y, y), dim=-1))
    candidates = LF.linear_log_prob(e, w, torch.stack((y, y), dim=-1))
    one = LF.linear_log_prob(e, w, y)
    for k in (0, 1):
        torch.testing.assert_close(candidates.log_prob[:, k], one.log_prob)
    for mine, exact in zip(both, one, strict=True):
        torch.testing.assert_close(mine[:, 0], exact)


def test_few_launches() -> None:
    e, w, y = make("bfloat16", (512,))
    g = torch.ones(512, device="cuda")

    def step() -> None:
        found = LF.linear_log_prob(e, w, y)
        torch.autograd.grad([found.log_prob, found.entropy], (e, w), [g, g])

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("policy_" in name for name in names) == 2
    assert sum("at::native" in name for name in names) <= 2
