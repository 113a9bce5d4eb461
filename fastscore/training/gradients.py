"""The gradient of one update: of several batches, on one process or several, and its norm."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastscore.averages import local


class Update:
    """Gathers the gradient of the mean over all samples of all batches and processes.

    One batch of one process needs nothing but `losses.mean().backward()`. Otherwise sums are
    differentiated, and the gradient is divided by the number of all samples at the end, so that
    batches may differ in size.
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.model = model
        # Once: a walk through a small network's modules takes longer than the norm of its gradient.
        self.parameters = list(model.parameters())
        self.batches = batches
        self.group = _group(model)
        self.is_mean = batches == 1 and self.group is None
        self._value = None
        self._count = 0

    def batch(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Around loss and backward of one: processes share the gradient in the last only."""
        return contextlib.nullcontext() if self.is_mean else self._sharing(number)

    @contextlib.contextmanager
    def _sharing(self, number) -> Iterator[None]:
        last = number + 1 == self.batches
        if hasattr(self.model, "set_requires_gradient_sync"):  # of fully_shard
            self.model.set_requires_gradient_sync(last)
        no_sync = None if last else getattr(self.model, "no_sync", None)
        with contextlib.nullcontext() if no_sync is None else no_sync():
            yield

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of a batch, (B,) or a scalar."""
        value = losses.mean() if self.is_mean else losses.sum()
        value.backward()
        value = value.detach()
        self._value = value if self._value is None else self._value + value
        self._count += losses.numel()

    def finish(self) -> tuple[Tensor, Tensor]:
        """The mean loss and the norm of its gradient, the same on all processes."""
        value, count = self._value, self._count
        self._value, self._count = None, 0
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not self.is_mean:
            value = self._scaled(value, count, [local(g) for g in grads])
        return value, _norm(grads)

    def _scaled(self, value, count, grads):
        """Make sums means: the number of samples of all processes is known by now."""
        if self.group is None:
            torch._foreach_div_(grads, count)
            return value / count

        import torch.distributed as dist

        shared = value.new_full((2,), count, dtype=torch.float64)
        shared[0] = value
        dist.all_reduce(shared, group=self.group)
        # What came together is the mean over the processes.
        torch._foreach_mul_(grads, dist.get_world_size(self.group) / shared[1])
        return shared[0] / shared[1]


def clip(parameters: list[Tensor], largest: float, norm: Tensor) -> None:
    """Scale the gradients down to this norm if theirs is larger."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(map(_is_sharded, parameters)):
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    elif parameters:
        # As PyTorch does it.
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([local(p.grad) for p in parameters], factor)


def joined(losses: list[Tensor]) -> Tensor:
    """The losses of a step's batches, one after another."""
    return losses[0] if len(losses) == 1 else torch.cat([t.reshape(-1) for t in losses])


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def can_fuse(model: nn.Module) -> bool | None:
    """True where the optimizer's fused form is the fast one, None where PyTorch is to choose."""
    on_gpu = all(p.is_cuda and p.is_floating_point() for p in model.parameters())
    return True if on_gpu else None


def _group(model):
    """Of the processes that share the model's gradient; None where it is one."""
    if isinstance(model, DistributedDataParallel):
        group = model.process_group
    else:
        sharded = next(filter(_is_sharded, model.parameters()), None)
        if sharded is None:
            return None
        mesh = sharded.device_mesh
        group = mesh.get_group() if mesh.ndim == 1 else torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _norm(grads):
    """Of all of them together, with infinities and NaN in any."""
    grads = [g.coalesce().values() if g.is_sparse else g for g in grads]
    if len({(type(g), g.dtype, g.device) for g in grads}) == 1 and not _is_sharded(grads[0]):
        # What PyTorch's function comes to, without its look at each of them.
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    parts = [[g for g in grads if _is_sharded(g) == sharded] for sharded in (False, True)]
    whole, shards = (torch.nn.utils.get_total_norm(part) for part in parts)
    if not parts[1]:
        return whole
    shards = shards.full_tensor()
    return torch.hypot(whole.to(shards), shards) if parts[0] else shards


def _is_sharded(t):
    """Whether t is a DTensor, as fully_shard makes of parameters."""
    return hasattr(t, "full_tensor")
