"""The command `fastscore evaluate`: samples beside held-out real images, under a classifier of real
images and by the distance to the nearest training image."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

from fastscore import random
from fastscore.cli import draw, held_out, readers, run_folder, splits
from fastscore.cli.conditions import spread
from fastscore.cli.progress import Progress
from fastscore.cli.readers import reader as reader
from fastscore.cli.readers import seen as seen
from fastscore.training import files

SURE = 0.9
WEIGHT = 1.0   # of the guidance, unless given
_BATCH = 100   # of samples of a UNet, whose layers then stay in the cache
_HELD_OUT = 1025   # the stream of the noise on held-out images


class Real(NamedTuple):
    """The images that a run trained on, those that it kept apart, and the labels of both."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


class Drawn(NamedTuple):
    """Samples (N, C, H, W), and the classes that they are to be of, int64 (N,), or None."""

    samples: Tensor
    asked: Tensor | None = None


def evaluate(
    run: Positional[Path],
    n: Annotated[int, arg(aliases=["-n"])] = 500,
    seed: int = 0,
    weight: float | None = None,
    likelihood: bool = False,
    grey_levels: int | None = None,
) -> None:
    """Compare samples of a run with held-out real images, by a classifier and nearest neighbours;
    or report the log-density of held-out images.

    Args:
        run: run folder, trained with held_out > 0; of a data set with labels, except with
            --likelihood.
        n: number of samples, or of images whose density is computed; of a run that knows classes,
            of guided samples, of conditional and of unconditional ones, the classes evenly.
        seed: of the sampler, or of noise and projections.
        weight: of the guidance by a run that knows classes, to p(x) p(class | x)^(1 + weight); 1
            unless given.
        likelihood: report the log-density of held-out and of training images.
        grey_levels: also their bits per dimension, dequantised: 17 for the digits, 256 for 8-bit
            images.
    """
    if likelihood:
        if weight is not None:
            raise ValueError("evaluate: weight belongs to samples, not to --likelihood.")
        result = held_out.report(run, n, seed=seed, grey_levels=grey_levels)
        write(run, "likelihood", result, held_out.markdown(result))
        return
    if grey_levels is not None:
        raise ValueError("evaluate: grey_levels belongs to --likelihood.")
    if n < 1:
        raise ValueError(f"evaluate: n must be at least 1; got {n}.")

    trained = run_folder.open_run(run)
    config = trained.config
    data = splits.source(config)
    if data.units is not None:
        raise ValueError(
            f"evaluate: {run} is of a table, whose samples no reader of images judges; "
            "--likelihood reports its log-density."
        )
    if data.labels is None or config.held_out == 0:
        raise ValueError(
            "evaluate: the run must be of labelled data and keep images apart "
            "(train --held-out 300)."
        )
    if weight is not None and not config.classes:
        raise ValueError(f"evaluate: weight belongs to a run that knows classes; {run} does not.")

    weight = WEIGHT if weight is None else weight
    drawn = drawn_sets(trained, n, seed, weight)
    parts = (splits.part(config, name, data) for name in ("training", "held_out"))
    real = Real(*(t for part in parts for t in part))
    result = compare(drawn, real, reader_shown("evaluate", real))
    if config.classes:
        result["weight"] = weight
    write(run, "report", result, markdown(result))


def drawn_sets(
    trained: run_folder.TrainedRun, n: int, seed: int, weight: float, **sampler: Any
) -> dict[str, Drawn]:
    """Samples by name; of a network that knows classes with guidance, without, and of no class."""
    net, sigmas, shape, config = trained
    if not config.classes:
        job = draw.prepare(net, sigmas, shape, n, seed=seed, **sampler)
        return {"samples": Drawn(draw.draw_shown("evaluate", job).samples)}

    asked = spread(range(config.classes), n)
    sets = {
        "guided": {"labels": asked, "weight": weight},
        "conditional": {"labels": asked, "weight": 0.0},
        "unconditional": {},
    }
    drawn = {}
    for name, options in sets.items():
        options = {"seed": seed, "batch_size": _BATCH} | options | sampler
        job = draw.prepare(net, sigmas, shape, n, **options)
        samples = draw.draw_shown(f"evaluate: {name}", job).samples
        drawn[name] = Drawn(samples, options.get("labels"))
    return drawn


