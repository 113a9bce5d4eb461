"""Networks under FSDP2's fully_shard, or of DTensors.

The gradients of one process, or one sentence.
"""

import faulthandler
import gc
import socket

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastscore
from fastscore import losses, models, sampling

pytestmark = pytest.mark.processes   # in a group of one, or of two
SIGMAS = [1.0, 0.1]


class Network(nn.Module):
    """Norms, a layer that is used twice, a skip.

    fully_shard takes each block and then the whole.
    """

    def __init__(self, outputs=3):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, outputs)
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.LayerNorm(8))

    def forward(self, x, sigma=None):
        h = self.first(x).tanh()
        h = h + self.twice(h)
        s = self.last(self.twice(h) + h)
        return s if sigma is None else s / sigma[:, None]


def network(outputs=3, **policy):
    torch.manual_seed(0)
    net = Network(outputs).double()
    if policy:
        for part in (net.first, net.twice, net.last, net):
            fully_shard(part, **policy)
    return net


def data():
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def energy(net):
    return models.EnergyScore(lambda x: net(x).square().sum(1))


LOSSES = {
    "sliced": lambda net, x, key: losses.sliced(net, x, projections=2, **key),
    "exact": lambda net, x, key: losses.exact(net, x),
    "exact-in-chunks": lambda net, x, key: losses.exact(net, x, chunk=1),
    "finite-differences": lambda net, x, key: losses.finite_difference_sliced(net, x, **key),
    "denoising": lambda net, x, key: losses.noise_conditional(net, x, SIGMAS, **key),
    "ladder-sliced": lambda net, x, key: losses.noise_conditional(
        net, x, SIGMAS, method="sliced", **key
    ),
    "plain-sliced-energy": lambda net, x, key: losses.sliced(
        energy(net), x, variance_reduced=False, **key
    ),
    "jvp": lambda net, x, key: fastscore.jvp(net, x, torch.ones_like(x))[1].square().sum(1),
}


def gradients(net, name, x, first=0):
    net.zero_grad()
    for _ in range(2):   # the second one meets what the first has left
        LOSSES[name](net, x, {"seed": 3, "first_sample": first}).mean().backward()
    return torch.cat(
        [
            (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).flatten() / 2
            for p in net.parameters()
        ]
    )


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("sharded") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    gc.collect()   # modules before their group
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reshard", [True, False], ids=["weights-freed-after-forward", "kept"])
def test_gradients_are_those_without_shards(mesh, name, reshard):
    expected = gradients(network(), name, data())
    torch.testing.assert_close(
        gradients(network(mesh=mesh, reshard_after_forward=reshard), name, data()),
        expected,
        rtol=1e-10,
        atol=1e-12,
    )


def _rank(rank, port, queue):
    faulthandler.dump_traceback_later(120, exit=True)  # no child hangs the suite
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    net, part = network(mesh=init_device_mesh("cpu", (2,))), data()[4 * rank :][:4]
    found = {name: gradients(net, name, part, 4 * rank).tolist() for name in LOSSES}
    if rank == 0:
        queue.put(found)

    del net
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow   # two interpreters that import torch
def test_two_processes_have_the_gradient_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, queue), nprocs=2)
    for name, values in queue.get().items():
        expected = gradients(network(), name, data())
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), expected, rtol=1e-10, atol=1e-12, msg=name
        )


def test_mixed_precision_goes_through(mesh):
    """Weights and activations in bfloat16, as without jvp: 8 bits, a few dozen roundings."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    net, x = network(mesh=mesh, mp_policy=policy), data().float()
    found, expected = (
        losses.sliced(net, x, seed=3).detach(),
        losses.sliced(network(), x.double(), seed=3).detach(),
    )
    assert found.dtype == torch.float32 and float((found - expected).norm()) < 0.05 * float(
        expected.norm()
    )
    assert gradients(net, "sliced", x).isfinite().all()


def test_samplers_and_energies_that_are_not_trained_work(mesh):
    net = network(mesh=mesh)
    x = fastscore.sample(net, x=data(), sigmas=SIGMAS, steps_per_level=2, step_size=1e-3, seed=0)
    assert torch.equal(
        x,
        fastscore.sample(
            network(), x=data(), sigmas=SIGMAS, steps_per_level=2, step_size=1e-3, seed=0
        ),
    )
    states = [
        list(sampling.mala(energy(n), data(), steps=3, step_size=0.01, seed=0))[-1].x
        for n in (net, network())
    ]
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda score, x: losses.sliced(score, x, seed=0),
        lambda score, x: losses.exact(score, x),
        lambda score, x: losses.denoising(lambda x, sigma: score(x), x, 0.5, seed=0),
        lambda score, x: losses.finite_difference_sliced(score, x, seed=0),
    ],
    ids=["sliced", "exact", "denoising", "finite-differences"],
)
def test_the_score_of_an_energy_is_not_trained(mesh, loss):
    """Its second backward pass would meet weights that are gone, and leave gradients on their
    rank."""
    with pytest.raises(
        NotImplementedError,
        match=r"of an energy's score needs two backward passes .* fully_shard frees its w",
    ):
        loss(energy(network(mesh=mesh)), data())


@pytest.mark.filterwarnings("ignore::fastscore.FallbackWarning")
def test_an_operation_without_a_rule_is_refused(mesh):
    net = network(mesh=mesh)
    with pytest.raises(
        NotImplementedError,
        match=r"f, for the operation that the FallbackWarning names, needs two backward p",
    ):
        losses.sliced(lambda x: net(x.as_strided(x.shape, x.stride())), data(), seed=0)


def parallel(mesh, outputs=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, outputs))
    return (
        net
        if mesh is None
        else parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    )


def test_tensor_parallelism_goes_where_one_backward_pass_is_enough(mesh):
    x, found = data().float(), []
    for net in (parallel(None), parallel(mesh)):
        losses.denoising(lambda x, sigma, net=net: net(x), x, 0.5, seed=0).mean().backward()
        losses.finite_difference_sliced(net, x, seed=0).mean().backward()
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in net.parameters()]
        states = list(
            sampling.mala(
                lambda x, net=net: -net(x).square().sum(1), x, steps=3, step_size=0.01, seed=0
            )
        )
        found.append((*grads, states[-1].x))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore::fastscore.FallbackWarning")
def test_second_derivatives_of_dtensors_are_refused(mesh):
    """PyTorch's own are wrong.

    The gradients of an energy's score were None, and its Hessian some other number.
    """
    x, net, one = data().float(), parallel(mesh), models.EnergyScore(parallel(mesh, 1))
    for loss in (losses.sliced, losses.exact, lambda f, x: fastscore.jvp(f, x, x)):
        with pytest.raises(
            NotImplementedError,
            match=r"jvp: DTensors, as of tensor parallelism, have no jvp; shard the n",
        ):
            loss(net, x)
    calls = [
        lambda: losses.denoising(lambda x, sigma: one(x), x, 0.5, seed=0),
        lambda: one.jvp(x, x[None]),
    ]
    calls += [
        lambda form=form: losses.sliced(one, x, variance_reduced=form, seed=0)
        for form in (True, False)
    ]
    calls.append(
        lambda: losses.sliced(
            lambda x: torch.autograd.grad(net(x).sum(), x, create_graph=True)[0], x, seed=0
        )
    )
    for call in calls:
        with pytest.raises(
            NotImplementedError,
            match=r"DTensors, as of tensor parallelism, (lose second derivat|have no jvp)",
        ):
            call()
