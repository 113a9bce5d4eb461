"""Samplers and densities ask networks in evaluation mode, and leave them in the mode that they
were in."""

import functools
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import fastscore
from fastscore import (
    conversions,
    guidance,
    likelihood,
    losses,
    models,
    sampling,
    schedules,
    training,
)

SIGMAS = schedules.geometric(1.0, 0.1, 3)
X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Noisy(nn.Module):
    """A score whose value tells its mode: dropout, and a batch norm."""

    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last, self.drop = nn.BatchNorm1d(3), nn.Linear(3, outputs), nn.Dropout(0.5)
        self.modes = set()

    def forward(self, x, sigma=None):
        self.modes.add(self.norm.training)
        return self.drop(self.last(self.norm(x)))


class Energy(Noisy):
    def __init__(self):
        super().__init__(1)

    def forward(self, x, sigma=None):
        return super().forward(x)[:, 0] - x.square().sum(1)


def trained(net):
    """In training mode, but for one frozen part."""
    net.train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.eval()
    return net


def modes(net):
    return [m.training for m in net.modules()]


RUNS = {
    "annealed_langevin": {"sigmas": SIGMAS, "steps_per_level": 2, "step_size": 0.01},
    "consistent_annealed": {"sigmas": schedules.geometric(1.0, 0.1, 30)},
    "predictor_corrector": {"sigmas": SIGMAS},
    "probability_flow": {"sigmas": SIGMAS},
    "langevin": {"steps": 3, "step_size": 0.01},
    "mala": {"steps": 3, "step_size": 0.01},
}


def model_of(sampler):
    return Energy() if sampler == "mala" else Noisy()


@pytest.mark.parametrize("sampler", RUNS)
def test_a_network_in_training_mode_is_sampled_as_in_evaluation_mode(sampler):
    """With the same seed.

    Without dropout, a sample alone as in its batch, running statistics untouched.
    """
    net, key = model_of(sampler), {"sampler": sampler, "x": X, "seed": 1, **RUNS[sampler]}
    wanted = fastscore.sample(net.eval(), **key)
    net.train()
    before = net.norm.running_mean.clone(), modes(net)
    assert torch.equal(fastscore.sample(net, **key), wanted)
    assert torch.equal(fastscore.sample(net, **{**key, "x": X[2:], "first_sample": 2}), wanted[2:])
    assert torch.equal(net.norm.running_mean, before[0]) and modes(net) == before[1]


@pytest.mark.parametrize("sampler", RUNS)
def test_modes_are_back_between_states_after_an_exception_and_when_a_sampler_is_dropped(sampler):
    net = trained(model_of(sampler))
    before = modes(net)

    run = getattr(sampling, sampler)(net, X, seed=0, **RUNS[sampler])
    next(run)
    assert modes(net) == before   # a training step between two states trains in training mode
    del run
    gc.collect()
    assert modes(net) == before

    def broken(x, *sigma):
        net(x)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        next(getattr(sampling, sampler)(broken, X, seed=0, **RUNS[sampler]))
    assert modes(net) == before and net.modes == {False}


GLOBAL = Noisy()
NETS = {"one": [Noisy()]}


class Owner:
    def __init__(self, net):
        self.inner = {"net": net}

    def score(self, x, sigma):
        return self.inner["net"](x)

    def __call__(self, x, sigma):
        return self.inner["net"](x)


def with_default(net):
    return lambda x, sigma, net=net: net(x)


def with_keyword(net):
    def score(x, sigma, *, net=net):
        return net(x)

    return score


def inside(net):
    def outer(x, sigma):
        return (lambda: net(x))()

    return outer


def wrapped(net):
    @functools.wraps(net.forward)
    def score(x, sigma):
        return score.__wrapped__(x)

    score.__wrapped__ = net
    return score


class Ensemble(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.nets, self.other = [net], lambda x: net(x)

    def forward(self, x, sigma):
        return self.nets[0](x) + 0 * self.other(x)


HOLDERS = {
    "module": lambda net: net,
    "closure": lambda net: lambda x, sigma: net(x),
    "default": with_default,
    "keyword": with_keyword,
    "inner function": inside,
    "partial": lambda net: functools.partial(lambda net, x, sigma: net(x), net),
    "bound method": lambda net: Owner(net).score,
    "forward": lambda net: net.forward,
    "object": Owner,
    "attribute of a function": wrapped,
    "list in a module": Ensemble,
    "average": lambda net: training.averaged(net, 0.9).train(),
    "Converted": lambda net: conversions.Converted(lambda x, sigma: net(x), kind="noise"),
    "EnergyScore": lambda net: models.EnergyScore(lambda x, sigma: net(x).sum(1)),
    "posterior": lambda net: guidance.posterior(lambda x, sigma: -x, likelihood_score=net),
    "likelihood": lambda net: guidance.posterior(
        lambda x, sigma: -x, lambda x, sigma: net(x).sum(1)
    ),
    "linear_inverse": lambda net: guidance.linear_inverse(
        net, guidance.Matrix([[1.0, 0.0, 0.0]]), torch.ones(1), 0.1
    ),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled function": lambda net: torch.compile(lambda x, sigma: net(x), backend="eager"),
    "scripted": lambda net: torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))),
}


