"""The losses as training uses them.

Low precision, autocast, torch.compile, DistributedDataParallel.
"""

import faulthandler
import gc
import os
import socket

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastscore import losses
from fastscore.losses.noise_conditional import METHODS

SIGMAS = [1.0, 0.1]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)
    )


def every_loss(net, x):
    """(name, values), the same noise at every call."""
    key = {"seed": 3}
    yield "exact", losses.exact(net, x)
    for form in (True, False):
        yield f"sliced {form}", losses.sliced(net, x, projections=2, variance_reduced=form, **key)
        yield (
            f"finite-difference {form}",
            losses.finite_difference_sliced(net, x, variance_reduced=form, radius=1.0, **key),
        )
    yield "one sigma", losses.denoising(lambda x, sigma: net(x), x, 0.5, **key)
    for method in METHODS:
        yield (
            f"ladder {method}",
            losses.noise_conditional(lambda x, sigma: net(x), x, SIGMAS, method=method, **key),
        )


def gradient(net, loss):
    return torch.cat(
        [g.flatten().double() for g in torch.autograd.grad(loss.mean(), list(net.parameters()))]
    )


def angle(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def images(n=16):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["bfloat16 network", "autocast"])
def test_low_precision(mode):
    """bfloat16 keeps 8 bits.

    Some twenty roundings of 2^-9 in the network, at random, are 1 % of a value, the mean of 16
    samples less.
    """
    net, x = network(), images().bfloat16().float()
    exact = {
        name: (loss.detach(), gradient(net, loss))
        for name, loss in every_loss(net.double(), x.double())
    }
    net = network().bfloat16() if mode == "bfloat16 network" else network()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        for name, loss in every_loss(net, x.bfloat16() if mode == "bfloat16 network" else x):
            expected, slope = exact[name]
            assert loss.dtype == torch.float32 and loss.shape == (16,), name
            # Differences of two rounded scores at distance 2h = ½ lose what ‖s‖ / ‖Jv‖ h⁻¹ costs;
            # the others cannot be worse.
            assert abs(float(loss.mean() - expected.mean())) < 0.02 * float(
                expected.abs().mean()
            ), name
            assert angle(gradient(net, loss), slope) > 0.99, name


@pytest.fixture(
    params=[True, False], ids=["as the processor can", "without its bfloat16 instructions"]
)
def onednn(request):
    # torch.testing's own modules, once imported, forbid to set it otherwise.
    with torch.backends.mkldnn.flags(enabled=request.param):
        yield


@pytest.mark.usefixtures("onednn")
def test_sliced_in_bfloat16_is_as_near_as_double_backprop():
    x, v = images(64).bfloat16(), images(64).sign().bfloat16()

    def by_double_backprop(net, x, v):
        x = x.clone().requires_grad_()
        s = net(x)
        (vj,) = torch.autograd.grad(s, x, v, create_graph=True)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (vj.to(dtype) * v).flatten(1).sum(1) + 0.5 * s.to(dtype).square().flatten(1).sum(1)

    net = network().bfloat16().double()   # the same weights in every precision
    right = by_double_backprop(net, x.double(), v.double())
    slope, right = gradient(net, right), right.detach()
    net = net.bfloat16()
    for measure, truth in (
        (lambda loss: loss.detach().double(), right),
        (lambda loss: gradient(net, loss), slope),
    ):
        ours, theirs = (
            float((measure(loss) - truth).norm())
            for loss in (losses.sliced(net, x, v=v), by_double_backprop(net, x, v))
        )
        assert ours <= 2 * theirs


