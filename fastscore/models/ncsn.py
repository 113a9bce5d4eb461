"""NCSN: a dilated RefineNet whose every normalisation knows the noise level, named as in
ermongroup/ncsn's checkpoints."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastscore.models.refinenet import RefineNet, ladder
from fastscore.ops import checks
from fastscore.schedules import geometric

STAGES = (("res1", 1, 1), ("res2", 2, 1), ("res3", 2, 2), ("res4", 2, 4))  # name, width, dilation
REFINES = (("refine1", 2), ("refine2", 2), ("refine3", 1), ("refine4", 1))


class NCSN(RefineNet):
    """The noise-conditional score network of Song & Ermon 2019.

        s = RefineNet(2x - 1, l),    l = argmin_i |log σ - log σ_i|

    The network predicts the score itself: its output is not divided by σ (NCSNv2's is).

    Args:
        channels: of the image.
        ngf: base width; 128 for CIFAR-10 and CelebA, 64 for MNIST.
        sigmas: the ladder, descending; None is the paper's, 10 levels geometric from 1 to 0.01.
        image_size: what `sample_shape` says; the network takes any even height and width.
        nonlinearity: elu, relu, lrelu (slope 0.2) or swish; ermongroup/ncsn's own network has only
            elu.
        rescaled, logit_transform: x is 2x - 1 or the logit of images, see `from_images` and
            `to_images`; so are σ and the score.

    Shapes: forward(x, sigma): x (B, channels, H, W) in [0, 1] plus noise, any float dtype that the
        parameters have; sigma a float, 0-d or (B,), levels of the ladder. Returns the score, like
        x.

    Raises:
        ValueError: sigmas do not descend; x has other channels or an odd side; sigma is no level
            (relative 1e-3; looked at for floats and CPU tensors, not while compiling).

    Source: Song & Ermon 2019, appendix A (arXiv:1907.05600).

    >>> net = NCSN(channels=1, ngf=4, image_size=8)
    >>> net(torch.rand(2, 1, 8, 8), net.sigmas[:2]).shape
    torch.Size([2, 1, 8, 8])
    """

    sigmas: Tensor
    sample_shape: tuple[int, int, int]

    published: tuple[float, float, int] = 1.0, 0.01, 10  # the ladder: σ_max, σ_min, L

    def __init__(
        self,
        channels: int = 3,
        ngf: int = 128,
        sigmas: Tensor | Sequence[float] | None = None,
        image_size: int = 32,
        nonlinearity: str = "elu",
        rescaled: bool = False,
        logit_transform: bool = False,
    ) -> None:
        sigmas = geometric(*self.published) if sigmas is None else ladder("NCSN", sigmas)
        super().__init__(
            channels, ngf, STAGES, REFINES, len(sigmas), nonlinearity, rescaled, logit_transform
        )
        image_size = checks.integer("NCSN", "image_size", image_size, 1, limit=2**31)
        self.sample_shape = (self.channels, image_size, image_size)
        self.register_buffer("sigmas", sigmas, persistent=False)

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        self.check_images(x)
        return self.network(x, self.level(sigma, x))

    def level(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        """The index (B,) of the level nearest to sigma (a float, 0-d or (B,)) in log σ."""
        sigma = checks.coefficient("NCSN", "sigma", sigma, x)
        if not isinstance(sigma, torch.Tensor):
            sigma = checks.as_tensor(sigma, x)
        # (B, L).
        distance = (sigma.log()[..., None] - self.sigmas.to(sigma.device, sigma.dtype).log()).abs()
        nearest, labels = distance.min(-1)
        if sigma.device.type == "cpu" and checks.readable():
            self._check_level(nearest, sigma)
        # In memory, as every one of the norms would ask for it.
        return labels.expand(x.shape[0]).contiguous()

    def _check_level(self, distance, sigma):
        far = ~(distance.detach() <= max(1e-3, torch.finfo(self.sigmas.dtype).eps))  # NaN is far
        if bool(far.any()):
            wrong = sigma.detach()[far].flatten()[0].item()
            first = self.sigmas[0].item()
            last = self.sigmas[-1].item()
            raise ValueError(
                f"NCSN: sigma must be one of the {len(self.sigmas)} levels from {first:g} to "
                f"{last:g}; got {wrong:g}."
            )
