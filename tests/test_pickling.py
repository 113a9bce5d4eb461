"""Everything public can be pickled, deep-copied and saved by torch.save, and does afterwards
what it did."""

import copy
import io
import pickle

import pytest
import torch

import fastscore
from fastscore import (
    conversions,
    guidance,
    interop,
    losses,
    models,
    nn,
    sampling,
    schedules,
    training,
)

SIGMAS = schedules.geometric(1.0, 0.1, 3)
X = torch.linspace(0.05, 0.95, 32).reshape(2, 1, 4, 4)
S = torch.tensor([1.0, 0.1])
MASK = X[0] > 0.25


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda t: pickle.loads(pickle.dumps(t)), "deepcopy": copy.deepcopy, "save": saved}


def network(**options):
    torch.manual_seed(0)
    net = models.ScoreMLP(16, width=8, depth=1, sigmas=SIGMAS, **options)
    torch.nn.init.normal_(net.last.weight)
    return net


def classify():
    torch.manual_seed(0)
    return guidance.class_likelihood(
        models.NoiseClassifier(16, 3, width=8, depth=1, sigmas=SIGMAS), 1
    )


def scheduler():
    one = interop.AnnealedLangevinScheduler(SIGMAS, seed=3)
    one.set_timesteps(4)
    return one


def levels(layer):
    return lambda t: t(X.expand(2, 4, 4, 4), torch.tensor([0, 2]))


def channels(t):
    return t(X.expand(2, 4, 4, 4))


def at_noise(t):
    return t(X, S)


def guided(t):
    return t(X.clone(), S)


def at_level(t):
    return t(X, 0.5, 3)


def trained():
    def loss(net, x, step):
        return losses.noise_conditional(net, x, SIGMAS, seed=0, step=step)

    return list(training.training_loop(network(), [X], loss, steps=3))[-1]


