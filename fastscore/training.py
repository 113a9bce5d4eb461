"""The training loop: a short generator."""

import math
from typing import NamedTuple

import torch

from fastscore.averages import averaged as averaged
from fastscore.ops import checks


class Step(NamedTuple):
    """What `training_loop` yields after each update: its number, the losses (B,) detached, the averaged model."""

    step: int
    losses: torch.Tensor
    ema: torch.nn.Module


def training_loop(model, loader, loss, *, steps, optimizer=None, lr=1e-3, ema_decay=0.999, grad_clip=None, first_step=0, ema=None):
    """Train a model on a loss; yields a `Step` after each update.

    Args:
        model: any module. loader: an iterable of batches, run again from its start when it ends.
        loss: called loss(model, batch, step), returns (B,) or a scalar; `step` is there for the noise key.
        steps: number of the last step + 1. optimizer: Adam(lr) unless given. grad_clip: largest gradient norm, or None.
        first_step, ema: to resume.

    Raises:
        ValueError: steps or ema_decay out of range, or the loader is empty. FloatingPointError: the loss is not finite.
        TypeError: the loss is no tensor.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"training_loop: ema_decay must be in [0, 1); got {ema_decay}.")
    steps = checks.integer("training_loop", "steps", steps, 0)
    first_step = checks.integer("training_loop", "first_step", first_step, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr) if optimizer is None else optimizer
    ema = averaged(model, ema_decay) if ema is None else ema
    return _loop(model, loader, loss, range(first_step, steps), optimizer, ema, grad_clip)


def _loop(model, loader, loss, steps, optimizer, ema, grad_clip):
    for step, batch in zip(steps, _endless(loader)):
        losses = loss(model, batch, step)
        if not isinstance(losses, torch.Tensor):
            raise TypeError(f"training_loop: loss(model, batch, step) must return a tensor, (B,) or a scalar; got {type(losses).__name__}.")
        value = losses.mean()
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"training_loop: the loss is {value.item()} at step {step}; lower the learning rate.")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        ema.update_parameters(model)
        yield Step(step, losses.detach(), ema)


def _endless(loader):
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("training_loop: the loader is empty.")
