"""The layers of score_sde's NCSN++, DDPM++ and DDPM networks, named as in its checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.deferred import KeepsBuffers
from fastscore.models.refinenet import ACTIVATIONS
from fastscore.ops import group_norm_modulate
from fastscore.tensors import home

_FIR = (1.0, 3.0, 3.0, 1.0)   # of StyleGAN2, normalised to sum 1 in each direction
_FUSED = {"elu": "elu", "relu": "relu", "swish": "silu"}   # as the norms call them
SMALL = 1e-10   # variance of the last layers' initial weights, beside that of the others


class Exact(KeepsBuffers):
    """Buffers stay in float32 or wider where the parameters are halved: noise levels and
    frequencies, whose rounding would be another condition."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, t in self._buffers.items():
            if t is not None and t.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(t.device)
        return self


class FourierFeatures(Exact):
    """(sin 2π W u, cos 2π W u) of numbers u (B,)."""

    W: Tensor

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        # Constants, which no optimizer moves.
        self.register_buffer("W", scale * torch.randn(features))

    def forward(self, u: Tensor) -> Tensor:
        angles = 2 * math.pi * u[:, None] * self.W.to(u.dtype)
        return torch.cat([angles.sin(), angles.cos()], 1)


def positions(t: Tensor, features: int) -> Tensor:
    """(sin ω_k t, cos ω_k t) of times t (B,), ω_k geometric from 1 to 1/10000."""
    half = features // 2
    exponents = torch.linspace(0, 1, half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10000) * exponents)
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, features % 2))


class Residual(nn.Module):
    """x' + conv(drop(a(n(conv(a(n(x))') + dense(e))))), ' being nothing, up or down, the sum
    divided by √2 where asked for.

    biggan: project x by a 1×1 convolution (where channels or sides change), else by a `Nin`.
    """

    GroupNorm_0: nn.GroupNorm
    Conv_0: nn.Conv2d
    Dense_0: nn.Linear
    GroupNorm_1: nn.GroupNorm
    Dropout_0: nn.Dropout
    Conv_1: nn.Conv2d
    Conv_2: nn.Conv2d
    NIN_0: "Nin"
    shortcut: str | None
    resample: nn.Module | None

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        features: int | None,
        groups: int | None,
        act: str,
        dropout: float,
        rescale: bool,
        biggan: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.act = act
        self.rescale = rescale
        self.GroupNorm_0 = norm(channels, groups)
        self.Conv_0 = conv(channels, out)
        if features is not None:
            self.Dense_0 = dense(features, out)
        self.GroupNorm_1 = norm(out, groups)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = conv(out, out, scale=SMALL)
        self.shortcut = None
        if biggan and (channels != out or resample is not None):
            self.shortcut = "Conv_2"
            self.Conv_2 = conv(channels, out, 1)
        elif channels != out:
            self.shortcut = "NIN_0"
            self.NIN_0 = Nin(channels, out, 0.1)
        self.resample = resample

    def forward(self, x: Tensor, e: Tensor | None) -> Tensor:
        h = activated(self.GroupNorm_0, x, self.act)
        if self.resample is not None:
            h = self.resample(h)
            x = self.resample(x)

        h = self.Conv_0(h)
        if e is not None:
            h = h + self.Dense_0(e)[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(activated(self.GroupNorm_1, h, self.act)))

        if self.shortcut is not None:
            x = getattr(self, self.shortcut)(x)
        return added(x, h, self.rescale)


class Attention(nn.Module):
    """x + W₃ (self-attention over all places with one head), the sum divided by √2 where asked
    for."""

    GroupNorm_0: nn.GroupNorm
    NIN_0: "Nin"
    NIN_1: "Nin"
    NIN_2: "Nin"
    NIN_3: "Nin"

    def __init__(self, channels: int, groups: int | None, rescale: bool) -> None:
        super().__init__()
        self.rescale = rescale
        self.GroupNorm_0 = norm(channels, groups)
        self.NIN_0 = Nin(channels, channels, 0.1)
        self.NIN_1 = Nin(channels, channels, 0.1)
        self.NIN_2 = Nin(channels, channels, 0.1)
        self.NIN_3 = Nin(channels, channels, SMALL)

    def forward(self, x: Tensor) -> Tensor:
        h = activated(self.GroupNorm_0, x, None)
        q, k, v = (
            nin.of_places(h)[:, None] for nin in (self.NIN_0, self.NIN_1, self.NIN_2)
        )
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]   # (B, L, C)
        h = h.transpose(1, 2).reshape(x.shape)
        return added(x, self.NIN_3(h), self.rescale)


