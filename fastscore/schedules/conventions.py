"""Step sizes: from the conventions of other code bases to ours, x + ε/2 s + √ε z, and back.

| code | one step | ours |
|---|---|---|
| Song & Ermon 2019 as printed, NCSN's toy code, toy_gradlogp | x + ε/2 s + √ε z | ε |
| NCSN, NCSNv2, CAS (`step_lr`), torchebm, the SDE dx = s dt + √2 dW | x + η s + √(2η) z | `to_epsilon`: 2 η |
| score_sde's correctors, diffusers' ScoreSdeVe (`snr`) | η = 2 (r ‖z‖/‖s‖)², or 2 (r σ)² | `snr_to_epsilon`: 4 r² σ² |
"""

import math

from fastscore.ops import checks
from fastscore.scalars import SQUARE


def to_epsilon(step_lr):
    """ε = 2 η: from the step size of NCSN's code, x + η s + √(2η) z, to ours, x + ε/2 s + √ε z."""
    return 2 * checks.values("to_epsilon", "step_lr", step_lr, 0, most=1e300)


def to_step_lr(epsilon):
    """η = ε / 2: the inverse of `to_epsilon`."""
    return checks.values("to_step_lr", "epsilon", epsilon, 0) / 2


def snr_to_epsilon(snr, sigma):
    """The step size of score_sde's correctors at noise level σ.

        η = 2 (r σ)²,    ε = 2 η = 4 r² σ²

    Exact for the annealed corrector. The Langevin corrector has r ‖z‖/‖s‖, its norms averaged over the batch, in place of r σ: the same
    for a point blurred by σ, and r √(s² + σ²) for normal data of variance s².

    Args:
        snr: r, a float. sigma: σ, a float or a tensor; a ladder gives one ε for each level.

    Source: Song et al. 2021, Algorithm 4 (arXiv:2011.13456).

    >>> round(to_step_lr(snr_to_epsilon(0.176, 0.01)), 8)   # NCSNv2's step_lr 6.2e-6
    6.2e-06
    """
    snr = checks.values("snr_to_epsilon", "snr", snr, 0, 1e9)
    sigma = checks.values("snr_to_epsilon", "sigma", sigma, 0, SQUARE)
    return 4 * snr**2 * sigma**2


def epsilon_to_snr(epsilon, sigma):
    """r = √ε / (2 σ): the inverse of `snr_to_epsilon`, for floats."""
    epsilon = checks.number("epsilon_to_snr", "epsilon", epsilon, 0)
    return math.sqrt(epsilon) / (2 * checks.number("epsilon_to_snr", "sigma", sigma, above=0, most=SQUARE))
