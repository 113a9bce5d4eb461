"""Instance normalisation, plain, conditional, and with the channel term of NCSN."""

import torch
from torch import Tensor, nn

from fastscore.nn.tables import check_channels, near_one_, size, small, table
from fastscore.ops import conditional_instance_norm_plus, instance_norm_plus


class InstanceNorm2dPlus(nn.Module):
    """Normalise over pixels, and put the means back normalised over channels.

        y = a(γ (h + α m̂) + β),    h = (x - μ)/√(var_hw x + 1e-5),
        m̂ = (μ - mean_c μ)/√(var_c μ + 1e-5)

    with μ the means over pixels, var_hw biased and var_c unbiased. With one channel m̂ = 0 (ncsnv2
    returns NaN); with one pixel h = 0.

    Args:
        num_features: C.
        bias: learn β. ncsnv2's networks pass their number of levels here; any true value is True.
        activation: a, one of None, elu, silu, relu, gelu, softplus; fused, and no part of the
            state_dict.

    Shapes: x (B, C, H, W), any float dtype -> the same. Parameters alpha, gamma (and beta), each
        (C,).

    Raises:
        ValueError: x does not have C channels.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600).

    >>> InstanceNorm2dPlus(3)(torch.zeros(2, 3, 4, 4)).abs().max().item()
    0.0
    """

    num_features: int
    bias: bool
    activation: str | None
    alpha: nn.Parameter
    gamma: nn.Parameter
    beta: nn.Parameter

    def __init__(
        self, num_features: int, bias: bool = True, *, activation: str | None = None
    ) -> None:
        super().__init__()
        num_features = size(self, "num_features", num_features)
        self.num_features = num_features
        self.bias = bool(bias)
        self.activation = activation
        self.alpha = nn.Parameter(near_one_(torch.empty(num_features)))
        self.gamma = nn.Parameter(near_one_(torch.empty(num_features)))
        if bias:
            self.beta = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x)
        return instance_norm_plus(
            x, self.gamma, self.alpha, self.beta if self.bias else None, activation=self.activation
        )


class ConditionalInstanceNorm2dPlus(nn.Module):
    """InstanceNorm2dPlus with one row of coefficients per noise level.

        y = a(γ_l (h + α_l m̂) + β_l),    l = labels

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: learn β.
        activation: a, as in InstanceNorm2dPlus.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 3C), columns γ, α, β,
        or (L, 2C) without bias.

    Raises:
        ValueError: x does not have C channels.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600); layout as in ermongroup/ncsnv2.

    >>> layer = ConditionalInstanceNorm2dPlus(8, 10)
    >>> sorted(layer.state_dict()), layer.embed.weight.shape
    (['embed.weight'], torch.Size([10, 24]))
    """

    num_features: int
    num_classes: int
    bias: bool
    activation: str | None
    embed: nn.Embedding

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        num_features = size(self, "num_features", num_features)
        num_classes = size(self, "num_classes", num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.bias = bool(bias)
        self.activation = activation
        self.embed = table(num_classes, num_features, 2, bias, near_one_)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        check_channels(self, x)
        return conditional_instance_norm_plus(
            x, labels, self.embed.weight, activation=self.activation, bias=self.bias
        )


class ConditionalInstanceNorm2d(nn.Module):
    """Normalise over pixels, with one row of coefficients per noise level.

        y = a(γ_l h + β_l),    h = (x - μ)/√(var_hw x + 1e-5),    l = labels

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: learn β.
        activation: a, as in InstanceNorm2dPlus.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 2C), columns γ, β, or
        (L, C) without bias.

    Raises:
        ValueError: x does not have C channels.

    Source: Dumoulin et al. 2017 (arXiv:1610.07629); layout and initialisation (γ ~ U[0, 1)) as in
        ermongroup/ncsnv2.
    """

    num_features: int
    num_classes: int
    bias: bool
    activation: str | None
    embed: nn.Embedding

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        num_features = size(self, "num_features", num_features)
        num_classes = size(self, "num_classes", num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.bias = bool(bias)
        self.activation = activation
        self.embed = table(num_classes, num_features, 1, bias, nn.init.uniform_)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        check_channels(self, x)
        gamma, *beta = self.embed(labels).split(self.num_features, -1)
        return instance_norm_plus(
            x, gamma, None, beta[0] if beta else None, activation=self.activation
        )


class InstanceNorm2d(nn.Module):
    """torch.nn.InstanceNorm2d without running statistics, right in forward mode too.

        y = a(w h + b),    h = (x - μ)/√(var_hw x + eps)

    Args:
        num_features: C.
        eps: added to the variance.
        affine: learn w and b, `weight` and `bias` in the state_dict, as torch.nn.InstanceNorm2d.
        activation: a, as in InstanceNorm2dPlus.

    Shapes: x (B, C, H, W) or (C, H, W). With one pixel h = 0 (PyTorch raises).

    Raises:
        ValueError: x does not have C channels; without affine any number will do, as in PyTorch.

    Source: Ulyanov et al. 2016 (arXiv:1607.08022).
    """

    num_features: int
    eps: float
    affine: bool
    activation: str | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        affine: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        num_features = size(self, "num_features", num_features)
        eps = small(self, eps)
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.activation = activation
        self.register_parameter(
            "weight", nn.Parameter(torch.ones(num_features)) if affine else None
        )
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self(x[None])[0]
        if self.affine or x.dim() < 3:
            check_channels(self, x)
        gamma = self.weight if self.affine else x.new_ones(x.shape[1])
        return instance_norm_plus(
            x, gamma, None, self.bias, eps=self.eps, activation=self.activation
        )
