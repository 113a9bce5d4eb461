"""Where samples of a run start: like its images with noise, as far as the network knows them."""

import pytest
import torch

from fastscore import models, schedules
from fastscore.cli import draw

SIGMAS = schedules.geometric(4.0, 0.02, 30)


class Bright(models.UNet):
    """The score of images that are one grey each, N(m, d² 11ᵀ + v I): what pixels share has a
    variance of N d²."""

    def forward(self, x, sigma, label=None, context=None, *, dropped=None):
        n = x[0].numel()
        total = (x - self.data_mean).flatten(1).mean(1, keepdim=True)[..., None, None]
        rest = x - self.data_mean - total
        noise = torch.as_tensor(sigma).square().reshape(-1, 1, 1, 1)
        return -total / (n * 0.1**2 + 0.01 + noise) - rest / (0.01 + noise)


@pytest.fixture
def net():
    return Bright(width=8, multipliers=(1,), blocks=1, data_mean=0.8, data_std=0.1414).eval()


@pytest.mark.parametrize("sampler", ["probability_flow", "predictor_corrector"])
def test_samples_of_a_unet_are_as_bright_as_its_images(net, sampler):
    """Mean grey of 400 samples: 6 standard errors of 0.1/√400; from N(0, σ_1²) they are darker."""
    means = {}
    for law in (None, "gaussian"):
        job = draw.prepare(net, SIGMAS, (1, 16, 16), 400, sampler=sampler, initial_law=law)
        means[law] = float(draw.draw(job).samples.mean())
    assert means[None] == pytest.approx(0.8, abs=6 * 0.1 / 20)
    assert means["gaussian"] < 0.75


def test_batches_start_as_the_whole_does(net):
    whole, parts = (
        draw.prepare(net, SIGMAS, (1, 8, 8), 5, steps_per_level=1, batch_size=size)
        for size in (5, 2)
    )
    torch.testing.assert_close(draw.draw(whole).samples, draw.draw(parts).samples)
    assert whole.depends_on["start"] == parts.depends_on["start"]


def test_other_networks_do_not_know_their_data():
    mlp = models.ScoreMLP(4, width=8, depth=1, sigmas=SIGMAS)
    with pytest.raises(ValueError, match="initial_law data is for a UNet"):
        draw.prepare(mlp, SIGMAS, (1, 2, 2), 2, initial_law="data")
