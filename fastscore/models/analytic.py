"""Densities whose score is known at every noise level.

The Gaussian and the mixture of Gaussians.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastscore import random
from fastscore.deferred import KeepsBuffers
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import offset
from fastscore.tensors import numbers


class GaussianMixture(KeepsBuffers):
    """A mixture of Gaussians, convolved with N(0, σ² I) at will.

        p_σ(x) = Σ_k w_k N(x; μ_k, C_k + σ² I)
        ∇ log p_σ(x) = Σ_k r_k P_k (μ_k - x),    P_k = (C_k + σ² I)⁻¹,    r_k = w_k N_k(x) / p_σ(x)

    Each C_k is diagonalised once, here, so that any σ costs the same.

    Args:
        weights: w, (K,), not negative; scaled to sum to 1.
        means: μ, (K, d).
        covariances: C, variances () or (K,), diagonals (K, d) or matrices (K, d, d), positive
            definite. One variance serves all.

    Shapes: log_prob(x, sigma) -> (B,); score(x, sigma), also the call itself -> like x; x (B, *)
        with prod(*) = d, any float dtype, computed in float32 (float64 for float64) whatever the
        dtype of the buffers; sigma a float, 0-d or (B,), default 0.

    Raises:
        ValueError: weights negative or without a positive sum, shapes that do not fit, a covariance
            that is not symmetric positive definite, x of another dimension.

    Source: the convolution of Gaussians is Gaussian; C_k = Q diag(λ) Qᵀ gives P_k = Q diag(1/(λ +
        σ²)) Qᵀ.

    >>> mixture = GaussianMixture([1, 1], [[-1.0], [1.0]], 1.0)
    >>> mixture.score(torch.tensor([[0.0], [100.0]])).tolist()
    [[0.0], [-99.0]]
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor | None

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        means: Tensor | Sequence[Sequence[float]],
        covariances: float | Tensor | Sequence[Any],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        means = _float64(name, "means", means)
        weights, covariances = (
            _float64(name, n, t, means.device)
            for n, t in (("weights", weights), ("covariances", covariances))
        )
        if means.dim() != 2 or not means.numel():
            raise ValueError(f"{name}: means must be (K, d); got {tuple(means.shape)}.")
        if weights.shape != means.shape[:1]:
            raise ValueError(
                f"{name}: weights must be ({len(means)},), one for each mean; got "
                f"{tuple(weights.shape)}."
            )
        if not bool(weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(
                f"{name}: weights must be finite, not negative, with a positive sum; got "
                f"{shown(weights.tolist())}."
            )
        if not bool(means.isfinite().all()):
            raise ValueError(f"{name}: means must be finite.")

        variances, axes = _diagonalised(name, covariances, *means.shape)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)  # λ (K, d)
        self.register_buffer("axes", axes)  # Q (K, d, d), or None where the C_k are diagonal

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def extra_repr(self) -> str:
        return f"{len(self.means)} components, d={self.dim}"

    def forward(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        return self.score(x, sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log p_σ(x) in nats, (B,)."""
        return self._terms(x, sigma)[0].logsumexp(1).to(x.dtype)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """∇ log p_σ(x), like x."""
        log_joint, pull = self._terms(x, sigma)
        s = log_joint.softmax(1)[..., None] * pull  # (B, K, d), along the axes of each component
        s = s.sum(1) if self.axes is None else torch.einsum("kij,bkj->bi", self.axes.to(s.dtype), s)
        return s.to(x.dtype).reshape(x.shape)

    def sample(
        self,
        n: int,
        sigma: float | Tensor = 0.0,
        *,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw samples first_sample ...

        first_sample + n - 1 of p_σ, bit for bit the same however a run is split.

            x = μ_k + Q_k √(λ_k + σ²) z,    z from stream DATA,
            k by the inverse CDF of a uniform from its substream 1

        Args:
            n: how many.
            sigma: a float, 0-d or (n,).
            seed, step, first_sample: the noise key; sample i of the call has offset (first_sample +
                i) d.
            dtype: of the result; None is torch's default.

        Returns:
            (n, d), on the device of the buffers.
        """
        device = self.means.device
        d = self.dim
        op = type(self).__name__
        n = checks.integer(op, "n", n, 0, limit=2**40)
        begin = offset(op, first_sample, d)
        dtype = random.check_dtype(op, dtype)
        key = {"seed": random.draw_seed() if seed is None else seed, "step": step, "device": device}
        u = random.draw(
            op,
            random.UNIFORM,
            (n,),
            stream=random.DATA,
            substream=1,
            offset=begin // d,
            dtype=torch.float64,
            **key,
        )
        z = random.draw(
            op, random.NORMAL, (n, d), stream=random.DATA, offset=begin, dtype=torch.float64, **key
        )
        cdf = self.log_weights.double().exp().cumsum(0)
        k = torch.searchsorted(cdf / cdf[-1], u)  # u > 0 never meets a weight of 0
        variance = _squared("sample", checks.coefficient(op, "sigma", sigma, z, minimum=0))
        z = (
            z
            * (
                self.variances.double()[k]
                + (variance if isinstance(variance, float) else variance.reshape(-1, 1))
            ).sqrt()
        )
        return (self.means.double()[k] + self._rotated(z, k)).to(dtype)

    def _rotated(self, z, k):
        if self.axes is None:
            return z
        columns = self.axes.double().mT.contiguous()
        # Column by column: the sums of a matrix product depend on the size of the batch, these do
        # not.
        return sum(columns[:, j][k] * z[:, j : j + 1] for j in range(self.dim))

    def _terms(self, x, sigma):
        """log w_k N_k(x), (B, K), and P_k (μ_k - x) along the axes of each component, (B, K, d)."""
        name = type(self).__name__
        checks.check_float(name, "x", x)
        if x.dim() < 1 or math.prod(x.shape[1:]) != self.dim:
            raise ValueError(
                f"{name}: x must be (B, *) with {self.dim} values per sample; got {tuple(x.shape)}."
            )

        variance = _squared(name, checks.coefficient(name, "sigma", sigma, x, minimum=0))
        dtype = checks.compute_dtype(x.dtype)
        log_w, means, variances = (
            t.to(dtype) for t in (self.log_weights, self.means, self.variances)
        )
        u = means - x.to(dtype).reshape(-1, 1, self.dim)  # (B, K, d)
        if self.axes is not None:
            u = torch.einsum("kij,bki->bkj", self.axes.to(dtype), u)

        total = variances + variance  # (K, d) or (B, K, d)
        pull = u / total
        return log_w - 0.5 * (
            (u * pull).sum(-1) + total.log().sum(-1) + self.dim * math.log(2 * math.pi)
        ), pull


class Gaussian(GaussianMixture):
    """A Gaussian, convolved with N(0, σ² I) at will: a mixture of one.

        ∇ log p_σ(x) = (C + σ² I)⁻¹ (μ - x)

    Args:
        mean: μ, (d,).
        covariance: C, a variance (), a diagonal (d,) or a matrix (d, d), positive definite.

    Methods, shapes and errors as in `GaussianMixture`.

    >>> Gaussian([0.0, 0.0], 1.0).score(torch.tensor([[1.0, 2.0]]), sigma=1.0)
    tensor([[-0.5000, -1.0000]])
    """

    def __init__(
        self, mean: Tensor | Sequence[float], covariance: float | Tensor | Sequence[Any]
    ) -> None:
        mean = _float64("Gaussian", "mean", mean)
        covariance = _float64("Gaussian", "covariance", covariance, mean.device)
        if mean.dim() != 1 or covariance.shape not in ((), mean.shape, mean.shape * 2):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(
                f"Gaussian: mean must be (d,) and covariance (), (d,) or (d, d); got {shapes}."
            )
        super().__init__([1.0], mean[None], covariance[None] if covariance.dim() else covariance)

    def extra_repr(self) -> str:
        return f"d={self.dim}"


def _float64(op, name, t, device=None):
    t = numbers(op, name, t, torch.float64).detach().clone()
    return t if device is None else t.to(device)


def _squared(name, sigma):
    """σ², a float or shaped to broadcast with (B, K, d)."""
    return sigma * sigma if isinstance(sigma, float) else sigma.square().reshape(-1, 1, 1)


def _diagonalised(name, covariances, K, d):
    """Eigenvalues (K, d) and eigenvectors (K, d, d) or None."""
    if covariances.shape not in ((), (K,), (K, d), (K, d, d)):
        found = tuple(covariances.shape)
        raise ValueError(
            f"{name}: covariances must be (), ({K},), ({K}, {d}) or ({K}, {d}, {d}); got {found}."
        )

    axes, floor = None, 0.0
    if not bool(covariances.isfinite().all()):
        raise ValueError(f"{name}: covariances must be finite.")

    if covariances.dim() == 3:
        if not torch.allclose(
            covariances, covariances.mT, rtol=1e-6, atol=1e-6 * covariances.abs().max().item()
        ):
            raise ValueError(f"{name}: covariances must be symmetric.")
        variances, axes = torch.linalg.eigh((covariances + covariances.mT) / 2)
        # The rounding of a singular matrix.
        floor = d * torch.finfo(variances.dtype).eps * variances[:, -1:].abs()
    else:
        variances = (
            covariances.reshape(covariances.shape + (1,) * (2 - covariances.dim()))
            .expand(K, d)
            .clone()
        )
    if not bool((variances > floor).all()):
        raise ValueError(
            f"{name}: covariances must be positive definite; the smallest eigenvalue is "
            f"{variances.min().item():g}."
        )

    return variances, axes
