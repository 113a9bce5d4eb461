"""The training loop: a short generator."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastscore.averages import averaged
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import RUN, SQUARE, function
from fastscore.training import gradients
from fastscore.training.nonfinite import NonFinite


class Step(NamedTuple):
    """What `training_loop` yields after each update.

    Its number, the losses (B,) detached, the averaged model.
    """

    step: int
    losses: torch.Tensor
    ema: torch.nn.Module

    def __repr__(self) -> str:
        return f"Step(step={self.step}, loss={float(self.losses.mean()):.4g})"


class _Options(NamedTuple):
    """Of `_loop`."""

    optimizer: torch.optim.Optimizer
    ema: nn.Module
    grad_clip: float | None
    accumulate: int
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    autocast: torch.dtype | None
    nonfinite: NonFinite


def training_loop(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[nn.Module, Any, int], Tensor],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | Tensor | None = None,
    ema_decay: float | None = None,
    grad_clip: float | None = None,
    first_step: int = 0,
    ema: nn.Module | None = None,
    accumulate: int = 1,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    autocast: torch.dtype | None = None,
    nonfinite: str | int | NonFinite = "raise",
) -> Iterator[Step]:
    """Train a model on a loss; yields a `Step` after each update.

    Whatever else is to happen after a step is the body of the caller's `for`. A model in
    DistributedDataParallel is trained on the batches of all its processes: each of them calls the
    loop with its own.

    Args:
        model: any module. loader: an iterable of batches, run again from its start when it ends.
        loss: called loss(model, batch, step), returns (B,) or a scalar; `step` is there for the
            noise key. Where a step has several batches, let each carry the number of its first
            sample among them, for the `first_sample` of the losses: its noise is then the same
            however the samples are spread.
        steps: number of the last step + 1. optimizer: Adam(lr) unless given, with lr = 1e-3 unless
            given. grad_clip: largest gradient norm, or None. ema_decay: of the averaged weights,
            0.999 unless given. first_step, ema: to resume.
        accumulate: batches of one update, whose gradient is that of the mean over all their
            samples.
        scheduler: of the learning rate, one of PyTorch's; it takes a step after each update.
        autocast: torch.bfloat16 computes the loss under torch.autocast, or None.
        nonfinite: "raise" where a loss or a gradient is not finite; or how many steps may be
            skipped for it before that; or a `NonFinite`.

    Raises:
        ValueError: steps or ema_decay out of range, lr beside an optimizer, ema_decay beside an ema
            of another decay, or the loader is empty, or ends and cannot be run again.
        FloatingPointError: the loss or its gradient is not finite; the message says whether the
            batch or the weights are.
        TypeError: the loss is no tensor.
    """
    op = "training_loop"
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module; got {shown(model)}.")
    if not isinstance(loader, Iterable):
        raise TypeError(f"{op}: loader must be an iterable of batches; got {shown(loader)}.")

    function(op, "loss", loss)
    ema_decay = None if ema_decay is None else checks.number(op, "ema_decay", ema_decay, 0, below=1)
    if optimizer is not None and lr is not None:
        raise ValueError(
            f"{op}: give either an optimizer, which has its own learning rate, or lr; got both."
        )
    if ema is not None and ema_decay not in (None, getattr(ema, "decay", None)):
        raise ValueError(
            f"{op}: ema_decay must be that of the ema that is given, "
            f"{getattr(ema, 'decay', None)}; got {ema_decay}."
        )

    steps = checks.integer(op, "steps", steps, 0, limit=RUN)
    first_step = checks.integer(op, "first_step", first_step, 0, limit=RUN)
    accumulate = checks.integer(op, "accumulate", accumulate, 1)
    if grad_clip is not None and not (type(grad_clip) is float and grad_clip == math.inf):
        grad_clip = checks.number(op, "grad_clip", grad_clip, above=0)
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"{op}: autocast must be torch.bfloat16 or None (float16 needs a scaled loss); got "
            f"{shown(autocast)}."
        )
    _check_scheduler(scheduler, optimizer)
    policy = nonfinite if isinstance(nonfinite, NonFinite) else _policy(nonfinite)

    if optimizer is None:
        lr = 1e-3 if lr is None else lr
        rate = checks.number(op, "lr", lr, 0, SQUARE)
        optimizer = torch.optim.Adam(
            model.parameters(),
            lr=lr if isinstance(lr, torch.Tensor) else rate,
            fused=gradients.can_fuse(model),
        )

    ema = averaged(model, 0.999 if ema_decay is None else ema_decay) if ema is None else ema
    options = _Options(optimizer, ema, grad_clip, accumulate, scheduler, autocast, policy)
    return _loop(model, loader, loss, range(first_step, steps), options)


def _policy(nonfinite):
    skip = nonfinite
    if nonfinite == "raise":
        skip = 0
    elif isinstance(nonfinite, str):
        raise ValueError(
            f"training_loop: nonfinite must be 'raise', a number of steps, or a NonFinite; got "
            f"{shown(nonfinite)}."
        )
    return NonFinite(checks.integer("training_loop", "nonfinite", skip, 0))


def _check_scheduler(scheduler, optimizer):
    op = "training_loop"
    if scheduler is None:
        return
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(
            f"{op}: scheduler must be one of torch.optim.lr_scheduler; got {shown(scheduler)}."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            f"{op}: ReduceLROnPlateau follows a value that the loop does not know; call its step "
            "in your own loop."
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(f"{op}: scheduler must be of the optimizer that is given.")


def _loop(model, loader, loss, steps, options):
    optimizer = options.optimizer
    policy = options.nonfinite
    policy.begin(model, optimizer)
    update = gradients.Update(model, options.accumulate)
    batches = _endless(loader, steps, options.accumulate)

    for step in steps:
        seen = list(itertools.islice(batches, options.accumulate))
        losses = []
        optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(seen):
            with update.batch(number):
                with _autocast(options.autocast, model):
                    found = _losses(loss, model, batch, step)
                # Their sum has more digits than bfloat16 has.
                update.backward(found.float() if found.dtype == torch.bfloat16 else found)
            losses.append(found.detach())

        value, norm = update.finish()
        if policy.allows(step, value, norm, losses, seen):
            if options.grad_clip is not None:
                gradients.clip(update.parameters, options.grad_clip, norm)
            policy.update(optimizer)
            options.ema.update_parameters(model)
        if options.scheduler is not None:
            options.scheduler.step()
        yield Step(step, gradients.joined(losses), options.ema)
    policy.look()


def _losses(loss, model, batch, step):
    losses = loss(model, batch, step)
    if not isinstance(losses, torch.Tensor):
        raise TypeError(
            "training_loop: loss(model, batch, step) must return a tensor, (B,) or a scalar; "
            f"got {type(losses).__name__}."
        )
    return losses


def _autocast(dtype, model):
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(gradients.device_of(model).type, dtype)


def _endless(loader, steps, accumulate):
    """Batches, again and again."""
    first = number = steps.start * accumulate
    while True:
        before = number
        for batch in loader:
            yield batch
            number += 1
        if number > before:
            continue
        if number > first:  # it had batches, once
            raise ValueError(
                f"training_loop: the loader ended before step {number // accumulate}, after "
                f"{number - first} batches, and has none when it is run again (a "
                "generator runs once); give a DataLoader or a list, or a generator without end."
            )
        once = " (an iterator that has ended already?)" if iter(loader) is loader else ""
        raise ValueError(f"training_loop: the loader is empty{once}.")
