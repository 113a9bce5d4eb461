"""Another default device, and networks that are made on the meta device and filled later."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastscore
from fastscore import (
    guidance,
    interop,
    likelihood,
    losses,
    models,
    random,
    sampling,
    schedules,
    training,
)
from fastscore.losses.noise_conditional import METHODS
from fastscore.losses.projections import DISTRIBUTIONS
from fastscore.schedules.ladders import check_ladder

SIGMAS = schedules.geometric(1.0, 0.1, 4)
LIST = SIGMAS.tolist()
IMAGES, X, ONES = (
    torch.linspace(0, 1, 256).view(4, 1, 8, 8),
    torch.linspace(-1, 1, 8).view(4, 2),
    torch.ones(4),
)
GAUSSIAN = models.Gaussian([0.0, 0.0], 1.0)
TABLE = torch.linspace(0.999, 0.01, 10).tolist()
RANGE = {"sigma_min": 0.1, "sigma_max": 1.0, "steps": 3}


def network(**options):
    torch.manual_seed(0)
    net = models.ScoreMLP(64, width=8, depth=1, sigmas=SIGMAS, **options)
    nn.init.normal_(net.last.weight)
    return net


NET, NCSN = network(), models.NCSN(1, 4, SIGMAS, 8)


def sampled(sampler, **options):
    score = (lambda x: -x.square().sum(1)) if sampler == "mala" else GAUSSIAN
    return lambda: fastscore.sample(score, sampler=sampler, x=X, seed=0, **options)


def inverse(method, operator):
    def run():
        a = operator()
        return guidance.linear_inverse(NET, a, a.forward(IMAGES)[0], 0.1, method=method)(
            IMAGES, ONES
        )

    return run


def trained():
    def loss(net, x, step):
        return losses.noise_conditional(net, x, LIST, seed=0, step=step)

    with torch.device("cpu"):
        net = network()
    # Adam makes its counters on the default device by itself.
    *_, last = training.training_loop(
        net, [IMAGES], loss, steps=3, optimizer=torch.optim.SGD(net.parameters(), lr=1e-3)
    )
    return last.losses, list(last.ema.parameters())


def scheduled():
    pytest.importorskip("diffusers")
    one = interop.AnnealedLangevinScheduler(LIST, seed=0)
    one.set_timesteps()
    return one.step(X, one.timesteps[0], X)[0]


OPERATORS = {
    "downsample": lambda: guidance.Downsample(2),
    "blur": lambda: guidance.Blur(guidance.gaussian_kernel(0.5)),
    "grey": guidance.Grey,
    "mask": lambda: guidance.Mask((IMAGES[0] > 0.2).tolist()),
    "matrix": lambda: guidance.Matrix(torch.eye(64, device="cpu")[:3].tolist(), (1, 8, 8)),
}
CALLS = {
    "ladders": lambda: [
        schedules.geometric(1, 0.1, 3),
        schedules.karras(1, 0.1, 3),
        schedules.linear(1, 0.1, 3),
        schedules.vp(3),
    ],
    "check_ladder": lambda: check_ladder("op", LIST),
    "techniques": lambda: [
        schedules.variance_ratios(LIST, 3, 0.001),
        schedules.technique4_step_size(LIST, 3),
    ],
    "recipe": lambda: schedules.recipe(X.repeat(5, 1), 30).sigmas,
    "distances": lambda: [schedules.distance_bounds(X, seed=0), schedules.max_pairwise_distance(X)],
    "timesteps_of": lambda: schedules.timesteps_of(0.5, TABLE),
    "Gaussian": lambda: list(models.Gaussian([0.0, 0.0], 1.0).buffers()),
    "Gaussian of tensors": lambda: list(models.Gaussian(X[0], 1.0).buffers()),
    "GaussianMixture": lambda: list(models.GaussianMixture([1, 1], X[:2], [1.0, 2.0]).buffers()),
    "Gaussian's values": lambda: [
        GAUSSIAN(X, 0.5),
        GAUSSIAN.log_prob(X, 0.5),
        GAUSSIAN.sample(3, seed=0),
    ],
    "networks": lambda: [NET(IMAGES, 0.5), NCSN(IMAGES, 1.0)],
    **{
        f"noise_conditional {m}": (
            lambda m=m: losses.noise_conditional(NET, IMAGES, LIST, method=m, seed=0)
        )
        for m in METHODS
    },
    "noise_conditional of a tensor": lambda: losses.noise_conditional(NET, IMAGES, SIGMAS, seed=0),
    "denoising": lambda: losses.denoising(NET, IMAGES, 0.5, seed=0),
    "sliced": lambda: [losses.sliced(torch.sin, X, distribution=d, seed=0) for d in DISTRIBUTIONS],
    "exact": lambda: losses.exact(torch.sin, X),
    "finite_difference_sliced": lambda: losses.finite_difference_sliced(torch.sin, X, seed=0),
    "annealed_langevin": sampled(
        "annealed_langevin", sigmas=LIST, steps_per_level=1, step_size=0.01
    ),
    "consistent_annealed": sampled("consistent_annealed", sigmas=schedules.geometric(1.0, 0.1, 30)),
    "predictor_corrector": sampled("predictor_corrector", sigmas=SIGMAS),
    "probability_flow": sampled("probability_flow", sigmas=SIGMAS),
    "langevin": sampled("langevin", steps=2, step_size=0.1),
    "mala": sampled("mala", steps=2, step_size=0.1),
    "sample of a shape": lambda: fastscore.sample(
        NET, shape=(2, 1, 8, 8), sigmas=LIST, steps_per_level=1, step_size=0.01, seed=0
    ),
    "log_density": lambda: likelihood.log_density(GAUSSIAN, X, **RANGE),
    "log_density by signs": lambda: likelihood.log_density(
        GAUSSIAN, X, trace="rademacher", seed=0, prior=GAUSSIAN, **RANGE
    ),
    "log_ratio": lambda: likelihood.log_ratio(GAUSSIAN, X, 2 * X, sigma=0.5),
    "class_likelihood": lambda: guidance.class_likelihood(lambda x, s: x.flatten(1), 1)(
        IMAGES, ONES
    ),
    **{
        f"{m} {name}": inverse(m, operator)
        for m in ("flat", "denoiser", "moments")
        for name, operator in OPERATORS.items()
    },
    "inpainting": lambda: guidance.inpainting(
        IMAGES[0], (IMAGES[0] > 0.1).tolist(), seed=0, noise=0.1
    )(IMAGES, 0.5, 1),
    "VpUNet": lambda: interop.VpUNet(lambda x, t: x, TABLE)(IMAGES, 0.5),
    "scheduler": scheduled,
    "training_loop": trained,
    "load_official": lambda: list(models.load_official(OFFICIAL).parameters()),
    "random": lambda: random.normal((3,), seed=0, stream=5, device="cpu"),
}
OFFICIAL = models.NCSNv2(1, 4).state_dict()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:load_official")
def test_another_default_device_changes_nothing(name):
    """meta stands for any device that is not the one of the tensors.

    What is made without a word about it has no values there.
    """
    wanted = tree_leaves(CALLS[name]())
    with torch.device("meta"):
        found = tree_leaves(CALLS[name]())
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


NETWORKS = {
    "ScoreMLP": (lambda s: models.ScoreMLP(64, width=8, depth=1, sigmas=s), IMAGES),
    "EnergyMLP": (lambda s: models.EnergyMLP(64, width=8, depth=1, sigmas=s), IMAGES),
    "EnergyScore": (
        lambda s: models.EnergyScore(models.EnergyMLP(64, width=8, depth=1, sigmas=s)),
        IMAGES,
    ),
    "NoiseClassifier": (
        lambda s: models.NoiseClassifier(64, 3, width=8, depth=1, sigmas=s),
        IMAGES,
    ),
    "NCSN": (lambda s: models.NCSN(1, 4, s), IMAGES),
    "NCSNv2": (lambda s: models.NCSNv2(1, 4, s), IMAGES),
    "NCSNv2 of CAS": (lambda s: models.NCSNv2(1, 4, s, scale_by_sigma=False), IMAGES),
    "NCSNv2Deeper": (lambda s: models.NCSNv2Deeper(1, 4, s), IMAGES),
    "NCSNv2Deepest": (lambda s: models.NCSNv2Deepest(1, 4, s), IMAGES),
    "NCSNpp": (
        lambda s: models.NCSNpp(1, 4, sigmas=s, ch_mult=(1, 2), num_res_blocks=1),
        IMAGES,
    ),
    "NCSNpp of levels": (
        lambda s: models.NCSNpp(1, 4, sigmas=s, ch_mult=(1, 2), continuous=False),
        IMAGES,
    ),
    "NCSNpp of VP": (
        lambda s: models.NCSNpp(1, 4, sigmas=s, ch_mult=(1, 2), sde="vp", continuous=False),
        IMAGES,
    ),
    "average": (lambda s: training.averaged(models.NCSN(1, 4, s), 0.9), IMAGES),
    "part of another": (lambda s: nn.ModuleDict({"net": models.NCSN(1, 4, s)}), None),
    "Gaussian": (lambda s: models.Gaussian([0.0, 1.0], [[2.0, 0.5], [0.5, 1.0]]), X),
    "GaussianMixture": (
        lambda s: models.GaussianMixture([1, 3], [[0.0, 1.0], [2.0, 0.0]], [1.0, 2.0]),
        X,
    ),
}
LADDERS = {
    "list": lambda: LIST,
    "tensor": lambda: SIGMAS,
    "geometric": lambda: schedules.geometric(1.0, 0.1, 4),
}


def filled(net, like):
    """As a checkpoint is loaded into a network of the meta device."""
    net.to_empty(device="cpu")
    for t in net.parameters():
        t.data.fill_(float("nan"))   # what is not loaded shows
    net.load_state_dict(like.state_dict())
    return net


def same_network(net, like, x):
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), like.buffers(), strict=True))
    if x is not None:
        each = torch.tensor(LIST)
        with torch.random.fork_rng():
            assert torch.equal(net(x, each), like(x, each))


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_made_on_the_meta_device_and_filled_is_the_network(name, ladder):
    make, x = NETWORKS[name]
    like = make(SIGMAS)
    with torch.device("meta"):
        net = make(LADDERS[ladder]())
    assert all(p.is_meta for p in net.parameters())
    same_network(filled(net, like), like, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_went_to_the_meta_device_and_back_is_the_network(name):
    make, x = NETWORKS[name]
    like = make(SIGMAS)
    same_network(filled(copy.deepcopy(like).to("meta"), like), like, x)
    same_network(filled(copy.deepcopy(like), like), like, x)   # to_empty from where it is


@pytest.mark.parametrize("name", [n for n in NETWORKS if "part" not in n])
def test_a_checkpoint_can_be_assigned(name):
    make, x = NETWORKS[name]
    like = make(SIGMAS)
    with torch.device("meta"):
        net = make(SIGMAS)
    net.load_state_dict(like.state_dict(), assign=True)
    same_network(net, like, x)


def test_a_ladder_that_was_loaded_is_kept():
    other = models.NCSNv2(1, 4, schedules.geometric(7.0, 0.5, 4))
    net = models.NCSNv2(1, 4, SIGMAS)
    net.load_state_dict(other.state_dict())
    net.to("meta").to_empty(device="cpu")
    assert torch.equal(net.sigmas, other.sigmas)


def test_a_ladder_that_nobody_knows_is_refused():
    """As where another package has put the buffer on the meta device itself."""
    net = models.NCSN(1, 4, SIGMAS, 8)
    net._buffers["sigmas"] = net.sigmas.to("meta")
    net.to_empty(device="cpu").load_state_dict(NCSN.state_dict())
    assert bool(net.sigmas.isnan().all())
    with pytest.raises(ValueError, match="sigma must be one of the 4 levels from nan to nan"):
        net(IMAGES, 1.0)
    with pytest.raises(ValueError, match="sigmas must be positive, finite"):
        sampling.annealed_langevin(
            net, IMAGES, sigmas=net.sigmas, steps_per_level=1, step_size=0.01
        )


def test_shapes_can_be_computed_on_the_meta_device():
    with torch.device("meta"):
        nets = [
            models.NCSN(1, 4, SIGMAS),
            models.NCSNv2(1, 4, SIGMAS),
            models.ScoreMLP(64, width=8, depth=1, sigmas=SIGMAS),
        ]
        for net in nets:
            assert net(torch.empty(4, 1, 8, 8), torch.empty(4)).shape == (4, 1, 8, 8)


def test_samples_are_drawn_where_the_network_is():
    with torch.device("meta"):
        x = fastscore.sample(
            NET, shape=(2, 1, 8, 8), sigmas=SIGMAS, steps_per_level=1, step_size=0.01, seed=0
        )
        assert x.device.type == "cpu"
        empty = models.NCSN(1, 4, SIGMAS)
    with pytest.raises(
        ValueError, match="the network must have weights; some of it is on the meta device"
    ):
        fastscore.sample(
            empty, shape=(2, 1, 8, 8), sigmas=SIGMAS, steps_per_level=1, step_size=0.01, seed=0
        )


def test_values_that_are_on_the_meta_device_are_refused():
    nothing = torch.empty(4, device="meta")
    for call in (
        lambda: check_ladder("op", nothing),
        lambda: models.NCSN(1, 4, nothing),
        lambda: models.ScoreMLP(4, sigmas=nothing),
        lambda: models.Gaussian(nothing, 1.0),
        lambda: losses.noise_conditional(NET, IMAGES, nothing, seed=0),
        lambda: fastscore.sample(GAUSSIAN, x=X, sigmas=nothing, steps_per_level=1, step_size=0.01),
        lambda: guidance.Mask(nothing),
    ):
        with pytest.raises(ValueError, match="must have values; it is on the meta device"):
            call()
