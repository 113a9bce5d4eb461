"""The layers of ermongroup/ncsn and ncsnv2 under their own names, written from their formulas on
stock PyTorch."""

import torch
from torch import nn


class _Conditional(nn.Module):
    def __init__(self, num_features, num_classes, columns):
        super().__init__()
        self.num_features = num_features
        self.embed = nn.Embedding(num_classes, columns * num_features)

    def affine(self, h, y):
        gamma, *beta = (c[..., None, None] for c in self.embed(y).split(self.num_features, 1))
        return gamma * h + sum(beta)


class ConditionalBatchNorm2d(_Conditional):
    def __init__(self, num_features, num_classes, bias=True):
        super().__init__(num_features, num_classes, 2 if bias else 1)
        self.bn = nn.BatchNorm2d(num_features, affine=False)

    def forward(self, x, y):
        return self.affine(self.bn(x), y)


class ConditionalInstanceNorm2d(_Conditional):
    def __init__(self, num_features, num_classes, bias=True):
        super().__init__(num_features, num_classes, 2 if bias else 1)
        self.instance_norm = nn.InstanceNorm2d(num_features)

    def forward(self, x, y):
        return self.affine(self.instance_norm(x), y)


class ConditionalVarianceNorm2d(_Conditional):
    def __init__(self, num_features, num_classes, bias=False):
        super().__init__(num_features, num_classes, 1)

    def forward(self, x, y):
        return self.affine(x / (x.var((2, 3), keepdim=True) + 1e-5).sqrt(), y)


class ConditionalNoneNorm2d(_Conditional):
    def __init__(self, num_features, num_classes, bias=True):
        super().__init__(num_features, num_classes, 2 if bias else 1)

    def forward(self, x, y):
        return self.affine(x, y)


def _channel_term(x):
    mu = x.mean((2, 3), keepdim=True)
    return (mu - mu.mean(1, keepdim=True)) / (mu.var(1, keepdim=True) + 1e-5).sqrt()


class ConditionalInstanceNorm2dPlus(_Conditional):
    def __init__(self, num_features, num_classes, bias=True):
        super().__init__(num_features, num_classes, 3 if bias else 2)
        self.instance_norm = nn.InstanceNorm2d(num_features)

    def forward(self, x, y):
        gamma, alpha, *beta = (
            c[..., None, None] for c in self.embed(y).split(self.num_features, 1)
        )
        return gamma * (self.instance_norm(x) + alpha * _channel_term(x)) + sum(beta)


class InstanceNorm2dPlus(nn.Module):
    def __init__(self, num_features, bias=True):
        super().__init__()
        self.num_features = num_features
        self.instance_norm = nn.InstanceNorm2d(num_features)
        self.alpha, self.gamma = (
            nn.Parameter(torch.ones(num_features)),
            nn.Parameter(torch.ones(num_features)),
        )
        if bias:
            self.beta = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        gamma, alpha = self.gamma[:, None, None], self.alpha[:, None, None]
        y = gamma * (self.instance_norm(x) + alpha * _channel_term(x))
        return y + self.beta[:, None, None] if hasattr(self, "beta") else y


class VarianceNorm2d(nn.Module):
    def __init__(self, num_features, bias=False):
        super().__init__()
        self.num_features = num_features
        self.alpha = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        return self.alpha[:, None, None] * x / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()


class NoneNorm2d(nn.Module):
    def __init__(self, num_features, bias=True):
        super().__init__()

    def forward(self, x):
        return x