def test_compiled_training_step_equals_the_eager_one():
    """The graph breaks at the network of a derivative; what is around it is compiled."""
    net, x = network(), images()
    eager = {name: (loss.detach(), gradient(net, loss)) for name, loss in every_loss(net, x)}
    steps = {
        "sliced True": lambda x: losses.sliced(net, x, projections=2, seed=3).mean(),
        "finite-difference False": lambda x: losses.finite_difference_sliced(
            net, x, variance_reduced=False, radius=1.0, seed=3
        ).mean(),
        "exact": lambda x: losses.exact(net, x).mean(),
        "one sigma": lambda x: losses.denoising(lambda x, sigma: net(x), x, 0.5, seed=3).mean(),
        "ladder denoising": lambda x: losses.noise_conditional(
            lambda x, sigma: net(x), x, SIGMAS, seed=3
        ).mean(),
        "ladder sliced-vr": lambda x: losses.noise_conditional(
            lambda x, sigma: net(x), x, SIGMAS, method="sliced-vr", seed=3
        ).mean(),
    }
    for name, step in steps.items():
        torch.compiler.reset()
        loss = torch.compile(step, backend="aot_eager")(x)
        expected, slope = eager[name]
        torch.testing.assert_close(loss.detach(), expected.mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            gradient(net, loss), slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max())
        )


def _rank(rank, port, queue):
    faulthandler.dump_traceback_later(120, exit=True)   # no child hangs the suite
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    net = DistributedDataParallel(network().double())
    part = images().double()[8 * rank :][:8]
    found = {}
    for name in ("sliced", "denoising"):
        for _ in range(2):   # a second step fails where the first left a gradient out
            net.zero_grad()
            _ddp_loss(name, net, part, 8 * rank).mean().backward()
        found[name] = torch.cat([p.grad.flatten() for p in net.parameters()]).tolist()
    if rank == 0:
        queue.put(found)

    # Before the group: the last to hold it joins gloo's thread, which may want the interpreter that
    # it keeps.
    del net
    gc.collect()
    torch.distributed.destroy_process_group()


def _ddp_loss(name, net, x, first_sample):
    if name == "sliced":
        return losses.sliced(net, x, projections=2, seed=3, first_sample=first_sample)
    return losses.noise_conditional(
        lambda x, sigma: net(x), x, SIGMAS, seed=3, first_sample=first_sample
    )


@pytest.mark.processes
def test_two_processes_have_the_gradient_of_one():
    """Noise and levels of a sample follow its number in the whole batch, first_sample = rank ·
    b."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, queue), nprocs=2)
    found, net, x = queue.get(), network().double(), images().double()
    for name, values in found.items():
        expected = gradient(net, _ddp_loss(name, net, x, 0))
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), expected, rtol=1e-10, atol=1e-12
        )


@pytest.mark.processes
def test_a_static_graph_is_refused(tmp_path):
    """Its gradients stay on their own rank, those of stock double backprop, too."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    net, x = DistributedDataParallel(network(), static_graph=True), images()
    message = (
        r"DistributedDataParallel\(static_graph=True\) leaves the gradients .* "
        "build it without static_graph"
    )
    try:
        for loss in (losses.sliced, losses.exact, losses.finite_difference_sliced):
            with pytest.raises(ValueError, match=message):
                loss(net, x)
        with pytest.raises(ValueError, match=message):
            losses.noise_conditional(lambda x, sigma: net(x), x, SIGMAS, method="sliced", seed=3)
        # Of which PyTorch differentiates the network once.
        losses.denoising(lambda x, sigma: net(x), x, 0.5, seed=3)
    finally:
        net = None   # before its group
        gc.collect()
        torch.distributed.destroy_process_group()


def test_a_split_batch_draws_the_levels_of_the_whole():
    x = images(12)
    whole = losses.noise_conditional(lambda x, sigma: -x, x, SIGMAS, seed=3)
    parts = [
        losses.noise_conditional(lambda x, sigma: -x, x[k : k + 4], SIGMAS, seed=3, first_sample=k)
        for k in (0, 4, 8)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (3,)], ids=str)
def test_no_samples_and_samples_of_no_dimension(shape):
    """tr ∂s/∂x + ½ ‖s‖² of s = -x is -d + ½ ‖x‖², for every draw of signs."""
    x = torch.randn(shape)
    d = x[:1].numel() if len(x) else 0
    expected = 0.5 * x.square().reshape(len(x), d).sum(1) - d
    for loss in (
        losses.exact(torch.neg, x),
        losses.sliced(torch.neg, x, seed=1),
        losses.finite_difference_sliced(torch.neg, x, seed=1),
    ):
        torch.testing.assert_close(loss, expected)
    assert losses.sliced(torch.neg, x, distribution="sphere", projections=2, seed=1).shape == (
        len(x),
    )
