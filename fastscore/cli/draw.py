"""The one loop that draws: batches of a network or under conditions, on one process or several.

Batches are the same whatever happens to a job: each rank takes whole ones, and finished ones can be
kept for a job that goes on. So the samples of a job that was interrupted or split are those of one
that was not, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastscore import distributed, memory, models, random, sampling
from fastscore.cli import run_folder
from fastscore.cli.conditions import Condition, conditioned
from fastscore.cli.parts import Parts, digest_of_network
from fastscore.cli.progress import Progress
from fastscore.cli.sampler_options import DATA, SamplerOptions
from fastscore.ops import checks

FOLLOWED = 8   # samples whose path is shown
LONGEST = 128   # states of a path


class Job(NamedTuple):
    """Samples to draw, checked by `prepare`.

    score: called score(start, end), returns the score(x, sigma) of these samples of the job.
    hook: called hook(first_sample), returns `project` of a batch. states: how many a batch has.
    start: mean and standard deviation of the law DATA. to_images: from what the score knows to
    [0, 1]. shown: what is written beside the samples.
    depends_on: what they depend on, by name.
    """

    score: Callable
    hook: Callable
    sampler: dict[str, Any]
    start: tuple[float, float] | None
    states: int
    shape: tuple[int, int, int]
    device: torch.device
    n: int
    batch_size: int
    seed: int
    first_sample: int
    to_images: Callable
    shown: dict[str, Tensor]
    depends_on: dict[str, Any]

    @property
    def batches(self) -> int:
        """Their number."""
        return -(-self.n // self.batch_size)

    def bounds(self, batch: int) -> tuple[int, int]:
        """The first sample of a batch and the one after its last, counted within the job."""
        start = batch * self.batch_size
        return start, min(start + self.batch_size, self.n)


class Drawn(NamedTuple):
    """Samples (n, C, H, W) on the CPU, the path of the first eight, (states, 8, C, H, W), thinned
    where it is long, and what is shown beside them, (C, H, W) each."""

    samples: Tensor
    path: Tensor
    shown: dict[str, Tensor]


def prepare(
    net: nn.Module,
    sigmas: Tensor,
    shape: tuple[int, int, int],
    n: int,
    *,
    seed: int | None = 0,
    first_sample: int = 0,
    batch_size: int = 500,
    condition: dict[str, Any] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    context: Tensor | None = None,
    weight: float | None = None,
    **sampler: Any,
) -> Job:
    """The job of drawing n samples of a network, on its device.

    Args:
        net, sigmas, shape: of a run (`run_folder.open_run`) or a checkpoint.
        condition: arguments of `conditions.conditioned`, or None.
        labels: of a network that knows classes: one for all samples or one for each, (n,); -1 for
            none. context: of one that knows contexts, (C,) or (n, C).
        weight: of classifier-free guidance; 0 is the class itself. 1 unless given, 0 for contexts.
        sampler: fields of `SamplerOptions`.

    Raises:
        ValueError: whatever the sampler and the conditions refuse.
    """
    n = checks.integer("sample", "n", n, 1)
    batch_size = checks.integer("sample", "batch_size", batch_size, 1)
    # Batches, all of them together, and as images.
    memory.check(12 * n * math.prod(shape), f"sample: {n} samples", "; lower n")
    options = SamplerOptions(**sampler)
    arguments = options.arguments(sigmas, net)
    device = next(net.parameters()).device
    # One for the observation, the hook and all batches.
    seed = random.draw_seed() if seed is None else seed

    under = Condition(lambda start, end: net, lambda first: None, {}, {})
    if labels is not None or context is not None:
        told = {"labels": labels, "context": context, "weight": weight}
        condition = {**(condition or {}), **told}
    if condition is not None:
        under = conditioned(net, shape, n=n, seed=seed, **condition)

    start = _start_law(net, sigmas) if arguments["initial_law"] == DATA else None
    depends_on = {
        **arguments,
        **under.depends_on,
        "sigmas": sigmas.tolist(),
        "weights": digest_of_network(net),
        "shape": list(shape),
        "seed": seed,
        "first_sample": first_sample,
        "n": n,
        "batch_size": batch_size,
    }
    if start is not None:
        depends_on["start"] = start
    job = Job(
        score=under.score,
        hook=under.hook,
        sampler=arguments,
        start=start,
        states=options.states(sigmas),
        shape=tuple(shape),
        device=device,
        n=n,
        batch_size=batch_size,
        seed=seed,
        first_sample=first_sample,
        to_images=getattr(net, "to_images", lambda x: x),
        shown=under.shown,
        depends_on=depends_on,
    )
    # A run of no samples, which refuses what the sampler does before anything is kept.
    _states(job, 0, 0)
    return job


def _start_law(net, sigmas):
    """Of images with noise of σ_1, as far as a UNet knows them: their mean and standard deviation.

    Whatever all pixels share, their brightness, is in sum far larger than σ_1: from N(0, σ_1²)
    flows and predictors never reach it, and Langevin steps take a while.
    """
    if not isinstance(net, models.UNet):
        raise ValueError(
            f"sample: initial_law {DATA} is for a UNet, which knows the mean of its data; "
            "take uniform or gaussian."
        )
    return net.data_mean, math.hypot(net.data_std, float(sigmas[0]))


def draw(
    job: Job, *, done: Callable[[int], object] | None = None, parts: Parts | None = None
) -> Drawn | None:
    """Draw the samples of a job; on several ranks (torchrun), on rank 0, and None on the others.

    Args:
        done: called with the number of states reported since.
        parts: keeps finished batches, and has those that are not drawn again.
    """
    done = done or (lambda states: None)
    own = [_batch(job, number, done, parts) for number in own_batches(job)]
    samples, path = _gathered(job, own)
    if samples is None:
        return None
    return Drawn(job.to_images(samples), job.to_images(path), job.shown)


def draw_shown(
    name: str,
    job: Job,
    check: Callable[[], object] = lambda: None,
    parts: Parts | None = None,
) -> Drawn | None:
    """`draw`, with its progress under this name; check is called after every state."""
    total = len(own_batches(job)) * job.states
    images = job.n / (job.batches * job.states)
    first = distributed.environment()[0] == 0
    with Progress(name, total, "level", images=images, shown=first) as progress:

        def done(states):
            progress.update(states)
            check()

        return draw(job, done=done, parts=parts)


def draw_run(folder: str | Path, n: int, **options: Any) -> Drawn:
    """n samples of a run folder; options as in `prepare`."""
    net, sigmas, shape, _ = run_folder.open_run(folder)
    return draw(prepare(net, sigmas, shape, n, **options))


def own_batches(job: Job) -> range:
    """The numbers of the batches that this rank draws."""
    first, count = distributed.share(job.batches)
    return range(first, first + count)


def _batch(job, number, done, parts):
    """One batch, drawn or found: its samples, and the path of those among the first eight."""
    start, end = job.bounds(number)
    found = None if parts is None else parts.load(start, end)
    if found is not None:
        done(job.states)
        return found

    run = _states(job, start, end)
    samples, path = followed(run, job.states, _followed_in(job, number), done)
    batch = {"samples": samples, "path": path}
    if parts is not None:
        parts.save(start, end, batch)
    return batch


def _states(job, start, end):
    """The run of these samples of a job."""
    first = job.first_sample + start
    options = {"shape": (end - start, *job.shape), **job.sampler}
    key = {"seed": job.seed, "first_sample": first, "device": job.device}
    if job.start is not None:
        mean, std = job.start
        del options["initial_law"]
        options["x"] = mean + sampling.initial(
            options.pop("shape"), law="gaussian", sigma=std, **key
        )
        del key["device"]
    return sampling.states(job.score(start, end), project=job.hook(first), **options, **key)


def followed(
    run: Iterator[sampling.State], states: int, count: int, done: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Exhaust a run of so many states: the last x, and the path of its first `count` samples."""
    shown = set(shown_states(states))
    path = []
    for number, state in enumerate(run):
        if number in shown:
            path.append(state.x[:count].cpu())
        done(1)
    assert number + 1 == states, (number + 1, states)
    return state.x.cpu(), torch.stack(path)


