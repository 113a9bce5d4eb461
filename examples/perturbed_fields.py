"""The data with more and more noise.

Densities, their scores, and the field that denoising score matching learns.
"""

from fastscore import losses

from toy import MIXTURE, draw_density, draw_field, fisher_ratio, grid, panels, run, save, train

SIGMAS = (0.0, 0.25, 0.5, 1.0)


def covered(sigma):
    p = MIXTURE.log_prob(grid(100), sigma).exp()
    return float((p > 0.01 * p.max()).double().mean())


def main(out, quick=False):
    """Returns the part of the square where the density is above 1 % of its maximum, for each σ.

    And for a field learnt at σ = 0.5 its Fisher ratio to the noisy and to the clean truth.

    Denoising score matching learns the density with its noise, not the one without.
    """
    figure, axes = panels(*(f"σ = {sigma:g}" for sigma in SIGMAS), "learnt, σ = 0.5")
    for a, sigma in zip(axes, SIGMAS):
        draw_density(a, lambda x, sigma=sigma: MIXTURE.log_prob(x, sigma))
        draw_field(a, lambda x, sigma=sigma: MIXTURE.score(x, sigma))
    net = train(
        lambda net, x, step: losses.denoising(lambda x, _: net(x), x, 0.5, seed=1, step=step),
        400 if quick else 2000,
    )
    draw_field(axes[-1], net)
    save(figure, out, "perturbed_fields.png")
    noisy, clean = MIXTURE.sample(5000, 0.5, seed=9), MIXTURE.sample(5000, seed=9)
    return {
        "covered": {sigma: covered(sigma) for sigma in SIGMAS},
        "to_noisy": fisher_ratio(net, lambda x: MIXTURE.score(x, 0.5), noisy),
        "to_clean": fisher_ratio(net, MIXTURE.score, clean),
    }


if __name__ == "__main__":
    run(main)
