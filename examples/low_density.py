"""Why naive score matching fails.

The score is learnt where the data are, and Langevin dynamics starts where they are not.
"""

import torch

from fastscore import losses, random, sampling

from toy import (
    EXTENT,
    MIXTURE,
    draw_density,
    draw_field,
    draw_points,
    grid,
    panels,
    run,
    save,
    train,
    weight_of_first,
)


def relative_error(score, x):
    """‖s - ∇ log p‖² over ‖∇ log p‖², both summed over the points."""
    truth = MIXTURE.score(x)
    return float((score(x) - truth).square().sum() / truth.square().sum())


def main(out, quick=False):
    """Returns the relative squared error where the density is high and where it is low, and the
    weight of the first mode in the samples.

    The data give that mode 0.8; the samples give it the fraction of the square from which the field
    leads there.
    """
    steps, n = (300, 1000) if quick else (2000, 5000)
    net = train(lambda net, x, step: losses.sliced(net, x, seed=1, step=step), steps)
    points = grid(60)
    high = MIXTURE.log_prob(points) > MIXTURE.log_prob(MIXTURE.sample(4000, seed=3)).quantile(0.05)
    start = EXTENT * (2 * random.uniform((n, 2), seed=4, stream=1024) - 1)
    *_, last = sampling.langevin(net, start, steps=500 if quick else 2000, step_size=0.01, seed=5)
    x = last.x
    figure, axes = panels(
        "density", "true score", "learnt score", "error of the learnt score", "Langevin samples"
    )
    draw_density(axes[0], MIXTURE.log_prob)
    draw_field(axes[1], MIXTURE.score)
    draw_field(axes[2], net)
    error = (net(points) - MIXTURE.score(points)).norm(dim=1).reshape(60, 60).T
    axes[3].imshow(error, origin="lower", extent=(-EXTENT, EXTENT, -EXTENT, EXTENT), cmap="Reds")
    draw_points(axes[4], x)
    save(figure, out, "low_density.png")
    errors = {
        "error_high_density": relative_error(net, points[high]),
        "error_low_density": relative_error(net, points[~high]),
    }
    inside = x[(x.abs() < 2 * EXTENT).all(1)]
    return {**errors, "weight": weight_of_first(inside if len(inside) else torch.zeros(1, 2))}


if __name__ == "__main__":
    run(main)