def shown_states(states: int) -> list[int]:
    """Which states of a run its path shows: each, or each second, fourth, ... and the last."""
    stride = 1
    while -(-states // stride) > LONGEST:
        stride *= 2
    shown = list(range(0, states, stride))
    return shown if shown[-1] == states - 1 else [*shown, states - 1]


def _followed_in(job, number):
    """How many samples of a batch are among the first eight of the job."""
    start, end = job.bounds(number)
    return max(0, min(FOLLOWED, end) - start)


def _gathered(job, own):
    """(samples, path) of all ranks on rank 0, (None, None) on the others."""
    rank, world_size = distributed.environment()
    if world_size == 1:
        samples = torch.cat([batch["samples"] for batch in own])
        return samples, torch.cat([batch["path"] for batch in own], 1)

    # As whole batches, of which only the last can be short.
    padded = torch.zeros(len(own), job.batch_size, *job.shape)
    for row, batch in zip(padded, own):
        row[: len(batch["samples"])] = batch["samples"]
    with distributed.process_group():
        samples = distributed.gather(padded, job.batches)
        path = _gathered_path(job, own, rank, world_size)
    return (None, None) if samples is None else (samples.flatten(0, 1)[: job.n], path)


def _gathered_path(job, own, rank, world_size):
    """The path of the first eight samples, of which small batches leave some to other ranks."""
    counts = []
    for other in range(world_size):
        first, count = distributed.share(job.batches, other, world_size)
        counts.append(sum(_followed_in(job, number) for number in range(first, first + count)))
    path = torch.cat([batch["path"] for batch in own], 1) if own else None
    if not any(counts[1:]):
        return path

    padded = torch.zeros(FOLLOWED, len(shown_states(job.states)), *job.shape)
    if counts[rank]:
        padded[: counts[rank]] = path.transpose(0, 1)
    every = distributed.gather(padded, FOLLOWED * world_size)
    if every is None:
        return None
    rows = [every[other * FOLLOWED :][:count] for other, count in enumerate(counts)]
    return torch.cat(rows).transpose(0, 1)
