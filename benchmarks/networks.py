"""The networks of the field as their authors lay them out, in stock PyTorch.

Sums in place into fresh zeros, norms of their own.

The RefineNets of NCSN (a noise level in every norm) and NCSNv2 (none in the refinement), and a DiT.
Written from the papers and the names of the checkpoints.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from originals import ConditionalInstanceNorm2dPlus, InstanceNorm2dPlus


class Conditional(nn.Module):
    """A norm that takes the level, or, without levels, one that does not."""

    def __init__(self, channels, levels):
        super().__init__()
        self.norm = (
            InstanceNorm2dPlus(channels)
            if levels is None
            else ConditionalInstanceNorm2dPlus(channels, levels)
        )

    def forward(self, x, y):
        return self.norm(x) if y is None else self.norm(x, y)


class MeanPool(nn.Module):
    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x):
        h = self.conv(x)
        return (
            sum([h[:, :, ::2, ::2], h[:, :, 1::2, ::2], h[:, :, ::2, 1::2], h[:, :, 1::2, 1::2]])
            / 4
        )


class Residual(nn.Module):
    def __init__(self, inputs, outputs, levels, dilation=None, down=False):
        super().__init__()
        middle = inputs if down else outputs
        self.norm1, self.norm2, self.act = (
            Conditional(inputs, levels),
            Conditional(middle, levels),
            nn.ELU(),
        )
        d = dilation or 1
        self.conv1 = nn.Conv2d(inputs, middle, 3, padding=d, dilation=d)
        pooled = down and dilation is None
        self.conv2 = (
            MeanPool(middle, outputs, 3)
            if pooled
            else nn.Conv2d(middle, outputs, 3, padding=d, dilation=d)
        )
        self.shortcut = nn.Identity()
        if pooled:
            self.shortcut = MeanPool(inputs, outputs, 1)
        elif inputs != outputs or down:
            self.shortcut = nn.Conv2d(inputs, outputs, 3, padding=d, dilation=d)

    def forward(self, x, y):
        h = self.conv1(self.act(self.norm1(x, y)))
        h = self.conv2(self.act(self.norm2(h, y)))
        return self.shortcut(x) + h


class Units(nn.Module):
    """Residual units, each of two convolutions, added up in place."""

    def __init__(self, channels, units, levels):
        super().__init__()
        self.act = nn.ELU()
        self.norms = nn.ModuleList(
            None if levels is None else Conditional(channels, levels) for _ in range(2 * units)
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2 * units)
        )

    def forward(self, x, y):
        for k in range(0, len(self.convs), 2):
            residual = x
            for norm, conv in zip(self.norms[k : k + 2], self.convs[k : k + 2]):
                x = conv(self.act(x if norm is None else norm(x, y)))
            x += residual
        return x


class Fusion(nn.Module):
    def __init__(self, inputs, channels, levels):
        super().__init__()
        self.norms = nn.ModuleList(
            None if levels is None else Conditional(c, levels) for c in inputs
        )
        self.convs = nn.ModuleList(nn.Conv2d(c, channels, 3, padding=1) for c in inputs)

    def forward(self, xs, y, shape):
        sums = torch.zeros(
            xs[0].shape[0],
            self.convs[0].out_channels,
            *shape,
            dtype=xs[0].dtype,
            device=xs[0].device,
        )
        for x, norm, conv in zip(xs, self.norms, self.convs):
            h = conv(x if norm is None else norm(x, y))
            h = F.interpolate(h, size=shape, mode="bilinear", align_corners=True)
            sums += h
        return sums


class Pooling(nn.Module):
    def __init__(self, channels, levels):
        super().__init__()
        self.act = nn.ELU()
        self.norms = nn.ModuleList(
            None if levels is None else Conditional(channels, levels) for _ in range(2)
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.pool = nn.AvgPool2d(5, 1, 2) if levels else nn.MaxPool2d(5, 1, 2)

    def forward(self, x, y):
        x = path = self.act(x)
        for norm, conv in zip(self.norms, self.convs):
            path = conv(self.pool(path if norm is None else norm(path, y)))
            x = path + x
        return x


class Refine(nn.Module):
    def __init__(self, inputs, channels, levels, units=1):
        super().__init__()
        self.adapt = nn.ModuleList(Units(c, 2, levels) for c in inputs)
        self.fusion = Fusion(inputs, channels, levels) if len(inputs) > 1 else None
        self.pooling, self.output = Pooling(channels, levels), Units(channels, units, levels)

    def forward(self, xs, y, shape):
        hs = [adapt(x, y) for adapt, x in zip(self.adapt, xs)]
        h = hs[0] if self.fusion is None else self.fusion(hs, y, shape)
        return self.output(self.pooling(h, y), y)


class RefineNet(nn.Module):
    """The network of NCSN, or with levels=None that of NCSNv2, called (x, labels) or (x)."""

    def __init__(self, channels: int, ngf: int, levels: int | None):
        super().__init__()
        n, refined = ngf, levels
        self.begin, self.end = (
            nn.Conv2d(channels, n, 3, padding=1),
            nn.Conv2d(n, channels, 3, padding=1),
        )
        self.normalizer, self.act = Conditional(n, levels), nn.ELU()
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([Residual(n, n, levels), Residual(n, n, levels)]),
                nn.ModuleList(
                    [Residual(n, 2 * n, levels, down=True), Residual(2 * n, 2 * n, levels)]
                ),
                nn.ModuleList(
                    [
                        Residual(2 * n, 2 * n, levels, 2, down=True),
                        Residual(2 * n, 2 * n, levels, 2),
                    ]
                ),
                nn.ModuleList(
                    [
                        Residual(2 * n, 2 * n, levels, 4, down=True),
                        Residual(2 * n, 2 * n, levels, 4),
                    ]
                ),
            ]
        )
        self.refines = nn.ModuleList(
            [
                Refine([2 * n], 2 * n, refined),
                Refine([2 * n, 2 * n], 2 * n, refined),
                Refine([2 * n, 2 * n], n, refined),
                Refine([n, n], n, refined, units=3),
            ]
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h, layers, below = self.begin(2 * x - 1), [], []
        for stage in self.stages:
            for block in stage:
                h = block(h, y)
            layers.append(h)
        for refine in self.refines:
            top = layers.pop()
            below = [refine([top, *below], y, top.shape[2:])]
        return self.end(self.act(self.normalizer(below[0], y)))


class DiTBlock(nn.Module):
    """Attention and an MLP, shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(
            self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        )
        return x + gate2.unsqueeze(1) * self.mlp(
            self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        )

    def attention(self, x):
        B, N, C = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(B, N, 3, self.heads, C // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class DiT(nn.Module):
    """Peebles & Xie 2023, called (x, t)."""

    def __init__(self, channels: int, side: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.channels, self.patch, self.width = channels, patch, width
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(
            0.02 * torch.randn(1, (side // patch) ** 2, width), requires_grad=False
        )
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm, self.modulation = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
            nn.Linear(width, 2 * width),
        )
        self.last = nn.Linear(width, patch**2 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(
            -9.2 * torch.arange(self.width // 2, device=x.device) / (self.width // 2)
        ).to(x.dtype)
        angles = t[:, None] * frequencies
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        h = self.last(self.norm(h) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        n, p = x.shape[2] // self.patch, self.patch
        h = h.reshape(len(h), n, n, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), self.channels, n * p, n * p)
