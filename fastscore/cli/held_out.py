"""The log-density of a run's held-out images, for `fastscore evaluate RUN --likelihood`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import likelihood, models, ops
from fastscore.cli import run_folder, splits
from fastscore.cli.progress import Progress
from fastscore.datasets import Source

BATCH = 100
STEPS = 64
_BLOCK = 4096   # samples read together


def report(
    folder: str | Path, n: int, *, seed: int = 0, grey_levels: int | None = None
) -> dict[str, Any]:
    """Nats per dimension of at most n held-out and n training images of a run.

    The network knows the density of images with noise σ_min, so that is what is measured, and on
    images with that noise: log p_{σ_min}(x + σ_min z) / d, by 64 Runge-Kutta steps (Heun's on the
    ladder for a network of fixed levels) and one Rademacher projection, from the prior
    N(μ, diag v + σ_max²) with the mean and variance of each training pixel.

    Of a table it is the density in the table's units; the noise is that of standardised columns.

    With grey_levels also bits per dimension. They are those of dequantised images: far too many for
    a network that never saw such images and whose σ_min is below the width of a grey level.

    Returns a dict: nats_per_dim and, if asked for, bits_per_dim, each with mean, standard error and
    number for held_out and training.

    Raises:
        ValueError: the run keeps no images apart, n < 2, or the images have not grey_levels levels.
    """
    net, sigmas, shape, config = run_folder.open_run(folder)
    if config.held_out < 2:
        raise ValueError("evaluate: the run must keep images apart (train --held-out 300).")
    if n < 2:
        raise ValueError(f"evaluate: n must be at least 2 for a standard error; got {n}.")

    data = splits.source(config)
    if data.units is not None and grey_levels is not None:
        raise ValueError("evaluate: grey_levels belongs to images; the run is of a table.")
    train, held_out = (data.subset(rows) for rows in splits.split(config, data))
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    parts = {"held_out": held_out, "training": train}
    sets = {name: part.read(torch.arange(min(n, len(part)))) for name, part in parts.items()}
    sigma = float(sigmas[-1])
    dim = math.prod(shape)
    # Of a table in its own units: a column of deviation s is as much less dense.
    scale = 0.0 if data.units is None else float(data.units.deviation.log().mean())
    prior = fitted(train)

    times = 1 if grey_levels is None else 2
    batches = times * sum(-(-len(x) // BATCH) for x in sets.values())
    progress = Progress("evaluate", batches, "batch", images=BATCH)

    def nats(x):
        return density(net, sigmas, x, prior, seed, progress.update)

    def bits(x):
        whole = likelihood.dequantize(x, grey_levels, seed=seed)
        return likelihood.bits_per_dim(nats(whole), dim, levels=grey_levels)

    result = {"sigma_min": sigma}
    with progress:
        # First: images of other levels are refused before anything is computed.
        if grey_levels is not None:
            result["grey_levels"] = grey_levels
            result["bits_per_dim"] = {name: summary(bits(x)) for name, x in sets.items()}
        result["nats_per_dim"] = {
            name: summary(nats(ops.perturb(x, sigma, seed=seed)) / dim - scale)
            for name, x in sets.items()
        }
    return result


def fitted(data: Source) -> models.Gaussian:
    """The Gaussian with the mean and variance of each pixel, which is never below 10⁻⁶."""
    shift, total, squares = None, 0.0, 0.0
    for rows in torch.arange(len(data)).split(_BLOCK):
        x = data.read(rows).flatten(1).cpu().double()
        # About a mean, so that squares do not cancel.
        shift = x.mean(0) if shift is None else shift
        total = total + (x - shift).sum(0)
        squares = squares + (x - shift).square().sum(0)

    n = len(data)
    variance = (squares - total.square() / n) / (n - 1)
    return models.Gaussian(shift + total / n, variance.clamp_min(1e-6))


@torch.no_grad()
def density(
    net: nn.Module,
    sigmas: Tensor,
    x: Tensor,
    prior: models.Gaussian,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> Tensor:
    """log p_{σ_min}(x), (B,) on the CPU, batch by batch on the network's device.

    done: called after each batch.
    """
    device = next(net.parameters()).device
    options = {
        "sigma_min": float(sigmas[-1]),
        "sigma_max": float(sigmas[0]),
        "trace": "rademacher",
        "prior": prior.to(device),
        "steps": STEPS,
        "seed": seed,
    }
    # Such a network knows the levels of its ladder only.
    if hasattr(net, "level"):
        options |= {"steps": sigmas, "method": "heun"}

    found = []
    for start in range(0, len(x), BATCH):
        batch = x[start : start + BATCH].to(device)
        found.append(likelihood.log_density(net, batch, first_sample=start, **options).cpu())
        done()
    return torch.cat(found)


def summary(values: Tensor) -> dict[str, Any]:
    """Mean, standard error and number."""
    values = values.double()
    error = float(values.std() / math.sqrt(len(values)))
    return {"mean": float(values.mean()), "standard_error": error, "n": len(values)}


def markdown(result: dict[str, Any]) -> str:
    """The report as a small table."""
    nats = f"log p per dimension, σ = {result['sigma_min']:.3g}, nats"
    rows = [f"| {nats} | {_cells(result['nats_per_dim'])} |"]
    if "bits_per_dim" in result:
        bits = f"bits per dimension, {result['grey_levels']} grey levels"
        rows.append(f"| {bits} | {_cells(result['bits_per_dim'])} |")
    return "\n".join(["| | held-out images | training images |", "|---|---|---|", *rows]) + "\n"


def _cells(row):
    values = (row[name] for name in ("held_out", "training"))
    return " | ".join(f"{v['mean']:.4f} ± {v['standard_error']:.4f}" for v in values)
