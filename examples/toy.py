"""What the examples share.

a mixture of two Gaussians with unequal weights, a small training run, and panels of vector fields.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import fastscore
from fastscore.models import GaussianMixture, ScoreMLP

EXTENT = 2.0   # the square of the pictures, [-2, 2]²
MIXTURE = GaussianMixture([0.8, 0.2], [[-1.0, -1.0], [1.0, 1.0]], 0.06)


def train(loss, steps, sigmas=None, density=MIXTURE, seed=0):
    """A ScoreMLP trained on fresh samples of the density; loss(net, x, step) gives (B,)."""
    torch.manual_seed(seed)
    net = ScoreMLP(2, width=64, depth=2, sigmas=sigmas)
    batches = (density.sample(256, seed=seed, step=step) for step in range(steps))
    loop = fastscore.training.training_loop(
        net, batches, loss, steps=steps, lr=4e-3, ema_decay=0.98
    )
    *_, last = loop
    return last.ema.module.requires_grad_(False)


def fisher_ratio(score, target, x):
    """The Fisher divergence of a score from the truth, over that of the zero field."""
    learnt = fastscore.losses.exact(score, x, target=target).mean()
    return float(learnt / fastscore.losses.exact(torch.zeros_like, x, target=target).mean())


def weight_of_first(x):
    """The fraction of samples nearer to the first mode than to the second."""
    distance = torch.cdist(x.double(), MIXTURE.means)
    return float((distance[:, 0] < distance[:, 1]).double().mean())


def grid(n):
    axis = torch.linspace(-EXTENT, EXTENT, n)
    return torch.cartesian_prod(axis, axis)


def panels(*titles, rows=1):
    columns = -(-len(titles) // rows)
    figure = Figure(figsize=(3.4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for a in axes[len(titles) :]:
        a.set_axis_off()
    for a, title in zip(axes, titles):
        a.set(
            title=title,
            xlim=(-EXTENT, EXTENT),
            ylim=(-EXTENT, EXTENT),
            aspect="equal",
            xticks=[],
            yticks=[],
        )
    return figure, axes


def draw_points(axes, x, **options):
    axes.scatter(*x.T.tolist(), **{"s": 2, "alpha": 0.5, "linewidths": 0, **options})


def draw_field(axes, score, n=22):
    """Arrows along the score.

    Their lengths are square roots, for the far ones would hide the near ones.
    """
    x = grid(n)
    s = score(x)
    s = s / s.norm(dim=1, keepdim=True).clamp_min(1e-12).sqrt()
    axes.quiver(*x.T.tolist(), *s.T.tolist(), angles="xy", width=0.004)


def draw_density(axes, log_prob, n=100):
    p = log_prob(grid(n)).exp().reshape(n, n).T
    axes.imshow(p, origin="lower", extent=(-EXTENT, EXTENT, -EXTENT, EXTENT), cmap="Blues")


def save(figure, out, name):
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out) / name, dpi=110, bbox_inches="tight")


def run(main):
    """What each script does when it is started: `python examples/NAME.py [folder] [--quick]`."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", default="pictures", help="where to write the pictures (created)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and points")
    options = parser.parse_args()
    for name, figure in main(options.folder, quick=options.quick).items():
        print(f"{name}: {figure}")
    print(f"pictures: {options.folder}")
