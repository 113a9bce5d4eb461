"""The density comes back from the score.

By the probability flow, and by the line integral from one point, with a learnt score.
"""

import torch

from fastscore import likelihood, losses, schedules

from toy import EXTENT, MIXTURE, grid, panels, run, save, train

SIGMAS = schedules.geometric(3.0, 0.1, 12)
N = 48   # points a side


def main(out, quick=False):
    """Returns, for the density that each way gives, the mean over samples of its distance to the
    true log p_σ, in nats."""
    sigma, steps = float(SIGMAS[-1]), 600 if quick else 4000
    net = train(
        lambda net, x, step: losses.noise_conditional(net, x, SIGMAS, seed=1, step=step),
        steps,
        sigmas=SIGMAS,
    )
    # Where the line integrals begin; the constant that they leave open is log p there.
    start = MIXTURE.means[:1].float()
    options = {"sigma_min": sigma, "sigma_max": float(SIGMAS[0]), "steps": 24}

    def by_ratio(x):
        return MIXTURE.log_prob(start, sigma) + likelihood.log_ratio(
            net, start.expand_as(x), x, sigma=sigma, nodes=48
        )

    ways = {
        "true": lambda x: MIXTURE.log_prob(x, sigma),
        "by the flow": lambda x: likelihood.log_density(net, x, prior=MIXTURE, **options),
        "by the line": by_ratio,
    }
    figure, axes = panels(*(f"log p, {name}" for name in ways))
    x, held_out = grid(N), MIXTURE.sample(500, sigma, seed=9)
    truth = ways["true"](held_out)
    distance = {}
    for a, (name, log_p) in zip(axes, ways.items()):
        draw_levels(a, log_p(x))
        distance[name] = float((log_p(held_out) - truth).abs().mean())
    save(figure, out, "density.png")
    return {name: distance[name] for name in ("by the flow", "by the line")}


def draw_levels(axes, log_p):
    """Contours two nats apart, from the mode down; below -12 nothing was ever trained."""
    axis = torch.linspace(-EXTENT, EXTENT, N).tolist()
    axes.contourf(
        axis,
        axis,
        log_p.reshape(N, N).T.clamp(-12, 2).tolist(),
        levels=list(range(-12, 3, 2)),
        cmap="Blues",
    )


if __name__ == "__main__":
    run(main)
