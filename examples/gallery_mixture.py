"""The samplers on a mixture of two Gaussians whose noisy scores are known."""

import torch

import fastscore
from fastscore.models import EnergyScore

from gallery_tables import Counted, drawn, samplers, table
from toy import MIXTURE, draw_points, panels, save, weight_of_first

ROWS = 3   # panels of a picture


def spread_of_first(x):
    """The standard deviation of the samples about the first mode, per coordinate."""
    near = x[(x - MIXTURE.means[0].to(x)).norm(dim=1) < 1.2]
    return float(near.var(0).mean().sqrt()) if len(near) > 1 else float("nan")


def single_level(n, quick):
    """{title: (samples, calls)} of the samplers without a ladder, from a uniform start in the
    unit square."""
    steps = 40 if quick else 320
    plain = drawn(MIXTURE.score, (n, 2), {"sampler": "langevin", "steps": steps, "step_size": 0.02})
    energy = Counted(MIXTURE.log_prob)
    x = fastscore.sampling.initial((n, 2), seed=2)
    mala = fastscore.sample(
        EnergyScore(energy), sampler="mala", x=x, steps=steps, step_size=0.04, seed=2
    )
    return {"langevin": plain, "mala": (mala, energy.calls)}


def draw(out, runs, quick):
    """Returns the lines of the section, and its rows."""
    n = 500 if quick else 4000
    results = single_level(n, quick)
    for title, options in samplers(10.0, 0.02, quick).items():
        results[title] = drawn(MIXTURE.score, (n, 2), {**options, "initial_law": "gaussian"})
    truth = MIXTURE.sample(n, seed=9)
    rows = [{"sampler": "the mixture itself", "weight of the first mode": weight_of_first(truth),
             "spread about it": spread_of_first(truth), "calls": ""}]  # fmt: skip
    for title, (x, calls) in results.items():
        rows.append(
            {
                "sampler": title,
                "weight of the first mode": weight_of_first(x),
                "spread about it": spread_of_first(x),
                "calls": calls,
            }
        )
    figure, axes = panels(*(title.replace(", ", ",\n") for title in results), rows=ROWS)
    for a, (x, _) in zip(axes, results.values()):
        draw_points(a, x)
    save(figure, out, "mixture.png")
    return [TEXT, "![samples of each sampler](gallery/mixture.png)\n", *table(rows)], rows


TEXT = f"""## Samplers on a mixture

p(x) = 0.8 N((-1, -1), 0.06 I) + 0.2 N((1, 1), 0.06 I), so the first weight is 0.8 and the spread
{float(torch.tensor(0.06).sqrt()):.3f}; the score is exact at every noise level. `langevin` and
`mala` start uniformly in the unit square, next to the second mode, and cannot cross to the first:
they sample what lies around them. The others start from N(0, σ_1² I), σ_1 = 10. Annealed Langevin
dynamics lags behind the ladder, and loses a few per cent of the larger weight in 320 steps; the
flow keeps the bias of its start, whose mean is not the mixture's. Score-SDE's own corrector
(`corrector="langevin"`) takes its step from a ratio of two norms, which for a single sample in two
dimensions is often huge; the annealed corrector, the default, needs none.
"""
