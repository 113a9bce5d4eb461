"""The one loop that trains, in a run folder: a score network by any loss, or a classifier."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore import datasets, likelihood, losses, perturb, training
from fastscore.cli import board, emphasis, metrics, networks, run_folder, splits, widths
from fastscore.cli.board import Board
from fastscore.cli.config import TrainConfig
from fastscore.cli.validation import Validation
from fastscore.datasets import order
from fastscore.training import files, lock, ranks
from fastscore.training.ranks import Ranks

SAVE_EVERY = 500   # steps: what a killed run may lose
RECORD_EVERY = 100


def fit(config: TrainConfig, together: Ranks | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, mean loss) after each update of what the config trains.

    The loss of a score network is that of `losses.noise_conditional`; of a classifier it is

        L_b = -log p(label_b | x_b + σ_b z, σ_b),    σ_b uniform on the ladder

    The run is saved every 500 steps, at its end, and when the generator is closed; an exception in
    the middle of a step leaves the save before it.

    Args:
        together: the processes that share the work, each of which calls `fit`. The batch is cut
            into equal parts, one after another, and everything random follows the number that a
            sample has in the whole. The first process alone writes.

    Raises:
        ValueError: an option is out of range; the folder holds a run already (without resume) or
            none (with it), or one that cannot go on so; the data cannot be read, or have no labels
            for a classifier.
    """
    together = together or Ranks()
    if config.resume:
        config = run_folder.resumed(config)
    out = Path(config.out)
    if not config.resume and together.leads:
        refuse_another_run(out)
    data = splits.source(config)
    if config.task == "classifier" and data.labels is None:
        raise ValueError(f"train: a classifier needs labels; {config.data} has none.")
    if config.tensorboard:
        board.check()
    training_part, held_out = (data.subset(part) for part in splits.split(config, data))
    # Of all samples: those that are held out may have a class that no other has.
    classes = None if data.labels is None else int(data.labels.max()) + 1
    if not config.resume:
        config = networks.resolved(config, training_part, data)
    if config.batch_size % (together.size * config.accumulate):
        raise ValueError(
            f"train: batch_size must be a multiple of processes x accumulate, {together.size} x "
            f"{config.accumulate}; got {config.batch_size}."
        )
    net, sigmas = networks.build(config, data.shape, classes)
    whole = training_part.whole
    whole, net, sigmas = (t.to(together.device) for t in (whole, net, sigmas))
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    things = (whole, held_out if config.held_out else None, net, sigmas)
    # Of all images, which are read for it; the other processes need none.
    record = splits.record(config, data) if together.leads else None
    return _updates(config, together, out, data.shape, record, *things)


