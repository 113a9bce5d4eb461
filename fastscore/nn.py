"""Drop-in normalisation layers of score networks, with the state_dict of ermongroup/ncsnv2."""

import torch
from torch import nn


def _normalise_plus(x, gamma, alpha, beta, eps=1e-5):
    """InstanceNorm++ with coefficients (C,) or (B, C); plain mean and product, so every order and mode of derivative is right."""
    B, C = x.shape[:2]
    u = x.flatten(2)
    mu = u.mean(-1)  # (B, C)
    centred = u - mu[..., None]
    h = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)  # biased over pixels
    deviation = mu - mu.mean(1, keepdim=True)
    v = deviation.square().sum(1, keepdim=True) / max(C - 1, 1)  # unbiased over channels; C = 1 leaves 0 / sqrt(eps)
    shift = gamma * alpha * deviation * torch.rsqrt(v + eps)
    shift = shift if beta is None else shift + beta
    return (h * gamma.expand(B, C)[..., None] + shift[..., None]).view_as(x)


class InstanceNorm2dPlus(nn.Module):
    """Normalise over pixels, and put the means back normalised over channels.

        y = γ (h + α m̂) + β,    h = (x - μ)/√(var_hw x + 1e-5),    m̂ = (μ - mean_c μ)/√(var_c μ + 1e-5)

    with μ the means over pixels, var_hw biased and var_c unbiased. With one channel m̂ = 0 (ncsnv2 returns NaN); with one
    pixel h = 0.

    Args:
        num_features: C.
        bias: learn β. ncsnv2's networks pass their number of levels here; any true value is True.

    Shapes: x (B, C, H, W), any float dtype -> the same. Parameters alpha, gamma (and beta), each (C,).

    Raises:
        ValueError: x does not have C channels.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600).

    >>> InstanceNorm2dPlus(3)(torch.zeros(2, 3, 4, 4)).abs().max().item()
    0.0
    """

    def __init__(self, num_features, bias=True):
        super().__init__()
        self.num_features, self.bias = num_features, bool(bias)
        self.alpha = nn.Parameter(1 + 0.02 * torch.randn(num_features))
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(num_features))
        if bias:
            self.beta = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        _check_channels("InstanceNorm2dPlus", x, self.num_features)
        return _normalise_plus(x, self.gamma, self.alpha, self.beta if self.bias else None)


class ConditionalInstanceNorm2dPlus(nn.Module):
    """InstanceNorm2dPlus with one row of coefficients per noise level.

        y = γ_l (h + α_l m̂) + β_l,    l = labels

    Args:
        num_features: C.
        num_classes: L, the number of levels.
        bias: learn β.

    Shapes: x (B, C, H, W), labels (B,) int64 in [0, L). `embed.weight` is (L, 3C), columns γ, α, β, or (L, 2C) without bias.

    Raises:
        ValueError: x does not have C channels.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600); layout as in ermongroup/ncsnv2.

    >>> sorted(ConditionalInstanceNorm2dPlus(8, 10).state_dict()), ConditionalInstanceNorm2dPlus(8, 10).embed.weight.shape
    (['embed.weight'], torch.Size([10, 24]))
    """

    def __init__(self, num_features, num_classes, bias=True):
        super().__init__()
        self.num_features, self.num_classes, self.bias = num_features, num_classes, bool(bias)
        self.embed = nn.Embedding(num_classes, num_features * (3 if bias else 2))
        with torch.no_grad():
            self.embed.weight[:, : 2 * num_features].normal_(1, 0.02)
            self.embed.weight[:, 2 * num_features :].zero_()

    def forward(self, x, labels):
        _check_channels("ConditionalInstanceNorm2dPlus", x, self.num_features)
        gamma, alpha, *beta = self.embed(labels).split(self.num_features, -1)
        return _normalise_plus(x, gamma, alpha, beta[0] if beta else None)


def _check_channels(op, x, C):
    if x.dim() < 3 or x.shape[1] != C:
        raise ValueError(f"{op}: x must be (B, {C}, H, W); got {tuple(x.shape)}.")
