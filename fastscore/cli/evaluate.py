"""The command `fastscore evaluate`: samples beside held-out real images, under a classifier of real
images and by the distance to the nearest training image."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

from fastscore import datasets, random
from fastscore.cli import draw, held_out, run_folder, splits
from fastscore.training import files

SURE = 0.9
_HELD_OUT = 1025   # the stream of the noise on held-out images


def evaluate(
    run: Positional[Path],
    n: Annotated[int, arg(aliases=["-n"])] = 500,
    seed: int = 0,
    likelihood: bool = False,
    grey_levels: int | None = None,
) -> None:
    """Compare samples of a run with held-out real images, by a classifier and nearest neighbours;
    or report the log-density of held-out images.

    Args:
        run: run folder, trained with held_out > 0; of a data set with labels, except with
            --likelihood.
        n: number of samples, or of images whose density is computed.
        seed: of the sampler, or of noise and projections.
        likelihood: report the log-density of held-out and of training images.
        grey_levels: also their bits per dimension, dequantised: 17 for the digits, 256 for 8-bit
            images.
    """
    if likelihood:
        result = held_out.report(run, n, seed=seed, grey_levels=grey_levels)
        _write(run, "likelihood", result, held_out.markdown(result))
        return
    if grey_levels is not None:
        raise ValueError("evaluate: grey_levels belongs to --likelihood.")
    if n < 1:
        raise ValueError(f"evaluate: n must be at least 1; got {n}.")

    net, sigmas, shape, config = run_folder.open_run(run)
    data = datasets.load(config.data)
    if data[1] is None or config.held_out == 0:
        raise ValueError(
            "evaluate: the run must be of labelled data and keep images apart "
            "(train --held-out 300)."
        )
    job = draw.prepare(net, sigmas, shape, n, seed=seed)
    samples = draw.draw_shown("evaluate", job).samples
    print("evaluate: training a classifier on the real images", file=sys.stderr, flush=True)
    parts = (splits.part(config, name, data) for name in ("training", "held_out"))
    result = report(samples, *(t for part in parts for t in part))
    _write(run, "report", result, markdown(result))


def _write(run, name, result, text):
    files.write_atomic(run / f"{name}.json", json.dumps(result, indent=2).encode())
    files.write_atomic(run / f"{name}.md", text.encode())
    print(f"{text}report: {run / f'{name}.md'}")


def reader(images: Tensor, labels: Tensor) -> Any:
    """A classifier trained on real images, of scikit-learn: a second opinion."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        # Capped at 200 iterations, with which it is as good as any.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = MLPClassifier((256,), alpha=1e-3, max_iter=200, random_state=0)
        return classifier.fit(images.flatten(1).cpu().numpy(), labels.numpy())


def seen(classifier: Any, samples: Tensor) -> Tensor:
    """The classes that the reader sees, int64 (N,)."""
    return torch.from_numpy(classifier.predict(samples.clamp(0, 1).flatten(1).cpu().numpy()))


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
    classifier = reader(images, labels) if classifier is None else classifier
    train = images.flatten(1).cpu()
    held_out = held_out_images.flatten(1).cpu()
    accuracy = float(classifier.score(held_out.numpy(), held_out_labels.numpy()))

    result = {"classifier_accuracy_held_out": accuracy}
    for name, x in (("samples", samples.clamp(0, 1).flatten(1).cpu()), ("held_out", held_out)):
        p = torch.from_numpy(classifier.predict_proba(x.numpy()))
        distance = torch.cdist(x, train).min(1).values
        result[name] = {
            "n": len(x),
            "sure": float((p.max(1).values >= SURE).double().mean()),
            "per_class": torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist(),
            "nearest_training_distance": {
                "median": float(distance.median()),
                "p05": float(distance.quantile(0.05)),
                "min": float(distance.min()),
            },
        }
    return result


def markdown(result: dict[str, Any]) -> str:
    """The report as a small table."""
    cells = {
        "number": lambda row: row["n"],
        "classifier at least 90 % sure": lambda row: f"{100 * row['sure']:.1f} %",
        "images per class": lambda row: ", ".join(map(str, row["per_class"])),
    }
    for label, name in (("median", "median"), ("5th percentile", "p05"), ("smallest", "min")):
        cells[f"nearest training image, {label}"] = (
            lambda row, name=name: f"{row['nearest_training_distance'][name]:.3f}"
        )
    rows = [
        f"| {label} | {cell(result['samples'])} | {cell(result['held_out'])} |"
        for label, cell in cells.items()
    ]
    table = "\n".join(["| | samples | held-out real images |", "|---|---|---|", *rows])
    accuracy = 100 * result["classifier_accuracy_held_out"]
    return f"Classifier: {accuracy:.1f} % right on held-out real images.\n\n{table}\n"


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
