"""Langevin dynamics with and without annealing.

Without, the weights of the modes are lost even with the true score.
"""

import fastscore
from fastscore import losses, random, schedules

from toy import EXTENT, MIXTURE, draw_points, panels, run, save, train, weight_of_first

SIGMAS = schedules.geometric(3.0, 0.05, 12)


def main(out, quick=False):
    """Returns the weight of the first mode, 0.8 in the data, for plain and annealed runs with
    the true and with a learnt score."""
    n, train_steps = (1500, 500) if quick else (5000, 3000)
    net = train(
        lambda net, x, step: losses.noise_conditional(net, x, SIGMAS, seed=1, step=step),
        train_steps,
        sigmas=SIGMAS,
    )
    start = EXTENT * (2 * random.uniform((n, 2), seed=4, stream=1024) - 1)
    annealed = {
        "x": start,
        "sigmas": SIGMAS,
        "steps_per_level": 30,
        "step_size": 0.3 * float(SIGMAS[-1]) ** 2,
        "seed": 5,
    }
    samples = {
        "data": MIXTURE.sample(n, seed=9),
        "plain": fastscore.sample(
            MIXTURE.score, sampler="langevin", x=start, steps=360, step_size=0.02, seed=5
        ),
        "annealed": fastscore.sample(MIXTURE.score, **annealed),
        "annealed, learnt": fastscore.sample(net, **annealed),
    }
    weights = {name: weight_of_first(x) for name, x in samples.items()}
    figure, axes = panels(*(f"{name}: {100 * w:.0f} % below" for name, w in weights.items()))
    for a, x in zip(axes, samples.values()):
        draw_points(a, x)
    save(figure, out, "langevin.png")
    return weights


if __name__ == "__main__":
    run(main)
