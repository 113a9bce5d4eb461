"""Score-matching objectives, one value per sample."""

import torch

from fastscore import random
from fastscore.ops import checks, denoising_loss, perturb
from fastscore.schedules import check_ladder


def denoising(score, x, sigma, *, seed, step=0, offset=0):
    """Denoising score matching at noise σ.

        L_b = ½ ‖s(x̃, σ) + (x̃ - x)/σ²‖²,    x̃ = x + σ z

    Args:
        score: called score(x̃, sigma) with sigma (B,).
        x: clean data, (B, *). sigma: σ > 0, a float, 0-d or (B,). seed, step, offset: the noise key.

    Returns:
        (B,), float32 or wider.

    Raises:
        ValueError: σ is not positive and finite, or the score has another shape than x.

    Source: Vincent 2011, equation 11.
    """
    each = _each(x, sigma)
    return _weighted(score, x, each, seed, step, offset) / each**2


def noise_conditional(score, x, sigmas, *, method="denoising", power=2, labels=None, seed, step=0, offset=0):
    """Weighted score matching over a noise ladder, one level per sample.

        L_b = σ_b^power · ½ ‖s(x̃, σ_b) + (x̃ - x)/σ_b²‖²,    σ_b = sigmas[label_b]

    Args:
        score: called score(x̃, sigma) with sigma (B,). x: clean data, (B, *).
        sigmas: descending ladder, (L,). labels: int64 (B,), or None for uniform labels drawn on stream LEVEL.
        method: "denoising". power: of the weight λ(σ) = σ^power; 2 weighs all levels alike.
        seed, step, offset: the noise key.

    Returns:
        (B,), float32 or wider.

    Raises:
        ValueError: the ladder does not descend, a label is out of range, or the method is unknown.

    Source: Song & Ermon 2019, equations 5 and 6 (arXiv:1907.05600).
    """
    if method != "denoising":
        raise ValueError(f"noise_conditional: method must be 'denoising'; got {method!r}.")
    sigmas = check_ladder("noise_conditional", sigmas).to(x.device)
    if labels is None:
        labels = draw_labels(len(sigmas), x.shape[0], seed=seed, step=step, first_sample=0, device=x.device)
    elif labels.shape != x.shape[:1] or labels.dtype != torch.int64 or bool(((labels < 0) | (labels >= len(sigmas))).any()):
        raise ValueError(f"noise_conditional: labels must be int64 ({x.shape[0]},) in 0..{len(sigmas) - 1}.")
    each = sigmas[labels]
    loss = _weighted(score, x, each, seed, step, offset)
    return loss if power == 2 else loss * each ** (power - 2)


def draw_labels(levels, n, *, seed, step=0, first_sample=0, device=None):
    """Uniform level numbers, int64 (n,), from stream LEVEL."""
    return (random.words(n, seed=seed, step=step, stream=random.LEVEL, offset=first_sample, device=device) * levels) >> 32


def _each(x, sigma):
    sigma = checks.coefficient("denoising", "sigma", sigma, x, minimum=0)
    each = torch.as_tensor(sigma, dtype=checks.compute_dtype(x.dtype), device=x.device).expand(x.shape[0])
    if checks.readable() and each.device.type == "cpu" and bool((each <= 0).any()):
        raise ValueError("denoising: sigma must be > 0; got 0.")
    return each


def _weighted(score, x, each, seed, step, offset):
    """½ ‖σ s + z‖², with z made twice and stored never."""
    seed = random.draw_seed() if seed is None else seed
    s = score(perturb(x, each, seed=seed, step=step, offset=offset), each)
    checks.check_like("denoising", "score(x, sigma)", s, x)
    return denoising_loss(s, each, seed=seed, step=step, offset=offset)
