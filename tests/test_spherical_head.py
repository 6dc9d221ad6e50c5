"""`SphericalHead` against a dense weight trained by the same optimiser in float64."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from logitless import losses  # noqa: E402
from logitless.nn import SphericalHead, SphericalOptimizer  # noqa: E402

F = torch.nn.functional


def dense_rows(name, z, y, hyper):
    t = z.gather(1, y[:, None])[:, 0]
    if name == "zloss":
        a, b = hyper.get("a", 1.0), hyper.get("b", 0.0)
        zeta = (t - z.mean(1)) / (z.var(1, unbiased=False).sqrt() + 1e-12)
        return F.softplus(a * (b - zeta)) / a
    if name == "spherical_softmax":
        return torch.log((z * z + 1e-6).sum(1)) - torch.log(t * t + 1e-6)
    if name == "taylor_softmax":
        return torch.log((1 + z + z * z / 2).sum(1)) - torch.log(1 + t + t * t / 2)
    return ((z - F.one_hot(y, z.shape[1])) ** 2).sum(1)


class Dense:
    """The weight [W, b] in float64 with the optimiser written out."""

    def __init__(self, head):
        self.head, w, b = head, head.weight().double(), head.bias()
        self.p = w if b is None else torch.cat([w, b.double()[:, None]], 1)
        self.velocity = torch.zeros_like(self.p)

    def gradient(self, name, h, y, hyper):
        p = self.p.clone().requires_grad_()
        h = h.double().requires_grad_()
        e = F.pad(h, (0, 1), value=1.0) if self.head.has_bias else h
        kept = y >= 0
        loss = dense_rows(name, e[kept] @ p.T, y[kept], hyper).mean()
        return (loss.detach(), *torch.autograd.grad(loss, [p, h]))

    def step(self, g):
        s = self.head
        if s.clip_norm is not None:
            g = g * min(1.0, s.clip_norm / (g.norm().item() + 1e-6))
        lr = s.lr
        if s.trust_ratio is not None:
            w = self.p.norm()
            lr = lr * (s.trust_ratio * w / (g.norm() + s.weight_decay * w)).item()
        self.velocity = s.momentum * self.velocity + g
        direction = self.velocity
        if s.optimizer == "muon":
            u, sigma, v = torch.linalg.svd(direction, full_matrices=False)
            direction = u * (sigma > 1e-6 * sigma[0]) @ v
        self.p = (1 - lr * s.weight_decay) * self.p - lr * direction


def train(name, steps, dtype, *, v=300, d=12, n=16, relu=True, hyper=None, **arguments):
    """Train both; return the head, the dense weight, the largest loss and input-gradient errors."""
    torch.manual_seed(1)
    hyper = hyper or {}
    head = SphericalHead(v, d, loss=getattr(losses, name).module(**hyper), dtype=dtype, **arguments)
    dense, prototypes = Dense(head), torch.randn(40, d)
    worst = 0.0
    for _ in range(steps):
        y = torch.randint(40, (n,))
        h = (prototypes[y] + 0.3 * torch.randn(n, d)).to(dtype)
        h = h.relu() if relu else h
        y[0] = -100
        h.requires_grad_()
        loss = head(h, y)
        loss.backward()
        reference, g, g_h = dense.gradient(name, h.detach(), y, hyper)
        worst = max(
            worst,
            abs(loss.item() - reference.item()) / abs(reference.item()),
            ((h.grad.double() - g_h).norm() / g_h.norm()).item(),
        )
        head.step()
        dense.step(g)
    w, b = head.weight(), head.bias()
    w = w if b is None else torch.cat([w, b[:, None]], 1)
    return head, ((w.double() - dense.p).norm() / dense.p.norm()).item(), worst


CASES = {
    "zloss": ("zloss", {"lr": 2.0}),
    "zloss-sharp": ("zloss", {"lr": 2.0, "hyper": {"a": 0.1, "b": 10.0}}),
    "spherical": ("spherical_softmax", {"lr": 2.0}),
    "spherical-decay": ("spherical_softmax", {"lr": 2.0, "weight_decay": 1e-3}),
    "taylor-bias": ("taylor_softmax", {"lr": 2.0, "bias": True}),
    "mse": ("squared_error", {"lr": 0.02}),
    "mse-fast": ("squared_error", {"lr": 0.04}),  # diverges where epochs are not closed
    "clip": ("zloss", {"lr": 2.0, "clip_norm": 0.01}),
    "trust": ("zloss", {"lr": 1.0, "trust_ratio": 0.01, "weight_decay": 1e-2}),
    "momentum": ("zloss", {"lr": 0.1, "optimizer": "momentum", "momentum": 0.9}),
    "momentum-decay": (
        "squared_error",
        {"lr": 0.002, "optimizer": "momentum", "momentum": 0.9, "weight_decay": 1e-3},
    ),
    "muon": ("zloss", {"lr": 0.02, "optimizer": "muon", "weight_decay": 1e-2}),
    "muon-momentum": ("zloss", {"lr": 0.02, "optimizer": "muon", "momentum": 0.9}),
}


@pytest.mark.parametrize("case", CASES)
def test_thousand_steps_in_float64(case):
    name, arguments = CASES[case]
    _, error, worst = train(name, 1000, torch.float64, n=32, **arguments)
    assert error <= 1e-10
    assert worst <= 1e-8


@pytest.mark.parametrize(
    "case",
    ["zloss", "zloss-sharp", "spherical", "spherical-decay", "taylor-bias", "mse", "mse-fast"],
)
def test_thousand_steps_in_float32(case):
    name, arguments = CASES[case]
    head, error, _ = train(name, 1000, torch.float32, **arguments)
    assert error <= 5e-6
    assert head.diagnostics()["epochs"] <= 8


def test_several_targets_with_signed_weights():
    torch.manual_seed(0)
    head = SphericalHead(50, 6, loss="squared_error", lr=0.05, dtype=torch.float64)
    h = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(50, (8, 3))
    ids[1, 0] = ids[1, 2]
    ids[2, 1] = -100
    weight = torch.randn(8, 3, dtype=torch.float64)
    w = head.weight().requires_grad_()
    loss = head(h, ids, target_weight=weight)
    loss.backward()
    real = torch.where(ids >= 0, weight, 0.0)
    goal = torch.zeros(8, 50, dtype=torch.float64).scatter_add_(1, ids.clamp(min=0), real)
    reference = ((h.detach() @ w.T - goal) ** 2).sum(1).mean()
    (g,) = torch.autograd.grad(reference, [w])
    torch.testing.assert_close(loss, reference.detach(), rtol=1e-12, atol=1e-12)
    before = head.weight()
    head.step()
    torch.testing.assert_close(head.weight(), before - 0.05 * g, rtol=1e-11, atol=1e-12)


def small(**arguments):
    torch.manual_seed(3)
    arguments = {"lr": 0.5, "dtype": torch.float64, **arguments}
    return SphericalHead(40, 5, **arguments), torch.randn(7, 5).double(), torch.randint(40, (7,))


@pytest.mark.smoke
def test_upstream_factor_and_several_backwards():
    head, h, y = small(reduction="sum")
    other = copy.deepcopy(head)
    (3.0 * head(h, y)).backward()
    head.step(grad_scale=3.0)
    for part in (slice(0, 2), slice(2, 7)):
        other(h[part], y[part]).backward()
    other.step()
    torch.testing.assert_close(head.weight(), other.weight(), rtol=1e-12, atol=1e-13)


@pytest.mark.smoke
def test_eval_and_no_grad_record_nothing():
    head, h, y = small()
    before = head.weight()
    with torch.no_grad():
        head(h, y)
    head.eval()
    leaf = h.clone().requires_grad_()
    head(leaf, y).backward()
    assert leaf.grad is not None
    head.step()
    assert torch.equal(head.weight(), before)
    head.train()
    head(h, y).backward()
    head.zero_grad()
    head.step()
    assert torch.equal(head.weight(), before)


def test_fused_steps_in_backward():
    head, h, y = small(fused=True)
    other, _, _ = small()
    head(h, y).backward()
    other(h, y).backward()
    other.step()
    assert torch.equal(head.weight(), other.weight())


def test_ignored_batch_changes_nothing():
    head, h, y = small(reduction="sum")
    before = head.weight()
    head(h, torch.full_like(y, -100)).backward()
    head.step()
    assert torch.equal(head.weight(), before)


def test_singular_step_is_exact():
    head = SphericalHead(30, 2, loss="squared_error", lr=0.5, reduction="sum", dtype=torch.float64)
    h = torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # eigenvalue of X = 2hhᵀ is 2 = 1/lr
    dense, y = Dense(head), torch.tensor([3])
    assert head.diagnostics()["condition"] == 1.0
    for _ in range(3):
        head(h, y).backward()
        _, g, _ = dense.gradient("squared_error", h, y, {})
        head.step()
        dense.step(g)
        assert head.diagnostics()["condition"] > 1e12
        torch.testing.assert_close(head.weight(), dense.p, rtol=1e-12, atol=1e-13)


def test_state_dict_pickle_deepcopy_and_dense_checkpoints():
    for arguments in ({}, {"optimizer": "momentum", "momentum": 0.9}, {"bias": True}):
        head, h, y = small(**arguments)
        for _ in range(30):
            head(h, y).backward()
            head.step()
        fresh, _, _ = small(**arguments)
        fresh.load_state_dict(head.state_dict())
        twins = (head, fresh, copy.deepcopy(head), pickle.loads(pickle.dumps(head)))
        for twin in twins:
            assert torch.equal(twin.weight(), head.weight())
        for twin in twins:
            twin(h, y).backward()
            assert twin.diagnostics()["pending_rows"] == 7
            twin.step()
        for twin in twins[1:]:
            assert torch.equal(twin.weight(), head.weight())
        linear = head.to_linear()
        again = SphericalHead.from_linear(linear, lr=0.5)
        assert torch.equal(again.weight(), linear.weight)
        plain, _, _ = small(bias=linear.bias is not None)
        plain.load_state_dict(linear.state_dict())
        assert torch.equal(plain.weight(), linear.weight)


def test_to_keeps_the_state_wide():
    head, h, y = small(dtype=torch.float32)
    head.half()
    assert head.matrix.factor.dtype == torch.float32
    assert head.matrix.gram.dtype == torch.float64
    assert head(h.half(), y).dtype == torch.float32


def test_optimizer_adapter_with_scheduler_and_scaler():
    head, h, y = small(lr=1.0)
    body = torch.nn.Linear(5, 5).double()
    optimizer = SphericalOptimizer(head)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    other = copy.deepcopy(head)
    for lr in (1.0, 0.5, 0.25):
        optimizer.zero_grad()
        scaler.scale(head(body(h), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        other.lr = lr
        other(body(h), y).backward()
        other.step()
    torch.testing.assert_close(head.weight(), other.weight(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("loss", ["zloss", "spherical_softmax", "taylor_softmax"])
def test_topk_and_rank(loss):
    head, h, y = small(loss=loss, bias=True)
    for _ in range(60):
        head(h, y).backward()
        head.step()
    z = h @ head.weight().T + head.bias()
    score = {"zloss": z, "spherical_softmax": z.abs(), "taylor_softmax": (z + 1).abs()}[loss]
    values, ids = head.topk(h, 4)
    assert torch.equal(ids, score.topk(4, dim=1).indices)
    expected = (score > score.gather(1, y[:, None])).sum(1) + 1
    assert torch.equal(head.rank(h, y), expected)
    if loss == "zloss":
        torch.testing.assert_close(values, z.gather(1, ids))
        with pytest.raises(ValueError, match="define no probability"):
            head.log_prob(h, y)
    else:
        weight = z**2 + 1e-6 if loss == "spherical_softmax" else 1 + z + z**2 / 2
        log_p = torch.log(weight / weight.sum(1, keepdim=True))
        torch.testing.assert_close(values, log_p.gather(1, ids))
        torch.testing.assert_close(head.log_prob(h, y), log_p.gather(1, y[:, None])[:, 0])


RANK = """
import sys
from pathlib import Path
import pytest, torch
from logitless.nn import SphericalHead

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
)
w, h, y = torch.load(folder / "problem.pt")

