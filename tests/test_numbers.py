"""Every number that a public function takes.

Whatever stands in its place ends at once, in a value or in one sentence that names it.
"""

import contextlib
import copy
import inspect
import math
import signal
import warnings

import numpy as np
import pytest
import torch

import fastscore
from fastscore import (
    conversions,
    datasets,
    distributed,
    guidance,
    interop,
    likelihood,
    losses,
    models,
    nn,
    random,
    sampling,
    schedules,
    training,
)
from fastscore.guidance.linear import adjoint_gap
from fastscore.losses.noise_conditional import draw_labels
from fastscore.sampling.predictor_corrector import _Plan

X = torch.linspace(-1, 1, 12).reshape(2, 1, 2, 3)
ROWS = torch.linspace(0, 1, 12).reshape(4, 3)
SIGMAS = schedules.geometric(1.0, 0.1, 3)
FINE = schedules.geometric(1.0, 0.1, 30)
VALUES = {
    "10**400": 10**400, "-10**400": -(10**400), "10**30": 10**30, "-1e300": -1e300, "1e300": 1e300,
    "nan": math.nan, "inf": math.inf, "True": True, "str": "3", "float32": np.float32(0.5),
    "int64": np.int64(2), "0-d": torch.tensor(2.0), "0-d int": torch.tensor(2),
    "1-element": torch.tensor([2.0]), "None": None, "complex": 1j, "list": [2],
}
NO_NUMBER = ("True", "str", "nan", "complex", "list")   # whatever is asked for


def pull(x, *sigma):
    return -x


def log_prob(x):
    return -x.square().flatten(1).sum(1)


def run(sampler, **options):
    states = getattr(sampling, sampler)(
        log_prob if sampler == "mala" else pull, X, **{"seed": 0} | options
    )
    return [state.x for state in states]


def states_of_an_average():
    """At updates 1, 2 and 3."""
    average, states = training.power_averaged(torch.nn.Linear(1, 1), 0.1), []
    for _ in range(3):
        average.update_parameters(torch.nn.Linear(1, 1))
        states.append(copy.deepcopy(average.state_dict()))
    return states


def trained(**options):
    torch.manual_seed(0)
    loop = training.training_loop(
        torch.nn.Linear(3, 3), [ROWS] * 9, lambda net, x, step: net(x).square().sum(1), **options
    )
    return [state.losses for state in loop]


def planned(n=5, **options):
    scheduler = interop.AnnealedLangevinScheduler(**{"sigma_max": 1.0, "sigma_min": 0.1} | options)
    scheduler.set_timesteps(n)
    return scheduler.timesteps


def built(layer, *shape):
    return lambda **options: layer(**options)(torch.ones(shape))


