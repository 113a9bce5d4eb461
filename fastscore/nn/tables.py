"""What the layers share.

Coefficient tables with one row per noise level, and the check of an input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.ops import checks
from fastscore.scalars import SIZE


def size(layer: nn.Module, name: str, value: Any) -> int:
    """A number of channels, classes or features."""
    return checks.integer(type(layer).__name__, name, value, 1, limit=SIZE)


def small(layer: nn.Module, eps: float) -> float:
    """What is added to a variance."""
    return checks.number(type(layer).__name__, "eps", eps, above=0)


def table(
    num_classes: int, num_features: int, blocks: int, bias: bool, init_: Callable[[Tensor], Any]
) -> nn.Embedding:
    """An embedding (L, blocks C), filled by `init_`, with C more columns of zeros if `bias`."""
    embed = nn.Embedding(num_classes, num_features * (blocks + bool(bias)))
    with torch.no_grad():
        init_(embed.weight[:, : blocks * num_features])
        embed.weight[:, blocks * num_features :].zero_()
    return embed


def near_one_(t: Tensor) -> Tensor:
    """N(1, 0.02²), as the original layers draw γ and α."""
    return nn.init.normal_(t, 1, 0.02)


def rows(embed: nn.Embedding, labels: Tensor, x: Tensor) -> list[Tensor]:
    """The blocks of C columns of row `labels`, each shaped to multiply x (B, C, *)."""
    return [c.reshape(*c.shape, *(1,) * (x.dim() - 2)) for c in embed(labels).split(x.shape[1], -1)]


def check_channels(layer: nn.Module, x: Tensor, spatial: str = "H, W") -> None:
    if x.dim() < 3 or x.shape[1] != layer.num_features:
        raise ValueError(
            f"{type(layer).__name__}: x must be (B, {layer.num_features}, {spatial}); got "
            f"{tuple(x.shape)}."
        )
