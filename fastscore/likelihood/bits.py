"""Bits per dimension of images of a finite number of grey levels."""

import math

import torch
from torch import Tensor

from fastscore import random
from fastscore.ops import checks
from fastscore.scalars import offset


def dequantize(
    x: Tensor,
    levels: int = 256,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Spread each of L grey levels evenly over its cell of [0, 1].

        y = (k + u) / L,    k = (L - 1) x = 0 .. L-1,    u uniform in (0, 1], stream DEQUANTIZE

    The cells fill [0, 1] without gaps, so that a density of y sums up to a probability of each
    image, see `bits_per_dim`.

    Args:
        x: images in [0, 1], (B, *), multiples of 1/(L - 1) (looked at on the CPU), any float dtype
            that can tell the levels apart.
        levels: L, 256 for 8-bit images.
        seed, step, first_sample: the noise key; first_sample is the global number of x[0], so that
            splits of a batch agree.

    Returns:
        y like x, float32 (float64 for float64).

    Raises:
        ValueError: x is no image of L levels, or levels < 2. TypeError: x is no float tensor.

    Source: Theis et al. 2016, section 3.1 (arXiv:1511.01844).

    >>> import torch
    >>> dequantize(torch.tensor([[0.0, 1.0]]), levels=2, seed=0).mul(2).ceil()
    tensor([[1., 2.]])
    """
    op = "dequantize"
    checks.check_float(op, "x", x)
    # u keeps 8 bits at least
    levels = checks.integer(
        op, "levels", levels, 2, limit=2**32 if x.dtype == torch.float64 else 2**16
    )
    if not x.dim():
        raise ValueError(f"{op}: x must be (B, *); got shape ().")

    begin = offset(op, first_sample, math.prod(x.shape[1:]))
    scaled = x.to(checks.compute_dtype(x.dtype)) * (levels - 1)
    k = scaled.round()
    if (
        x.device.type == "cpu"
        and checks.readable()
        and not bool((((scaled - k).abs() < 1e-2) & (k >= 0) & (k < levels)).all())
    ):
        raise ValueError(
            f"{op}: x must hold multiples of 1/{levels - 1} in [0, 1], {levels} levels."
        )

    key = {"seed": seed, "step": step, "stream": random.DEQUANTIZE, "offset": begin}
    return (
        k + random.draw(op, random.UNIFORM, x.shape, dtype=k.dtype, device=x.device, **key)
    ) / levels


def bits_per_dim(
    log_density: Tensor, dim: int, *, levels: int | None = 256, width: float = 1.0
) -> Tensor:
    """Convert the log-density of dequantised images to bits per dimension, an upper bound on the
    lossless code length in expectation.

        b = -log p(y) / (d ln 2) + log₂(L / width)

    For images in [0, 1] of 256 levels (width 1) the offset is 8; for [-1, 1] (width 2) it is 7;
    levels=None is no offset, for continuous data. Since P(k) = ∫ p(y) dy over the cell of k, of
    volume (width/L)^d, and the logarithm is concave,

        -log₂ P(k) / d <= E_u[b]

    Args:
        log_density: log p(y) in nats, (B,). dim: d, the number of values of an image. levels: L.
            width: of the range of y.

    Returns:
        b, like log_density.

    Raises:
        ValueError: dim, levels or width out of range. TypeError: log_density is no float tensor.

    Source: Theis et al. 2016, section 3.1 (arXiv:1511.01844).

    >>> import torch
    >>> bits_per_dim(torch.zeros(1), 3072)
    tensor([8.])
    """
    op = "bits_per_dim"
    checks.check_float(op, "log_density", log_density)
    dim = checks.integer(op, "dim", dim, 1, limit=2**53)
    width = checks.number(op, "width", width, above=0)
    if levels is None:
        return log_density / (-dim * math.log(2))
    levels = checks.integer(op, "levels", levels, 2, limit=2**53)
    return log_density / (-dim * math.log(2)) + math.log2(levels / width)
