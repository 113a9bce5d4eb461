"""What a training takes, said and checked before it begins, and how many steps a budget buys."""

import math
import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from fastscore import memory, schedules, training
from fastscore.cli import emphasis, fit, networks, splits
from fastscore.cli.config import TrainConfig
from fastscore.datasets import Source
from fastscore.training.ranks import Ranks

_BUDGET = 10.0   # minutes
_SAVED = 16   # bytes of a parameter in a save: its average, itself and Adam's two
_TRAINED = 20   # bytes of a parameter in training: those and the gradient
_MEASURED = 12   # steps at most, and three at least where they take less than ten seconds
_PICTURES = 64
_ROUGH = 2000   # steps of a convolutional network, below which samples are hardly more than strokes


class Plan(NamedTuple):
    """A training before it begins.

    config: resolved. shape, images: of the data. parameters: their number. seconds: of a step.
    memory, disk: in bytes; disk is that of the saves that are kept.
    """

    config: TrainConfig
    shape: tuple[int, ...]
    images: int
    parameters: int
    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        c = self.config
        told = f", told {c.classes} classes" if c.classes else ""
        told = f", told contexts of {c.context}" if c.context else told
        kind = "classifier (mlp)" if c.task == "classifier" else c.network
        lines = [
            f"{kind} of width {c.width}, {_count(self.parameters)} parameters{told}, for "
            f"{self.images} samples of {'x'.join(map(str, self.shape))}; {c.levels} noise levels "
            f"from {c.sigma_max:.3g} to {c.sigma_min:.3g}",
            f"{c.steps} steps of {c.batch_size}: {_time(self.seconds)} each, "
            f"{_time(c.steps * self.seconds)} in all{self._pictures()}; {_bytes(self.memory)} of "
            f"memory, {_bytes(self.disk)} of disk for {_kept(c)} saves",
        ]
        return "\n".join([*lines, *self.remarks()])

    def _pictures(self):
        """What the samples at the end take, by a third of a step for one call of the network."""
        c = self.config
        if c.task != "score":
            return ""
        calls = max(200, c.levels) * (1 + (c.classes > 0)) if c.network == "unet" else 20 * c.levels
        seconds = calls * _PICTURES / c.batch_size * self.seconds / 3
        return f", and {_time(seconds)} for pictures" if seconds > 5 else ""

    def remarks(self) -> list[str]:
        """What stands against good samples, and the way out."""
        c, dim = self.config, math.prod(self.shape)
        if c.task == "score" and c.network == "mlp" and c.width < dim:
            least = (dim - c.width) / (2 * dim)
            return [
                f"the mlp is narrower than a sample, {c.width} of {dim}: its loss cannot fall "
                f"below {least:.2g}, which stays in the samples as noise; --width {dim} can"
            ]
        if c.network != "mlp" and c.steps < _ROUGH:
            minutes = math.ceil(_ROUGH * self.seconds / 60)
            return [f"samples are rough below some {_ROUGH} steps: --budget {minutes} buys these"]
        return []


def made(config: TrainConfig, together: Ranks) -> Plan:
    """The plan of a new run: its options resolved, steps among them, and what it takes.

    Nothing is written, and nothing random is moved: steps are measured on a network of their own.

    Raises:
        ValueError: it does not fit in the memory or on the disk, or as `fit.fit`.
    """
    given = config.given
    if "steps" in given and config.budget:
        raise ValueError("train: give either steps or budget; got both.")
    data = splits.source(config)
    part = data.subset(splits.split(config, data)[0])
    if config.task == "classifier" and part.labels is None:
        raise ValueError(f"train: a classifier needs labels; {config.data} has none.")
    config = networks.resolved(config, part, data)
    classes = None if data.labels is None else int(data.labels.max()) + 1

    shape, images = part.shape, len(part)
    parameters = _parameters(config, shape, classes)
    batch = config.batch_size // (together.size * config.accumulate)
    needed = _check_memory(config, shape, parameters, batch, together.device, classes)
    disk = _check_disk(config, parameters)

    # On every process; the slowest counts.
    seconds = _seconds(config, part, classes, together)
    seconds = together.highest(math.ceil(seconds * 1e9)) / 1e9
    if "steps" not in given and (config.network != "mlp" or config.budget):
        config = _with_steps(config, seconds)
    return Plan(config, shape, images, parameters, seconds, needed, disk)


