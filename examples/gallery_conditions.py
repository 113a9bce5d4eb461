"""Bayes' rule on the digits: samples of a class, and of what an observation leaves open."""

import numpy as np
import torch

from fastscore import datasets
from fastscore.cli import draw as drawing
from fastscore.cli import evaluate, observations, pictures, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit

from gallery_digits import colour, trained
from gallery_tables import table

SAMPLES = 8   # shown of each condition
SCALE = 3.0   # of the class likelihood
BOTH_IMAGE, BOTH_CLASSES = "inpaint=held-out:18,left-half", (3, 8, 9)
REQUESTS = {  # title: (what is asked for, how)
    "inpaint, as in NCSN": ("inpaint=held-out:3,right-half", {"guide": "replace"}),
    "inpaint, likelihood flat": ("inpaint=held-out:3,right-half", {"guide": "flat"}),
    "inpaint, likelihood denoiser": ("inpaint=held-out:3,right-half", {"guide": "denoiser"}),
    "inpaint, likelihood moments": ("inpaint=held-out:3,right-half", {"guide": "moments"}),
    "the same with noise 0.1": ("inpaint=held-out:3,right-half", {"noise": 0.1}),
    "super-resolution, from 4×4": ("super_resolution=held-out:3,2", {}),
    "super-resolution, from 4×4, probability flow": (
        "super_resolution=held-out:3,2",
        {"sampler": "probability_flow"},
    ),
    "deblurring, 0.8 pixels, noise 0.05": ("deblur=held-out:3,0.8", {"noise": 0.05}),
}


def draw(out, folder, quick):
    """Returns the lines of the section, and its rows."""
    net, sigmas, shape, config = trained(folder / "digits", quick)
    classifier = trained_classifier(folder / "classifier", quick)
    n = SAMPLES if quick else 64
    reader, shown, rows = evaluate.reader(*splits.part(config, "training")), [], []
    few = {"steps_per_level": 2} if quick else {}
    classes, right = by_class(net, sigmas, shape, config, classifier, n, reader, few)
    pictures.save_grid(out / "classes.png", classes, columns=SAMPLES)
    for title, (text, options) in REQUESTS.items():
        result, error = conditioned(
            net, sigmas, shape, config, text, n, **options, **({} if "sampler" in options else few)
        )
        shown.append(in_row(result))
        rows.append(row(title, result, error, reader))
    pictures.save_grid(out / "conditions.png", torch.cat(shown), columns=SAMPLES + 2)
    shown, asked = [], {}
    for k in BOTH_CLASSES:
        both, _ = conditioned(
            net,
            sigmas,
            shape,
            config,
            BOTH_IMAGE,
            n,
            f"class={k}",
            classifier=classifier,
            scale=SCALE,
            **few,
        )
        shown.append(in_row(both))
        asked[k] = float((evaluate.seen(reader, both.samples) == k).double().mean())
    pictures.save_grid(out / "both.png", torch.cat(shown), columns=SAMPLES + 2)
    coloured, error = recoloured(folder, quick, n, few)
    pictures.save_grid(out / "colours.png", coloured, columns=SAMPLES + 2)
    lines = [
        CLASSES.format(right=100 * right, scale=SCALE),
        "![a row for each class](gallery/classes.png)\n",
        OBSERVED,
        "![original, observation, samples; a row for each condition](gallery/conditions.png)\n",
        *table(rows),
        BOTH.format(asked=", ".join(f"{100 * share:.0f} % as {k}" for k, share in asked.items())),
        "![original, observation, samples; a row for each class](gallery/both.png)\n",
        COLOURS.format(error=error),
        "![original, observation, samples](gallery/colours.png)\n",
    ]
    return lines, [{"condition": "class", "as asked": right}, *rows]


def trained_classifier(folder, quick):
    config = TrainConfig(
        task="classifier", out=folder, held_out=300, steps=40 if quick else 3000
    )
    if not run_folder.is_saved(folder):
        for _ in fit(config):
            pass
    return run_folder.open_run(folder, "classifier").net


def by_class(net, sigmas, shape, config, classifier, n, reader, options):
    """Eight samples of each class, and the fraction of all in which a reader sees the class that
    was asked for."""
    drawn = []
    for k in range(10):
        requests = [observations.parse(f"class={k}")]
        condition = {
            "requests": requests,
            "config": config,
            "classifier": classifier,
            "scale": SCALE,
        }
        job = drawing.prepare(
            net, sigmas, shape, n, first_sample=k * n, condition=condition, **options
        )
        drawn.append(drawing.draw(job).samples)
    asked = torch.arange(10).repeat_interleave(n)
    right = float((evaluate.seen(reader, torch.cat(drawn)) == asked).double().mean())
    return torch.cat([x[:SAMPLES] for x in drawn]), right


def conditioned(
    net,
    sigmas,
    shape,
    config,
    text,
    n,
    *more,
    noise=0.0,
    guide="moments",
    scale=1.0,
    classifier=None,
    **options,
):
    """What is drawn under the conditions, and the root mean square of A x - y."""
    requests = [observations.parse(t) for t in (text, *more)]
    condition = {
        "requests": requests,
        "config": config,
        "noise": noise,
        "guide": guide,
        "scale": scale,
        "classifier": classifier,
    }
    result = drawing.draw(drawing.prepare(net, sigmas, shape, n, condition=condition, **options))
    observed = observations.observe(requests[0], shape, config, noise=noise)
    gap = observed.operator.forward(result.samples) - observed.y
    known = gap if observed.mask is None else gap[:, observed.mask]
    return result, float(known.square().mean().sqrt())


def in_row(result):
    return torch.cat(
        [
            result.shown["original"][None],
            result.shown["observation"][None],
            result.samples[:SAMPLES],
        ]
    )


def row(title, result, error, reader):
    k = int(evaluate.seen(reader, result.shown["original"][None]))
    share = float((evaluate.seen(reader, result.samples) == k).double().mean())
    apart = float(result.samples.var(0).mean().sqrt())
    return {
        "condition": title,
        f"read as the original, a {k}": f"{100 * share:.0f} %",
        "root mean square of A x - y": error,
        "spread of the samples": apart,
    }


def recoloured(folder, quick, n, options):
    """Grey images in colour.

    Rows of original, observation and samples, from a network trained on coloured digits.
    """
    source = folder / "coloured.npz"
    images, _ = datasets.load("digits")
    np.savez(source, images=colour(images).numpy())
    net, sigmas, shape, config = trained(folder / "coloured", quick, data=str(source))
    shown, error = [], 0.0
    for number in (3, 7):
        result, error = conditioned(
            net, sigmas, shape, config, f"colourise=held-out:{number}", n, **options
        )
        shown.append(in_row(result))
    return torch.cat(shown), error


CLASSES = """## A class that is asked for

`fastscore sample RUN --condition class=3 --classifier CLASSIFIER --scale {scale:.0f}`: Bayes' rule
with a noise-conditional classifier. Another classifier, trained on clean images, sees the class
that was asked for in {right:.0f} % of the samples.
"""
OBSERVED = """## What an observation leaves open

Original (never trained on), observation, samples; a row for each row of the table.
`inpaint=held-out:3,right-half` and so on are the arguments of `fastscore sample RUN --condition`.
"""
BOTH = """## Two conditions at once

The right half of a picture, and a class, one in each row; read as asked: {asked}.
"""
COLOURS = """## Colours of grey images

From a network trained on digits in random colours; the luma of the samples keeps to the grey image
within {error:.2g} (root mean square).
"""
