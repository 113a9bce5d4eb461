"""Steps whose loss or gradient is not finite."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastscore.averages import local

LOOK_EVERY = 100   # steps, where every look waits for a GPU


class _Seen(NamedTuple):
    step: int
    value: Tensor
    norm: Tensor
    losses: list[Tensor]


class NonFinite:
    """What becomes of a step whose loss or gradient is not finite: FloatingPointError, or nothing.

    A step that is skipped changes no weights, no average and no state of the optimizer; a warning
    names it. Where none may be skipped and the optimizer can leave out an update by itself
    (PyTorch's fused ones on a GPU), nothing waits for the device: it is asked every 100 steps and
    at the end, and by `look`, without which nothing should be saved.

    Args:
        skip: how many steps may be skipped; the next one raises.
        describe: called describe(batch, step, i), tells in words what the i-th sample of a batch
            was, such as the image and its noise level.
    """

    def __init__(
        self, skip: int = 0, *, describe: Callable[[Any, int, int], str] | None = None
    ) -> None:
        self.skip = skip
        self.describe = describe
        self.skipped: list[int] = []   # numbers of steps
        self._late = False
        self._unseen: list[_Seen] = []

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Of a loop."""
        self._model = model
        on_gpu = any(p.is_cuda for p in model.parameters())
        self._late = on_gpu and not self.skip and _can_leave_out(optimizer)

    def allows(
        self, step: int, value: Tensor, norm: Tensor, losses: list[Tensor], batches: list[Any]
    ) -> bool:
        """Whether a step is to be made; on a GPU it may turn out later that it was not.

        Args:
            value, norm: the mean loss, and the norm of its gradient. losses: of each batch.
        """
        if self._late:
            self._unseen.append(_Seen(step, value, norm, losses))
            if len(self._unseen) >= LOOK_EVERY:
                self.look()
            return True

        found = float(value)
        if math.isfinite(found) and math.isfinite(norm):
            return True
        told = self._told(_Seen(step, found, norm, losses), batches)
        if len(self.skipped) >= self.skip:
            raise FloatingPointError(f"training_loop: {told}.")
        self.skipped.append(step)
        warnings.warn(
            f"training_loop: step {step} is skipped ({len(self.skipped)} of {self.skip}): {told}.",
            stacklevel=3,
        )
        return False

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step, unless the device finds that it must not be."""
        if not self._late:
            optimizer.step()
            return
        last = self._unseen[-1]
        optimizer.grad_scale = None
        optimizer.found_inf = _bad(last).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def look(self) -> None:
        """Wait for the device; raise FloatingPointError if a step until now was not finite."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        bad = torch.stack([_bad(seen) for seen in unseen]).tolist()
        if any(bad):
            raise FloatingPointError(f"training_loop: {self._told(unseen[bad.index(True)], None)}.")

    def _told(self, seen, batches):
        told = f"the loss is {float(seen.value)} at step {seen.step}"
        if math.isfinite(seen.value):
            told = f"the gradient is not finite at step {seen.step}, where the loss is "
            told += f"{float(seen.value):.4g}"
        told += f"; {_why(self._model, batches)}"
        return told + self._samples(seen, batches)

    def _samples(self, seen, batches):
        """Which samples it was, where it was not all of them."""
        bad = [t.reshape(-1).isfinite().logical_not().nonzero().flatten() for t in seen.losses]
        count = sum(map(len, bad))
        total = sum(t.numel() for t in seen.losses)
        if count in (0, total):
            return ""
        number = next(k for k, found in enumerate(bad) if len(found))
        i = int(bad[number][0])
        told = f"; it is that of {count} of {total} samples, the first of them sample {i}"
        if len(bad) > 1:
            told += f" of batch {number}"
        if self.describe is not None and batches is not None:
            told += f" ({self.describe(batches[number], seen.step, i)})"
        return told


def _can_leave_out(optimizer):
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _bad(seen):
    return (seen.value + seen.norm).isfinite().logical_not()


def _why(model, batches):
    """What a loss that is not finite comes from, looked at once it is there."""
    if batches is not None and not _finite(tree_leaves(batches)):
        return "the batch holds NaN or infinite values, so look at the data"
    if not _finite([*model.parameters(), *model.buffers()]):
        return (
            "the weights are not finite; lower the learning rate, or clip the gradient (grad_clip)"
        )
    known = "the weights" if batches is None else "the data and the weights"
    return f"{known} are finite, so look at the loss, or lower the learning rate"


def _finite(things):
    return all(bool(t.isfinite().all()) for t in map(_tensor, things) if t is not None)


def _tensor(thing):
    """A tensor of what may be NaN; None for everything else."""
    if isinstance(thing, np.ndarray) and thing.dtype.kind == "f":
        return torch.from_numpy(thing)
    if not isinstance(thing, torch.Tensor):
        return None
    thing = local(thing.detach())
    return thing if thing.is_floating_point() or thing.is_complex() else None
