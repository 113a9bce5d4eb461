"""Data, the vector field of its true score, and fields learnt from the data alone.

By the exact trace and by random projections.
"""

from fastscore import losses

from toy import MIXTURE, draw_field, draw_points, fisher_ratio, panels, run, save, train


def main(out, quick=False):
    """Returns the Fisher divergence of each learnt field, as a fraction of that of the zero
    field."""
    steps, x = 250 if quick else 2000, MIXTURE.sample(5000, seed=9)
    learnt = {
        "exact": train(lambda net, x, step: losses.exact(net, x), steps),
        "sliced": train(lambda net, x, step: losses.sliced(net, x, seed=1, step=step), steps),
    }
    figure, axes = panels("data", "true score", *(f"learnt, {name}" for name in learnt))
    draw_points(axes[0], x[:2000])
    for a, score in zip(axes[1:], (MIXTURE.score, *learnt.values())):
        draw_field(a, score)
    save(figure, out, "vector_fields.png")
    return {name: fisher_ratio(net, MIXTURE.score, x) for name, net in learnt.items()}


if __name__ == "__main__":
    run(main)
