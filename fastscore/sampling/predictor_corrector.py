"""Predictor-corrector sampling down a ladder of the variance-exploding process."""

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastscore import random
from fastscore.ops.noisy_update_functions import LOSS, reduce
from fastscore.sampling.run import (
    Ladder,
    State,
    begin,
    check_count,
    check_updates,
    noiseless_update,
    norm,
    number,
    per_sample,
    without_gradients,
)
from fastscore.scalars import choice
from fastscore.schedules.ladders import check_ladder

PREDICTORS = ("reverse_diffusion", "ancestral", "euler", "none")
CORRECTORS = ("langevin", "annealed", "none")
NORMS = ("sample", "batch", "dimension")

# Its ε is held by float32 on every ladder of the field.
LARGEST_SNR = 1e9


def predictor_corrector(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    sigmas: Ladder,
    predictor: str = "reverse_diffusion",
    corrector: str = "annealed",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norms: str | None = None,
    denoise: bool = True,
    temperature: float = 1.0,
    project: Callable[..., Tensor] | None = None,
    diagnostics: bool = False,
    every_step: bool = False,
    start: int = 0,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Iterator[State]:
    """Correct at each level, then predict the next; yields a `State` after each level.

        corrector, n times: x ← x + (ε/2) s(x, σ_i) + √(T ε) z
            annealed: ε = 4 (r σ_i)²;  langevin: ε = 4 (r ‖z‖/‖s‖)²
        predictor: x ← x + g s(x, σ_i) + √T b z
            reverse_diffusion: g = σ_i² - σ_{i+1}², b = √g
            ancestral: the same g, b = √g σ_{i+1}/σ_i
            euler (Euler-Maruyama in log σ): g = 2 σ_i² log(σ_i/σ_{i+1}), b = √g
        last, if asked: x ← x + σ_L² s(x, σ_L), no noise

    The last step is the mean of Score-SDE's own last step, which goes from σ_L to 0. Without
    denoise the samples stay at σ_L.

    Args:
        score: called score(x, sigma) with sigma (B,). x: start, (B, *), such as N(0, σ_1² I); not
            modified.
        sigmas: descending ladder, (L,). predictor: see above, or "none". corrector: see above, or
            "none".
        corrector_steps: n; a level costs n + 1 calls of the score.
        snr: r, the signal-to-noise ratio of a corrector step. Score-SDE's ε is half of ours, its r
            the same.
        norms: of corrector="langevin", Score-SDE's rule, alone: ‖z‖ and ‖s‖ of each "sample" (its
            default), their means over the "batch" as in Score-SDE, or of each sample with ‖z‖ ≈ √d
            ("dimension"). The law of a step that looks at the state is not p_σ: on unit
            Gaussians the variance of "sample" is infinite in 1 and 2 dimensions, 2.4 in 4 and 1.1
            in 64; and "batch" couples batch mates. Where ‖s‖ is zero the step is the annealed
            corrector's.
        temperature: T, scales every noise by √T. For data N(μ, s²), with t = s² + σ_i², a predictor
            takes the variance V to (1 - g/t)² V + T b², and an annealed corrector to
            (1 - ε/(2t))² V + T ε. A langevin corrector's ε depends on the data: the
            same holds with ε = 4 r² t²/V as d grows.
        denoise, project, diagnostics, every_step, start, seed, first_sample: as in
            `annealed_langevin`; predictors draw from the stream LANGEVIN and correctors from
            CORRECTOR, and `step` counts both.

    Raises:
        ValueError: an unknown name, norms without corrector="langevin", the ladder does not
            descend, snr is negative, or start is beyond the end.

    Source: Song et al. 2021, Algorithms 2 and 4 (arXiv:2011.13456).
    """
    op = "predictor_corrector"
    run = begin(
        op,
        score,
        x,
        temperature=temperature,
        project=project,
        diagnostics=diagnostics,
        seed=seed,
        first_sample=first_sample,
    )
    for name, value, known in (
        ("predictor", predictor, PREDICTORS),
        ("corrector", corrector, CORRECTORS),
    ):
        choice(op, name, value, known)
    choice(op, "norms", NORMS[0] if norms is None else norms, NORMS)
    norms = _checked_norms(op, corrector, norms)
    sigmas = check_ladder(op, sigmas).tolist()
    corrector_steps = check_updates(op, "corrector_steps", corrector_steps, len(sigmas))
    plan = _Plan(len(sigmas), predictor, 0 if corrector == "none" else corrector_steps, denoise)
    start = check_count(op, "start", start, len(plan))
    return _run(
        run,
        x,
        sigmas,
        plan,
        predictor,
        corrector,
        number(op, "snr", snr, LARGEST_SNR),
        norms,
        every_step,
        start,
    )


def _checked_norms(op, corrector, norms):
    """Whose norms: None for correctors that need none. Those of Score-SDE are warned about."""
    if corrector != "langevin":
        if norms is not None:
            raise ValueError(
                f"{op}: norms are for corrector='langevin'; got corrector={corrector!r}."
            )
        return None
    what = "has another law than the score's in few dimensions"
    if norms == "batch":
        what = "makes a sample depend on the others of its batch"
    warnings.warn(
        f"{op}: corrector='langevin' (norms of each {norms or 'sample'}) {what}; "
        "corrector='annealed' does not.",
        stacklevel=3,
    )
    return norms or "sample"


class _Plan:
    """(level, what) of each update, as a sequence that holds none of them: there may be 2^32."""

    def __init__(self, levels, predictor, corrections, denoise):
        predicts = predictor != "none"
        self.levels, self.corrections, self.per_level = levels, corrections, corrections + predicts
        self.before_denoising = levels * corrections + (levels - 1) * predicts
        self.length = self.before_denoising + bool(denoise)

    def __len__(self):
        return self.length

    def __getitem__(self, step):
        if step >= self.before_denoising:
            return self.levels - 1, "denoise"
        level, within = divmod(step, self.per_level)
        return level, "correct" if within < self.corrections else "predict"


@without_gradients
def _run(run, x, sigmas, plan, predictor, corrector, snr, norms, every_step, start):
    level = None
    end = len(plan)
    for step in range(start, end):
        if plan[step][0] != level:
            level = plan[step][0]
            sigma = sigmas[level]
            each = per_sample(sigma, x)
        what = plan[step][1]
        to = sigma

        x = run.projected(x, sigma, step)
        s = run.score(x, each)
        if what == "correct":
            e = _step_size(run, corrector, norms, snr, sigma, s, step)
            a, b = run.langevin_coefficients(e)
            y = run.noisy_update(x, s, a, b, step, random.CORRECTOR)
        elif what == "predict":
            to = sigmas[level + 1]
            a, b = predict(predictor, sigma, to)
            b *= run.root_temperature
            y = run.noisy_update(x, s, a, b, step)
        else:
            to = 0.0
            a, b = sigma**2, 0.0
            y = noiseless_update(x, s, a)

        told = run.diagnose(x, s, a, b)
        x = run.projected(y, 0.0, end) if step + 1 == end else y
        if every_step or step + 1 == end or plan[step + 1][0] != level:
            yield State(level, to, x, step + 1, told)


def predict(predictor: str, sigma: float, to: float) -> tuple[float, float]:
    """Drift g and diffusion b of one predictor step from σ to the next level."""
    if predictor == "euler":
        g = 2 * sigma**2 * math.log(sigma / to)
        return g, math.sqrt(g)
    g = sigma**2 - to**2
    return g, math.sqrt(g) * (to / sigma if predictor == "ancestral" else 1.0)


def _step_size(run, corrector, norms, snr, sigma, s, step):
    """ε of a corrector step: a float, or a tensor () or (B,) that the host never looks at."""
    annealed = 4 * (snr * sigma) ** 2
    if corrector == "annealed":
        return annealed
    # A score of zero says nothing about the step; of one that is NaN the state becomes NaN by the
    # drift.
    e = _from_norms(run, norms, snr, s, step)
    return torch.where(e.isfinite(), e, annealed)


def _from_norms(run, norms, snr, s, step):
    score_norm = norm(s)
    if norms == "dimension":
        return (4 * snr**2 * run.size) / score_norm.square()

    # ½ ‖z‖² of the very noise of this step.
    key, *numbers = run.key.at(step, random.CORRECTOR)
    half = reduce(s, 0.0, key, tuple(numbers), run.backend, LOSS)
    if norms == "sample":
        return (8 * snr**2) * half / score_norm.square()
    return 4 * (snr * (2 * half).sqrt().mean() / score_norm.mean()).square()
