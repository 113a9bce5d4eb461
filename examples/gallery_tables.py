"""What the parts of the gallery share.

Scores that count their calls, samplers by title, and tables.
"""

import fastscore
from fastscore import schedules

LEVELS = 16


class Counted:
    """A score that counts how often each sample met it."""

    def __init__(self, score):
        self.score, self.calls = score, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.score(*arguments)


def samplers(sigma_max, sigma_min, quick=False):
    """{title: options of `fastscore.sample`}: each sampler at a few hundred calls.

    At a tenth of them if quick.
    """
    smallest, steps = sigma_min**2, 2 if quick else 20

    def ladder(n):
        return schedules.geometric(sigma_max, sigma_min, n // 10 if quick and n > LEVELS else n)

    coarse = {"rtol": 1e-2, "atol": 1e-2} if quick else {}
    return {
        "annealed_langevin": {
            "sigmas": ladder(LEVELS),
            "steps_per_level": steps,
            "step_size": 0.2 * smallest,
        },
        "annealed_langevin, no last denoise": {
            "sigmas": ladder(LEVELS),
            "steps_per_level": steps,
            "step_size": 0.2 * smallest,
            "denoise": False,
        },
        "annealed_langevin, a step size from technique 4": {
            "sigmas": ladder(LEVELS),
            "steps_per_level": steps,
            "step_size": schedules.technique4_step_size(ladder(LEVELS), steps),
        },
        "consistent_annealed": {"sampler": "consistent_annealed", "sigmas": ladder(320)},
        "predictor_corrector": {"sampler": "predictor_corrector", "sigmas": ladder(160)},
        "predictor_corrector, norms of each sample": {
            "sampler": "predictor_corrector",
            "sigmas": ladder(160),
            "corrector": "langevin",
            "norms": "sample",
        },
        "predictor_corrector, batch norms": {
            "sampler": "predictor_corrector",
            "sigmas": ladder(160),
            "corrector": "langevin",
            "norms": "batch",
        },
        "predictor_corrector, ancestral": {
            "sampler": "predictor_corrector",
            "sigmas": ladder(160),
            "predictor": "ancestral",
        },
        "predictor only, euler": {
            "sampler": "predictor_corrector",
            "sigmas": ladder(320),
            "predictor": "euler",
            "corrector": "none",
        },
        "probability_flow, heun": {"sampler": "probability_flow", "sigmas": ladder(40)},
        "probability_flow, adaptive": {
            "sampler": "probability_flow",
            "sigmas": ladder(2),
            "method": "adaptive",
            **coarse,
        },
    }


def drawn(score, shape, options):
    """The samples, and the calls that each cost."""
    counted = Counted(score)
    return fastscore.sample(counted, shape=shape, seed=2, **options), counted.calls


def table(rows):
    """Markdown of a list of {column: value}."""
    columns = list(rows[0])
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(show(row[c]) for c in columns) + " |" for row in rows),
        "",
    ]


def show(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)
