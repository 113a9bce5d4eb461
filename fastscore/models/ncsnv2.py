"""NCSNv2 in its three depths.

One unconditional RefineNet for all noise levels, named as in ermongroup/ncsnv2's checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.models import ncsn
from fastscore.models.refinenet import RefineNet, ladder
from fastscore.ops import checks
from fastscore.scalars import named
from fastscore.schedules import geometric

_SMALLEST = 1e-30  # sigma; 1/σ is finite in float32


class NCSNv2(RefineNet):
    """The score network of Song & Ermon 2020, for images of 32 to 64 pixels.

        s(x, σ) = f(x) / σ,    f = RefineNet(2x - 1)

    f does not see σ, so every σ > 0 is allowed; the ladder is for the sampler and the state_dict.

    Jolicoeur-Martineau et al. 2020 train the same f as their network (f(x) = (D(x) - x)/σ, with
    D(x) the denoised image) and keep no ladder beside it; with scale_by_sigma=False this is their
    network: f(x) itself, and no `sigmas` in the state_dict. It is a score only after the division
    by σ, which samplers here expect.

    Args:
        channels: of the image.
        ngf: base width.
        sigmas: the ladder, descending; None is CIFAR-10's, 232 levels geometric from 50 to 0.01.
        image_size: what `sample_shape` says, 32 unless given; the network takes any even height and
            width.
        scale_by_sigma: return a score. Without, what the network itself computes: f, or D if the
            target is dae.
        nonlinearity: elu, relu, lrelu (slope 0.2) or swish.
        rescaled, logit_transform: x is 2x - 1 or the logit of images, see `from_images` and
            `to_images`; so are σ and the score.
        std: divide f (or D) by its variance over the whole batch, as CAS's --std does: a sample
            then depends on its batch mates.
        target: gaussian; or dae of CAS, where D(x) = sigmoid(2 f(x)) is the denoised image and the
            score is (D - x)/σ².
        dilated: without, the last two stages halve the sides instead of being dilated (CAS's
            --no_dilation).

    Shapes: forward(x, sigma): x (B, channels, H, W) in [0, 1] plus noise, any float dtype that the
        parameters have; sigma a float, 0-d or (B,). Returns the score, like x.

    Raises:
        ValueError: sigmas do not descend; x has other channels or an odd side; sigma is not
            positive; an unknown option.

    Source: Song & Ermon 2020, technique 3 (arXiv:2006.09011); Jolicoeur-Martineau et al. 2020
        (arXiv:2009.05475).

    >>> import torch
    >>> net = NCSNv2(channels=1, ngf=4, image_size=8)
    >>> x = torch.rand(2, 1, 8, 8)
    >>> torch.allclose(2 * net(x, 2.0), net(x, 1.0))
    True
    """

    sigmas: Tensor
    sample_shape: tuple[int, int, int] | None
    std: bool
    target: str
    scale_by_sigma: bool

    _stages, _refines = ncsn.STAGES, ncsn.REFINES
    published: tuple[float, float, int] = 50.0, 0.01, 232
    image_size = 32

    def __init__(
        self,
        channels: int = 3,
        ngf: int = 128,
        sigmas: Tensor | Sequence[float] | None = None,
        image_size: int | None = None,
        scale_by_sigma: bool = True,
        nonlinearity: str = "elu",
        rescaled: bool = False,
        logit_transform: bool = False,
        std: bool = False,
        target: str = "gaussian",
        dilated: bool = True,
    ) -> None:
        sigmas = (
            geometric(*self.published) if sigmas is None else ladder(type(self).__name__, sigmas)
        )
        if not named(target, ("gaussian", "dae")):
            raise ValueError(
                f"{type(self).__name__}: target must be gaussian or dae; got {shown(target)}."
            )

        stages = self._stages if dilated else [(name, width, 1) for name, width, _ in self._stages]
        super().__init__(
            channels, ngf, stages, self._refines, None, nonlinearity, rescaled, logit_transform
        )
        self.std = bool(std)
        self.target = target
        image_size = self.image_size if image_size is None else image_size
        image_size = checks.integer(type(self).__name__, "image_size", image_size, 1, limit=2**31)
        self.sample_shape = (self.channels, image_size, image_size)
        self.scale_by_sigma = scale_by_sigma
        self.register_buffer("sigmas", sigmas, persistent=scale_by_sigma)

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        self.check_images(x)
        if not self.scale_by_sigma:
            return self.output(x).to(x.dtype)

        sigma = checks.expand(
            checks.coefficient(type(self).__name__, "sigma", sigma, x, minimum=_SMALLEST), x
        )
        output = self.output(x)
        if self.target == "dae":
            return ((output - x) / sigma / sigma).to(x.dtype)

        return (output / sigma).to(x.dtype)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """f, or D if the target is dae, in the compute dtype of x."""
        f = self.network(x).to(checks.compute_dtype(x.dtype))
        if self.target == "dae":
            f = torch.sigmoid(2 * f)
        return f / (f.var() + 1e-10) if self.std else f


class NCSNv2Deeper(NCSNv2):
    """NCSNv2 with one more stage, for images of 64 to 128 pixels.

    Arguments, shapes and errors as in NCSNv2, but the sides are divisible by 4, and the defaults
    are those of LSUN bedroom and tower: 1086 levels from 190 to 0.01, 128 pixels.
    """

    _stages = (("res1", 1, 1), ("res2", 2, 1), ("res3", 2, 1), ("res4", 4, 2), ("res5", 4, 4))
    _refines = (("refine1", 4), ("refine2", 2), ("refine3", 2), ("refine4", 1), ("refine5", 1))
    published: tuple[float, float, int] = 190.0, 0.01, 1086
    image_size = 128


class NCSNv2Deepest(NCSNv2):
    """NCSNv2Deeper with one more stage, for images of 256 pixels.

    Arguments, shapes and errors as in NCSNv2, but the sides are divisible by 8, and the defaults
    are those of FFHQ: 2311 levels from 348 to 0.01, 256 pixels.
    """

    _stages = (
        ("res1", 1, 1),
        ("res2", 2, 1),
        ("res3", 2, 1),
        ("res31", 2, 1),
        ("res4", 4, 2),
        ("res5", 4, 4),
    )
    _refines = (
        ("refine1", 4),
        ("refine2", 2),
        ("refine31", 2),
        ("refine3", 2),
        ("refine4", 1),
        ("refine5", 1),
    )
    published: tuple[float, float, int] = 348.0, 0.01, 2311
    image_size = 256