def batches(
    data: datasets.Source,
    config: TrainConfig,
    first_step: int,
    device: torch.device,
    together: Ranks | None = None,
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """The batches of this process, on the device: images, labels, and the number of the first in
    the whole batch of its step.

    They are a function of the seed and the step: a resumed run sees what the whole one would. Each
    step has `accumulate` of them.
    """
    parts = (together or Ranks()).parts(config.batch_size, config.accumulate)
    begin, count = parts[0][0], sum(count for _, count in parts)
    options = {"seed": config.seed, "steps": config.steps, "first_step": first_step}
    options |= {"first_sample": begin, "count": count}
    for step, images, labels in datasets.batches(data, config.batch_size, **options):
        for first, count in parts:
            part = slice(first - begin, first - begin + count)
            varied = _varied(images[part].to(device), config, step, first)
            if config.channels_last:
                varied = varied.contiguous(memory_format=torch.channels_last)
            yield varied, None if labels is None else labels[part].to(device), first


def _varied(images, config, step, first_sample):
    """Training images as the options want them; first_sample: the number of the first in the batch
    of all processes."""
    key = {"seed": config.seed, "step": step, "first_sample": first_sample}
    if config.flip or config.shift or config.crop:
        options = {"flip": config.flip, "shift": config.shift, "crop": config.crop or None}
        images = datasets.augment(images, **options, **key)
    if config.grey_levels:
        images = likelihood.dequantize(images, config.grey_levels, **key)
    return images


def refuse_another_run(out: Path) -> None:
    """Raise ValueError if the folder holds anything."""
    # What a run that was killed before it had its config leaves is none.
    kept = [] if not out.exists() else list(out.iterdir())
    left = {splits.FILE, lock.NAME, ranks.JOB}
    if [path for path in kept if path.name not in left and not files.is_temporary(path)]:
        raise ValueError(f"train: {out} exists already; choose another folder or pass --resume.")


def _updates(config, together, out, *things):
    with _writing(config, together, out):
        yield from _updates_alone(config, together, out, *things)


@contextlib.contextmanager
def _writing(config, together, out):
    """Within: nobody else writes the run. The other processes of this one wait until it is so."""
    if not together.leads:
        together.meet()
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with lock.only_writer(out):
        if not config.resume:
            # Another process may have begun meanwhile.
            refuse_another_run(out)
        files.sweep(out)
        ranks.claim(out)
        together.meet()
        yield


def _updates_alone(config, together, out, shape, split, data, held_out, net, sigmas):
    run = Run(config, together, out, net, sigmas)
    together.check_same("the step that the run goes on from", run.done)
    together.check_same("the number of images", len(data))
    if run.done > config.steps:
        raise ValueError(
            f"train: {out} has done {run.done} steps already; steps must be at least that; "
            f"got {config.steps}."
        )
    dim = math.prod(shape) if config.task == "score" else 1
    sums = metrics.Metrics(len(sigmas), dim, together, **run.begun)
    if together.leads:
        # The config makes it a run, so it comes last.
        splits.keep(out, split)
        run_folder.write_config(out, config, shape)
        if held_out is not None:
            run.validation = Validation(objective, config, held_out, sigmas, dim)
        if config.tensorboard:
            run.board = Board(out, sigmas, shape, run.done)

    levels = []

    def loss(model, batch, step):
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step, config.steps)
        *batch, first = batch
        level = emphasis.draw_levels(config, sigmas, len(batch[0]), step=step, first_sample=first)
        levels.append(level)
        return objective(config, model, sigmas, *batch, level, step, first_sample=first)

    def describe(batch, step, i):
        number = batch[-1] + i
        which = {"seed": config.seed, "step": step, "first_sample": number}
        (row,) = order.chosen(len(data), config.batch_size, count=1, **which).tolist()
        key = {"step": step, "first_sample": number}
        (level,) = emphasis.draw_levels(config, sigmas, 1, **key).tolist()
        return f"training image {row} at noise level {level}, σ = {float(sigmas[level]):.3g}"

    run.policy.describe = describe
    options = {"steps": config.steps, "optimizer": run.optimizer, "first_step": run.done}
    options |= {"ema": run.ema, "accumulate": config.accumulate, "nonfinite": run.policy}
    options |= {"grad_clip": config.grad_clip or None}
    options |= {"autocast": torch.bfloat16 if config.precision == "bfloat16" else None}
    called = together.wrapped(torch.compile(net) if config.compile else net)
    parts = batches(data, config, run.done, sigmas.device, together)
    try:
        for state in training.training_loop(called, parts, loss, **options):
            # One that is skipped has no loss.
            if state.step not in run.policy.skipped:
                sums.add(levels, state.losses)
            levels.clear()
            run.step(state.step + 1, sums)
            yield state.step, state.losses.mean()
    except GeneratorExit:
        # Between two steps; in the middle of one, nothing fits together. Nor does it where the
        # other processes go on.
        if together.size == 1 or together.ending:
            run.save(sums)
        raise
    except FloatingPointError:
        # Of the loss, before anything was updated. Weights that are not finite are refused.
        with contextlib.suppress(ValueError, FloatingPointError):
            run.save(sums)
        raise
    finally:
        # The thread that reads ahead ends here, whoever keeps a traceback.
        parts.close()
    run.save(sums)
    run.close()