KEY = {"seed": 3, "step": 1, "offset": 2}
DRAW = {**KEY, "stream": 5, "substream": 1}
SPLIT = {"seed": 3, "step": 1, "first_sample": 2}
CALLS = {  # name in messages: (call, its arguments)
    "words": (random.words, {"n": 5, **DRAW}),
    "uniform": (random.uniform, {"shape": (2, 3), **DRAW}),
    "normal": (random.normal, {"shape": (2, 3), **DRAW}),
    "rademacher": (random.rademacher, {"shape": (2, 3), **DRAW}),
    "langevin_step": (
        fastscore.langevin_step,
        {"x": X, "score": -X, "step_size": 0.1, "stream": 5, **KEY},
    ),
    "langevin_step, step_lr": (fastscore.langevin_step, {"x": X, "score": -X, "step_lr": 0.1}),
    "noisy_update": (
        fastscore.noisy_update,
        {"x": X, "direction": X, "drift": 0.5, "diffusion": 0.5, "stream": 5, **KEY},
    ),
    "perturb": (fastscore.perturb, {"x": X, "sigma": 0.5, **KEY}),
    "denoising_loss": (fastscore.denoising_loss, {"score": X, "sigma": 0.5, **KEY}),
    "instance_norm_plus": (
        fastscore.instance_norm_plus,
        {"x": X, "gamma": torch.ones(1), "eps": 1e-5},
    ),
    "conditional_instance_norm_plus": (
        lambda **o: fastscore.conditional_instance_norm_plus(
            X, torch.tensor([0, 1]), torch.ones(2, 3), **o
        ),
        {"eps": 1e-5},
    ),
    "group_norm_modulate": (
        lambda **o: fastscore.group_norm_modulate(X.expand(2, 4, 2, 3), **o),
        {"num_groups": 2, "eps": 1e-5},
    ),
    "rademacher_jvp": (fastscore.rademacher_jvp, {"f": torch.sin, "x": X, "projections": 2, **KEY}),
    "denoising": (losses.denoising, {"score": pull, "x": X, "sigma": 0.5, **SPLIT}),
    "sliced": (losses.sliced, {"score": torch.sin, "x": X, "projections": 2, **SPLIT}),
    "exact": (losses.exact, {"score": torch.sin, "x": X, "chunk": 2}),
    "finite_difference_sliced": (
        losses.finite_difference_sliced,
        {"score": torch.sin, "x": X, "projections": 2, "radius": 0.1, **SPLIT},
    ),
    "noise_conditional": (
        losses.noise_conditional,
        {
            "score": pull,
            "x": X,
            "sigmas": SIGMAS,
            "power": 2,
            "method": "sliced",
            "projections": 2,
            **SPLIT,
        },
    ),
    "draw_labels": (draw_labels, {"levels": 4, "n": 5, **SPLIT}),
    "variance_report": (
        losses.variance_report,
        {"score": torch.sin, "x": X, "draws": 4, "seed": 3},
    ),
    "langevin": (
        lambda **o: run("langevin", **o),
        {"steps": 3, "step_size": 0.1, "sigma": 0.5, "temperature": 1.0, "start": 1},
    ),
    "langevin, step_lr": (
        lambda **o: run("langevin", steps=2, **o),
        {"step_lr": 0.1, "first_sample": 2, "seed": 3},
    ),
    "mala": (
        lambda **o: run("mala", **o),
        {"steps": 3, "step_size": 0.1, "temperature": 1.0, "burn_in": 2},
    ),
    "mala, start": (
        lambda **o: run("mala", steps=2, **o),
        {"step_lr": 0.1, "first_sample": 2, "start": 1, "seed": 3},
    ),
    "annealed_langevin": (
        lambda **o: run("annealed_langevin", sigmas=SIGMAS, **o),
        {
            "steps_per_level": 2,
            "step_size": 0.01,
            "temperature": 1.0,
            "start": 1,
            "first_sample": 2,
            "seed": 3,
        },
    ),
    "annealed_langevin, step_lr": (
        lambda **o: run("annealed_langevin", sigmas=SIGMAS, steps_per_level=2, **o),
        {"step_lr": 0.01},
    ),
    "consistent_annealed": (
        lambda **o: run("consistent_annealed", sigmas=FINE, **o),
        {"step_size": 0.004, "temperature": 1.0, "start": 1, "first_sample": 2, "seed": 3},
    ),
    "consistent_annealed, step_lr": (
        lambda **o: run("consistent_annealed", sigmas=FINE, **o),
        {"step_lr": 0.002},
    ),
    "predictor_corrector": (
        lambda **o: run("predictor_corrector", sigmas=SIGMAS, **o),
        {
            "corrector_steps": 2,
            "snr": 0.1,
            "temperature": 1.0,
            "start": 1,
            "first_sample": 2,
            "seed": 3,
        },
    ),
    "predictor_corrector, norms": (
        lambda **o: run("predictor_corrector", sigmas=SIGMAS, corrector="langevin", **o),
        {"corrector_steps": 1, "snr": 0.1},
    ),
    "probability_flow": (
        lambda **o: run("probability_flow", sigmas=SIGMAS, method="adaptive", **o),
        {"rtol": 1e-2, "atol": 1e-2, "start": 1, "first_sample": 2, "seed": 3},
    ),
    "sample": (
        lambda **o: fastscore.sample(
            pull, shape=(2, 3), sigmas=SIGMAS, steps_per_level=1, step_size=0.01, **o
        ),
        {"seed": 3, "first_sample": 2},
    ),
    "sample, langevin": (
        lambda **o: fastscore.sample(
            pull, sampler="langevin", shape=(2, 3), steps=2, step_size=0.01, seed=3, **o
        ),
        {"sigma": 0.5},
    ),
    "initial": (
        sampling.initial,
        {"shape": (2, 3), "law": "gaussian", "sigma": 2.0, "seed": 3, "first_sample": 2},
    ),
    "start_law": (sampling.start_law, {"sigma": 2.0}),
    "start_like": (
        sampling.start_like,
        {"data": ROWS, "n": 3, "sigma": 1.0, "seed": 3, "first_sample": 2},
    ),
    "geometric": (schedules.geometric, {"sigma_max": 1.0, "sigma_min": 0.1, "n": 3}),
    "karras": (schedules.karras, {"sigma_max": 1.0, "sigma_min": 0.1, "n": 3, "rho": 7.0}),
    "linear": (schedules.linear, {"sigma_max": 1.0, "sigma_min": 0.1, "n": 3}),
    "vp": (schedules.vp, {"n": 3, "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-3}),
    "level_overlap": (schedules.level_overlap, {"dim": 60, "gamma": 1.05}),
    "number_of_levels": (
        schedules.number_of_levels,
        {"dim": 60, "sigma_max": 50.0, "sigma_min": 0.01, "overlap": 0.5},
    ),
    "technique4_step_size": (
        schedules.technique4_step_size,
        {"sigmas": SIGMAS, "steps_per_level": 3},
    ),
    "variance_ratio": (
        schedules.variance_ratio,
        {"gamma": 1.1, "steps_per_level": 5, "eta": 0.1, "start": 1.0},
    ),
    "variance_ratios": (
        schedules.variance_ratios,
        {"sigmas": SIGMAS, "steps_per_level": 5, "step_size": 1e-3},
    ),
    "step_size_from_lr": (schedules.step_size_from_lr, {"step_lr": 0.1}),
    "lr_from_step_size": (schedules.lr_from_step_size, {"step_size": 0.1}),
    "step_size_from_snr": (schedules.step_size_from_snr, {"snr": 0.1, "sigma": 0.5}),
    "snr_from_step_size": (schedules.snr_from_step_size, {"step_size": 0.1, "sigma": 0.5}),
    "sigmas_of": (schedules.sigmas_of, {"alphas_cumprod": 0.5}),
    "alphas_cumprod": (schedules.alphas_cumprod, {"sigmas": 0.5}),
    "timesteps_of": (
        lambda **o: schedules.timesteps_of(alphas_cumprod=torch.tensor([0.9, 0.1]), **o),
        {"sigma": 0.5},
    ),
    "recipe": (
        schedules.recipe,
        {
            "data": ROWS,
            "budget": 30,
            "sigma_max": 1.0,
            "sigma_min": 0.01,
            "overlap": 0.5,
            "seed": 3,
        },
    ),
    "recipe, largest distance": (schedules.recipe, {"data": ROWS, "budget": 30, "sigma_min": 0.01}),
    "distance_bounds": (
        schedules.distance_bounds,
        {"data": ROWS, "samples": 3, "seed": 3, "chunk": 2},
    ),
    "max_pairwise_distance": (schedules.max_pairwise_distance, {"data": ROWS, "chunk": 2}),
    "dequantize": (likelihood.dequantize, {"x": torch.tensor([[0.0, 1.0]]), "levels": 2, **SPLIT}),
    "bits_per_dim": (
        likelihood.bits_per_dim,
        {"log_density": torch.zeros(3), "dim": 6, "levels": 4, "width": 1.0},
    ),
    "log_density": (
        lambda **o: likelihood.log_density(pull, X, **o),
        {
            "sigma_min": 0.1,
            "sigma_max": 1.0,
            "trace": "rademacher",
            "projections": 2,
            "steps": 3,
            "seed": 3,
            "first_sample": 2,
        },
    ),
    "log_density, adaptive": (
        lambda **o: likelihood.log_density(pull, X, sigma_min=0.1, sigma_max=1.0, **o),
        {"chunk": 2, "atol": 1e-2, "rtol": 1e-2},
    ),
    "log_ratio": (
        lambda **o: likelihood.log_ratio(pull, X, 2 * X, **o),
        {"sigma": 0.5, "nodes": 4, "chunk": 3, "atol": 0.1},
    ),
    "Downsample": (guidance.Downsample, {"factor": 1}),
    "gaussian_kernel": (guidance.gaussian_kernel, {"sigma": 1.0, "radius": 2}),
    "adjoint_gap": (lambda **o: adjoint_gap(guidance.Downsample(1), (1, 2, 2), **o), {"seed": 3}),
    "inpainting": (
        lambda **o: guidance.inpainting(X[1], X[1] > 0.5, **o)(X, 0.5, 1),
        {"noise": 0.1, "seed": 3, "first_sample": 2},
    ),
    "linear_inverse": (
        lambda **o: guidance.linear_inverse(
            lambda x, s: -x, guidance.Mask(X[1] > 0.5), X[1], method="moments", **o
        )(X, torch.ones(2)),
        {"noise": 0.1, "iterations": 2, "scale": 1.0},
    ),
    "linear_inverse, flat": (
        lambda **o: guidance.linear_inverse(
            lambda x, s: -x, guidance.Mask(X[1] > 0.5), X[1], 0.1, **o
        )(X, torch.ones(2)),
        {"prior_variance": 0.25},
    ),
    "posterior": (
        lambda **o: guidance.posterior(pull, lambda x, s: log_prob(x), **o)(X, torch.ones(2)),
        {"scale": 0.5},
    ),
    "class_likelihood": (
        lambda **o: guidance.class_likelihood(lambda x, s: x.flatten(1), **o)(X, torch.ones(2)),
        {"labels": 1},
    ),
    "classifier_free": (
        lambda **o: guidance.classifier_free(lambda x, s, label=0: x - label, **o)(
            X, torch.ones(2)
        ),
        {"label": 1, "weight": 0.5},
    ),
    "NCSN": (models.NCSN, {"channels": 1, "ngf": 4, "image_size": 8}),
    "NCSNv2": (models.NCSNv2, {"channels": 1, "ngf": 4, "image_size": 8}),
    "NCSNv2Deeper": (models.NCSNv2Deeper, {"channels": 1, "ngf": 4, "image_size": 16}),
    "NCSNv2Deepest": (models.NCSNv2Deepest, {"channels": 1, "ngf": 4, "image_size": 16}),
    "NCSNpp": (
        lambda **o: models.NCSNpp(ch_mult=(1,), attention=(0,), sde="vp", continuous=False, **o),
        {
            "channels": 1, "nf": 4, "num_res_blocks": 1, "dropout": 0.1, "groups": 1,
            "num_scales": 30, "beta_min": 0.1, "beta_max": 9.0, "fourier_scale": 16.0,
            "image_size": 8,
        },
    ),
    "ScoreMLP": (models.ScoreMLP, {"dim": 3, "width": 4, "depth": 1, "context": 2}),
    "UNet": (
        lambda **o: models.UNet(multipliers=(1, 2), **o),
        {
            "dim": 2, "channels": 1, "width": 8, "blocks": 1, "patch": 2, "num_classes": 3,
            "context": 2, "data_mean": 0.5, "data_std": 0.5, "dropout": 0.1,
        },
    ),
    "UNet.forward": (
        lambda **o: models.UNet(width=4, multipliers=(1,), blocks=1, num_classes=3)(
            torch.zeros(2, 1, 3, 3), **o
        ),
        {"sigma": 0.5, "label": 1},
    ),
    "EnergyMLP": (models.EnergyMLP, {"dim": 3, "width": 4, "depth": 1}),
    "NoiseClassifier": (
        lambda **o: models.NoiseClassifier(sigmas=SIGMAS, **o),
        {"dim": 3, "num_classes": 2, "width": 4, "depth": 1},
    ),
    "Gaussian": (models.Gaussian, {"mean": [0.0], "covariance": 1.0}),
    "Gaussian.sample": (models.Gaussian([0.0], 1.0).sample, {"n": 3, "sigma": 0.5, **SPLIT}),
    "Gaussian.log_prob": (
        lambda **o: models.Gaussian([0.0], 1.0).log_prob(ROWS[:, :1], **o),
        {"sigma": 0.5},
    ),
    "Gaussian.score": (
        lambda **o: models.Gaussian([0.0], 1.0).score(ROWS[:, :1], **o),
        {"sigma": 0.5},
    ),
    "AdaGroupNorm": (
        nn.AdaGroupNorm,
        {"embedding_dim": 3, "out_dim": 4, "num_groups": 2, "eps": 1e-5},
    ),
    "GroupNormAct": (nn.GroupNormAct, {"num_groups": 2, "num_channels": 4, "eps": 1e-5}),
    "InstanceNorm2d": (nn.InstanceNorm2d, {"num_features": 4, "eps": 1e-5}),
    "ConditionalBatchNorm2d": (
        nn.ablations.ConditionalBatchNorm2d,
        {"num_features": 4, "num_classes": 2},
    ),
    "ConditionalInstanceNorm2d": (
        nn.ConditionalInstanceNorm2d,
        {"num_features": 4, "num_classes": 2},
    ),
    "ConditionalInstanceNorm2dPlus": (
        nn.ConditionalInstanceNorm2dPlus,
        {"num_features": 4, "num_classes": 2},
    ),
    "ConditionalNoneNorm2d": (
        nn.ablations.ConditionalNoneNorm2d,
        {"num_features": 4, "num_classes": 2},
    ),
    "ConditionalVarianceNorm2d": (
        nn.ablations.ConditionalVarianceNorm2d,
        {"num_features": 4, "num_classes": 2},
    ),
    "InstanceNorm2dPlus": (nn.InstanceNorm2dPlus, {"num_features": 4}),
    "VarianceNorm2d": (nn.ablations.VarianceNorm2d, {"num_features": 4}),
    "convert": (
        lambda **o: conversions.convert(X, X, kind="noise", to="v", **o),
        {"sigma": 0.5, "alpha": 0.8},
    ),
    "ve_to_vp": (lambda **o: conversions.ve_to_vp(X, **o), {"alphas_cumprod": 0.5}),
    "vp_to_ve": (lambda **o: conversions.vp_to_ve(X, **o), {"alphas_cumprod": 0.5}),
    "Rescaled": (
        lambda **o: conversions.Rescaled(pull, **o)(X, torch.ones(2)),
        {"scale": 2.0, "shift": 1.0},
    ),
    "training_loop": (
        trained,
        {"steps": 3, "lr": 1e-3, "ema_decay": 0.9, "grad_clip": 1.0, "first_step": 1},
    ),
    "power_averaged": (
        lambda **o: training.power_averaged(torch.nn.Linear(1, 1), **o),
        {"width": 0.1},
    ),
    "post_hoc": (
        lambda **o: training.post_hoc(torch.nn.Linear(1, 1), states_of_an_average(), **o),
        {"width": 0.1, "step": 3},
    ),
    "split": (datasets.split, {"n": 9, "held_out": 3, "seed": 0}),
    "augment": (
        lambda **o: datasets.augment(torch.ones(2, 1, 4, 4), **o),
        {"crop": 2, "seed": 3, "step": 1, "first_sample": 2},
    ),
    "augment, shifted": (
        lambda **o: datasets.augment(torch.ones(2, 1, 4, 4), **o),
        {"shift": 1, "seed": 3},
    ),
    "batches": (
        lambda **o: next(datasets.batches(datasets.open(torch.ones(5, 1)), **o), None),
        {"batch_size": 4, "steps": 3, "seed": 3, "first_step": 1, "first_sample": 1, "count": 1},
    ),
    "open": (
        lambda **o: datasets.open(torch.ones(5, 1), **o),
        {"skip_corrupt": 1, "workers": 2},
    ),
    "gather": (lambda **o: distributed.gather(torch.ones(2), **o), {"n": 2}),
    "share": (distributed.share, {"n": 10, "rank": 1, "world_size": 4}),
    "AnnealedLangevinScheduler": (
        planned,
        {
            "sigma_max": 1.0,
            "sigma_min": 0.1,
            "steps_per_level": 2,
            "step_size": 0.01,
            "seed": 3,
            "first_sample": 1,
        },
    ),
    "set_timesteps": (planned, {"n": 5}),
}
NUMBERS = [
    (name, argument)
    for name, (_, given) in CALLS.items()
    for argument, value in given.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


class Late(BaseException):
    """Not an Exception: nothing may catch it."""


@contextlib.contextmanager
def at_once(seconds=5):
    """Within a second on a machine that does nothing else."""

    def late(*_):
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(name, argument, value):
    """What is wrong, or None."""
    call, given = CALLS[name]
    op = name.split(",")[0]
    argument_in_message = (
        {"n": "num_inference_steps"}.get(argument, argument) if op == "set_timesteps" else argument
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            with at_once():
                result = call(**given | {argument: value})
        except (TypeError, ValueError) as error:
            text = str(error)
            if (
                text.startswith(f"{op.split('.')[0]}: ")
                and argument_in_message in text
                and "\n" not in text
                and len(text) < 400
            ):
                return None
            return f"{type(error).__name__}: {text}"
        except (Exception, Late) as error:
            return f"{type(error).__name__}: {error}"
    return f"a value: {str(result)[:60]}" if refused(name, argument, value) else None


def refused(name, argument, value):
    """Whether no value may come of it."""
    if value is VALUES["list"] and (name, argument) in (
        ("timesteps_of", "sigma"),
        ("Gaussian", "covariance"),
    ):
        return False   # numbers, as tensors of them are
    return any(value is VALUES[kind] for kind in NO_NUMBER)


@pytest.mark.parametrize("name, argument", NUMBERS)
def test_a_number_is_taken_or_refused_in_one_sentence(name, argument):
    wrong = {
        kind: found for kind, value in VALUES.items() if (found := outcome(name, argument, value))
    }
    assert not wrong, "\n" + "\n".join(
        f"{name}({argument}={kind}): {found}" for kind, found in wrong.items()
    )


PUBLIC = (
    fastscore, sampling, losses, schedules, likelihood, guidance, models, nn, nn.ablations,
    training, datasets, distributed,
)
RESULTS = (
    "Estimator", "State", "Step", "Preset", "Recipe", "DistanceBounds", "VarianceReport",
    "NoneNorm2d", "draw",
)


def functions():
    """Every public function and class, by its name."""
    for module in PUBLIC:
        names = getattr(module, "__all__", None) or [
            name for name in vars(module) if not name.startswith("_")
        ]
        for thing in (getattr(module, name) for name in names):
            if inspect.isroutine(thing) or (
                inspect.isclass(thing) and not issubclass(thing, Warning)
            ):
                if thing.__module__.startswith("fastscore"):
                    yield thing


def test_no_number_of_a_public_function_is_left_out():
    """Whatever has the name of a number in one of them has it in all.

    What is handed out, and `NoneNorm2d`, which ignores all, aside.
    """
    tried = {}
    for name, argument in NUMBERS:
        tried.setdefault(name.split(",")[0].split(".")[0], set()).add(argument)
    tensors = {
        "sigma", "labels", "sigmas", "covariance", "alphas_cumprod", "step_lr", "noise", "scale",
        "shift", "alpha", "gamma", "weight", "context",
    }
    names = set().union(*tried.values()) - tensors   # in some functions
    tried["variance_report"].add("projections")   # a tuple of them there
    tried["gather"].add("samples")   # the samples themselves
    missing = {}
    for f in functions():
        same = {"states": "sample", "GaussianMixture": "Gaussian"}.get(
            f.__name__, f.__name__
        ).removesuffix("_dual")
        if left := names & set(inspect.signature(f).parameters) - tried.get(same, set()):
            missing[f.__name__] = left
    assert not {name: left for name, left in missing.items() if name not in RESULTS}


@pytest.mark.parametrize("steps", [2**32, 2**31])
def test_a_plan_of_four_thousand_million_updates_is_none_of_them(steps):
    """The list of its updates took the memory of the machine."""
    with at_once():
        states = sampling.predictor_corrector(
            pull, X, sigmas=[1.0], corrector_steps=steps, seed=0, every_step=True
        )
        assert next(states).step == 1


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "none"])
@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("denoise", [True, False])
def test_the_plan_is_the_list_of_its_updates(predictor, corrections, denoise):
    listed = []
    for level in range(3):
        listed += [(level, "correct")] * corrections
        if level < 2 and predictor != "none":
            listed.append((level, "predict"))
    listed += [(2, "denoise")] * denoise
    plan = _Plan(3, predictor, corrections, denoise)
    assert [plan[step] for step in range(len(plan))] == listed


def test_arrays_and_tensors_of_numbers_are_taken_where_they_were():
    """Elementwise conversions of numpy's arrays, a shift for each channel, and a ladder of one
    level."""
    half, table = np.array([0.5]), np.array([0.5, 0.2])
    assert schedules.step_size_from_lr(half) == 1.0 and schedules.sigmas_of(table).tolist() == [
        1.0,
        2.0,
    ]
    assert np.allclose(schedules.alphas_cumprod(np.array([1.0, 2.0])), table)
    with pytest.raises(ValueError, match="sigmas_of: alphas_cumprod must be a finite number > 0"):
        schedules.sigmas_of(np.array([0.5, 0.0]))
    shift = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(
        conversions.Rescaled(pull, 2.0, shift)(X, torch.ones(2)), -2 * (2 * X + shift)
    )
    assert schedules.geometric(1.0, 1.0, np.int64(1)).tolist() == [1.0]


def test_a_number_that_asks_for_a_gradient_is_refused():
    """It would be read as a float, and its gradient be None."""
    power = torch.tensor(2.0, requires_grad=True)

    def loss(power):
        return losses.noise_conditional(
            lambda x, sigma: -x, torch.ones(2, 3), torch.tensor([1.0, 0.5]), power=power, seed=0
        )

    with pytest.raises(ValueError, match="noise_conditional: power must be a finite number; got"):
        loss(power)
    with torch.no_grad():
        assert torch.equal(loss(power), loss(2.0))
