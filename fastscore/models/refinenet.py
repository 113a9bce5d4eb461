"""The dilated RefineNet of NCSN and NCSNv2, named as in the official checkpoints.

With levels=L every normalisation is conditional and the modules are called (x, labels); with
levels=None the refinement has no normalisation at all, its pooling takes the maximum instead of the
mean, and the modules are called (x).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.deferred import KeepsBuffers
from fastscore.messages import shown, shown_ladder
from fastscore.models.layout import channels_last, laid_out_as
from fastscore.nn import ConditionalInstanceNorm2dPlus, InstanceNorm2dPlus
from fastscore.ops import checks
from fastscore.scalars import SIZE, named
from fastscore.tensors import numbers

_leaky = partial(F.leaky_relu, negative_slope=0.2)
# As the official configs call them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": _leaky,
    "swish": F.silu,
}
_FUSED = {"elu": "elu", "relu": "relu", "swish": "silu"}   # as the norms call them
_LOGIT = 1e-6   # λ of the official logit transform


class RefineNet(KeepsBuffers):
    """Residual stages downwards, refinement upwards, no output scaling.

    The part that the score networks share.

        f = conv(act(norm(RefineNet(conv(2x - 1)))))

    Args:
        channels, ngf: of the image, and the base width n.
        stages: (name, width, dilation) of each, the width in units of n. Every stage but the first
            halves the sides, or keeps them if it is dilated.
        refines: (name, width) of each; the first takes the last stage, the others one stage each
            and the one before.
        levels: L, or None for an unconditional network.
        nonlinearity: act, one of elu, relu, lrelu (slope 0.2) and swish.
        rescaled, logit_transform: the network's data are 2x - 1, or logit(λ + (1 - 2λ) x), λ =
            1e-6, of images x, and it takes them as they are; at most one. `from_images` and
            `to_images` go between them and images in [0, 1].
    """

    nonlinearity: str
    rescaled: bool
    logit_transform: bool
    stages: list[Any]
    refines: list[Any]
    side: int
    begin_conv: nn.Conv2d
    normalizer: nn.Module
    end_conv: nn.Conv2d

    def __init__(
        self,
        channels: int,
        ngf: int,
        stages: Any,
        refines: Any,
        levels: int | None = None,
        nonlinearity: str = "elu",
        rescaled: bool = False,
        logit_transform: bool = False,
    ) -> None:
        super().__init__()
        if not named(nonlinearity, ACTIVATIONS):
            raise ValueError(
                f"{type(self).__name__}: nonlinearity must be one of {', '.join(ACTIVATIONS)}; got "
                f"{shown(nonlinearity)}."
            )
        if rescaled and logit_transform:
            raise ValueError(
                f"{type(self).__name__}: at most one of rescaled and logit_transform can be true."
            )

        act = nonlinearity
        self.nonlinearity = nonlinearity
        self.rescaled = bool(rescaled)
        self.logit_transform = bool(logit_transform)
        channels = checks.integer(type(self).__name__, "channels", channels, 1, limit=SIZE)
        ngf = checks.integer(type(self).__name__, "ngf", ngf, 1, limit=SIZE)
        self.channels = channels
        self.stages = [name for name, *_ in stages]
        self.refines = [name for name, _ in refines]
        # Both sides are multiples of it.
        self.side = 2 ** sum(dilation == 1 for _, _, dilation in stages[1:])
        self.begin_conv = nn.Conv2d(channels, ngf, 3, padding=1)
        inputs, widths = ngf, []
        for name, width, dilation in stages:
            first = Residual(inputs, width * ngf, levels, dilation, down=bool(widths), act=act)
            setattr(
                self,
                name,
                nn.ModuleList(
                    [first, Residual(width * ngf, width * ngf, levels, dilation, act=act)]
                ),
            )
            inputs = width * ngf
            widths.append(inputs)

        below = []
        for name, width in refines:
            blocks = 3 if name == refines[-1][0] else 1
            setattr(self, name, Refine([widths.pop(), *below], width * ngf, levels, blocks, act))
            below = [width * ngf]

        self.normalizer = norm(ngf, levels, act)
        self.end_conv = nn.Conv2d(ngf, channels, 3, padding=1)

    def check_images(self, x: Tensor) -> None:
        if (
            x.dim() != 4
            or x.shape[1] != self.channels
            or x.shape[2] % self.side
            or x.shape[3] % self.side
        ):
            sides = "even sides" if self.side == 2 else f"sides divisible by {self.side}"
            raise ValueError(
                f"{type(self).__name__}: x must be (B, {self.channels}, H, W) with {sides}; got "
                f"{tuple(x.shape)}."
            )

    def network(self, x: Tensor, *labels: Tensor) -> Tensor:
        """f(x), or f(x, labels), like x."""
        centred = x if self.rescaled or self.logit_transform else 2 * x - 1
        h = self.begin_conv(channels_last(centred))
        layers, below = [], []
        for name in self.stages:
            for block in getattr(self, name):
                h = block(h, *labels)
            layers.append(h)
        for name in self.refines:
            h = getattr(self, name)([layers.pop(), *below], *labels)
            below = [h]

        return laid_out_as(self.end_conv(self.normalizer(h, *labels)), x)

    def from_images(self, x: torch.Tensor) -> torch.Tensor:
        """The network's data, from images in [0, 1]."""
        if self.rescaled:
            return 2 * x - 1
        return torch.logit(_LOGIT + (1 - 2 * _LOGIT) * x) if self.logit_transform else x

    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        """Images, in [0, 1] where the network's data x are data: the inverse of `from_images`."""
        if self.rescaled:
            return (x + 1) / 2
        return (torch.sigmoid(x) - _LOGIT) / (1 - 2 * _LOGIT) if self.logit_transform else x


