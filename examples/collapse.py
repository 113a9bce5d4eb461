"""Following the score without noise.

Every point ends on a mode, and the samples have lost the spread of the data.
"""

import torch

from toy import MIXTURE, draw_field, draw_points, grid, panels, run, save


def flow(x, steps, step_size=0.01):
    """x ← x + step_size ∇ log p(x); yields every state."""
    for _ in range(steps):
        x = x + step_size * MIXTURE.score(x)
        yield x


def main(out, quick=False):
    """Returns the largest distance of an end point from its mode, and how many points each mode
    has collected."""
    *_, modes = flow(MIXTURE.means, 500)
    start = grid(20 if quick else 40)
    paths = torch.stack([start, *flow(start, 300)])
    distance, nearest = (paths[-1][:, None] - modes).norm(dim=2).min(1)
    figure, axes = panels("paths without noise", "end points and data")
    draw_field(axes[0], MIXTURE.score)
    for path in paths[:, ::7].unbind(1):
        axes[0].plot(*path.T.tolist(), linewidth=0.7)
    draw_points(axes[1], MIXTURE.sample(1000, seed=9), color="lightgray")
    draw_points(axes[1], paths[-1], s=20, color="crimson")
    save(figure, out, "collapse.png")
    return {
        "distance": float(distance.max()),
        "points": torch.bincount(nearest, minlength=2).tolist(),
    }


if __name__ == "__main__":
    run(main)
