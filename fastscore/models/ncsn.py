"""NCSN: a dilated RefineNet whose every normalisation knows the noise level, named as in ermongroup/ncsn's checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastscore.nn import ConditionalInstanceNorm2dPlus
from fastscore.ops import checks


class NCSN(nn.Module):
    """The noise-conditional score network of Song & Ermon 2019.

        s = RefineNet(2x - 1, l),    l = argmin_i |log σ - log σ_i|

    The network predicts the score itself: its output is not divided by σ (NCSNv2's is).

    Args:
        channels: of the image.
        ngf: base width; 128 for CIFAR-10 and CelebA, 64 for MNIST.
        sigmas: the ladder, descending; None is the paper's, 10 levels geometric from 1 to 0.01.
        image_size: what `sample_shape` says; the network takes any even height and width.

    Shapes: forward(x, sigma): x (B, channels, H, W) in [0, 1] plus noise, any float dtype that the parameters have;
        sigma a float, 0-d or (B,), levels of the ladder. Returns the score, like x.

    Raises:
        ValueError: sigmas do not descend; x has other channels or an odd side; sigma is no level (relative 1e-3; looked at for
            floats and CPU tensors, not while compiling).

    Source: Song & Ermon 2019, appendix A (arXiv:1907.05600).

    >>> net = NCSN(channels=1, ngf=4, image_size=8)
    >>> net(torch.rand(2, 1, 8, 8), net.sigmas[:2]).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, channels=3, ngf=128, sigmas=None, image_size=32):
        super().__init__()
        n, ladder = ngf, _ladder(sigmas)
        L = len(ladder)
        self.channels, self.sample_shape = channels, (channels, image_size, image_size)
        self.register_buffer("sigmas", ladder, persistent=False)
        self.begin_conv = nn.Conv2d(channels, n, 3, padding=1)
        self.res1 = nn.ModuleList([_Residual(n, n, L), _Residual(n, n, L)])
        self.res2 = nn.ModuleList([_Residual(n, 2 * n, L, pool=True), _Residual(2 * n, 2 * n, L)])
        self.res3 = nn.ModuleList([_Residual(2 * n, 2 * n, L, 2, down=True), _Residual(2 * n, 2 * n, L, 2)])
        self.res4 = nn.ModuleList([_Residual(2 * n, 2 * n, L, 4, down=True), _Residual(2 * n, 2 * n, L, 4)])
        self.refine1 = _Refine([2 * n], 2 * n, L)
        self.refine2 = _Refine([2 * n, 2 * n], 2 * n, L)
        self.refine3 = _Refine([2 * n, 2 * n], n, L)
        self.refine4 = _Refine([n, n], n, L, blocks=3)
        self.normalizer = ConditionalInstanceNorm2dPlus(n, L)
        self.end_conv = nn.Conv2d(n, channels, 3, padding=1)

    def forward(self, x, sigma):
        if x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"NCSN: x must be (B, {self.channels}, H, W) with even sides; got {tuple(x.shape)}.")
        labels = self.level(sigma, x)
        h, layers = self.begin_conv(2 * x - 1), []
        for stage in (self.res1, self.res2, self.res3, self.res4):
            for block in stage:
                h = block(h, labels)
            layers.append(h)
        h = self.refine1([layers[3]], labels)
        for refine, layer in zip((self.refine2, self.refine3, self.refine4), layers[2::-1]):
            h = refine([layer, h], labels)
        return self.end_conv(F.elu(self.normalizer(h, labels)))

    def level(self, sigma, x):
        """The index (B,) of the level nearest to sigma (a float, 0-d or (B,)) in log σ."""
        sigma = checks.coefficient("NCSN", "sigma", sigma, x)
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.full((), sigma, dtype=checks.compute_dtype(x.dtype), device=x.device)
        distance = (sigma.log()[..., None] - self.sigmas.to(sigma.dtype).log()).abs()  # (B, L)
        nearest, labels = distance.min(-1)
        if sigma.device.type == "cpu" and checks.readable():
            self._check_level(nearest, sigma)
        return labels.expand(x.shape[0])

    def _check_level(self, distance, sigma):
        far = ~(distance.detach() <= max(1e-3, torch.finfo(self.sigmas.dtype).eps))  # NaN is far
        if bool(far.any()):
            wrong = sigma.detach()[far].flatten()[0].item()
            first, last = self.sigmas[0].item(), self.sigmas[-1].item()
            raise ValueError(f"NCSN: sigma must be one of the {len(self.sigmas)} levels from {first:g} to {last:g}; got {wrong:g}.")


