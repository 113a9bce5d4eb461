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
    antithetic: bool = False,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Denoising score matching at noise σ.

        L_b = ½ ‖s(x̃, σ) + (x̃ - x)/σ²‖²,    x̃ = x + σ z

    Its gradient holds ∂s(x̃) z/σ, whose mean over z is finite as σ → 0 and whose variance is not:
    s(x̃) z/σ = s(x) z/σ + zᵀ∇s z + O(σ), and the first term has mean 0. The mean of the losses at z
    and at -z is without it, and without all that is odd in z: the same expectation at twice the
    cost, at no σ more variance, and a variance that stays finite.

    Args:
        score: called score(x̃, sigma) with sigma (B,).
        x: clean data, (B, *). sigma: σ > 0, a float, 0-d or (B,).
        antithetic: the mean of the losses at z and at -z, at which score is called in turn.
        seed, step: of the noise. first_sample: global number of x[0], so that splits of a batch
            agree.

    Returns:
        (B,), float32 or wider.

    Raises:
        ValueError: σ is not positive and finite, or the score has another shape than x.

    Source: Vincent 2011, equation 11; the variance at small σ: Wang et al. 2020
        (arXiv:2002.07501), Song & Kingma 2021, section 3 (arXiv:2101.03288).
    """
    check_data("denoising", x, score)
    antithetic = checks.flag("denoising", "antithetic", antithetic)
    offset = scalars.offset("denoising", first_sample, x[:1].numel())
    sigma = checks.coefficient("denoising", "sigma", sigma, x, minimum=0)
    # σ² is of every compute dtype.
    if type(sigma) is float and 1e-18 < sigma < 1e18 and not torch.compiler.is_compiling():
        each = torch.full(
            (x.shape[0],), sigma, dtype=checks.compute_dtype(x.dtype), device=x.device
        )
        loss = weighted("denoising", score, x, each, seed, step, offset, sigma, antithetic)
        return loss / sigma**2

    each = _each(x, sigma)
    loss = weighted("denoising", score, x, each, seed, step, offset, antithetic=antithetic)
    return loss / each**2


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
    antithetic: bool = False,
) -> Tensor:
    """½ ‖σ s + z‖², σ² times the loss, with z made twice and stored never.

    sigma: the number that each of them is, if it is one. antithetic: the mean over z and -z.
    """
    # perturb and denoising_loss without their doors, which cost as much as a small network: all
    # that they check has been checked here.
    chosen = backends.choose(x.device)
    key, *numbers = random.noise_key(op, seed, step, random.PERTURB, 0, offset, x.device)
    numbers = tuple(numbers)

    def loss(levels, level):
        noise = levels.to(checks.compute_dtype(x.dtype)) if level is None else level
        s = called(op, score, update(x, None, 0.0, noise, key, numbers, chosen), each)
        check_score(op, s, x, "score(x, sigma)")
        scale = levels.to(checks.compute_dtype(s.dtype)) if level is None else level
        return regenerated_loss(s, scale, key, numbers, chosen)

    found = loss(each, sigma)
    if not antithetic:
        return found
    # x - σ z and ½ ‖σ s - z‖² are those of -σ.
    return (found + loss(-each, None if sigma is None else -sigma)) / 2
