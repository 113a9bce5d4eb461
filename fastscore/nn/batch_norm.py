"""Conditional batch normalisation whose derivatives are right in forward mode too."""

import torch
from torch import nn

from fastscore.nn.tables import check_channels, rows, size, table
from fastscore.ops import checks


class ConditionalBatchNorm2d(nn.Module):
    """Normalise over the batch and pixels, with one row of coefficients per noise level.

        y = γ_l (x - μ)/√(var x + 1e-5) + β_l,    l = labels

    In training μ and var (biased) are of the batch, and the running statistics follow as in torch.nn.BatchNorm2d (var unbiased);
    in evaluation μ and var are the running statistics. PyTorch's own layer gives wrong parameter gradients through dual numbers
    (pytorch/pytorch#196699) and refuses torch.func.jvp in training.

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: learn β.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 2C), columns γ, β, or (L, C) without bias;
        `bn.running_mean`, `bn.running_var`, `bn.num_batches_tracked` as in torch.nn.BatchNorm2d.

    Raises:
        ValueError: x does not have C channels, or in training one value per channel.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167); layout and initialisation (γ ~ U[0, 1)) as in ermongroup/ncsnv2.
    """

    def __init__(self, num_features, num_classes, bias=True):
        super().__init__()
        num_features = size(self, "num_features", num_features)
        num_classes = size(self, "num_classes", num_classes)
        self.num_features, self.num_classes, self.bias = num_features, num_classes, bool(bias)
        self.bn = nn.BatchNorm2d(num_features, affine=False)  # holds the running statistics
        self.embed = table(num_classes, num_features, 1, bias, nn.init.uniform_)

    def forward(self, x, labels):
        check_channels(self, x)
        bn, dims = self.bn, (0, *range(2, x.dim()))
        u = x.to(checks.compute_dtype(x.dtype))
        if bn.training or bn.running_mean is None:
            mu = u.mean(dims, keepdim=True)
            v = (u - mu).square().mean(dims, keepdim=True)
            if bn.training and bn.running_mean is not None:
                _track(bn, x, mu.flatten(), v.flatten())
        else:
            mu, v = (t.to(u.dtype).reshape(-1, *(1,) * (x.dim() - 2)) for t in (bn.running_mean, bn.running_var))
        gamma, *beta = rows(self.embed, labels, x)
        y = gamma * ((u - mu) * torch.rsqrt(v + bn.eps))
        return (y + beta[0] if beta else y).to(x.dtype)


@torch.no_grad()
def _track(bn, x, mu, v):
    """Move the running statistics towards those of the batch."""
    n = x.numel() // x.shape[1]
    if n < 2:
        raise ValueError(f"ConditionalBatchNorm2d: training needs more than one value per channel; got x of shape {tuple(x.shape)}.")
    # out= and not lerp_: torch.func refuses to change a captured tensor by an in-place op.
    torch.add(bn.num_batches_tracked, 1, out=bn.num_batches_tracked)
    for running, value in ((bn.running_mean, mu), (bn.running_var, v * (n / (n - 1)))):
        momentum = bn.num_batches_tracked.to(running.dtype).reciprocal() if bn.momentum is None else bn.momentum
        torch.lerp(running, value.detach().to(running.dtype), momentum, out=running)