class _Residual(nn.Module):
    """norm, ELU, conv, norm, ELU, conv, plus the (projected) input; `pool` halves the sides, `down` only projects."""

    def __init__(self, inputs, outputs, levels, dilation=1, pool=False, down=False):
        super().__init__()
        middle = inputs if pool or down else outputs
        self.normalize1 = ConditionalInstanceNorm2dPlus(inputs, levels)
        self.conv1 = nn.Conv2d(inputs, middle, 3, padding=dilation, dilation=dilation)
        self.normalize2 = ConditionalInstanceNorm2dPlus(middle, levels)
        conv = _ConvMeanPool if pool else nn.Conv2d
        self.conv2 = conv(middle, outputs, 3, padding=dilation, dilation=dilation)
        if pool:
            self.shortcut = _ConvMeanPool(inputs, outputs, 1)
        elif down or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x, labels):
        h = self.conv1(F.elu(self.normalize1(x, labels)))
        return self.shortcut(x) + self.conv2(F.elu(self.normalize2(h, labels)))


class _ConvMeanPool(nn.Module):
    def __init__(self, inputs, outputs, kernel, **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, **options)

    def forward(self, x):
        return F.avg_pool2d(self.conv(x), 2)


class _Refine(nn.Module):
    """Adapt each input, fuse them at the size of the first, pool in a chain, adapt the result."""

    def __init__(self, inputs, features, levels, blocks=1):
        super().__init__()
        self.adapt_convs = nn.ModuleList(_ResidualUnits(c, 2, levels) for c in inputs)
        if len(inputs) > 1:
            self.msf = _Fusion(inputs, features, levels)
        self.crp = _ChainedPooling(features, levels)
        self.output_convs = _ResidualUnits(features, blocks, levels)

    def forward(self, xs, labels):
        hs = [adapt(x, labels) for adapt, x in zip(self.adapt_convs, xs)]
        h = self.msf(hs, labels) if len(hs) > 1 else hs[0]
        return self.output_convs(self.crp(h, labels), labels)


class _ResidualUnits(nn.Module):
    """`blocks` residual units of two stages norm, ELU, conv; `{block}_{stage}_norm` and `_conv`, counted from 1."""

    def __init__(self, features, blocks, levels):
        super().__init__()
        self.blocks = blocks
        for name in (f"{b}_{s}" for b in range(1, blocks + 1) for s in (1, 2)):
            self.add_module(f"{name}_norm", ConditionalInstanceNorm2dPlus(features, levels))
            self.add_module(f"{name}_conv", nn.Conv2d(features, features, 3, padding=1, bias=False))

    def forward(self, x, labels):
        for b in range(1, self.blocks + 1):
            h = x
            for s in (1, 2):
                h = getattr(self, f"{b}_{s}_conv")(F.elu(getattr(self, f"{b}_{s}_norm")(h, labels)))
            x = x + h
        return x


class _Fusion(nn.Module):
    def __init__(self, inputs, features, levels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, features, 3, padding=1) for c in inputs)
        self.norms = nn.ModuleList(ConditionalInstanceNorm2dPlus(c, levels) for c in inputs)

    def forward(self, xs, labels):
        hs = [conv(norm(x, labels)) for conv, norm, x in zip(self.convs, self.norms, xs)]
        size = xs[0].shape[2:]
        hs = [h if h.shape[2:] == size else F.interpolate(h, size, mode="bilinear", align_corners=True) for h in hs]
        return sum(hs[1:], hs[0])


class _ChainedPooling(nn.Module):
    def __init__(self, features, levels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(ConditionalInstanceNorm2dPlus(features, levels) for _ in range(2))

    def forward(self, x, labels):
        x = path = F.elu(x)
        for conv, norm in zip(self.convs, self.norms):
            path = conv(F.avg_pool2d(norm(path, labels), 5, stride=1, padding=2))  # average, padding counted
            x = x + path
        return x


def _ladder(sigmas):
    if sigmas is None:
        return torch.linspace(0, math.log(0.01), 10, dtype=torch.float64).exp().float()
    sigmas = torch.as_tensor(sigmas, dtype=torch.get_default_dtype()).detach().clone()
    if sigmas.dim() != 1 or not len(sigmas) or not bool((sigmas > 0).all() and (sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(f"NCSN: sigmas must be a descending ladder (L,) of positive levels; got {sigmas.tolist()}.")
    return sigmas
