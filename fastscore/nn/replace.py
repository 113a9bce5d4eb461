"""Swap the normalisation layers of an existing network for ours."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from fastscore.messages import shown
from fastscore.nn.ablations import (
    ConditionalBatchNorm2d,
    ConditionalNoneNorm2d,
    ConditionalVarianceNorm2d,
    NoneNorm2d,
    VarianceNorm2d,
)
from fastscore.nn.group_norm import GroupNormAct
from fastscore.nn.instance_norm import (
    ConditionalInstanceNorm2d,
    ConditionalInstanceNorm2dPlus,
    InstanceNorm2d,
    InstanceNorm2dPlus,
)


class Swap(NamedTuple):
    """One layer: its qualified name, its class, and the class that took its place (None: left
    alone)."""

    name: str
    old: type
    new: type | None


def replace_norms(module: nn.Module, *, fuse_silu: bool = True) -> list[Swap]:
    """Swap the normalisation layers of a network for ours, in place.

    Known are the classes of ermongroup/ncsn and ncsnv2, by name and state_dict,
    torch.nn.InstanceNorm2d and torch.nn.GroupNorm. Parameters and buffers are moved, not copied, so
    optimizers and the state_dict keep working. torch.nn.BatchNorm2d and torch.nn.LayerNorm, whose
    forward mode is wrong too, are not touched.

    Args:
        module: a network; not itself one of these layers.
        fuse_silu: a torch.nn.SiLU right after a GroupNorm in a torch.nn.Sequential becomes part of
            it, and torch.nn.Identity in its place. Switch it off for networks that call the layers
            of a Sequential one by one.

    Returns:
        A list of (name, old class, new class), one for each place of a layer. The new class is None
        where a layer of a known name was left alone: it has running statistics (InstanceNorm2d),
        hooks, or parameters of other shapes.

    Raises:
        ValueError: module itself is such a layer, which has no place to swap it in.

    >>> net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    >>> [(name, old.__name__, new.__name__) for name, old, new in replace_norms(net)]
    [('0', 'GroupNorm', 'GroupNormAct'), ('1', 'SiLU', 'Identity')]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"replace_norms: module must be a torch.nn.Module; got {shown(module)}.")
    if _known(module):
        raise ValueError(
            f"replace_norms: module is itself a {type(module).__name__}; put it into a "
            "torch.nn.Sequential."
        )

    places = Counter(id(child) for parent in module.modules() for child in parent._modules.values())
    # done: id -> (old, new); holding the old layer keeps its id from being used again.
    swaps, done = [], {}

    def visit(parent, prefix):
        slots = list(parent._modules.items())
        for (key, child), (after, follower) in zip(slots, slots[1:] + [(None, None)]):
            if not _known(child):
                if child is not None and not isinstance(child, _OURS):
                    visit(child, f"{prefix}{key}.")
                continue
            fuse = (
                fuse_silu
                and _calls_in_order(parent)
                and type(follower) is nn.SiLU
                and not _hooked(follower)
            )
            fuse = fuse and type(child) is nn.GroupNorm and places[id(child)] == 1
            _, new = done.setdefault(id(child), (child, _twin(child)))
            swaps.append(Swap(prefix + key, type(child), type(new) if new else None))
            if new is None:
                continue
            parent._modules[key] = new
            if fuse:
                new.activation, parent._modules[after] = "silu", nn.Identity()
                swaps.append(Swap(prefix + after, nn.SiLU, nn.Identity))

    visit(module, "")
    return swaps


def _conditional(cls, blocks):
    """Build cls for an original whose table has `blocks` times C columns with a bias."""
    return lambda old: cls(
        old.num_features,
        old.embed.num_embeddings,
        bias=old.embed.embedding_dim == blocks * old.num_features,
    )


_BY_NAME = {
    "ConditionalBatchNorm2d": _conditional(ConditionalBatchNorm2d, 2),
    "ConditionalInstanceNorm2d": _conditional(ConditionalInstanceNorm2d, 2),
    "ConditionalInstanceNorm2dPlus": _conditional(ConditionalInstanceNorm2dPlus, 3),
    "ConditionalNoneNorm2d": _conditional(ConditionalNoneNorm2d, 2),
    "ConditionalVarianceNorm2d": _conditional(ConditionalVarianceNorm2d, 1),
    "InstanceNorm2dPlus": lambda old: InstanceNorm2dPlus(
        old.num_features, bias=hasattr(old, "beta")
    ),
    "NoneNorm2d": lambda old: NoneNorm2d(None),
    "VarianceNorm2d": lambda old: VarianceNorm2d(old.num_features),
}
_BY_TYPE = {
    nn.GroupNorm: lambda old: GroupNormAct(old.num_groups, old.num_channels, old.eps, old.affine),
    nn.InstanceNorm2d: lambda old: InstanceNorm2d(old.num_features, old.eps, affine=old.affine),
}
_OURS = (
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    ConditionalInstanceNorm2dPlus,
    ConditionalNoneNorm2d,
    ConditionalVarianceNorm2d,
    GroupNormAct,
    InstanceNorm2d,
    InstanceNorm2dPlus,
    NoneNorm2d,
    VarianceNorm2d,
)


def _known(layer):
    return type(layer) in _BY_TYPE or (
        type(layer).__name__ in _BY_NAME and not isinstance(layer, _OURS)
    )


def _twin(old):
    """Our layer around the parameters and submodules of `old`; None where they do not fit."""
    build = _BY_TYPE.get(type(old)) or _BY_NAME[type(old).__name__]
    try:
        with torch.device("meta"):  # takes no memory and no random numbers
            new = build(old)
    except AttributeError:
        return None
    if _hooked(old) or _shapes(new) != _shapes(old):
        return None

    new._parameters.update({name: old._parameters.get(name) for name in new._parameters})
    new._modules.update({name: old._modules[name] for name in new._modules})
    return new.train(old.training)


def _shapes(layer):
    return {name: t.shape for name, t in layer.state_dict().items()}


def _hooked(layer):
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _calls_in_order(parent):
    return isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
