"""Denoising score matching."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastscore import backend as backends
from fastscore import random, scalars
from fastscore.losses.projections import called, check_data, check_score
from fastscore.ops import checks
from fastscore.ops.denoising_loss import regenerated_loss
from fastscore.ops.noisy_update_functions import update


def denoising(
    score: Callable[..., Tensor],
    x: Tensor,
    sigma: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Denoising score matching at noise σ.

        L_b = ½ ‖s(x̃, σ) + (x̃ - x)/σ²‖²,    x̃ = x + σ z

    Args:
        score: called score(x̃, sigma) with sigma (B,).
        x: clean data, (B, *). sigma: σ > 0, a float, 0-d or (B,).
        seed, step: of the noise. first_sample: global number of x[0], so that splits of a batch
            agree.

    Returns:
        (B,), float32 or wider.

    Raises:
        ValueError: σ is not positive and finite, or the score has another shape than x.

    Source: Vincent 2011, equation 11.
    """
    check_data("denoising", x, score)
    offset = scalars.offset("denoising", first_sample, x[:1].numel())
    sigma = checks.coefficient("denoising", "sigma", sigma, x, minimum=0)
    # σ² is of every compute dtype.
    if type(sigma) is float and 1e-18 < sigma < 1e18 and not torch.compiler.is_compiling():
        each = torch.full(
            (x.shape[0],), sigma, dtype=checks.compute_dtype(x.dtype), device=x.device
        )
        return weighted("denoising", score, x, each, seed, step, offset, sigma) / sigma**2

    each = _each(x, sigma)
    return weighted("denoising", score, x, each, seed, step, offset) / each**2


def _each(x, sigma):
    each = (
        sigma.expand(x.shape[0])
        if isinstance(sigma, torch.Tensor)
        else checks.as_tensor(sigma, x).repeat(x.shape[0])
    )
    if checks.readable() and each.device.type == "cpu" and bool((each <= 0).any()):
        raise ValueError("denoising: sigma must be > 0; got 0.")
    return each


def weighted(
    op: str,
    score: Callable[..., Tensor],
    x: Tensor,
    each: Tensor,
    seed: int | Tensor | None,
    step: int | Tensor,
    offset: int,
    sigma: float | None = None,
) -> Tensor:
    """½ ‖σ s + z‖², σ² times the loss, with z made twice and stored never.

    sigma: the number that each of them is, if it is one.
    """
    # perturb and denoising_loss without their doors, which cost as much as a small network: all
    # that they check has been checked here.
    chosen = backends.choose(x.device)
    key, *numbers = random.noise_key(op, seed, step, random.PERTURB, 0, offset, x.device)
    numbers = tuple(numbers)
    noisy = update(
        x,
        None,
        0.0,
        each.to(checks.compute_dtype(x.dtype)) if sigma is None else sigma,
        key,
        numbers,
        chosen,
    )
    s = called(op, score, noisy, each)
    check_score(op, s, x, "score(x, sigma)")
    return regenerated_loss(
        s, each.to(checks.compute_dtype(s.dtype)) if sigma is None else sigma, key, numbers, chosen
    )