def by_sigma(holder):
    return (lambda x, sigma: holder(x)) if isinstance(holder, torch.jit.ScriptModule) else holder


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_network_is_found_wherever_a_score_holds_it(name):
    """Two calls of one seed agree, a sample does not depend on its batch, and modes are as they
    were."""
    net = Noisy().train()
    score = by_sigma(HOLDERS[name](net))
    key = {"sigmas": SIGMAS, "steps_per_level": 1, "step_size": 0.01, "seed": 1}
    found = fastscore.sample(score, x=X, **key)
    assert torch.equal(found, fastscore.sample(score, x=X, **key))
    assert torch.allclose(
        found[2:], fastscore.sample(score, x=X[2:], first_sample=2, **key), atol=1e-6
    )
    assert all(modes(net)) and True not in net.modes


def test_a_network_is_found_that_is_a_global():
    key = {"x": X, "sigmas": SIGMAS, "steps_per_level": 1, "step_size": 0.01, "seed": 1}
    for net, score in (
        (GLOBAL, lambda x, sigma: GLOBAL(x)),
        (NETS["one"][0], lambda x, sigma: NETS["one"][0](x)),
    ):
        net.train()
        fastscore.sample(score, **key)
        assert net.modes == {False} and all(modes(net))


def test_the_network_of_a_hook_is_in_evaluation_mode():
    net = Noisy().train()
    key = {"x": X, "sigmas": SIGMAS, "steps_per_level": 1, "step_size": 0.01, "seed": 1}
    fastscore.sample(lambda x, sigma: -x, project=lambda x, sigma, step: x + 0 * net(x), **key)
    assert net.modes == {False} and all(modes(net))


def test_a_score_that_sets_its_mode_has_its_way():
    """Dropout on purpose."""
    net = Noisy().train()

    def score(x, sigma):
        return net.train()(x)

    fastscore.sample(score, x=X, sigmas=SIGMAS, steps_per_level=1, step_size=0.01, seed=1)
    assert net.modes == {True} and all(modes(net))


DENSITIES = {
    "log_density": lambda net, x: likelihood.log_density(
        net, x, sigma_min=0.1, sigma_max=1.0, steps=3
    ),
    "log_density by signs": lambda net, x: likelihood.log_density(
        net, x, sigma_min=0.1, sigma_max=1.0, steps=3, trace="rademacher", seed=0
    ),
    "log_density of an energy": lambda net, x: likelihood.log_density(
        models.EnergyScore(lambda x, sigma: net(x).sum(1)), x, sigma_min=0.1, sigma_max=1.0, steps=3
    ),
    "prior": lambda net, x: likelihood.log_density(
        lambda x, sigma: -x, x, sigma_min=0.1, sigma_max=1.0, steps=3, prior=lambda x: net(x).sum(1)
    ),
    "log_ratio": lambda net, x: likelihood.log_ratio(net, x, 2 * x, nodes=4),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_is_that_of_the_network_in_evaluation_mode(name):
    net, density = Noisy(), DENSITIES[name]
    wanted = density(net.eval(), X)
    trained(net)
    before, statistics = modes(net), net.norm.running_mean.clone()
    found = density(net, X)
    assert torch.equal(found, wanted)
    assert (
        torch.equal(net.norm.running_mean, statistics)
        and modes(net) == before
        and net.modes == {False}
    )

    found.sum().backward()   # still a graph
    assert net.last.weight.grad is not None


def test_losses_keep_training_in_training_mode():
    net = Noisy().train()
    losses.sliced(lambda x: net(x), X, seed=0)
    losses.noise_conditional(net, X, SIGMAS, seed=0)
    assert net.modes == {True}


def test_a_checkpoint_inside_an_energy_is_in_evaluation_mode_in_the_backward_pass_of_mala():
    class Checkpointed(Energy):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    net = Checkpointed().train()
    fastscore.sample(net, sampler="mala", x=X, steps=2, step_size=0.01, seed=0)
    assert net.modes == {False}


def test_a_batch_norm_without_running_statistics_is_told():
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    key = {"x": X, "steps": 1, "step_size": 0.01, "seed": 0, "sampler": "langevin"}
    with pytest.warns(UserWarning, match="a sample depends on the others of its batch"):
        fastscore.sample(net, **key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastscore.sample(nn.Sequential(nn.BatchNorm1d(3)), **key)


@pytest.mark.parametrize("change", ["replaced", "added", "inside a part"])
def test_a_part_that_comes_between_two_states_is_in_evaluation_mode(change):
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.Identity())
    states = sampling.langevin(net, X, steps=2, step_size=0.1, seed=0)
    next(states)
    late = Noisy()
    if change == "replaced":
        net[2] = late
    elif change == "added":
        net.append(late)
    else:
        net[1][0].child = late
        net[1][0].register_forward_hook(lambda module, given, result: late(result))
    next(states)
    assert late.modes == {False} and late.training and net.training and net[1].training


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x, sigma):
        return -self.net(x)


class Weak(Slotted):
    __slots__ = ()

    def __init__(self, net):
        super().__init__(weakref.ref(net))

    def __call__(self, x, sigma):
        return -self.net()(x)


@pytest.mark.parametrize("kind", [Slotted, Weak])
def test_networks_in_slots_and_behind_weak_references_are_found(kind):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).train()
    options = {
        "x": torch.ones(2, 3),
        "sigmas": SIGMAS,
        "steps_per_level": 1,
        "step_size": 0.01,
        "seed": 0,
    }
    assert (
        torch.equal(fastscore.sample(kind(net), **options), fastscore.sample(kind(net), **options))
        and net.training
    )
