"""The layers of NCSN's ablations that do not centre: scaled by the standard deviation, or not at all."""

import torch
from torch import nn

from fastscore.nn.tables import check_channels, near_one_, rows, size, table
from fastscore.ops import checks


def _scaled(x):
    """x/√(var_hw x + 1e-5), unbiased; one pixel has variance 0."""
    dims, n = tuple(range(2, x.dim())), x.shape[2:].numel()
    u = x.to(checks.compute_dtype(x.dtype))
    v = (u - u.mean(dims, keepdim=True)).square().sum(dims, keepdim=True) / max(n - 1, 1)
    return u * torch.rsqrt(v + 1e-5)


class VarianceNorm2d(nn.Module):
    """Scale each channel by its standard deviation; the mean stays.

        y = α x/√(var_hw x + 1e-5)

    with var_hw unbiased. With one pixel var_hw = 0 (ncsnv2 returns NaN).

    Args:
        num_features: C.
        bias: ignored, as in ncsnv2, whose networks pass their number of levels here.

    Shapes: x (B, C, H, W), any float dtype -> the same. Parameter alpha (C,).

    Raises:
        ValueError: x does not have C channels.

    Source: ermongroup/ncsnv2, normalization "VarianceNorm".
    """

    def __init__(self, num_features, bias=False):
        super().__init__()
        num_features = size(self, "num_features", num_features)
        self.num_features = num_features
        self.alpha = nn.Parameter(near_one_(torch.empty(num_features)))

    def forward(self, x):
        check_channels(self, x)
        return (self.alpha.reshape(-1, *(1,) * (x.dim() - 2)) * _scaled(x)).to(x.dtype)


class ConditionalVarianceNorm2d(nn.Module):
    """VarianceNorm2d with one row of coefficients per noise level.

        y = γ_l x/√(var_hw x + 1e-5),    l = labels

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: ignored, as in ncsnv2.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, C).

    Raises:
        ValueError: x does not have C channels.

    Source: ermongroup/ncsnv2, normalization "VarianceNorm".
    """

    def __init__(self, num_features, num_classes, bias=False):
        super().__init__()
        num_features = size(self, "num_features", num_features)
        num_classes = size(self, "num_classes", num_classes)
        self.num_features, self.num_classes = num_features, num_classes
        self.embed = table(num_classes, num_features, 1, False, near_one_)

    def forward(self, x, labels):
        check_channels(self, x)
        (gamma,) = rows(self.embed, labels, x)
        return (gamma * _scaled(x)).to(x.dtype)


class ConditionalNoneNorm2d(nn.Module):
    """No normalisation, with one row of coefficients per noise level.

        y = γ_l x + β_l,    l = labels

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: learn β.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 2C), columns γ, β, or (L, C) without bias.

    Raises:
        ValueError: x does not have C channels.

    Source: ermongroup/ncsnv2, normalization "NoneNorm".
    """

    def __init__(self, num_features, num_classes, bias=True):
        super().__init__()
        num_features = size(self, "num_features", num_features)
        num_classes = size(self, "num_classes", num_classes)
        self.num_features, self.num_classes, self.bias = num_features, num_classes, bool(bias)
        self.embed = table(num_classes, num_features, 1, bias, nn.init.uniform_)

    def forward(self, x, labels):
        check_channels(self, x)
        gamma, *beta = rows(self.embed, labels, x)
        return gamma * x + beta[0] if beta else gamma * x


class NoneNorm2d(nn.Module):
    """y = x. Takes the arguments of the other layers and ignores them."""

    def __init__(self, num_features, bias=True):
        super().__init__()

    def forward(self, x):
        return x
