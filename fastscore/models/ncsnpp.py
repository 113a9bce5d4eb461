"""NCSN++, DDPM++ and DDPM, the U-Nets of score_sde, named as in its checkpoints."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastscore.messages import shown
from fastscore.models import ncsnpp_layers as layers
from fastscore.models.ncsnpp_layers import activated, added
from fastscore.models.refinenet import ACTIVATIONS
from fastscore.models.score_sde_process import Process
from fastscore.ops import checks
from fastscore.scalars import DEPTH, SIZE, named

_NAME = "NCSNpp"
_SMALLEST = 1e-30  # sigma; 1/σ is finite in float32
CHOICES: dict[str, tuple[str, ...]] = {
    "nonlinearity": tuple(ACTIVATIONS),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
}


class NCSNpp(layers.Exact):
    """The score networks of Song et al. 2021, for square images.

        s(x, σ) = F(2x - 1, ln σ)/σ                        sde "ve"
        s(x, i) = F(2x - 1, i)/σ_i                          "ve", not continuous: levels alone
        s(x, σ) = -F(√ᾱ (2x - 1), 999 t)/σ                 "vp", "subvp": ᾱ and t from σ

    Whatever the process, x are images in [0, 1] plus noise of standard deviation σ and s is their
    score, as everywhere in this package. Of the variance-preserving ones, where the network saw
    u = √ᾱ (2x₀ - 1) + b z, this is a change of variables: 2σ = b/√ᾱ with b² = 1 - ᾱ ("vp") or
    b = 1 - ᾱ ("subvp"), and ᾱ = exp(-β_min t - (β_max - β_min) t²/2); t is in (0, 1], so σ has an
    upper end. Of "vp", not continuous, ᾱ is the product of 1 - β over DDPM's steps, and steps
    between two are interpolated in ln σ.

    F is a U-Net of residual blocks of group norm, activation and convolution, twice, the embedding
    of the noise added between; see `score_sde`'s configs for the options, called as here.

    Args:
        channels: of the image. nf: base width, 4 at least. ch_mult: its multiples, by level; each
            level has half the side of the one before. num_res_blocks: of a level on the way down;
            one more on the way up.
        attention: levels, from 0, with self-attention (attn_resolutions gives their sides).
        sde: ve, vp or subvp. continuous: of training; not of sub-VP, which always is.
        conditional: F sees the noise.
        resblock_type: biggan, or ddpm as in DDPM. fir: resample by the filter (1, 3, 3, 1), as
            NCSN++ does and DDPM++ does not. skip_rescale: divide sums by √2.
        progressive: none or output_skip. progressive_input: none, input_skip or residual, of which
            the last is NCSN++'s. progressive_combine: sum or cat.
        nonlinearity: elu, relu, lrelu (slope 0.2) or swish. dropout: probability, in the blocks.
        groups: of the group norms; None is min(channels/4, 32), DDPM has 32.
        scale_by_sigma: F is divided by σ ("ve" alone, where it is unless told otherwise).
        centered: F takes images as 2x - 1 from the data's side, as vp and subvp do, and not by
            itself; then the noise was that of 2x - 1.
        sigmas: the ladder, descending, for samplers, and the levels of "ve"; None is that of the
            process, num_scales levels, of "ve" geometric from 50 to 0.01.
        beta_min, beta_max: β of vp and subvp. fourier_scale: of the frequencies of ln σ.
        image_size: what `sample_shape` says.

    Shapes: forward(x, sigma): x (B, channels, H, W), sides multiples of 2^(levels - 1), any float
        dtype that the parameters have; sigma a float, 0-d or (B,). Returns the score, like x.

    state_dict: `all_modules.i.*` as in score_sde, and of "ve" `sigmas`.

    Raises:
        ValueError: an argument outside its range or a sigma outside the process's; x has other
            channels or sides.

    Source: Song et al. 2021, appendices C, G and H (arXiv:2011.13456); Ho et al. 2020
        (arXiv:2006.11239).

    >>> net = NCSNpp(nf=8, ch_mult=(1, 2), num_res_blocks=1, image_size=8)
    >>> net(torch.full((2, 3, 8, 8), 0.5), torch.tensor([50.0, 0.01])).shape
    torch.Size([2, 3, 8, 8])
    """

    channels: int
    nf: int
    levels: int
    attention: frozenset[int]
    num_res_blocks: int
    process: Process
    scale_by_sigma: bool
    conditional: bool
    skip_rescale: bool
    sigmas: Tensor
    sample_shape: tuple[int, int, int]
    pyramid_down: layers.Resample
    pyramid_up: layers.Resample
    all_modules: nn.ModuleList

    def __init__(
        self,
        channels: int = 3,
        nf: int = 128,
        *,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 4,
        attention: Sequence[int] = (1,),
        sde: str = "ve",
        continuous: bool = True,
        conditional: bool = True,
        resblock_type: str = "biggan",
        fir: bool = True,
        skip_rescale: bool = True,
        progressive: str = "none",
        progressive_input: str = "residual",
        progressive_combine: str = "sum",
        nonlinearity: str = "swish",
        dropout: float = 0.0,
        groups: int | None = None,
        scale_by_sigma: bool | None = None,
        centered: bool | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
        num_scales: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        fourier_scale: float = 16.0,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.channels = checks.integer(_NAME, "channels", channels, 1, limit=SIZE)
        self.nf = checks.integer(_NAME, "nf", nf, 4, limit=SIZE)
        widths = [self.nf * m for m in _integers("ch_mult", ch_mult, 1, SIZE)]
        if not widths:
            raise ValueError(f"{_NAME}: ch_mult must name one level at least; got none.")
        self.levels = len(widths)
        self.attention = frozenset(_integers("attention", attention, 0, self.levels - 1))
        self.num_res_blocks = checks.integer(
            _NAME, "num_res_blocks", num_res_blocks, 1, limit=DEPTH
        )
        image_size = checks.integer(_NAME, "image_size", image_size, 1, limit=2**31)
        self.sample_shape = (self.channels, image_size, image_size)
        for name, value in {
            "nonlinearity": nonlinearity,
            "resblock_type": resblock_type,
            "progressive": progressive,
            "progressive_input": progressive_input,
            "progressive_combine": progressive_combine,
        }.items():
            if not named(value, CHOICES[name]):
                raise ValueError(
                    f"{_NAME}: {name} must be one of {', '.join(CHOICES[name])}; got "
                    f"{shown(value)}."
                )

        self.process = Process(sde, continuous, centered, num_scales, beta_min, beta_max)
        if scale_by_sigma and sde != "ve":
            raise ValueError(f"{_NAME}: scale_by_sigma is an option of sde ve; got sde {sde}.")
        self.scale_by_sigma = sde == "ve" if scale_by_sigma is None else bool(scale_by_sigma)
        self.conditional = bool(conditional)
        self.skip_rescale = bool(skip_rescale)
        self.progressive = progressive
        self.progressive_input = progressive_input
        self.nonlinearity = nonlinearity

        # The file of a network of images in [0, 1] has the same ladder.
        of_images = sde == "ve" and not self.process.centered
        self.register_buffer("sigmas", self.process.ladder(sigmas), persistent=of_images)
        self.pyramid_down = layers.Resample(False, bool(fir))
        self.pyramid_up = layers.Resample(True, bool(fir))
        self.all_modules = nn.ModuleList(
            self._parts(
                widths,
                biggan=resblock_type == "biggan",
                fir=bool(fir),
                combine=progressive_combine,
                scale=checks.number(_NAME, "fourier_scale", fourier_scale, above=0),
                groups=_groups(groups),
                dropout=checks.number(_NAME, "dropout", dropout, 0, 1),
            )
        )

    def _parts(
        self,
        widths: list[int],
        *,
        biggan: bool,
        fir: bool,
        combine: str,
        scale: float,
        groups: int | None,
        dropout: float,
    ) -> Iterator[nn.Module]:
        """The modules in the order of the data's way, which is that of their numbers."""
        features = 4 * self.nf if self.conditional else None

        def block(c, out, up=None):
            return layers.Residual(
                c,
                out,
                features=features,
                groups=groups,
                act=self.nonlinearity,
                dropout=dropout,
                rescale=self.skip_rescale,
                biggan=biggan,
                resample=None if up is None else layers.Resample(up, fir),
            )

        def resampled(c, up):
            return block(c, c, up) if biggan else layers.ConvResample(c, c, up)

        def attention(c):
            return layers.Attention(c, groups, self.skip_rescale)

        def to_image(c):
            return layers.norm(c, groups), layers.conv(c, self.channels, scale=layers.SMALL)

        embedded = self.nf
        if self.process.takes_logarithm:
            yield layers.FourierFeatures(self.nf, scale)
            embedded = 2 * self.nf
        if self.conditional:
            yield layers.dense(embedded, 4 * self.nf)
            yield layers.dense(4 * self.nf, 4 * self.nf)

        yield layers.conv(self.channels, self.nf)
        c, kept, image = self.nf, [self.nf], self.channels
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                yield block(c, width)
                c = width
                if level in self.attention:
                    yield attention(c)
                kept.append(c)
            if level < self.levels - 1:
                yield resampled(c, up=False)
                if self.progressive_input == "input_skip":
                    yield layers.Combine(self.channels, c, combine)
                    c = 2 * c if combine == "cat" else c
                elif self.progressive_input == "residual":
                    yield layers.FirDown(image, c) if fir else layers.ConvResample(image, c, False)
                    image = c
                kept.append(c)

        yield block(c, c)
        yield attention(c)
        yield block(c, c)

        for level in range(self.levels - 1, -1, -1):
            for _ in range(self.num_res_blocks + 1):
                yield block(c + kept.pop(), widths[level])
                c = widths[level]
            if level in self.attention:
                yield attention(c)
            if self.progressive == "output_skip":
                yield from to_image(c)
            if level:
                yield resampled(c, up=True)
        if self.progressive == "none":
            yield from to_image(c)

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = self._check(x, sigma)
        root, condition = self.process.condition(sigma, self.sigmas)
        sigma, root = (_column(t) for t in (sigma, root))

        wide = x.to(sigma.dtype)
        u = root * (2 * wide - 1) if self.process.centered else 2 * root * wide - 1
        f = self.network(u.to(x.dtype), condition).to(sigma.dtype)

        if self.process.sde != "ve":
            return (-f / sigma).to(x.dtype)
        if self.scale_by_sigma:
            return (f / sigma).to(x.dtype)
        return (2 * f if self.process.centered else f).to(x.dtype)

    def network(self, u: Tensor, condition: Tensor) -> Tensor:
        """F of the network's own data u (B, channels, H, W), like u.

        condition: (B,) or (1,); ln σ, a level's number, or 999 t.
        """
        parts = iter(self.all_modules)
        e = self._embedding(parts, condition, u)

        pyramid = u
        h = next(parts)(u)
        skips = [h]
        for level in range(self.levels):
            for _ in range(self.num_res_blocks):
                h = next(parts)(h, e)
                if level in self.attention:
                    h = next(parts)(h)
                skips.append(h)
            if level < self.levels - 1:
                h = next(parts)(h, e)
                if self.progressive_input == "input_skip":
                    pyramid = self.pyramid_down(pyramid)
                    h = next(parts)(pyramid, h)
                elif self.progressive_input == "residual":
                    h = added(next(parts)(pyramid), h, self.skip_rescale)
                    pyramid = h
                skips.append(h)

        h = next(parts)(h, e)
        h = next(parts)(h)
        h = next(parts)(h, e)

        image = None
        for level in range(self.levels - 1, -1, -1):
            for _ in range(self.num_res_blocks + 1):
                h = next(parts)(torch.cat([h, skips.pop()], 1), e)
            if level in self.attention:
                h = next(parts)(h)
            if self.progressive == "output_skip":
                more = self._to_image(parts, h)
                image = more if image is None else self.pyramid_up(image) + more
            if level:
                h = next(parts)(h, e)
        return self._to_image(parts, h) if image is None else image

    def _to_image(self, parts, h):
        norm, conv = next(parts), next(parts)
        return conv(activated(norm, h, self.nonlinearity))

    def _embedding(self, parts, condition, u):
        """act(e), (B, 4 nf) or (1, 4 nf); None of an unconditional network."""
        act = ACTIVATIONS[self.nonlinearity]
        if self.process.takes_logarithm:
            e = next(parts)(condition)
        else:
            e = layers.positions(condition, self.nf)
        if not self.conditional:
            return None
        first, second = next(parts), next(parts)
        return act(second(act(first(e.to(u.dtype)))))

    def _check(self, x, sigma):
        """σ as (B,) or (1,)."""
        checks.check_float(_NAME, "x", x)
        side = 2 ** (self.levels - 1)
        if x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % side or x.shape[3] % side:
            raise ValueError(
                f"{_NAME}: x must be (B, {self.channels}, H, W) with sides divisible by {side}; "
                f"got {tuple(x.shape)}."
            )
        sigma = checks.coefficient(_NAME, "sigma", sigma, x, minimum=_SMALLEST)
        if not isinstance(sigma, Tensor):
            sigma = checks.as_tensor(sigma, x)
        return sigma.reshape(-1)


def _groups(groups):
    return None if groups is None else checks.integer(_NAME, "groups", groups, 1, limit=SIZE)


def _column(t):
    return t.reshape(-1, 1, 1, 1) if isinstance(t, Tensor) else t


def _integers(name, values, least, most):
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{_NAME}: {name} must be integers, such as (1, 2); got {shown(values)}.")
    return [checks.integer(_NAME, name, value, least, most) for value in values]