HALF = guidance.Downsample(2)
BLUR = guidance.Blur(guidance.gaussian_kernel(0.5, 1))
CASES = {  # name: (make, what it does)
    **{
        f"ScoreMLP {a}": (lambda a=a: network(activation=a), at_noise)
        for a in ("silu", "elu", "gelu", "relu", "softplus", "tanh")
    },
    "EnergyScore": (
        lambda: models.EnergyScore(models.EnergyMLP(16, width=8, depth=1, sigmas=SIGMAS)),
        at_noise,
    ),
    "NoiseClassifier": (
        lambda: models.NoiseClassifier(16, 3, width=8, depth=1, sigmas=SIGMAS),
        at_noise,
    ),
    "NCSN": (lambda: models.NCSN(1, 4, SIGMAS), at_noise),
    **{
        c.__name__: (lambda c=c: c(1, 4, SIGMAS), lambda t: t(X.repeat(1, 1, 2, 2), S))
        for c in (models.NCSNv2, models.NCSNv2Deeper, models.NCSNv2Deepest)
    },
    "NCSNpp": (
        lambda: models.NCSNpp(1, 4, sigmas=SIGMAS, ch_mult=(1, 2), num_res_blocks=1),
        at_noise,
    ),
    "NCSNpp of VP": (
        lambda: models.NCSNpp(
            1, 4, sigmas=SIGMAS, ch_mult=(1,), attention=(), sde="vp", continuous=False
        ),
        at_noise,
    ),
    "Gaussian": (lambda: models.Gaussian([0.0] * 16, 1.0), at_noise),
    "GaussianMixture": (
        lambda: models.GaussianMixture([1, 1], [[0.0], [1.0]], 1.0),
        lambda t: t.sample(3, seed=0),
    ),
    **{
        c.__name__: (lambda c=c: c(4, 3, activation="elu"), levels(c))
        for c in (nn.ConditionalInstanceNorm2d, nn.ConditionalInstanceNorm2dPlus)
    },
    **{
        c.__name__: (lambda c=c: c(4, 3), levels(c))
        for c in (
            nn.ablations.ConditionalBatchNorm2d,
            nn.ablations.ConditionalVarianceNorm2d,
            nn.ablations.ConditionalNoneNorm2d,
        )
    },
    **{
        c.__name__: (lambda c=c: c(4), channels)
        for c in (
            nn.InstanceNorm2d,
            nn.InstanceNorm2dPlus,
            nn.ablations.VarianceNorm2d,
            nn.ablations.NoneNorm2d,
        )
    },
    "GroupNormAct": (lambda: nn.GroupNormAct(2, 4, activation="silu"), channels),
    **{
        f"AdaGroupNorm {a}": (
            lambda a=a: nn.AdaGroupNorm(3, 4, 2, act_fn=a),
            lambda t: t(X.expand(2, 4, 4, 4), torch.ones(2, 3)),
        )
        for a in (None, "silu", "mish")
    },
    "Converted": (lambda: conversions.Converted(network(), kind="v"), at_noise),
    "Rescaled": (lambda: conversions.Rescaled(network(), 2.0, -1.0), at_noise),
    "edm": (lambda: interop.edm(lambda_free), at_noise),
    "k_diffusion": (lambda: interop.k_diffusion(network()), at_noise),
    "VpUNet": (
        lambda: interop.VpUNet(network(), torch.linspace(0.999, 0.01, 10)),
        lambda t: t(X, S.fill_(0.5)),
    ),
    "scheduler": (scheduler, lambda t: t.step(X, t.timesteps[0], X)[0]),
    "Mask": (lambda: guidance.Mask(MASK), lambda t: t(X)),
    "Downsample": (lambda: guidance.Downsample(2), lambda t: t(X)),
    "Grey": (lambda: guidance.Grey("luma"), lambda t: t(X.expand(2, 3, 4, 4))),
    "Blur": (lambda: BLUR, lambda t: t(X)),
    "Matrix": (lambda: guidance.Matrix(X.reshape(2, 16), (1, 4, 4)), lambda t: t(X)),
    "Composition": (lambda: guidance.Downsample(2) @ BLUR, lambda t: t.adjoint(t(X))),
    "from_function": (
        lambda: guidance.from_function(torch.nn.Flatten(), (1, 4, 4)),
        lambda t: t.adjoint(t(X)),
    ),
    **{
        f"linear_inverse {m}": (
            lambda m=m: guidance.linear_inverse(network(), HALF, X[0, :, :2, :2], 0.1, method=m),
            guided,
        )
        for m in ("flat", "denoiser", "moments")
    },
    "classifier": (classify, guided),
    "posterior": (lambda: guidance.posterior(network(), classify(), 2.0), guided),
    "posterior of scores": (
        lambda: guidance.posterior(network(), likelihood_score=network()),
        guided,
    ),
    "inpainting": (lambda: guidance.inpainting(X[1], MASK, noise=0.1), at_level),
    "data_consistency": (
        lambda: guidance.data_consistency(guidance.Downsample(2), X[0, :, :2, :2]),
        lambda t: t(X, 0.0, 3),
    ),
    "chain": (
        lambda: guidance.chain(guidance.inpainting(X[1], MASK), guidance.inpainting(X[0], ~MASK)),
        at_level,
    ),
    "power_averaged": (lambda: training.power_averaged(network(), 0.1), at_noise),
    "averaged": (lambda: training.averaged(network(), 0.9), at_noise),
    "state.ema": (lambda: trained().ema, at_noise),
    "Step": (trained, lambda t: (t.step, t.losses, t.ema(X, S))),
    "State": (
        lambda: next(
            sampling.langevin(torch.neg, X, steps=1, step_size=0.1, seed=0, diagnostics=True)
        ),
        lambda t: (t.x, t.diagnostics),
    ),
    "PRESETS": (lambda: sampling.PRESETS, lambda t: sorted(t)),
    "recipe": (lambda: schedules.recipe(X.flatten(1), 30), str),
    "distance_bounds": (lambda: schedules.distance_bounds(X), str),
    "variance_report": (lambda: losses.variance_report(torch.sin, X, draws=2, seed=0), str),
}


class Zero(torch.nn.Module):
    def forward(self, x, sigma, class_labels=None):
        return 0 * x


lambda_free = Zero()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))
    return a == b


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_copy_does_what_the_original_does(name, way):
    make, use = CASES[name]
    thing = make()
    twin = WAYS[way](thing)
    assert twin is not thing or name == "PRESETS"
    assert same(use(twin), use(thing))


@pytest.mark.parametrize(
    "module",
    [
        fastscore, conversions, guidance, interop, losses, models, nn, nn.ablations, sampling,
        schedules, training,
    ],
)
def test_every_public_name_is_picklable(module):
    for name in getattr(module, "__all__", None) or [
        n for n in vars(module) if not n.startswith("_")
    ]:
        thing = getattr(module, name)
        if type(thing).__name__ != "module":
            pickle.loads(pickle.dumps(thing))


def test_a_copied_guided_score_has_a_network_of_its_own():
    net = network()
    twin = copy.deepcopy(guidance.posterior(net, likelihood_score=net))
    before = twin(X, S)
    with torch.no_grad():
        net.last.weight.zero_()
    assert torch.equal(twin(X, S), before)
