"""The other norms of NCSN's and NCSNv2's code, which their ablations compare with."""

import torch
from torch import Tensor, nn

from fastscore.nn.tables import check_channels, near_one_, rows, size, table
from fastscore.ops import checks

__all__ = [
    "ConditionalBatchNorm2d",
    "ConditionalNoneNorm2d",
    "ConditionalVarianceNorm2d",
    "NoneNorm2d",
    "VarianceNorm2d",
]


class ConditionalBatchNorm2d(nn.Module):
    """Normalise over the batch and pixels, with one row of coefficients per noise level.

        y = γ_l (x - μ)/√(var x + 1e-5) + β_l,    l = labels

    In training μ and var (biased) are those of the batch, and the running statistics follow as in
    torch.nn.BatchNorm2d (var unbiased). In evaluation μ and var are the running statistics.
    PyTorch's own layer gives wrong parameter gradients through dual numbers
    (pytorch/pytorch#196699) and refuses torch.func.jvp in training.

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: learn β.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 2C), columns γ, β,
        or (L, C) without bias; `bn.running_mean`, `bn.running_var`, `bn.num_batches_tracked` as in
        torch.nn.BatchNorm2d.

    Raises:
        ValueError: x does not have C channels, or in training one value per channel.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167); layout and initialisation (γ ~ U[0, 1)) as in
        ermongroup/ncsnv2.
    """

    num_features: int
    num_classes: int
    bias: bool
    bn: nn.BatchNorm2d
    embed: nn.Embedding

    def __init__(self, num_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.num_features = size(self, "num_features", num_features)
        self.num_classes = size(self, "num_classes", num_classes)
        self.bias = bool(bias)
        # Without weights: it holds the running statistics.
        self.bn = nn.BatchNorm2d(self.num_features, affine=False)
        self.embed = table(self.num_classes, self.num_features, 1, bias, nn.init.uniform_)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        check_channels(self, x)
        bn, dims = self.bn, (0, *range(2, x.dim()))
        u = x.to(checks.compute_dtype(x.dtype))
        if bn.training or bn.running_mean is None:
            mu = u.mean(dims, keepdim=True)
            v = (u - mu).square().mean(dims, keepdim=True)
            if bn.training and bn.running_mean is not None:
                _track(bn, x, mu.flatten(), v.flatten())
        else:
            per_channel = (-1, *(1,) * (x.dim() - 2))
            mu = bn.running_mean.to(u.dtype).reshape(per_channel)
            v = bn.running_var.to(u.dtype).reshape(per_channel)

        gamma, *beta = rows(self.embed, labels, x)
        y = gamma * ((u - mu) * torch.rsqrt(v + bn.eps))
        return (y + beta[0] if beta else y).to(x.dtype)


@torch.no_grad()
def _track(bn, x, mu, v):
    """Move the running statistics towards those of the batch."""
    n = x.numel() // x.shape[1]
    if n < 2:
        raise ValueError(
            "ConditionalBatchNorm2d: training needs more than one value per channel; "
            f"got x of shape {tuple(x.shape)}."
        )

    # out= and not lerp_: torch.func refuses to change a captured tensor by an in-place op.
    torch.add(bn.num_batches_tracked, 1, out=bn.num_batches_tracked)
    for running, value in ((bn.running_mean, mu), (bn.running_var, v * (n / (n - 1)))):
        momentum = bn.momentum
        if momentum is None:
            momentum = bn.num_batches_tracked.to(running.dtype).reciprocal()
        torch.lerp(running, value.detach().to(running.dtype), momentum, out=running)


def _scaled(x):
    """x/√(var_hw x + 1e-5), unbiased; one pixel has variance 0."""
    dims = tuple(range(2, x.dim()))
    n = x.shape[2:].numel()
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

    num_features: int
    alpha: nn.Parameter

    def __init__(self, num_features: int, bias: bool = False) -> None:
        super().__init__()
        self.num_features = size(self, "num_features", num_features)
        self.alpha = nn.Parameter(near_one_(torch.empty(self.num_features)))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x)
        alpha = self.alpha.reshape(-1, *(1,) * (x.dim() - 2))
        return (alpha * _scaled(x)).to(x.dtype)


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

    num_features: int
    num_classes: int
    embed: nn.Embedding

    def __init__(self, num_features: int, num_classes: int, bias: bool = False) -> None:
        super().__init__()
        self.num_features = size(self, "num_features", num_features)
        self.num_classes = size(self, "num_classes", num_classes)
        self.embed = table(self.num_classes, self.num_features, 1, False, near_one_)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
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

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 2C), columns γ, β,
        or (L, C) without bias.

    Raises:
        ValueError: x does not have C channels.

    Source: ermongroup/ncsnv2, normalization "NoneNorm".
    """

    num_features: int
    num_classes: int
    bias: bool
    embed: nn.Embedding

    def __init__(self, num_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.num_features = size(self, "num_features", num_features)
        self.num_classes = size(self, "num_classes", num_classes)
        self.bias = bool(bias)
        self.embed = table(self.num_classes, self.num_features, 1, bias, nn.init.uniform_)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        check_channels(self, x)
        gamma, *beta = rows(self.embed, labels, x)
        return gamma * x + beta[0] if beta else gamma * x


class NoneNorm2d(nn.Module):
    """y = x. Takes the arguments of the other layers and ignores them."""

    def __init__(self, num_features: int | None, bias: bool = True) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