def write(run: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write a report into a run folder, as JSON and as a table, and print the table."""
    files.write_atomic(run / f"{name}.json", json.dumps(result, indent=2).encode())
    files.write_atomic(run / f"{name}.md", text.encode())
    print(f"{text}report: {run / f'{name}.md'}")


def reader_shown(name: str, real: Real) -> Any:
    """`reader` of the training images, with its progress under this name."""
    print(f"{name}: training a classifier on the real images", file=sys.stderr, flush=True)
    if not readers.convolutional(real.images):
        return reader(real.images, real.labels)
    images = readers.BATCH
    with Progress(f"{name}: classifier", readers.STEPS, "step", images=images) as progress:
        return reader(real.images, real.labels, progress.reach)


def report(
    samples: Tensor,
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    classifier: Any = None,
) -> dict[str, Any]:
    """Compare samples with held-out real images under one classifier and one training set.

    Args:
        classifier: `reader(images, labels)` unless given.

    Returns a dict: classifier accuracy on held-out images; for samples and held-out images the
    fraction of which the classifier is at least 90 % sure, the number of images per class, and the
    median nearest-training-image distance.
    """
    real = Real(images, labels, held_out_images, held_out_labels)
    return compare({"samples": Drawn(samples)}, real, classifier)


def compare(drawn: dict[str, Drawn], real: Real, classifier: Any = None) -> dict[str, Any]:
    """What `report` says, of several sets of samples by their names.

    Of samples that are to be of given classes also the fraction that is recognised as such, in all
    and of each class.
    """
    classifier = reader(real.images, real.labels) if classifier is None else classifier
    train = real.images.flatten(1).cpu()
    held_out = real.held_out.flatten(1).cpu()
    accuracy = float(classifier.score(held_out.numpy(), real.held_out_labels.numpy()))

    result = {"classifier_accuracy_held_out": accuracy}
    for name, (samples, asked) in drawn.items():
        x = samples.clamp(0, 1).flatten(1).cpu()
        result[name] = _figures(x, asked, train, classifier)
    asked = None if all(asked is None for _, asked in drawn.values()) else real.held_out_labels
    result["held_out"] = _figures(held_out, asked, train, classifier)
    return result


def _figures(x, asked, train, classifier):
    p = torch.from_numpy(classifier.predict_proba(x.numpy()))
    guessed = p.argmax(1)
    distance = torch.cdist(x, train).min(1).values
    found = {"n": len(x)}
    if asked is not None:
        right = (guessed == asked).double()
        found["recognised"] = float(right.mean())
        found["recognised_per_class"] = [
            float(right[asked == k].mean()) if (asked == k).any() else None
            for k in range(p.shape[1])
        ]
    return found | {
        "sure": float((p.max(1).values >= SURE).double().mean()),
        "per_class": torch.bincount(guessed, minlength=p.shape[1]).tolist(),
        "nearest_training_distance": {
            "median": float(distance.median()),
            "p05": float(distance.quantile(0.05)),
            "min": float(distance.min()),
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The report as a small table."""
    sets = {name: row for name, row in result.items() if isinstance(row, dict)}
    cells = {"number": lambda row: row["n"]}
    if any("recognised" in row for row in sets.values()):
        cells["recognised as the class asked for"] = _recognised
        cells["the same of each class, %"] = _recognised_of_each
    cells["classifier at least 90 % sure"] = lambda row: f"{100 * row['sure']:.1f} %"
    cells["images per class"] = lambda row: ", ".join(map(str, row["per_class"]))
    for label, name in (("median", "median"), ("5th percentile", "p05"), ("smallest", "min")):
        cells[f"nearest training image, {label}"] = (
            lambda row, name=name: f"{row['nearest_training_distance'][name]:.3f}"
        )

    rows = [
        f"| {label} | {' | '.join(str(cell(row)) for row in sets.values())} |"
        for label, cell in cells.items()
    ]
    titles = [_title(name, result) for name in sets]
    head = [f"| | {' | '.join(titles)} |", f"|{'---|' * (1 + len(sets))}"]
    accuracy = 100 * result["classifier_accuracy_held_out"]
    table = "\n".join(head + rows)
    return f"Classifier: {accuracy:.1f} % right on held-out real images.\n\n{table}\n"


def _recognised(row):
    return f"{100 * row['recognised']:.1f} %" if "recognised" in row else "–"


def _recognised_of_each(row):
    if "recognised" not in row:
        return "–"
    shares = row["recognised_per_class"]
    return ", ".join("–" if share is None else f"{100 * share:.0f}" for share in shares)


def _title(name, result):
    if name == "guided":
        return f"guided, w = {result['weight']:g}"
    return {"held_out": "held-out real images"}.get(name, name)


@torch.no_grad()
def accuracy(
    net: nn.Module, images: Tensor, labels: Tensor, sigmas: Tensor, *, seed: int = 0
) -> list[float]:
    """The fraction of noisy images whose label a run's classifier finds, at each noise level."""
    found = []
    key = {"seed": seed, "stream": _HELD_OUT, "device": images.device}
    for level, sigma in enumerate(sigmas.tolist()):
        z = random.normal(images.shape, step=level, **key)
        guessed = net(images + sigma * z, sigma).argmax(1)
        found.append(float((guessed == labels).double().mean()))
    return found