class Nin(nn.Module):
    """A linear map of the channels, W (in, out) and b (out,)."""

    W: nn.Parameter
    b: nn.Parameter

    def __init__(self, channels: int, out: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(initial(torch.empty(channels, out), scale))
        self.b = nn.Parameter(torch.zeros(out))

    def of_places(self, x: Tensor) -> Tensor:
        """(B, L, out) of (B, in, *)."""
        return F.linear(x.flatten(2).transpose(1, 2), self.W.t(), self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_places(x).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Resample(KeepsBuffers):
    """Twice or half the sides without parameters: by the FIR filter, else by repetition and by
    means of four."""

    kernel: Tensor

    def __init__(self, up: bool, fir: bool) -> None:
        super().__init__()
        self.up = up
        self.fir = fir
        self.register_buffer("kernel", _kernel(4 if up else 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fir:
            if self.up:
                return F.interpolate(x, scale_factor=2, mode="nearest")
            return F.avg_pool2d(x, 2)

        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


class ConvResample(nn.Module):
    """Twice or half the sides by a 3×3 convolution, of DDPM; called with the embedding, which it
    does not use."""

    Conv_0: nn.Conv2d

    def __init__(self, channels: int, out: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.Conv_0 = conv(channels, out, padding=1 if up else 0, stride=1 if up else 2)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        if self.up:
            return self.Conv_0(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


class FirDown(KeepsBuffers):
    """Half the sides by the FIR filter and a 3×3 convolution in one."""

    Conv2d_0: nn.Conv2d
    kernel: Tensor

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.Conv2d_0 = conv(channels, out, stride=2, padding=0)
        self.register_buffer("kernel", _kernel(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return self.Conv2d_0(F.conv2d(x, kernel, padding=2, groups=channels))


class Combine(nn.Module):
    """y and a 1×1 convolution of x, added or side by side."""

    Conv_0: nn.Conv2d

    def __init__(self, channels: int, out: int, method: str) -> None:
        super().__init__()
        self.method = method
        self.Conv_0 = conv(channels, out, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.Conv_0(x)
        return torch.cat([h, y], 1) if self.method == "cat" else h + y


def activated(norm: nn.GroupNorm, x: Tensor, act: str | None) -> Tensor:
    """act(norm(x)), in one op where there is one."""
    fused = None if act is None else _FUSED.get(act)
    h = group_norm_modulate(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=fused
    )
    return h if act is None or fused is not None else ACTIVATIONS[act](h)


def added(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, of the same variance as both where asked for."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


def norm(channels: int, groups: int | None) -> nn.GroupNorm:
    """Holds the parameters; groups None: of four channels or more, 32 at most."""
    groups = groups or min(channels // 4, 32)
    if channels % groups:
        raise ValueError(
            f"NCSNpp: widths must be multiples of their {groups} groups; got {channels}."
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv(
    channels: int,
    out: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    scale: float = 1.0,
) -> nn.Conv2d:
    padding = kernel // 2 if padding is None else padding
    layer = nn.Conv2d(channels, out, kernel, stride, padding)
    initial(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


def dense(channels: int, out: int) -> nn.Linear:
    layer = nn.Linear(channels, out)
    initial(layer.weight, 1.0)
    nn.init.zeros_(layer.bias)
    return layer


def initial(weight: Tensor, scale: float) -> Tensor:
    """Uniform with variance scale/(mean of fan in and fan out)."""
    return nn.init.xavier_uniform_(weight, gain=math.sqrt(scale))


def _kernel(gain):
    row = torch.tensor(_FIR, dtype=torch.float32, device=home()) / sum(_FIR)
    return gain * torch.outer(row, row)
