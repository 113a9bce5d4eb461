"""Odd values in the place of each argument.

Every refusal begins with the name of the function that was called, in one sentence.
"""

import warnings

import numpy as np
import pytest
import torch
from test_numbers import FINE, ROWS, SIGMAS, X, at_once, log_prob, pull

import fastscore
from fastscore import (
    conversions,
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

ODD = {
    "None": None,
    "str": "abc",
    "integers": torch.ones(2, 3, dtype=torch.int64),
    "sparse": torch.ones(2, 3).to_sparse(),
    "meta": torch.ones(2, 3, device="meta"),
    "0-d": torch.tensor(1.0),
    "empty": torch.ones(0, 3),
    "other shape": torch.ones(5, 7),
    "complex": torch.ones(2, 3, dtype=torch.complex64),
    "array": np.ones((2, 3), np.float32),
    "list": [1.0],
    "nan": torch.full((2, 1, 2, 3), torch.nan),
}
ONE, MASK, HALF, TABLE = torch.ones(2), X[1] > 0.5, torch.full((2,), 0.5), torch.tensor([0.9, 0.1])


def run(sampler, **options):
    return list(getattr(sampling, sampler)(**options, seed=0))


def called(factory, *arguments):
    return lambda **options: factory(**options)(*arguments)


CALLS = {
    "langevin_step": (
        fastscore.langevin_step,
        {"x": X, "score": -X, "step_size": 0.1, "noise": X, "out": None},
    ),
    "noisy_update": (
        fastscore.noisy_update,
        {"x": X, "direction": X, "drift": 0.1, "diffusion": 0.1},
    ),
    "perturb": (fastscore.perturb, {"x": X, "sigma": ONE}),
    "denoising_loss": (fastscore.denoising_loss, {"score": X, "sigma": ONE, "seed": 0}),
    "instance_norm_plus": (
        fastscore.instance_norm_plus,
        {"x": X, "gamma": torch.ones(1), "alpha": torch.ones(1), "beta": torch.ones(1)},
    ),
    "rademacher_jvp": (fastscore.rademacher_jvp, {"f": torch.sin, "x": X, "v": X}),
    "jvp": (fastscore.jvp, {"f": torch.sin, "x": X, "v": X}),
    "denoising": (losses.denoising, {"score": pull, "x": X, "sigma": ONE, "seed": 0}),
    "sliced": (losses.sliced, {"score": torch.sin, "x": X, "v": X, "mask": torch.ones_like(X)}),
    "exact": (losses.exact, {"score": torch.sin, "x": X, "target": X}),
    "finite_difference_sliced": (
        losses.finite_difference_sliced,
        {"score": torch.sin, "x": X, "v": X, "mask": torch.ones_like(X)},
    ),
    "noise_conditional": (
        losses.noise_conditional,
        {"score": pull, "x": X, "sigmas": SIGMAS, "labels": torch.tensor([0, 1]), "seed": 0},
    ),
    "variance_report": (losses.variance_report, {"score": torch.sin, "x": X}),
    "start_like": (sampling.start_like, {"data": ROWS, "n": 3, "sigma": 1.0, "seed": 0}),
    "initial": (sampling.initial, {"shape": (2, 3), "seed": 0, "dtype": None, "device": None}),
    "normal": (
        random.normal,
        {"shape": (2, 3), "seed": 0, "stream": 5, "dtype": None, "device": None},
    ),
    "words": (random.words, {"n": 3, "seed": 0, "stream": 5, "device": None}),
    "draw_labels": (draw_labels, {"levels": 3, "n": 3, "seed": 0, "device": None}),
    "sample": (
        fastscore.sample,
        {
            "score": pull,
            "shape": (2, 3),
            "sigmas": SIGMAS,
            "steps_per_level": 1,
            "step_size": 0.01,
            "dtype": None,
            "device": None,
            "seed": 0,
        },
    ),
    "annealed_langevin": (
        lambda **o: run("annealed_langevin", **o),
        {
            "score": pull,
            "x": X,
            "sigmas": SIGMAS,
            "steps_per_level": 1,
            "step_size": torch.tensor(0.01),
        },
    ),
    "langevin": (
        lambda **o: run("langevin", **o),
        {"score": pull, "x": X, "steps": 1, "step_size": torch.tensor(0.01)},
    ),
    "mala": (
        lambda **o: run("mala", **o),
        {"log_prob": log_prob, "x": X, "steps": 1, "step_size": torch.tensor(0.01)},
    ),
    "consistent_annealed": (
        lambda **o: run("consistent_annealed", **o),
        {"score": pull, "x": X, "sigmas": FINE},
    ),
    "predictor_corrector": (
        lambda **o: run("predictor_corrector", **o),
        {"score": pull, "x": X, "sigmas": SIGMAS},
    ),
    "probability_flow": (
        lambda **o: run("probability_flow", **o),
        {"score": pull, "x": X, "sigmas": SIGMAS},
    ),
    "log_density": (
        likelihood.log_density,
        {
            "score": pull, "x": X, "sigma_min": 0.1, "sigma_max": 1.0, "steps": 2, "prior": None,
            "trace": "exact", "method": "rk4",
        },
    ),
    "log_ratio": (likelihood.log_ratio, {"score": pull, "x0": X, "x1": 2 * X, "sigma": ONE}),
    "dequantize": (likelihood.dequantize, {"x": torch.zeros(2, 3), "levels": 4, "seed": 0}),
    "bits_per_dim": (likelihood.bits_per_dim, {"log_density": torch.zeros(3), "dim": 3}),
    "max_pairwise_distance": (schedules.max_pairwise_distance, {"data": ROWS}),
    "distance_bounds": (schedules.distance_bounds, {"data": ROWS, "seed": 0}),
    "recipe": (schedules.recipe, {"data": ROWS, "budget": 30}),
    "timesteps_of": (schedules.timesteps_of, {"sigma": torch.tensor(0.5), "alphas_cumprod": TABLE}),
    "sigmas_of": (schedules.sigmas_of, {"alphas_cumprod": TABLE}),
    "alphas_cumprod": (schedules.alphas_cumprod, {"sigmas": TABLE}),
    "technique4_step_size": (
        schedules.technique4_step_size,
        {"sigmas": SIGMAS, "steps_per_level": 2},
    ),
    "variance_ratios": (
        schedules.variance_ratios,
        {"sigmas": SIGMAS, "steps_per_level": 2, "step_size": 1e-3},
    ),
    "convert": (
        conversions.convert,
        {"value": X, "x": X, "sigma": ONE, "kind": "noise", "to": "v"},
    ),
    "vp_to_ve": (conversions.vp_to_ve, {"score": X, "alphas_cumprod": HALF}),
    "inpainting": (
        lambda **o: guidance.inpainting(**o)(X, 0.5, 1),
        {"observation": X[1], "mask": MASK},
    ),
    "data_consistency": (
        lambda **o: guidance.data_consistency(**o)(X, 0.0, 1),
        {"operator": guidance.Mask(MASK), "observation": X[1]},
    ),
    "linear_inverse": (
        called(guidance.linear_inverse, X, ONE),
        {"score": pull, "operator": guidance.Mask(MASK), "observation": X[1], "noise": 0.1},
    ),
    "posterior": (
        called(guidance.posterior, X, ONE),
        {"score": pull, "log_likelihood": lambda x, s: log_prob(x), "scale": ONE},
    ),
    "class_likelihood": (
        called(guidance.class_likelihood, X, ONE),
        {"net": lambda x, s: x.flatten(1), "labels": torch.tensor([0, 1])},
    ),
    "adjoint_gap": (
        adjoint_gap,
        {"operator": guidance.Grey(), "shape": (1, 2, 2), "dtype": None, "device": None},
    ),
    "from_function": (
        guidance.from_function,
        {"forward": lambda x: x, "shape": (3,), "adjoint": None, "device": None},
    ),
    "Mask": (guidance.Mask, {"mask": MASK}),
    "Matrix": (guidance.Matrix, {"matrix": torch.ones(2, 3), "shape": None}),
    "Blur": (guidance.Blur, {"kernel": torch.ones(3, 3), "padding": "circular"}),
    "Grey": (called(guidance.Grey, torch.ones(2, 3, 4, 4)), {"weights": "mean"}),
    "Gaussian": (models.Gaussian, {"mean": [0.0], "covariance": 1.0}),
    "GaussianMixture": (
        models.GaussianMixture,
        {"weights": [1.0, 1.0], "means": [[0.0], [1.0]], "covariances": 1.0},
    ),
    "ScoreMLP": (
        models.ScoreMLP,
        {"dim": 3, "width": 4, "depth": 1, "activation": "silu", "sigmas": SIGMAS},
    ),
    "EnergyMLP": (
        models.EnergyMLP,
        {"dim": 3, "width": 4, "depth": 1, "activation": "silu", "sigmas": SIGMAS},
    ),
    "NCSN": (models.NCSN, {"channels": 1, "ngf": 4, "sigmas": SIGMAS, "nonlinearity": "elu"}),
    "NCSNv2": (
        models.NCSNv2,
        {"channels": 1, "ngf": 4, "sigmas": SIGMAS, "nonlinearity": "elu", "target": "gaussian"},
    ),
    "NoiseClassifier": (
        models.NoiseClassifier,
        {
            "dim": 3,
            "num_classes": 2,
            "width": 4,
            "depth": 1,
            "activation": "silu",
            "sigmas": SIGMAS,
        },
    ),
    "EnergyScore": (lambda **o: models.EnergyScore(**o)(X), {"f": log_prob}),
    "Converted": (
        called(conversions.Converted, X, ONE),
        {"network": pull, "kind": "noise", "to": "score"},
    ),
    "Rescaled": (called(conversions.Rescaled, X, ONE), {"score": pull, "scale": 2.0}),
    "VpUNet": (
        interop.VpUNet,
        {"unet": torch.nn.Identity(), "alphas_cumprod": TABLE, "prediction": "epsilon"},
    ),
    "VeUNet": (interop.VeUNet, {"unet": torch.nn.Identity()}),
    "gather": (distributed.gather, {"samples": ONE, "n": 2}),
    "training_loop": (
        lambda **o: list(training.training_loop(**o)),
        {
            "model": torch.nn.Linear(3, 3),
            "loader": [ROWS],
            "loss": lambda n, x, s: n(x).square().sum(1),
            "steps": 2,
        },
    ),
    "replace_norms": (nn.replace_norms, {"module": torch.nn.Linear(2, 2)}),
}
# Errors of the network and of the operator.
THEIRS = (("training_loop", "loader"), ("adjoint_gap", "shape"))
# What `sample` hands on is refused by whom it is for.
OF_THE_SAMPLER = ("steps_per_level", "step_size", "sigmas", "score")


@pytest.mark.parametrize("name", CALLS)
def test_a_refusal_begins_with_the_name_of_what_was_called(name):
    call, given = CALLS[name]
    call(**given)
    wrong = []
    for argument in given:
        for kind, value in ODD.items() if (name, argument) not in THEIRS else ():
            names = (
                (name, "annealed_langevin")
                if name == "sample" and argument in OF_THE_SAMPLER
                else (name,)
            )
            try:
                with warnings.catch_warnings(), at_once():
                    warnings.simplefilter("ignore")
                    call(**given | {argument: value})
            except (TypeError, ValueError, FloatingPointError) as error:
                text = str(error)
                if not text.startswith(tuple(f"{n}: " for n in names)) or "\n" in text:
                    wrong.append(f"{argument}={kind}: {type(error).__name__}: {text}")
            except Exception as error:
                wrong.append(f"{argument}={kind}: {type(error).__name__}: {error}")
    assert not wrong, "\n" + "\n".join(wrong)
