"""Score matching over a ladder of noise levels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastscore import random, scalars
from fastscore.losses.denoising import weighted
from fastscore.losses.exact import implicit
from fastscore.losses.projections import check_data, check_key, check_projections, sliced_estimate
from fastscore.ops import checks, perturb
from fastscore.schedules.ladders import check_ladder
from fastscore.tensors import fake

METHODS = ("denoising", "denoising-vr", "sliced", "sliced-vr", "exact")


def noise_conditional(
    score: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    method: str = "denoising",
    power: float = 2,
    labels: Tensor | None = None,
    projections: int = 1,
    distribution: str = "rademacher",
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Weighted score matching over a noise ladder, one level per sample.

        L_b = σ_b^power · ℓ(s(·, σ_b), x̃_b),    σ_b = sigmas[label_b],    x̃ = x + σ z

        ℓ = ½ ‖s(x̃, σ) + (x̃ - x)/σ²‖²                   method "denoising"
        ℓ = its mean over z and -z (`denoising`, antithetic) "denoising-vr"
        ℓ = `sliced`, plain or variance reduced           "sliced", "sliced-vr"
        ℓ = `exact`, implicit                             "exact"

    All methods have the same minimiser, the score of the noisy data; only the first two use that x̃
    is x with noise. "denoising-vr" costs two calls and is for small σ, where the variance of the
    other's gradient grows as 1/σ² (see `denoising`).

    Args:
        score: called score(x̃, sigma) with sigma (B,), or a `models.EnergyScore`. x: clean data,
            (B, *).
        sigmas: descending ladder, (L,). labels: int64 (B,), or None for uniform labels drawn on
            stream LEVEL.
        power: of the weight λ(σ) = σ^power; 2 weighs all levels alike.
        projections, distribution: of the sliced methods.
        seed, step: of the noise, the levels and the directions (streams PERTURB, LEVEL and
            PROJECTION).
        first_sample: global number of x[0], so that splits of a batch agree.

    Returns:
        (B,), float32 or wider.

    Raises:
        ValueError: the ladder does not descend, a label is out of range, or the method or
            distribution is unknown.

    Source: Song & Ermon 2019, equations 5 and 6, and section 4.2 (arXiv:1907.05600).
    """
    op = "noise_conditional"
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"{op}: method must be one of {', '.join(METHODS)}; got {checks.shown(method)}."
        )

    check_projections(op, projections, distribution)
    check_data(op, x, score)
    offset = scalars.offset(op, first_sample, x[:1].numel())
    check_key(op, seed, step, offset, x)
    seed = _drawn(x.device) if seed is None else seed   # once, for all that is drawn
    power = checks.number(op, "power", power)
    sigmas = check_ladder(op, sigmas, wait=False).to(x.device)
    power = checks.in_graph(power, sigmas if sigmas.dtype == torch.float64 else x)
    if labels is None:
        labels = draw_labels(
            len(sigmas),
            x.shape[0],
            seed=seed,
            step=step,
            first_sample=first_sample,
            device=x.device,
        )
    elif not _fit(op, labels, x, len(sigmas)):
        raise ValueError(f"{op}: labels must be int64 ({x.shape[0]},) in 0..{len(sigmas) - 1}.")

    each = sigmas[labels]
    if method in ("denoising", "denoising-vr"):
        antithetic = method == "denoising-vr"
        loss = weighted(op, score, x, each, seed, step, offset, antithetic=antithetic)
        return _weighted(loss, each, power - 2)

    key = {"seed": seed, "step": step, "offset": offset}
    noisy = perturb(x, each, **key)
    if method == "exact":
        loss = implicit(score, noisy, arguments=(each,))
    else:
        loss = sliced_estimate(
            op,
            score,
            noisy,
            projections,
            method == "sliced-vr",
            distribution,
            arguments=(each,),
            **key,
        )

    return _weighted(loss, each.to(checks.compute_dtype(x.dtype)), power)


def _drawn(device):
    """A seed; a compiled graph draws it itself."""
    return (
        torch.randint(0, 2**63 - 1, (), device=device)
        if torch.compiler.is_compiling()
        else random.draw_seed()
    )


def _weighted(loss, sigmas, power):
    return loss if isinstance(power, float) and power == 0 else loss * sigmas**power


def _fit(op, labels, x, levels):
    checks.check_tensor(op, "labels", labels)
    if (
        labels.device.type not in (x.device.type, "cpu")
        or labels.shape != x.shape[:1]
        or labels.dtype != torch.int64
    ):
        return False

    # On a GPU the indexing itself refuses them, without waiting.
    unread = labels.device.type != "cpu" or not checks.readable() or fake(labels)
    return unread or not bool(((labels < 0) | (labels >= levels)).any())


def draw_labels(
    levels: int,
    n: int,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform level numbers, int64 (n,), from stream LEVEL."""
    op = "draw_labels"
    levels = checks.integer(op, "levels", levels, 1, limit=2**31)
    n = checks.integer(op, "n", n, 0, limit=2**40)
    first_sample = scalars.offset(op, first_sample, 1)
    return (
        random.draw(
            op, random.WORDS, (n,), seed, step, random.LEVEL, offset=first_sample, device=device
        )
        * levels
    ) >> 32
