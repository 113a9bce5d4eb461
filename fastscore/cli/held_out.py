"""The log-density of a run's held-out images: what `fastscore evaluate RUN --likelihood` reports."""

import math

import torch

from fastscore import datasets, likelihood, models, ops
from fastscore.cli import runs, splits

BATCH = 100
STEPS = 64


def report(folder, n, *, seed=0, grey_levels=None):
    """Nats per dimension of at most n held-out and n training images of a run; with grey_levels also bits per dimension.

    The network knows the density of images with noise σ_min, so that is what is measured, and on images with that noise:
    log p_{σ_min}(x + σ_min z) / d, by 64 Runge-Kutta steps (Heun's on the ladder for a network of fixed levels) and one Rademacher
    projection, from the prior N(μ, diag v + σ_max²) with the mean and variance of each training pixel. Bits per dimension are those of
    dequantised images: far too many for a network that never saw such images and whose σ_min is below the width of a grey level.

    Returns a dict: nats_per_dim and, if asked for, bits_per_dim, each with mean, standard error and number for held_out and training.

    Raises:
        ValueError: the run keeps no images apart, n < 2, or the images have not grey_levels levels.
    """
    net, sigmas, shape, config = runs.open_run(folder)
    if config.held_out < 2:
        raise ValueError("evaluate: the run must keep images apart (train --held-out 300).")
    if n < 2:
        raise ValueError(f"evaluate: n must be at least 2 for a standard error; got {n}.")
    images, labels = datasets.load(config.data)
    train, held_out = splits.split(config, images, labels)
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    sets = {"held_out": images[held_out[:n]], "training": images[train[:n]]}
    sigma, dim, prior = float(sigmas[-1]), math.prod(shape), fitted(images[train].flatten(1))

    def nats(x):
        return density(net, sigmas, x, prior, seed)

    def bits(x):
        return likelihood.bits_per_dim(nats(likelihood.dequantize(x, grey_levels, seed=seed)), dim, levels=grey_levels)

    result = {"sigma_min": sigma}
    if grey_levels is not None:   # first: images of other levels are refused before anything is computed
        result |= {"grey_levels": grey_levels, "bits_per_dim": {name: summary(bits(x)) for name, x in sets.items()}}
    return result | {"nats_per_dim": {name: summary(nats(ops.perturb(x, sigma, seed=seed)) / dim) for name, x in sets.items()}}


def fitted(x):
    """The Gaussian with the mean and variance of each pixel; a pixel that never changes still has a width."""
    x = x.double()
    return models.Gaussian(x.mean(0), x.var(0).clamp_min(1e-6))


@torch.no_grad()
def density(net, sigmas, x, prior, seed):
    """log p_{σ_min}(x), (B,) on the CPU, batch by batch on the network's device."""
    way = {"steps": STEPS}
    if hasattr(net, "level"):   # it knows the levels of its ladder only
        way = {"steps": sigmas, "method": "heun"}
    device = next(net.parameters()).device
    options = {"sigma_min": float(sigmas[-1]), "sigma_max": float(sigmas[0]), "trace": "rademacher", "prior": prior.to(device)}
    batches = [(k, x[k : k + BATCH].to(device)) for k in range(0, len(x), BATCH)]
    return torch.cat([likelihood.log_density(net, batch, first_sample=k, seed=seed, **options, **way).cpu() for k, batch in batches])


def summary(values):
    values = values.double()
    return {"mean": float(values.mean()), "standard_error": float(values.std() / math.sqrt(len(values))), "n": len(values)}


def markdown(result):
    """The report as a small table."""
    rows = [f"| log p per dimension, σ = {result['sigma_min']:.3g}, nats | {_cells(result['nats_per_dim'])} |"]
    if "bits_per_dim" in result:
        rows.append(f"| bits per dimension, {result['grey_levels']} grey levels | {_cells(result['bits_per_dim'])} |")
    return "\n".join(["| | held-out images | training images |", "|---|---|---|", *rows]) + "\n"


def _cells(row):
    return " | ".join(f"{row[name]['mean']:.4f} ± {row[name]['standard_error']:.4f}" for name in ("held_out", "training"))