def make(**arguments):
    head = SphericalHead(*w.shape, lr=0.5, reduction="sum", dtype=torch.float64, **arguments)
    head.load_dense(w)
    return head

lonely = make()
lonely(h, y).backward()
with pytest.raises(RuntimeError, match="process_group"):
    lonely.step()
head = make(process_group=torch.distributed.group.WORLD)
part = slice(0, 2) if rank == 0 else slice(2, 7)
head(h[part], y[part]).backward()
head.step()
torch.save(head.weight(), folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_ranks_share_a_step(tmp_path):
    head, h, y = small(reduction="sum")
    torch.save((head.weight(), h, y), tmp_path / "problem.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path)]) for r in (0, 1)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    (head(h, y) / 2).backward()
    head.step()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, head.weight(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"optimizer": "adamw"}, "no exact O"),
        ({"optimizer": "momentum"}, "momentum = 0.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0"),
        ({"loss": "cross_entropy"}, "loss = 'cross_entropy'"),
        ({"loss": losses.squentropy.module()}, "visits every class"),
        ({"dtype": torch.bfloat16}, "half types"),
        ({"reduction": "average"}, "reduction"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=text):
        SphericalHead(10, 4, **arguments)


def test_bad_inputs_are_refused():
    head, h, y = small()
    with pytest.raises(ValueError, match=r"input\.shape"):
        head(h[:, :3], y)
    with pytest.raises(ValueError, match=r"target\.shape"):
        head(h, y[:3])
    with pytest.raises(IndexError, match=r"target\[0\] = 40"):
        head(h, torch.full_like(y, 40))
    with pytest.raises(ValueError, match="lr = inf"):
        head.lr = float("inf")


def test_a_forward_out_of_date_is_refused():
    head, h, y = small()
    stale = head(h, y)
    head(h, y).backward()
    head.step()
    with pytest.raises(RuntimeError, match="call backward before step"):
        stale.backward()


def test_padded_rows_may_be_zero():
    head, h, y = small()
    h[2:4], y[2:4] = 0.0, -100  # σ = 0 there
    leaf = h.clone().requires_grad_()
    head(leaf, y).backward()
    head.step()
    assert leaf.grad[2:4].eq(0).all()
    assert head.weight().isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of inductor itself
def test_compiled_steps():
    head, h, y = small(compile=True, loss="taylor_softmax", clip_norm=0.05)
    other, _, _ = small(loss="taylor_softmax", clip_norm=0.05)
    for each in (head, other):
        for i in range(20):
            each(h, (y + i) % 40).backward()
            each.step()
    torch.testing.assert_close(head.weight(), other.weight(), rtol=1e-11, atol=1e-12)


def test_one_class_and_one_feature():
    head = SphericalHead(1, 1, loss="squared_error", lr=0.1, dtype=torch.float64)
    h, y = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for _ in range(50):
        head(h, y).backward()
        head.step()
    torch.testing.assert_close(head.weight().item(), 1.0, rtol=1e-3, atol=0.0)
    undefined = SphericalHead(1, 1, loss="zloss", lr=0.1)  # σ = 0
    undefined(h.float(), y).backward()
    with pytest.raises(FloatingPointError, match="undefined"):
        undefined.step()
