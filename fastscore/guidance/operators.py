"""The operators of images: masks, averages of pixels and of channels, blur, and dense matrices."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastscore.guidance.linear import LinearOperator, pseudo_inverse
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.random import sizes
from fastscore.scalars import SQUARE, named
from fastscore.tensors import home, valued

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class _OrthogonalRows(LinearOperator):
    """A Aᵀ = gram · I on the range of A."""

    gram: float = 1.0

    def solve(self, r: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        return r / (a + b * self.gram)


class Mask(_OrthogonalRows):
    """A x = m x: the pixels where the mask m is 1 are observed.

    The others of A x are 0, and those of an observation y are ignored.

    Args:
        mask: bool, or 0 and 1; shape of a sample, or one that broadcasts to it, such as (H, W).

    Raises:
        ValueError: other values, nothing is observed, or (when called) a shape that does not fit.
    """

    mask: Tensor

    def __init__(self, mask: Tensor | Sequence[Any]) -> None:
        self.mask = check_mask("Mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(fitted_mask("Mask", self.mask, x), x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.forward(y)

    def observed(self, y: Tensor) -> Tensor:
        return self.forward(y)


class Downsample(_OrthogonalRows):
    """A x = means of factor × factor blocks of pixels, (B, C, H, W) -> (B, C, H/factor, W/factor).

    A Aᵀ = I / factor².

    Raises:
        ValueError: factor < 1, or (when called) the height or width is not a multiple of it.
    """

    factor: int
    gram: float

    def __init__(self, factor: int) -> None:
        factor = checks.integer("Downsample", "factor", factor, 1, limit=2**31)
        self.factor = factor
        self.gram = 1 / factor**2

    def forward(self, x: Tensor) -> Tensor:
        check_images("Downsample", x)
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            found = tuple(x.shape[-2:])
            raise ValueError(
                f"Downsample: height and width must be multiples of the factor {self.factor}; got "
                f"{found}."
            )
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1) * self.gram


class Grey(_OrthogonalRows):
    """A x = Σ_c w_c x_c, (B, C, H, W) -> (B, 1, H, W); A Aᵀ = ‖w‖² I.

    Args:
        weights: "mean", "luma" (ITU-R BT.601, of RGB), or one number for each channel.

    Raises:
        ValueError: other weights, or (when called) another number of channels.
    """

    weights: Tensor | None

    def __init__(self, weights: str | Sequence[float] | Tensor = "mean") -> None:
        if isinstance(weights, str) and weights not in ("mean", "luma"):
            raise ValueError(f"Grey: weights must be mean, luma or numbers; got {weights!r}.")
        if isinstance(weights, str) and weights == "mean":
            self.weights = None   # until the number of channels is seen
            return

        self.weights = valued(
            "Grey", "weights", LUMA if isinstance(weights, str) else weights
        ).double()
        if self.weights.dim() != 1 or not 0 < float(self.weights.square().sum()) < math.inf:
            raise ValueError(
                f"Grey: weights must be finite and not all 0; got {shown(self.weights.tolist())}."
            )

    def forward(self, x: Tensor) -> Tensor:
        check_images("Grey", x)
        if self.weights is None:
            self.weights = torch.full((x.shape[1],), 1 / x.shape[1], device=x.device).double()
        if x.shape[1] != len(self.weights):
            raise ValueError(f"Grey: x must have {len(self.weights)} channels; got {x.shape[1]}.")
        return (self._along(x) * x).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._along(y) * y

    def solve(self, r: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        return r / (a + b * float(self.weights.square().sum()))

    def _along(self, t):
        return self.weights.to(t.device, t.dtype)[:, None, None]


class Blur(LinearOperator):
    """A x = k * x, each channel convolved with one kernel; the image keeps its size.

        (k * x)(p) = Σ_q k(q) x(p - q),    q = 0 at the middle of k

    Args:
        kernel: k, (h, w), h and w odd.
        padding: "circular" (solved exactly, in the Fourier basis) or "zero" (solved by conjugate
            gradients).

    Raises:
        ValueError: an even or not 2-d kernel, values not finite, unknown padding, or (when called)
            x is not (B, C, H, W) or, circular, smaller than k.
    """

    kernel: Tensor
    padding: str

    def __init__(self, kernel: Tensor, padding: str = "circular") -> None:
        kernel = valued("Blur", "kernel", kernel).detach().double()
        if (
            kernel.dim() != 2
            or not all(n % 2 for n in kernel.shape)
            or not bool(kernel.isfinite().all())
            or not bool(kernel.any())
        ):
            raise ValueError(
                "Blur: kernel must be (h, w), odd, finite and not 0; got shape "
                f"{tuple(kernel.shape)}."
            )
        if not named(padding, ("circular", "zero")):
            raise ValueError(f"Blur: padding must be circular or zero; got {shown(padding)}.")

        self.kernel = kernel
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        check_images("Blur", x)
        if self.padding == "zero":
            return self._convolved(x, self.kernel.flip(0, 1))   # conv2d correlates
        return self._filtered(x, lambda k: k)

    def adjoint(self, y: Tensor) -> Tensor:
        return (
            self._convolved(y, self.kernel)
            if self.padding == "zero"
            else self._filtered(y, torch.conj)
        )

    def solve(self, r: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        if self.padding == "zero":
            return super().solve(r, a, b)
        return self._filtered(r, lambda k: pseudo_inverse(k.abs().square(), a, b))

    def _convolved(self, x, kernel):
        h, w = kernel.shape
        kernel = kernel.to(x.device, x.dtype).expand(x.shape[1], 1, h, w)
        return F.conv2d(x, kernel, padding=(h // 2, w // 2), groups=x.shape[1])

    def _filtered(self, x, f):
        """x times f(k̂) in the Fourier basis."""
        if not x.numel():   # which the FFT refuses
            return x

        (height, width), (h, w), dtype = (
            x.shape[-2:],
            self.kernel.shape,
            checks.compute_dtype(x.dtype),
        )
        if h > height or w > width:
            raise ValueError(
                f"Blur: the kernel, {(h, w)}, must not be larger than the image, {(height, width)}."
            )

        k = F.pad(self.kernel, (0, width - w, 0, height - h)).roll((-(h // 2), -(w // 2)), (0, 1))
        factor = f(torch.fft.rfft2(k.to(x.device))).to(
            torch.complex128 if dtype == torch.float64 else torch.complex64
        )
        return torch.fft.irfft2(torch.fft.rfft2(x.to(dtype)) * factor, s=(height, width)).to(
            x.dtype
        )


class Matrix(LinearOperator):
    """A dense matrix: x (B, *) with prod(*) = n -> y (B, m); A Aᵀ is diagonalised once.

    Args:
        matrix: A, (m, n). shape: of a sample, (n,) unless given.

    Raises:
        ValueError: A is not 2-d and finite, shape does not hold n values, or (when called) x has
            another shape.
    """

    shape: Sequence[int]
    matrix: Tensor
    eigenvalues: Tensor
    axes: Tensor

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        matrix = valued("Matrix", "matrix", matrix).detach().double()
        if matrix.dim() != 2 or not matrix.numel() or not bool(matrix.isfinite().all()):
            raise ValueError(
                f"Matrix: matrix must be (m, n) and finite; got shape {tuple(matrix.shape)}."
            )

        self.shape = matrix.shape[1:] if shape is None else sizes("Matrix", shape)
        if math.prod(self.shape) != matrix.shape[1]:
            raise ValueError(f"Matrix: shape must hold {matrix.shape[1]} values; got {self.shape}.")

        self.matrix = matrix
        self.eigenvalues, self.axes = torch.linalg.eigh(matrix @ matrix.mT)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"Matrix: x must be (B, *{tuple(self.shape)}); got {tuple(x.shape)}.")
        return x.flatten(1) @ self.matrix.mT.to(x.device, x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y.device, y.dtype)).reshape(len(y), *self.shape)

    def solve(self, r: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        axes = self.axes.to(r.device, r.dtype)
        return (
            (r @ axes) * pseudo_inverse(self.eigenvalues.to(r.device), a, b).to(r.dtype)
        ) @ axes.mT


def gaussian_kernel(sigma: float, radius: int | None = None) -> Tensor:
    """exp(-½ (i² + j²)/sigma²), scaled to sum to 1, (2 radius + 1)².

    Radius is 3 sigma unless given, in pixels.

    >>> gaussian_kernel(1.0).shape
    torch.Size([7, 7])
    """
    op = "gaussian_kernel"
    sigma = checks.number(op, "sigma", sigma, above=0, most=4096 if radius is None else SQUARE)
    radius = (
        max(1, math.ceil(3 * sigma))
        if radius is None
        else checks.integer(op, "radius", radius, 0, limit=2**13)
    )
    line = torch.exp(
        -0.5 * (torch.arange(-radius, radius + 1, device=home()).double() / sigma) ** 2
    )
    return torch.outer(line, line) / line.sum() ** 2


def check_images(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W); got {tuple(x.shape)}.")


def check_mask(op: str, mask: Any) -> Tensor:
    """bool, with something observed."""
    mask = valued(op, "mask", mask).detach()
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{op}: mask must be bool, or 0 (unknown) and 1 (known).")
    if not bool(mask.any()):
        raise ValueError(f"{op}: mask must hold at least one known value.")
    return mask.bool()


def fitted_mask(op: str, mask: Tensor, x: Tensor) -> Tensor:
    """The mask on x's device; its shape must broadcast to that of a sample."""
    shape = x.shape[1:]
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: mask must have the shape of a sample, {tuple(shape)}, or broadcast to it; got "
            f"{tuple(mask.shape)}."
        )

    return mask.to(x.device)
