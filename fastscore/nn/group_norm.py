"""Group normalisation with what follows it: scale, shift and activation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.nn.tables import check_channels, size, small
from fastscore.ops import group_norm_modulate

_EMBEDDING_ACTIVATIONS = {
    None: lambda e: e,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GroupNormAct(nn.Module):
    """torch.nn.GroupNorm and the activation after it in one op.

        y = a(w (x - μ_g)/√(var_g x + eps) + b)

    with μ_g and var_g (biased) over the pixels and channels of a group.

    Args:
        num_groups: how many; divides num_channels.
        num_channels: C.
        eps: added to the variance.
        affine: learn w and b, `weight` and `bias` in the state_dict, as torch.nn.GroupNorm.
        activation: a, one of None, elu, silu, relu, gelu, softplus; no part of the state_dict.

    Shapes: x (B, C, *) or (B, C), any float dtype -> the same.

    Raises:
        ValueError: num_groups does not divide C, or x does not have C channels.

    Source: Wu & He 2018 (arXiv:1803.08494).
    """

    num_groups: int
    num_features: int
    eps: float
    activation: str | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        num_groups = size(self, "num_groups", num_groups)
        num_channels = size(self, "num_channels", num_channels)
        eps = small(self, eps)
        _check_groups("GroupNormAct", num_groups, num_channels)
        self.num_groups = num_groups
        self.num_features = num_channels
        self.eps = eps
        self.activation = activation
        self.register_parameter(
            "weight", nn.Parameter(torch.ones(num_channels)) if affine else None
        )
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_channels)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:   # features, as one pixel
            return self(x[..., None])[..., 0]

        check_channels(self, x, "*")
        return group_norm_modulate(
            x, self.num_groups, self.weight, self.bias, eps=self.eps, activation=self.activation
        )


class AdaGroupNorm(nn.Module):
    """Group normalisation scaled and shifted by an embedding.

        y = a((x - μ_g)/√(var_g x + eps) (1 + scale) + shift),
        (scale, shift) = linear(act_fn(emb))

    Args:
        embedding_dim: E, the size of the embedding.
        out_dim: C.
        num_groups: how many; divides out_dim.
        act_fn: of the embedding, one of None, silu (or swish), mish, gelu, relu.
        eps: added to the variance.
        activation: a, as in GroupNormAct.

    Shapes: x (B, C, *) or (B, C), emb (B, E) -> like x. `linear.weight` (2C, E), rows scale, shift;
        `linear.bias` (2C,).

    Raises:
        ValueError: num_groups does not divide C, act_fn is unknown, or x does not have C channels.

    Source: Dhariwal & Nichol 2021, section 3.1 (arXiv:2105.05233); arguments and layout as in
        diffusers' AdaGroupNorm.
    """

    num_groups: int
    num_features: int
    eps: float
    act_fn: str | None
    activation: str | None
    linear: nn.Linear

    def __init__(
        self,
        embedding_dim: int,
        out_dim: int,
        num_groups: int,
        act_fn: str | None = None,
        eps: float = 1e-5,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        embedding_dim = size(self, "embedding_dim", embedding_dim)
        out_dim = size(self, "out_dim", out_dim)
        num_groups = size(self, "num_groups", num_groups)
        eps = small(self, eps)
        _check_groups("AdaGroupNorm", num_groups, out_dim)
        if act_fn not in _EMBEDDING_ACTIVATIONS:
            raise ValueError(
                "AdaGroupNorm: act_fn must be None, silu, swish, mish, gelu or relu; got "
                f"{act_fn!r}."
            )

        self.num_groups = num_groups
        self.num_features = out_dim
        self.eps = eps
        self.act_fn = act_fn
        self.activation = activation
        self.linear = nn.Linear(embedding_dim, 2 * out_dim)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if x.dim() == 2:
            return self(x[..., None], emb)[..., 0]

        check_channels(self, x, "*")
        scale, shift = self.linear(_EMBEDDING_ACTIVATIONS[self.act_fn](emb)).chunk(2, -1)
        return group_norm_modulate(
            x, self.num_groups, scale=scale, shift=shift, eps=self.eps, activation=self.activation
        )


def _check_groups(op, groups, channels):
    if channels % groups:
        raise ValueError(
            f"{op}: num_groups must divide the number of channels, {channels}; got {groups}."
        )
