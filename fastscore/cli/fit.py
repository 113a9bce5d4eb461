"""The one loop that trains, in a run folder: a score network by any loss, or a classifier."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore import datasets, likelihood, losses, perturb, training
from fastscore.cli import metrics, networks, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.losses.noise_conditional import draw_labels
from fastscore.training import files, lock

SAVE_EVERY = 500   # steps: what a killed run may lose
RECORD_EVERY = 100


def fit(config: TrainConfig) -> Iterator[tuple[int, float]]:
    """Yield (step, mean loss) after each update of what the config trains.

    The loss of a score network is that of `losses.noise_conditional`; of a classifier it is

        L_b = -log p(label_b | x_b + σ_b z, σ_b),    σ_b uniform on the ladder

    The run is saved every 500 steps, at its end, and when the generator is closed; an exception in
    the middle of a step leaves the save before it.

    Raises:
        ValueError: an option is out of range; the folder holds a run already (without resume) or
            none (with it), or one that cannot go on so; the data cannot be read, or have no labels
            for a classifier.
    """
    if config.resume:
        config = run_folder.resumed(config)
    out = Path(config.out)
    if not config.resume:
        _refuse_another_run(out)

    data = splits.source(config)
    if config.task == "classifier" and data.labels is None:
        raise ValueError(f"train: a classifier needs labels; {config.data} has none.")
    training_part = data.subset(splits.split(config, data)[0])
    classes = None if data.labels is None else int(training_part.labels.max()) + 1
    if not config.resume:
        config = networks.resolved(config, training_part)
    net, sigmas = networks.build(config, data.shape, classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = (t.to(device) for t in (training_part, net, sigmas))
    return _updates(config, out, splits.record(config, data), *moved)


def batches(
    data: datasets.Source, config: TrainConfig, first_step: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each step's images and labels, on the device.

    They are a function of the seed and the step: a resumed run sees what the whole one would.
    """
    options = {"seed": config.seed, "steps": config.steps, "first_step": first_step}
    for step, images, labels in datasets.batches(data, config.batch_size, **options):
        images = _varied(images.to(device), config, step)
        yield images, None if labels is None else labels.to(device)


def _varied(images, config, step, first_sample=0):
    """Training images as the options want them; first_sample: the number of the first in the batch
    of all processes."""
    key = {"seed": config.seed, "step": step, "first_sample": first_sample}
    if config.flip or config.shift:
        images = datasets.augment(images, flip=config.flip, shift=config.shift, **key)
    if config.grey_levels:
        images = likelihood.dequantize(images, config.grey_levels, **key)
    return images


def _refuse_another_run(out):
    # What a run that was killed before it had its config leaves is none.
    kept = [] if not out.exists() else list(out.iterdir())
    left = {splits.FILE, lock.NAME}
    if [path for path in kept if path.name not in left and not files.is_temporary(path)]:
        raise ValueError(f"train: {out} exists already; choose another folder or pass --resume.")


def _updates(config, out, *things):
    out.mkdir(parents=True, exist_ok=True)
    with lock.only_writer(out):
        if not config.resume:
            # Another process may have begun meanwhile.
            _refuse_another_run(out)
        files.sweep(out)
        yield from _updates_alone(config, out, *things)


def _updates_alone(config, out, split, images, net, sigmas):
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    ema = training.averaged(net, config.ema_decay)
    last, first, begun = None, 0, {}
    if config.resume:
        last, first, begun = run_folder.restore(out, net, ema, optimizer)
    if first > config.steps:
        raise ValueError(
            f"train: {out} has done {first} steps already; steps must be at least that; "
            f"got {config.steps}."
        )
    shape = images.shape
    # The config makes it a run, so it comes last.
    splits.keep(out, split)
    run_folder.write_config(out, config, shape)
    key = {"seed": config.seed, "device": sigmas.device}
    level = None

    def loss(model, batch, step):
        nonlocal level
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step, config.steps)
        level = draw_labels(len(sigmas), config.batch_size, step=step, **key)
        return objective(config, model, sigmas, *batch, level, step)

    data = batches(images, config, first, sigmas.device)
    options = {"steps": config.steps, "optimizer": optimizer, "first_step": first, "ema": ema}
    loop = training.training_loop(net, data, loss, **options)
    dim = math.prod(shape) if config.task == "score" else 1
    sums = metrics.Metrics(len(sigmas), dim, **begun)
    done = first

    def save():
        nonlocal last
        options = {"last": last, "seed": config.seed}
        last = run_folder.save(out, net, ema, optimizer, done, sums.state(), **options)

    try:
        for state in loop:
            done = state.step + 1
            sums.add(level, state.losses)
            if done % RECORD_EVERY == 0 or done == config.steps:
                metrics.add(out, sums.record(done))
            if done % SAVE_EVERY == 0:
                save()
            yield state.step, float(state.losses.mean())
    except GeneratorExit:
        # Between two steps; in the middle of one, nothing fits together.
        save()
        raise
    except FloatingPointError:
        # Of the loss, before anything was updated. Weights that are not finite are refused.
        with contextlib.suppress(ValueError):
            save()
        raise
    save()


def objective(
    config: TrainConfig,
    net: nn.Module,
    sigmas: Tensor,
    images: Tensor,
    labels: Tensor | None,
    level: Tensor,
    step: int,
) -> Tensor:
    """The loss of each image at its noise level, (B,)."""
    if config.task == "classifier":
        noisy = perturb(images, sigmas[level], seed=config.seed, step=step)
        return F.cross_entropy(net(noisy, sigmas[level]), labels, reduction="none")
    options = {"projections": config.projections, "distribution": config.distribution}
    options |= {"method": config.loss, "labels": level, "seed": config.seed, "step": step}
    score = networks.with_labels(config, net, labels, step)
    return losses.noise_conditional(score, images, sigmas, **options)


def learning_rate(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise over 100 steps, then a cosine to zero."""
    rise = min(1.0, (step + 1) / 100)
    return rise * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
