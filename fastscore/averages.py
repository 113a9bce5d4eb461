"""A moving average of a network's weights, kept in float32 whatever their dtype."""

import copy
from collections import defaultdict

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from fastscore.scalars import number
from fastscore.tensors import home

PREFIX = "average_"   # of the buffers that hold the float32 averages of narrower weights


def averaged(
    model: torch.nn.Module, decay: float, *, into: torch.nn.Module | None = None
) -> AveragedModel:
    """A moving average of a model's weights.

    Decay min(decay, (1 + n)/(10 + n)) at update n, so early weights are soon forgotten.

        w̄ ← d w̄ + (1 - d) w

    It is called like the model, in evaluation mode, and has the model's dtypes. bfloat16 and
    float16 weights are averaged in float32 beside it (the change of one update is far below their
    last bit) and rounded after every update; `state_dict` holds both. Buffers are copied. The copy
    is of the network itself, without DistributedDataParallel around it.

    Args:
        into: the module that becomes the average, in the place of a copy. It is needed for a model
            under `fully_shard`, which cannot be copied: a second one, sharded alike.

    Raises:
        ValueError: decay out of range, weights without a shape, a model that cannot be copied, or
            `into` has other parameters.
    """
    check_weights("averaged", model)
    return Averaged(model, number("averaged", "decay", decay, 0, below=1), into)


def check_weights(op: str, model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedTensorMixin):
            raise ValueError(
                f"{op}: the model must have weights; {name} has no shape yet (run its lazy "
                "modules once)."
            )


class Averaged(AveragedModel):
    """What `averaged` returns."""

    _sharded: list[torch.nn.Module] = []   # under fully_shard

    def __init__(
        self, model: torch.nn.Module, decay: float, into: torch.nn.Module | None = None
    ) -> None:
        super().__init__(torch.nn.Module())   # which would copy the model by copy.deepcopy alone
        self.n_averaged = self.n_averaged.new_zeros((), device=home())
        self.module = copied(_inner(model)) if into is None else _taken(into, _inner(model))
        self.decay = decay
        # Modules beside the module tree, which has them already.
        self._sharded = [m for m in self.module.modules() if _is_sharded(m)]
        for i, p in enumerate(self.module.parameters()):
            if _narrow(p):
                self.register_buffer(f"{PREFIX}{i}", p.detach().float())
        self.eval()

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take the model's weights into the average."""
        n = float(self.n_averaged)
        decay = self._decay(n) if n else 0.0
        groups = defaultdict(lambda: ([], []))

        # One that was called without a backward pass since may hold whole weights for a while.
        for module in self._sharded:
            module.reshard()

        parameters = list(model.parameters())
        if len(parameters) != len(list(self.module.parameters())):
            raise ValueError(
                "averaged: the model must have the parameters that it had when its average was "
                "made; their number differs."
            )

        for average, p in zip(self._averages(), parameters):
            average = local(average)
            current = local(p.detach()).to(average.device, average.dtype)
            if decay == 0 or not (average.dtype.is_floating_point or average.dtype.is_complex):
                average.copy_(current)
            else:
                for kept, t in zip(groups[average.device, average.dtype], (average, current)):
                    kept.append(t)
        for averages, currents in groups.values():
            torch._foreach_lerp_(averages, currents, 1 - decay)
        for rounded, average in self._shadowed():
            rounded.copy_(average)

        self._copy_buffers(_inner(model))
        self.n_averaged += 1

    def _decay(self, n):
        """Of the average of n weights, where another comes to it."""
        return min(self.decay, (1 + n) / (10 + n))

    def _copy_buffers(self, model):
        """By name, for a model may make buffers as it runs."""
        for name, b in model.named_buffers():
            path, _, leaf = name.rpartition(".")
            ours = self.module.get_submodule(path)
            theirs = model.get_submodule(path)
            kept = ours._buffers.get(leaf)
            if kept is not None and kept.shape == b.shape:
                kept.detach().copy_(b.detach())
            else:
                ours.register_buffer(
                    leaf,
                    b.detach().clone(),
                    persistent=leaf not in theirs._non_persistent_buffers_set,
                )

    def _averages(self):
        """The tensor that averages each parameter: itself, or its float32 shadow."""
        for i, p in enumerate(self.module.parameters()):
            yield self._shadow(i, p.detach()) if _narrow(p) else p.detach()

    def _shadow(self, i, p):
        """The float32 average whose rounded form is p.

        Where somebody has written into p since, it is p's.
        """
        name = f"{PREFIX}{i}"
        if name not in self._buffers:
            self.register_buffer(name, p.float())
        shadow = self._buffers[name]
        shadow.copy_(torch.where(shadow.to(p.dtype) == p, shadow, p.float()))
        return shadow

    def _shadowed(self):
        """(parameter, shadow) of the parameters that have one."""
        for i, p in enumerate(self.module.parameters()):
            if _narrow(p):
                yield p.detach(), self._buffers[f"{PREFIX}{i}"]

    def _apply(self, fn, recurse=True):
        """Shadows follow to other devices, not to other dtypes."""
        before = {name: t for name, t in self._buffers.items() if name.startswith(PREFIX)}
        super()._apply(fn, recurse)
        for name, t in before.items():
            self._buffers[name] = t.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        """Averages that were saved without shadows have none to load.

        They begin as the rounded ones.
        """
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[:] = [name for name in missing if not name.startswith(prefix + PREFIX)]


def local(t: torch.Tensor) -> torch.Tensor:
    """Of a DTensor, the part that this process holds; any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def _is_sharded(module):
    """Whether it is under fully_shard, whose module would take long to import."""
    return hasattr(module, "set_requires_gradient_sync")


def _taken(into, model):
    """`into` with the weights and buffers of the model."""
    found, wanted = (
        [(name, t.shape, t.dtype, local(t).shape) for name, t in m.named_parameters()]
        for m in (into, model)
    )
    if found != wanted or into is model:
        raise ValueError(
            "averaged: into must be another module with the parameters of the model, sharded alike."
        )
    with torch.no_grad():
        for ours, theirs in zip(into.parameters(), model.parameters()):
            local(ours).copy_(local(theirs))
        for ours, theirs in zip(into.buffers(), model.buffers()):
            ours.copy_(theirs)
    return into


def _inner(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def _narrow(p):
    return p.dtype.is_floating_point and p.element_size() < 4


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy, also of a model that keeps results of earlier calls
    (torch.nn.utils.weight_norm does), as constants."""
    if any(map(_is_sharded, model.modules())):
        raise ValueError(
            "averaged: a model under fully_shard cannot be copied; give a second one, sharded "
            "alike: averaged(model, decay, into=second), and training_loop its ema."
        )
    kept = [
        t
        for module in model.modules()
        for t in tree_leaves(vars(module))
        if isinstance(t, torch.Tensor) and not t.is_leaf
    ]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept})
