"""The normalisation ops in plain PyTorch. To be removed once fastscore.ops has them, with the same signatures."""

import torch
import torch.nn.functional as F

from fastscore.ops import checks

ACTIVATIONS = {None: lambda y: y, "elu": F.elu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "softplus": F.softplus}

# Only means, squares and products: F.instance_norm and its kin give wrong parameter gradients through forward mode.


def instance_norm_plus(x, gamma, alpha=None, beta=None, *, eps=1e-5, activation=None, backend=None):
    """y = a(γ (h + α m̂) + β), coefficients (C,) or (B, C); without alpha no channel term."""
    dims, C = tuple(range(2, x.dim())), x.shape[1]
    u = x.to(checks.compute_dtype(x.dtype))
    mu = u.mean(dims, keepdim=True)  # (B, C, 1, 1)
    centred = u - mu
    h = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)  # biased over pixels
    y = _along_channels(gamma, u) * h
    if alpha is not None:
        deviation = mu - mu.mean(1, keepdim=True)
        v = deviation.square().sum(1, keepdim=True) / max(C - 1, 1)  # unbiased over channels; C = 1 leaves 0 / sqrt(eps)
        shift = _along_channels(gamma * alpha, u) * (deviation * torch.rsqrt(v + eps))
        y = y + (shift if beta is None else shift + _along_channels(beta, u))
    elif beta is not None:
        y = y + _along_channels(beta, u)
    return ACTIVATIONS[activation](y).to(x.dtype)


def conditional_instance_norm_plus(x, labels, weight, *, eps=1e-5, activation=None, bias=True):
    """instance_norm_plus with row `labels` of weight (L, 3C): γ, α, β; (L, 2C) without bias."""
    gamma, alpha, *beta = F.embedding(labels, weight).split(x.shape[1], -1)
    return instance_norm_plus(x, gamma, alpha, beta[0] if bias else None, eps=eps, activation=activation)


def group_norm_modulate(x, num_groups, weight=None, bias=None, scale=None, shift=None, *, eps=1e-5, activation=None):
    """y = a((GN(x) w + b)(1 + scale) + shift), weight and bias (C,), scale and shift (B, C)."""
    B, C = x.shape[:2]
    u = x.to(checks.compute_dtype(x.dtype)).reshape(B, num_groups, C // num_groups, *x.shape[2:])
    dims = tuple(range(2, u.dim()))
    centred = u - u.mean(dims, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)).reshape(x.shape)
    y = y if weight is None else y * _along_channels(weight, y)
    y = y if bias is None else y + _along_channels(bias, y)
    y = y if scale is None else y * (1 + _along_channels(scale, y))
    y = y if shift is None else y + _along_channels(shift, y)
    return ACTIVATIONS[activation](y).to(x.dtype)


def _along_channels(c, u):
    """(C,) or (B, C), shaped and cast to multiply u."""
    return c.to(u.dtype).reshape(*c.shape, *(1,) * (u.dim() - 2))
