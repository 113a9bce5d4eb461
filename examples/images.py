"""The same failure on images: a score learnt without noise leads nowhere from a random image.

One over a ladder of noise does.
"""

from pathlib import Path

import torch

import fastscore
from fastscore import datasets, losses, schedules
from fastscore.cli import pictures
from fastscore.models import ScoreMLP

from toy import run

LADDER = schedules.geometric(1.0, 0.01, 16)
# Noise that the eye cannot see; without any, 8x8 digits of 17 grey levels have no density at all.
SINGLE = LADDER[-1:]


def learnt(images, sigmas, steps):
    torch.manual_seed(0)
    net = ScoreMLP(images[0].numel(), width=256, depth=3, sigmas=sigmas)
    picks = (
        torch.randint(len(images), (128,), generator=torch.Generator().manual_seed(step))
        for step in range(steps)
    )

    def loss(net, x, step):
        return losses.noise_conditional(net, x, sigmas, seed=1, step=step)

    *_, last = fastscore.training.training_loop(
        net, (images[i] for i in picks), loss, steps=steps, lr=2e-3, ema_decay=0.99
    )
    return last.ema.module.requires_grad_(False)


def distance(x, images):
    """The median distance to the nearest training image."""
    return float(torch.cdist(x.flatten(1), images.flatten(1)).min(1).values.median())


def main(out, quick=False):
    """Returns the median distance to the nearest training image, of held-out images and of samples
    without and with the ladder.

    Both networks, of one size, take the same number of updates; both samplers, 320 steps from one
    start.
    """
    images, _ = datasets.load("digits")
    train_set, held_out = datasets.split(len(images), 300, seed=0)
    steps, n = (400, 36) if quick else (6000, 256)
    samples = {"held out": images[held_out][:n]}
    for name, sigmas in (("without", SINGLE), ("with", LADDER)):
        net = learnt(images[train_set], sigmas, steps)
        options = {
            "sigmas": sigmas,
            "steps_per_level": 320 // len(sigmas),
            "step_size": 0.2 * float(sigmas[-1]) ** 2,
            "seed": 2,
        }
        samples[name] = fastscore.sample(net, shape=(n, 1, 8, 8), **options)
    Path(out).mkdir(parents=True, exist_ok=True)
    pictures.save_row(Path(out) / "images.png", {name: x[:36] for name, x in samples.items()})
    return {name: distance(x, images[train_set]) for name, x in samples.items()}


if __name__ == "__main__":
    run(main)