class _LeakyNorm(InstanceNorm2dPlus):
    def forward(self, x):
        return _leaky(super().forward(x))


class _ConditionalLeakyNorm(ConditionalInstanceNorm2dPlus):
    def forward(self, x, labels):
        return _leaky(super().forward(x, labels))


def norm(features: int, levels: int | None, act: str | None = None) -> nn.Module:
    """InstanceNorm++ and the activation of this name after it, in one op where there is one."""
    if act == "lrelu":
        return _LeakyNorm(features) if levels is None else _ConditionalLeakyNorm(features, levels)
    fused = None if act is None else _FUSED[act]
    if levels is None:
        return InstanceNorm2dPlus(features, activation=fused)
    return ConditionalInstanceNorm2dPlus(features, levels, activation=fused)


class Activation(nn.Module):
    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.act](x)


class Residual(nn.Module):
    """norm, act, conv, norm, act, conv, plus the (projected) input.

    `down` halves the sides, or only projects if dilated.
    """

    normalize1: nn.Module
    conv1: nn.Conv2d
    normalize2: nn.Module
    conv2: nn.Module
    shortcut: nn.Module

    def __init__(
        self,
        inputs: int,
        outputs: int,
        levels: int | None,
        dilation: int = 1,
        down: bool = False,
        act: str = "elu",
    ) -> None:
        super().__init__()
        middle = inputs if down else outputs
        pool = down and dilation == 1
        self.normalize1 = norm(inputs, levels, act)
        self.conv1 = nn.Conv2d(inputs, middle, 3, padding=dilation, dilation=dilation)
        self.normalize2 = norm(middle, levels, act)
        conv = ConvMeanPool if pool else nn.Conv2d
        self.conv2 = conv(middle, outputs, 3, padding=dilation, dilation=dilation)
        if pool:
            self.shortcut = ConvMeanPool(inputs, outputs, 1)
        elif down or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        h = self.conv1(self.normalize1(x, *labels))
        return self.shortcut(x) + self.conv2(self.normalize2(h, *labels))


class ConvMeanPool(nn.Module):
    conv: nn.Conv2d

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, **options)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2)


