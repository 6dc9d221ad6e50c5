"""`SphericalHead` on CUDA: nothing is read back, graphs replay it, and the host agrees."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

from logitless import losses  # noqa: E402
from logitless.nn import SphericalHead  # noqa: E402

pytestmark = pytest.mark.gpu
F = torch.nn.functional


@contextmanager
def nothing_read_back():
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def data(steps, n, d, v, dtype, k=None):
    """Batches with repeated, ignored and padded targets."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(steps):
        h = torch.randn(n, d, generator=generator, dtype=dtype)
        y = torch.randint(v, (n,) if k is None else (n, k), generator=generator)
        y[: n // 4] = y[: n // 4] % 5  # frequent classes
        y[n // 2] = -100
        if k is not None:
            y[0] = y[0, 0]
            y[1, 1:] = -100
        batches.append((h, y))
    return batches


def pair(v, d, **arguments):
    torch.manual_seed(3)
    host = SphericalHead(v, d, **arguments)
    device = SphericalHead(v, d, device="cuda", **arguments)
    device.load_dense(host.weight().cuda(), None if host.bias() is None else host.bias().cuda())
    return host, device


CASES = {
    "zloss": {"lr": 1.0},
    "bias-decay": {"loss": "taylor_softmax", "bias": True, "lr": 1.0, "weight_decay": 1e-3},
    "clip": {"lr": 1.0, "clip_norm": 0.01},
    "trust": {"lr": 1.0, "trust_ratio": 0.01},
    "momentum": {"lr": 0.1, "optimizer": "momentum", "momentum": 0.9, "weight_decay": 1e-3},
    "mse": {"loss": "squared_error", "lr": 0.01},
    "fused": {"lr": 1.0, "fused": True},
    "muon": {"lr": 0.02, "optimizer": "muon", "momentum": 0.5},
}


@pytest.mark.parametrize("n", [12, 40], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("k", [None, 3], ids=["one", "three"])
@pytest.mark.parametrize("case", CASES)
def test_the_host_agrees_and_nothing_is_read(case, k, n):
    arguments = CASES[case]
    host, device = pair(2000, 24, dtype=torch.float64, **arguments)
    batches = data(70, n, 24, 2000, torch.float64, k)
    on_device = [(h.cuda().requires_grad_(), y.cuda()) for h, y in batches]

    def run(head, batches):
        total = 0.0
        for h, y in batches:
            loss = head(h, y)
            loss.backward()
            head.step()
            total = total + loss.detach()
        return total

    expected = run(host, [(h.requires_grad_(), y) for h, y in batches])
    run_device = [on_device[:2], on_device[2:]]
    first = run(device, run_device[0])
    if case == "muon":  # torch's eigh waits
        total = first + run(device, run_device[1])
    else:
        with nothing_read_back():
            total = first + run(device, run_device[1])
    assert device.diagnostics()["steps"] == 70
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(device.weight().cpu(), host.weight(), rtol=1e-9, atol=1e-11)
    gradient, wanted = on_device[-1][0].grad.cpu(), batches[-1][0].grad
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)


def capture(head, h, y):
    """The documented way: some steps on a side stream, then one graph of everything."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            head(h, y).backward()
            head.step()
    torch.cuda.current_stream().wait_stream(side)
    h.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = head(h, y)
        loss.backward()
        head.step()
    return graph, loss


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"optimizer": "momentum", "momentum": 0.9},
        {"fused": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_graph_of_the_whole_step(arguments):
    v, d, n = 3000, 32, 24
    head = SphericalHead(v, d, device="cuda", lr=0.5, **arguments)
    exact = head.weight().double()
    velocity = torch.zeros_like(exact)
    batches = [(h.cuda(), y.cuda()) for h, y in data(200, n, d, v, torch.float32)]
    h, y = batches[0][0].clone().requires_grad_(), batches[0][1].clone()

    def dense_step(h, y, lr):
        nonlocal exact, velocity
        w = exact.clone().requires_grad_()
        loss = losses.zloss(h.detach().double(), w, y, route="stream")
        (g,) = torch.autograd.grad(loss, [w])
        velocity = head.momentum * velocity + g
        exact = exact - lr * velocity
        return loss.item()

    graph, loss = capture(head, h, y)
    for _ in range(2):
        dense_step(h, y, 0.5)
    for i, (new_h, new_y) in enumerate(batches):
        head.lr = 0.5 if i < 100 else 0.25  # captured steps read it on the device
        with torch.no_grad():
            h.copy_(new_h)
            y.copy_(new_y)
        with nothing_read_back():
            graph.replay()
            head.replayed()
        reference = dense_step(new_h, new_y, head.lr)
        assert abs(loss.item() - reference) <= 1e-5 * abs(reference)
    assert head.diagnostics()["steps"] == 202
    error = (head.weight().double() - exact).norm() / exact.norm()
    assert error <= 5e-6
    head(h, y).backward()  # an eager step among replays
    head.step()
    dense_step(h, y, head.lr)
    assert (head.weight().double() - exact).norm() / exact.norm() <= 5e-6


def test_replays_that_nobody_told_are_refused():
    head = SphericalHead(500, 16, device="cuda", lr=0.5)
    h, y = (t.cuda() for t in data(1, 10, 16, 500, torch.float32)[0])
    graph, _ = capture(head, h.requires_grad_(), y)
    for _ in range(2 + head.matrix.capacity // 10):
        graph.replay()
    with pytest.raises(RuntimeError, match="replayed"):
        head.diagnostics()
    assert head.weight().isfinite().all()
    before = head.weight()  # the error has made room
    graph.replay()
    head.replayed()
    head.diagnostics()
    assert not torch.equal(head.weight(), before)


def test_a_gradient_that_is_not_finite_is_told_later():
    head = SphericalHead(500, 16, device="cuda", lr=0.5)
    h, y = (t.cuda() for t in data(1, 10, 16, 500, torch.float32)[0])
    head(h, y).backward()
    head.step()
    before = head.weight()
    with nothing_read_back():
        head(h * torch.nan, y).backward()
        head.step()
    with pytest.raises(FloatingPointError, match="left as it was"):
        head.state_dict()
    assert torch.equal(head.weight(), before)
    head(h, y).backward()
    head.step()
    head.diagnostics()


def test_the_same_bits_twice():
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        head = SphericalHead(3000, 32, device="cuda", lr=0.5)
        for h, y in data(80, 24, 32, 3000, torch.float32):
            head(h.cuda(), y.cuda()).backward()
            head.step()
        results.append(head.weight())
    assert torch.equal(*results)


def test_a_larger_batch_after_a_capture_is_refused():
    head = SphericalHead(500, 16, device="cuda", lr=0.5)
    h, y = (t.cuda() for t in data(1, 10, 16, 500, torch.float32)[0])
    capture(head, h.requires_grad_(), y)
    many = 1 + head.matrix.capacity
    head(
        torch.randn(many, 16, device="cuda"), torch.zeros(many, dtype=torch.int64).cuda()
    ).backward()
    with pytest.raises(RuntimeError, match="largest batch first"):
        head.step()
