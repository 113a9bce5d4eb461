"""The training loop: a short generator."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastscore.averages import averaged as averaged
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import RUN, SQUARE, function
from fastscore.training.post_hoc import post_hoc as post_hoc
from fastscore.training.post_hoc import power_averaged as power_averaged

__all__ = ["Step", "averaged", "post_hoc", "power_averaged", "training_loop"]


class Step(NamedTuple):
    """What `training_loop` yields after each update.

    Its number, the losses (B,) detached, the averaged model.
    """

    step: int
    losses: torch.Tensor
    ema: torch.nn.Module

    def __repr__(self) -> str:
        return f"Step(step={self.step}, loss={float(self.losses.mean()):.4g})"


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
) -> Iterator[Step]:
    """Train a model on a loss; yields a `Step` after each update.

    Args:
        model: any module. loader: an iterable of batches, run again from its start when it ends.
        loss: called loss(model, batch, step), returns (B,) or a scalar; `step` is there for the
            noise key.
        steps: number of the last step + 1. optimizer: Adam(lr) unless given, with lr = 1e-3 unless
            given. grad_clip: largest gradient norm, or None. ema_decay: of the averaged weights,
            0.999 unless given. first_step, ema: to resume.

    Raises:
        ValueError: steps or ema_decay out of range, lr beside an optimizer, ema_decay beside an ema
            of another decay, or the loader is empty, or ends and cannot be run again.
        FloatingPointError: the loss is not finite; the message says whether the batch or the
            weights are.
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
    if grad_clip is not None and not (type(grad_clip) is float and grad_clip == math.inf):
        grad_clip = checks.number(op, "grad_clip", grad_clip, above=0)
    if optimizer is None:
        lr = 1e-3 if lr is None else lr
        rate = checks.number(op, "lr", lr, 0, SQUARE)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=lr if isinstance(lr, torch.Tensor) else rate
        )

    ema = averaged(model, 0.999 if ema_decay is None else ema_decay) if ema is None else ema
    return _loop(model, loader, loss, range(first_step, steps), optimizer, ema, grad_clip)


def _loop(model, loader, loss, steps, optimizer, ema, grad_clip):
    for step, batch in zip(steps, _endless(loader, steps.start)):
        losses = loss(model, batch, step)
        if not isinstance(losses, torch.Tensor):
            raise TypeError(
                "training_loop: loss(model, batch, step) must return a tensor, (B,) or a scalar; "
                f"got {type(losses).__name__}."
            )
        value = losses.mean()
        if not math.isfinite(value.item()):
            raise FloatingPointError(
                f"training_loop: the loss is {value.item()} at step {step}; {_why(model, batch)}."
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        ema.update_parameters(model)
        yield Step(step, losses.detach(), ema)


def _why(model, batch):
    """What a loss that is not finite comes from, looked at once it is there."""
    if not _finite(tree_leaves(batch)):
        return "the batch holds NaN or infinite values, so look at the data"
    if not _finite([*model.parameters(), *model.buffers()]):
        return (
            "the weights are not finite; lower the learning rate, or clip the gradient (grad_clip)"
        )
    return "the data and the weights are finite, so look at the loss, or lower the learning rate"


def _finite(things):
    return all(bool(t.isfinite().all()) for t in map(_tensor, things) if t is not None)


def _tensor(thing):
    """A tensor of what may be NaN; None for everything else."""
    if isinstance(thing, np.ndarray) and thing.dtype.kind == "f":
        return torch.from_numpy(thing)
    return (
        thing.detach()
        if isinstance(thing, torch.Tensor) and (thing.is_floating_point() or thing.is_complex())
        else None
    )


def _endless(loader, first):
    """Batches, again and again."""
    step = first
    while True:
        before = step
        for batch in loader:
            yield batch
            step += 1
        if step > before:
            continue
        if step > first:  # it had batches, once
            raise ValueError(
                f"training_loop: the loader ended before step {step}, after {step - first} "
                "batches, and has none when it is run again (a "
                "generator runs once); give a DataLoader or a list, or a generator without end."
            )
        once = " (an iterator that has ended already?)" if iter(loader) is loader else ""
        raise ValueError(f"training_loop: the loader is empty{once}.")