class Refine(nn.Module):
    """Adapt each input, fuse them at the size of the first, pool in a chain, adapt the result."""

    adapt_convs: nn.ModuleList
    msf: "Fusion"
    crp: "ChainedPooling"
    output_convs: "ResidualUnits"

    def __init__(
        self,
        inputs: Sequence[int],
        features: int,
        levels: int | None,
        blocks: int = 1,
        act: str = "elu",
    ) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ResidualUnits(c, 2, levels, act) for c in inputs)
        if len(inputs) > 1:
            self.msf = Fusion(inputs, features, levels)
        self.crp = ChainedPooling(features, levels, act)
        self.output_convs = ResidualUnits(features, blocks, levels, act)

    def forward(self, xs: Sequence[Tensor], *labels: Tensor) -> Tensor:
        hs = [adapt(x, *labels) for adapt, x in zip(self.adapt_convs, xs)]
        h = self.msf(hs, *labels) if len(hs) > 1 else hs[0]
        return self.output_convs(self.crp(h, *labels), *labels)


class ResidualUnits(nn.Module):
    """`blocks` residual units of two stages (norm,) act, conv.

    `{block}_{stage}_norm` and `_conv`, counted from 1.
    """

    def __init__(self, features: int, blocks: int, levels: int | None, act: str = "elu") -> None:
        super().__init__()
        self.blocks = blocks
        for name in (f"{b}_{s}" for b in range(1, blocks + 1) for s in (1, 2)):
            self.add_module(
                f"{name}_norm", Activation(act) if levels is None else norm(features, levels, act)
            )
            self.add_module(f"{name}_conv", nn.Conv2d(features, features, 3, padding=1, bias=False))

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        for b in range(1, self.blocks + 1):
            h = x
            for s in (1, 2):
                h = getattr(self, f"{b}_{s}_conv")(getattr(self, f"{b}_{s}_norm")(h, *labels))
            x = x + h
        return x


class Fusion(nn.Module):
    """(norm,) conv, resize to the first input, sum.

    Summed in the network's dtype, where the original sums in float32.
    """

    convs: nn.ModuleList
    norms: nn.ModuleList

    def __init__(self, inputs: Sequence[int], features: int, levels: int | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, features, 3, padding=1) for c in inputs)
        self.norms = nn.ModuleList(
            nn.Identity() if levels is None else norm(c, levels) for c in inputs
        )

    def forward(self, xs: Sequence[Tensor], *labels: Tensor) -> Tensor:
        hs = [conv(norm(x, *labels)) for conv, norm, x in zip(self.convs, self.norms, xs)]
        size = xs[0].shape[2:]
        hs = [
            h
            if h.shape[2:] == size
            else F.interpolate(h, size, mode="bilinear", align_corners=True)
            for h in hs
        ]
        return sum(hs[1:], hs[0])


class ChainedPooling(nn.Module):
    """act, then twice: (norm,) 5x5 pooling, conv, add.

    The original calls its pool `maxpool` also where it takes the mean.
    """

    convs: nn.ModuleList
    norms: nn.ModuleList
    unconditional: bool

    def __init__(self, features: int, levels: int | None, act: str = "elu") -> None:
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList(
            nn.Conv2d(features, features, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(
            nn.Identity() if levels is None else norm(features, levels) for _ in range(2)
        )
        self.unconditional = levels is None

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        pool = F.max_pool2d if self.unconditional else F.avg_pool2d  # the mean counts the padding
        x = path = ACTIVATIONS[self.act](x)
        for conv, norm in zip(self.convs, self.norms):
            path = conv(pool(norm(path, *labels), 5, stride=1, padding=2))
            x = x + path
        return x


def ladder(op: str, sigmas: Tensor | Sequence[float] | None) -> Tensor | None:
    """sigmas as a tensor (L,); raises unless they descend."""
    sigmas = numbers(op, "sigmas", sigmas, torch.get_default_dtype()).detach().clone()
    if sigmas.dim() != 1 or not len(sigmas):
        raise ValueError(
            f"{op}: sigmas must be a descending ladder (L,) of positive levels; got shape "
            f"{tuple(sigmas.shape)}."
        )

    positive = bool(((sigmas > 0) & sigmas.isfinite()).all())
    if not positive or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"{op}: sigmas must be a descending ladder (L,) of positive levels; got "
            f"{shown_ladder(sigmas.tolist())}."
        )

    return sigmas