class Run:
    """What a run has done, and what is written of it.

    Attributes:
        done: steps. begun: what the metrics held when the run was saved.
        validation, board: of the process that writes, where they are wanted.
    """

    validation: Validation | None = None
    board: Board | None = None

    def __init__(
        self, config: TrainConfig, together: Ranks, out: Path, net: nn.Module, sigmas: Tensor
    ) -> None:
        self.config = config
        self.together = together
        self.out = out
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
        self.ema = training.averaged(net, config.ema_decay)
        self.policy = training.NonFinite(config.skip)
        self.last, self.done, self.begun = None, 0, {}
        if config.resume:
            parts = (out, net, self.ema, self.optimizer, together.leads)
            self.last, self.done, self.begun = run_folder.restore(*parts)
        self.policy.skipped = self.begun.pop("skipped", torch.zeros(0)).int().tolist()
        self.best = None if self.last is None else self.last.manifest().get("best")
        self.averages = widths.begun(config, net, self.last)
        self._loss = None   # of the held-out images, after this step

    def step(self, done: int, sums: metrics.Metrics) -> None:
        """So many steps are done: write what is to be written after this one."""
        self.done = done
        self._loss = None
        for average in self.averages:
            average.update_parameters(self.net)
        ends = done == self.config.steps
        looks = self.config.held_out > 0 and (done % self.config.held_out_every == 0 or ends)
        if looks or ends or done % RECORD_EVERY == 0:
            self._record(sums, looks)
        if done % SAVE_EVERY == 0:
            self.save(sums)

    def _record(self, sums, looks):
        record = sums.record(self.done)
        if self.policy.skipped:
            record["skipped"] = len(self.policy.skipped)
        if looks and self.validation is not None:
            record |= self.validation.record(self.ema.module)
            self._loss = record["held_out"]
        if self.together.leads:
            metrics.add(self.out, record)
        if self.board is not None:
            self.board.add(record)

    def save(self, sums: metrics.Metrics) -> None:
        """Save it as it is between two steps."""
        # Of a step that the device has left out nothing is known until then.
        self.policy.look()
        state = sums.state()
        state["skipped"] = torch.tensor(self.policy.skipped, dtype=torch.int64)
        if not self.together.leads:
            return
        if self._loss is not None and (self.best is None or self._loss < self.best["loss"]):
            self.best = {"step": self.done, "loss": self._loss}
        options = {"last": self.last, "seed": self.config.seed}
        options |= {"keep": self.config.keep, "best": self.best}
        options |= {"processes": self.together.size}
        options["more"] = widths.contents(self.averages)
        parts = (self.net, self.ema, self.optimizer, self.done, state)
        self.last = run_folder.save(self.out, *parts, **options)
        if self.board is not None and self.config.task == "score":
            self.board.show(self.ema.module, self.done)

    def close(self) -> None:
        """Once all steps are done."""
        if self.board is not None:
            self.board.close()


def objective(
    config: TrainConfig,
    net: nn.Module,
    sigmas: Tensor,
    images: Tensor,
    labels: Tensor | None,
    level: Tensor,
    step: int,
    first_sample: int = 0,
) -> Tensor:
    """The loss of each image at its noise level, (B,).

    first_sample: number of the first image in the whole batch of the step.
    """
    key = {"seed": config.seed, "step": step}
    if config.task == "classifier":
        offset = first_sample * images[:1].numel()
        noisy = perturb(images, sigmas[level], offset=offset, **key)
        return F.cross_entropy(net(noisy, sigmas[level]), labels, reduction="none")
    options = {"projections": config.projections, "distribution": config.distribution}
    options |= {"method": config.loss, "labels": level, "first_sample": first_sample}
    score = networks.with_labels(config, net, labels, step, first_sample)
    values = losses.noise_conditional(score, images, sigmas, **options, **key)
    weights = emphasis.weights(config, sigmas)
    return values if weights is None else values * weights[level]


def learning_rate(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise over 100 steps, then a cosine to zero."""
    rise = min(1.0, (step + 1) / 100)
    return rise * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