def _with_steps(config, seconds):
    """As many as fit in the budget, to two digits; a hundred at least.

    The run keeps these, and no budget.
    """
    steps = max(100, int(60 * (config.budget or _BUDGET) / seconds))
    unit = 10 ** max(0, len(str(steps)) - 2)
    values = {name: getattr(config, name) for name in config.given}
    return TrainConfig(**values | {"steps": steps // unit * unit, "budget": 0.0})


def _parameters(config, shape, classes):
    sigmas = schedules.geometric(config.sigma_max, config.sigma_min, min(2, config.levels))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net = networks.network(config, shape, sigmas, classes)
    return sum(p.numel() for p in net.parameters())


def _check_memory(config, shape, parameters, batch, device, classes):
    """Bytes that training takes.

    Raises:
        ValueError: they are not there.
    """
    free, where = memory.available(), "memory"
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "GPU's memory"

    def check(needed, what, remedy):
        if needed > free:
            raise ValueError(
                f"train: {what} takes {_bytes(needed)} in training, more than the {_bytes(free)} "
                f"of the {where} that are free; {remedy}."
            )
        return needed

    weights = f"a network of {_count(parameters)} parameters"
    check(_TRAINED * parameters, weights, "lower width or depth")
    # Images, noise and scores at the least, before a network is asked.
    per_sample = 16 * math.prod(shape)
    remedy = "lower batch_size or raise accumulate"
    check(per_sample * batch, f"a batch of {batch}", remedy)
    per_sample += _kept_for_backward(config, shape, classes)
    needed = _TRAINED * parameters + per_sample * batch
    return check(needed, f"{weights} with a batch of {batch}", remedy)


def _kept_for_backward(config, shape, classes):
    """Bytes of one sample."""
    sizes = {}

    def pack(t):
        if t.dim() and len(t) == 1:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    net, sigmas = networks.build(config, shape, classes)
    x = torch.zeros(1, *shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x, sigmas[:1])
    return sum(sizes.values())


def _kept(config):
    """Saves of a run: the last ones, and the best where there are held-out images."""
    return config.keep + (config.held_out > 0)


def _check_disk(config, parameters):
    folder = Path(config.out).absolute()
    while not folder.exists():
        folder = folder.parent
    each = (_SAVED + 4 * len(config.ema_widths)) * parameters
    needed, free = _kept(config) * each, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"train: {_kept(config)} saves of a network of {_count(parameters)} parameters "
            f"take {_bytes(needed)}, more than the {_bytes(free)} that are free in {folder}; "
            "lower width or depth, or give another out."
        )
    return needed


def _seconds(config: TrainConfig, data: Source, classes: int | None, together: Ranks) -> float:
    """Of a step of training, measured on a network of its own."""
    net, sigmas = networks.build(config, data.shape, classes)
    net, sigmas = net.to(together.device), sigmas.to(together.device)

    def loss(model, batch, step):
        *batch, first = batch
        level = emphasis.draw_levels(config, sigmas, len(batch[0]), step=step, first_sample=first)
        return fit.objective(config, model, sigmas, *batch, level, step, first_sample=first)

    batches = fit.batches(data.whole, config, 0, sigmas.device, together)
    options = {"steps": config.steps, "lr": config.lr, "ema_decay": config.ema_decay}
    options |= {"accumulate": config.accumulate, "grad_clip": config.grad_clip or None}
    options |= {"autocast": torch.bfloat16 if config.precision == "bfloat16" else None}
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    loop = training.training_loop(net, batches, loss, **options)
    found, begin = [], time.perf_counter()
    for state in loop:
        state.losses.sum().item()   # waits for a GPU
        now = time.perf_counter()
        found.append(now - begin)
        begin = now
        if len(found) == _MEASURED or sum(found) > (1 if len(found) > 2 else 10):
            break
    batches.close()
    # The first step makes what the others find made.
    return statistics.median(found[1:] or found)


def _count(n):
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e5, "million")):
        if n >= unit:
            return f"{n / max(unit, 1e6):.3g} {name}"
    return str(n)


def _bytes(n):
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n / 2**10:.1f} KiB"


def _time(seconds):
    for unit, name in ((3600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{1000 * seconds:.3g} ms"
