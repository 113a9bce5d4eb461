"""The samplers with a network trained on the 8x8 digits."""

import torch

from fastscore import datasets
from fastscore.cli import evaluate, pictures, run_folder
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit

from gallery_tables import drawn, samplers, table

SHOWN = 36   # samples of each panel


def trained(folder, quick, **options):
    """A run of the digits in this folder, trained unless it is there; a `run_folder.TrainedRun`."""
    config = TrainConfig(
        out=folder, held_out=300, steps=40 if quick else 9000, **options
    )
    if not run_folder.is_saved(folder):
        for _ in fit(config):
            pass
    return run_folder.open_run(folder)


def draw(out, folder, quick):
    """Returns the lines of the section, and its rows."""
    net, sigmas, shape, _ = trained(folder / "digits", quick)
    images, labels = datasets.load("digits")
    train_set, held_out = datasets.split(len(images), 300, seed=0)
    reader = evaluate.reader(images[train_set], labels[train_set])
    panels, rows = {"held out": images[held_out][:SHOWN]}, []
    for title, options in samplers(float(sigmas[0]), float(sigmas[-1]), quick).items():
        x, calls = drawn(net, (36 if quick else 300, *shape), options)
        report = evaluate.report(
            x, images[train_set], labels[train_set], images[held_out], labels[held_out], reader
        )
        rows.append({"sampler": title, **figures(report["samples"]), "calls": calls})
        panels[title] = x[:SHOWN]
    first = {"sampler": "held-out real images", **figures(report["held_out"]), "calls": ""}
    pictures.save_row(
        out / "digits.png", {k.replace(", ", ",\n"): v for k, v in panels.items()}, rows=2
    )
    return [TEXT, "![samples of each sampler](gallery/digits.png)\n", *table([first, *rows])], rows


def figures(report):
    return {
        "a classifier is at least 90 % sure of": f"{100 * report['sure']:.0f} %",
        "classes": sum(n > 0 for n in report["per_class"]),
        "median distance to the nearest training image": report["nearest_training_distance"][
            "median"
        ],
    }


def colour(images, seed=0):
    """(N, 3, H, W): each image in a colour of its own, drawn uniformly from [0.2, 1]³."""
    tint = 0.2 + 0.8 * torch.rand(
        len(images), 3, 1, 1, generator=torch.Generator().manual_seed(seed)
    )
    return images * tint


TEXT = """## Samplers on digits

The network of `fastscore demo --quick`: 9,000 updates of denoising score matching on 1,497 of
scikit-learn's 8×8 digits, 16 noise levels from 1 to 0.01. The largest noise is less than the extent
of the data (technique 1 asks for 4.8), so that N(0, σ_1² I) is no good start: samplers that mix
recover from it, predictors alone and the flow do not.
"""
