"""UNet: the convolutional score network of diffusion models, in one, two or three dimensions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.messages import shown
from fastscore.models import conditions
from fastscore.models.layout import channels_last, laid_out_as, to_channels, to_places
from fastscore.models.upsample import Upsample
from fastscore.ops import checks, group_norm_modulate
from fastscore.scalars import DEPTH, SIZE, named

_NAME = "UNet"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRECONDITIONINGS = ("edm", "noise")
_FREQUENCIES = 32
_SMALLEST = 1e-30  # sigma; 1/σ is finite in float32


class UNet(nn.Module):
    """A U-Net for scores of signals, images and volumes, conditioned on σ and, where asked for, on
    a class or a vector.

        s(x, σ) = -(x - m)/(σ² + d²) + d F(u, e)/(σ √(σ² + d²))     preconditioning "edm"
        s(x, σ) = F(u, e)/σ                                          preconditioning "noise"
        u = (x - m)/√(σ² + d²),    e = e(ln σ) + e(label) + e(context)

    with m and d the mean and the standard deviation of the data. Of "edm", (x + σ² s) is the
    denoiser of Karras et al.; F starts at zero, where the score is that of a Gaussian with the
    data's mean and variance. F is made of residual blocks of group norm, scale and shift by e, SiLU
    and convolution, twice; skips are concatenated.

    Args:
        dim: of the space, 1, 2 or 3. channels: of the data.
        width: channels of the first level; a multiple of 4. multipliers: of the width, by level;
            each level has half the side of the one before.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: levels, from 0, with self-attention over all places after each block.
        patch: side of the patches that become channels at the entrance and places again at the
            exit; at 2 a quarter of the places of an image are left inside.
        num_classes: K of the labels; None: no labels. context: length of the context vector.
        data_mean, data_std: m and d, of all values of the data.
        preconditioning: "edm" or "noise".
        dropout: probability, inside the blocks.

    Shapes: forward(x, sigma, label, context): x (B, channels, *) with `dim` sides of any length, in
        the dtype of the parameters; sides are padded with the mean to a multiple of patch ·
        2^(levels - 1) inside. sigma a float, 0-d or (B,). label int64 (B,) or an int, -1 where it
        is dropped; None drops all. context (B, context), None drops all; `dropped` (B,) bool drops
        label and context of some. Returns the score, like x.

    state_dict: `embed.*` (σ), `classes.weight` (K + 1, E) whose last row stands for no class,
        `context.*` (its last input is 1 where there is a context), `mix.*`, `first.*`, `down.i.*`,
        `middle.i.*` and `up.i.*` in the order of the data's way, `norm.*`, `last.*`. In a block
        `norm1`, `conv1`, `modulate` (scale, then shift), `norm2`, `conv2`, `skip`, `attention`.

    Raises:
        ValueError: an argument outside its range; x, label or context that do not fit.

    Source: Ho et al. 2020 (arXiv:2006.11239); Dhariwal & Nichol 2021 (scale and shift,
        arXiv:2105.05233); Karras et al. 2022, table 1 (preconditioning, arXiv:2206.00364).

    >>> net = UNet(width=8, multipliers=(1, 2), blocks=1, num_classes=10)
    >>> net(torch.full((2, 1, 7, 9), 0.5), 2.0, label=torch.tensor([3, -1])).shape
    torch.Size([2, 1, 7, 9])
    """

    dim: int
    channels: int
    patch: int
    multiple: int
    num_classes: int | None
    context_size: int | None
    data_mean: float
    data_std: float
    embed: nn.Linear
    classes: nn.Embedding
    context: nn.Linear
    mix: nn.Linear
    first: nn.Module
    down: nn.ModuleList
    middle: nn.ModuleList
    up: nn.ModuleList
    norm: nn.GroupNorm
    last: nn.Module

    def __init__(
        self,
        dim: int = 2,
        channels: int = 1,
        width: int = 64,
        *,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        patch: int = 1,
        num_classes: int | None = None,
        context: int | None = None,
        data_mean: float = 0.5,
        data_std: float = 0.5,
        preconditioning: str = "edm",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = checks.integer(_NAME, "dim", dim, 1, 3)
        self.channels = checks.integer(_NAME, "channels", channels, 1, limit=SIZE)
        width = checks.integer(_NAME, "width", width, 4, limit=SIZE)
        if width % 4:
            raise ValueError(f"{_NAME}: width must be a multiple of 4; got {width}.")
        widths = [width * m for m in _integers("multipliers", multipliers, 1, SIZE)]
        if not widths:
            raise ValueError(f"{_NAME}: multipliers must name one level at least; got none.")
        attended = _integers("attention", attention, 0, len(widths) - 1)
        blocks = checks.integer(_NAME, "blocks", blocks, 1, limit=DEPTH)
        self.patch = checks.integer(_NAME, "patch", patch, 1, limit=SIZE)
        self.num_classes = conditions.size(_NAME, "num_classes", num_classes)
        self.context_size = conditions.size(_NAME, "context", context)
        self.data_mean = checks.number(_NAME, "data_mean", data_mean)
        self.data_std = checks.number(_NAME, "data_std", data_std, above=0)
        dropout = checks.number(_NAME, "dropout", dropout, 0, 1)
        if not named(preconditioning, _PRECONDITIONINGS):
            raise ValueError(
                f"{_NAME}: preconditioning must be one of {', '.join(_PRECONDITIONINGS)}; "
                f"got {shown(preconditioning)}."
            )
        self.preconditioning = preconditioning
        self.multiple = self.patch * 2 ** (len(widths) - 1)

        features = 4 * width
        self.embed = nn.Linear(2 * _FREQUENCIES, features)
        if self.num_classes:
            self.classes = nn.Embedding(self.num_classes + 1, features)
        if self.context_size:
            self.context = nn.Linear(self.context_size + 1, features)
        self.mix = nn.Linear(features, features)

        inside = self.channels * self.patch**self.dim
        conv = _CONVOLUTIONS[self.dim - 1]
        self.first = conv(inside, width, 3, padding=1)

        def block(c, out, level):
            return _Block(self.dim, c, out, features, level in attended, dropout)

        c, kept = width, [width]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(c, out, level))
                c = out
                kept.append(c)
            if level < len(widths) - 1:
                self.down.append(conv(c, c, 3, stride=2, padding=1))
                kept.append(c)

        bottom = len(widths) - 1
        self.middle = nn.ModuleList([block(c, c, bottom), block(c, c, bottom)])
        self.up = nn.ModuleList()
        for level in range(bottom, -1, -1):
            for _ in range(blocks + 1):
                self.up.append(block(c + kept.pop(), widths[level], level))
                c = widths[level]
            if level:
                self.up.append(Upsample(conv(c, c, 3, padding=1)))

        self.norm = _norm(c)
        self.last = conv(c, inside, 3, padding=1)
        _zero(self.last)

    @classmethod
    def small(cls, dim: int = 2, channels: int = 1, **options: Any) -> "UNet":
        """For images of 28 to 32 pixels a side on a processor: two levels of width 32 and 64 behind
        patches of 2, 0.69 million parameters for one channel."""
        given = {"width": 32, "multipliers": (1, 2), "blocks": 1, "patch": 2}
        return cls(dim, channels, **(given | options))

    @classmethod
    def large(cls, dim: int = 2, channels: int = 3, **options: Any) -> "UNet":
        """For images of 32 to 64 pixels a side on a GPU: four levels of width 128 to 256, attention
        at the second, 50.4 million parameters for three channels."""
        given = {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 3, "attention": (1,)}
        return cls(dim, channels, **(given | options))

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        label: int | Tensor | None = None,
        context: Tensor | None = None,
        *,
        dropped: Tensor | None = None,
    ) -> Tensor:
        sigma = self._check(x, sigma)
        e = self._embedding(x, sigma, label, context, dropped)

        column = sigma.reshape(-1, *[1] * (self.dim + 1))
        scale = torch.rsqrt(column.square() + self.data_std**2)
        u = (x - self.data_mean) * scale
        f = self._network(u.to(x.dtype), e)

        if self.preconditioning == "noise":
            return (f / column).to(x.dtype)
        return (self.data_std * scale / column * f - scale * u).to(x.dtype)

    def _network(self, u: Tensor, e: Tensor) -> Tensor:
        sides = u.shape[2:]
        padding = [-side % self.multiple for side in sides]
        padded = u
        if any(padding):
            padded = F.pad(u, [n for side in reversed(padding) for n in (0, side)])

        h = self.first(channels_last(to_channels(padded, self.patch)))
        skips = [h]
        for part in self.down:
            h = part(h, e) if isinstance(part, _Block) else part(h)
            skips.append(h)
        for part in self.middle:
            h = part(h, e)
        for part in self.up:
            h = part(torch.cat([h, skips.pop()], 1), e) if isinstance(part, _Block) else part(h)

        h = to_places(self.last(_activated(self.norm, h)), self.patch)
        if any(padding):
            h = h[(..., *(slice(side) for side in sides))]
        return laid_out_as(h, u)

    def _check(self, x, sigma):
        checks.check_float(_NAME, "x", x)
        if x.dim() != self.dim + 2 or x.shape[1] != self.channels:
            sides = ", ".join(["*"] * self.dim)
            raise ValueError(
                f"{_NAME}: x must be (B, {self.channels}, {sides}); got {tuple(x.shape)}."
            )
        sigma = checks.coefficient(_NAME, "sigma", sigma, x, minimum=_SMALLEST)
        # Made on the device: a copy from the host would be waited for.
        return sigma if isinstance(sigma, torch.Tensor) else checks.as_tensor(sigma, x)

    def _embedding(self, x, sigma, label, context, dropped):
        """e (B, E), or (1, E) where all samples have the same."""
        frequencies = torch.exp2(
            torch.linspace(-3, 4, _FREQUENCIES, dtype=sigma.dtype, device=sigma.device)
        )
        angles = sigma.log().reshape(-1, 1) * frequencies
        e = self.embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))

        context = conditions.context(_NAME, self.context_size, x, context, dropped)
        label = self._label(x, label)
        if label is not None:
            label = label if dropped is None else torch.where(dropped, -1, label)
            e = e + self.classes(torch.where(label < 0, self.num_classes, label))
        if context is not None:
            e = e + self.context(context)
        return F.silu(self.mix(F.silu(e)))

    def _label(self, x, label):
        """(B,) or (1,) of -1..K-1; None where the network knows no classes."""
        if self.num_classes is None:
            if label is not None:
                raise ValueError(f"{_NAME}: built without num_classes, it takes no label.")
            return None
        if label is None:
            label = -1
        if not isinstance(label, torch.Tensor):
            label = checks.integer(_NAME, "label", label, -1, self.num_classes - 1)
            return torch.full((1,), label, device=x.device)

        if label.dtype != torch.int64 or label.shape != x.shape[:1] or label.device != x.device:
            raise ValueError(
                f"{_NAME}: label must be int64 ({len(x)},) on {x.device}; "
                f"got {label.dtype} {tuple(label.shape)} on {label.device}."
            )
        if label.device.type == "cpu" and label.numel() and checks.readable():
            low, high = (v.item() for v in torch.aminmax(label))
            if low < -1 or high >= self.num_classes:
                raise ValueError(
                    f"{_NAME}: label must be in -1..{self.num_classes - 1}; "
                    f"got {low if low < -1 else high}."
                )
        return label


class _Block(nn.Module):
    """h + conv(a(n(conv(a(n(h)))) (1 + scale) + shift)), and attention after it."""

    def __init__(self, dim, channels, out, features, attended, dropout):
        super().__init__()
        conv = _CONVOLUTIONS[dim - 1]
        self.norm1 = _norm(channels)
        self.conv1 = conv(channels, out, 3, padding=1)
        self.modulate = nn.Linear(features, 2 * out)
        self.norm2 = _norm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else conv(channels, out, 1)
        self.attention = _Attention(out) if attended else None
        _zero(self.conv2)

    def forward(self, x, e):
        h = self.conv1(_activated(self.norm1, x))
        scale, shift = self.modulate(e).expand(len(x), -1).chunk(2, 1)
        h = self.conv2(self.dropout(_activated(self.norm2, h, scale, shift)))
        h = self.skip(x) + h
        return h if self.attention is None else self.attention(h)


class _Attention(nn.Module):
    """x + projection of self-attention over all places, of heads of 64 channels or fewer."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 64)
        while channels % self.heads:
            self.heads -= 1
        self.norm = _norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        _zero(self.projection)

    def forward(self, x):
        h = group_norm_modulate(x, self.norm.num_groups, self.norm.weight, self.norm.bias)
        h = h.flatten(2).transpose(1, 2)   # (B, L, C)
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, 2)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.projection(h).transpose(1, 2).reshape(x.shape)


def _activated(norm, x, scale=None, shift=None):
    return group_norm_modulate(
        x, norm.num_groups, norm.weight, norm.bias, scale, shift, eps=norm.eps, activation="silu"
    )


def _norm(channels):
    """Holds the parameters; groups of four channels or more, 32 at most."""
    groups = min(32, max(1, channels // 4))
    return nn.GroupNorm(math.gcd(channels, groups), channels)


def _zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _integers(name, values, least, most):
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{_NAME}: {name} must be integers, such as (1, 2); got {shown(values)}.")
    return [checks.integer(_NAME, name, value, least, most) for value in values]
