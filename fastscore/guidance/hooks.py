"""Hooks for samplers, project(x, sigma, step) -> x.

What is known is put back before every network call and after the last update.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore import random
from fastscore.guidance.linear import LinearOperator, check_operator, range_of, solve
from fastscore.guidance.operators import check_mask, fitted_mask
from fastscore.messages import printed, shown
from fastscore.ops import checks
from fastscore.scalars import SQUARE, named, offset

# project(x, sigma, step) -> x
Hook = Callable[[Tensor, float, int], Tensor]

_STEP, _LEVEL = 0, 1  # substreams of PERTURB


def inpainting(
    observation: Tensor,
    mask: Tensor,
    *,
    noise: float = 0.0,
    redraw: str = "level",
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Hook:
    """The hook that puts the known pixels back, with the noise that they have at the sampler's
    level.

        x ← y + √(σ² - σ_y²) z  where the mask is 1,    z from stream PERTURB;
        x stays where it is 0, and everywhere once σ < σ_y

    y with noise σ_y is a draw at level σ_y: above it the missing noise is added, below it the score
    cleans the known pixels, too. With σ_y = 0 the last call (σ = 0) leaves the known pixels equal
    to y. Each unknown pixel sees neighbours of the right noise, but the chain is not that of the
    posterior: for one that is, see `linear_inverse`.

    Args:
        observation: y, a sample's shape (*), or (B, *); its unknown values are ignored.
        mask: bool, or 1 (known) and 0; broadcasts to a sample.
        noise: σ_y >= 0, of the observation.
        redraw: "level" (NCSN: z is drawn once for each σ; its key's step is the bit pattern of σ in
            float32, on substream 1) or "step" (NCSNv2: with the sampler's step, on substream 0).
        seed, first_sample: the noise key; first_sample as given to the sampler, so that splits of a
            batch agree.

    Raises:
        ValueError: a shape that does not fit, a mask that is neither 0 nor 1, negative noise, an
            unknown redraw.

    Source: Song & Ermon 2019, appendix B.3 (arXiv:1907.05600); Song & Ermon 2020 redraw
        (arXiv:2006.09011).
    """
    op = "inpainting"
    checks.check_float(op, "the observation", observation)
    mask = check_mask(op, mask)
    noise = check_noise(op, noise)
    seed = random.draw_seed() if seed is None else seed  # one for all calls
    random.check_seed(
        op, seed, seed.device if isinstance(seed, torch.Tensor) else observation.device
    )
    first_sample = checks.integer(op, "first_sample", first_sample, 0, limit=2**62)
    if not named(redraw, ("level", "step")):
        raise ValueError(f"{op}: redraw must be level or step; got {shown(redraw)}.")
    if not bool(
        observation.isfinite()[
            fitted_mask(op, mask, observation[None]).expand_as(observation)
        ].all()
    ):
        raise ValueError(f"{op}: the known part of the observation must be finite.")

    return _Inpainting(observation, mask, noise, redraw, seed, first_sample)


@printed
@dataclass(eq=False)
class _Inpainting:
    observation: torch.Tensor
    mask: torch.Tensor
    noise: float
    redraw: str
    seed: int | torch.Tensor
    first_sample: int

    def __call__(self, x, sigma, step):
        y = fitted_observation("inpainting", self.observation, x)
        known = fitted_mask("inpainting", self.mask, x)
        if sigma < self.noise:
            return x
        added = math.sqrt(sigma**2 - self.noise**2)
        if added:
            y = y + added * self._draw(x, sigma, step)
        return torch.where(known, y, x)

    def _draw(self, x, sigma, step):
        each_step = self.redraw == "step"
        key = (
            {"step": step, "substream": _STEP}
            if each_step
            else {"step": level_key(sigma), "substream": _LEVEL}
        )
        begin = offset("inpainting", self.first_sample, math.prod(x.shape[1:]))
        key |= {"seed": self.seed, "stream": random.PERTURB, "offset": begin}
        return random.draw(
            "inpainting", random.NORMAL, x.shape, dtype=x.dtype, device=x.device, **key
        )


def data_consistency(operator: LinearOperator, observation: Tensor) -> Hook:
    """The hook that moves the finished sample to the nearest one with A x = y, for observations
    without noise.

        x ← x + Aᵀ (A Aᵀ)⁻¹ (y - A x)    at σ = 0

    Args:
        operator: as in `linear_inverse`. observation: y, a shape (*) or (B, *) of A x.

    Raises:
        ValueError: the operator has no adjoint, or (when called) y has another shape than A x.

    Source: Wang et al. 2022, equation 10 (arXiv:2212.00490).
    """
    check_operator("data_consistency", operator)

    return _DataConsistency(operator, observation)


@printed
@dataclass(eq=False)
class _DataConsistency:
    operator: LinearOperator
    observation: torch.Tensor

    def __call__(self, x, sigma, step):
        if sigma > 0:
            return x

        ax = self.operator.forward(x)
        r = (
            range_of(
                self.operator, fitted_observation("data_consistency", self.observation, ax, "A x")
            )
            - ax
        )
        zero, one = (r.new_full((1,) * r.dim(), value) for value in (0.0, 1.0))
        return x + self.operator.adjoint(solve(self.operator, r, zero, one))


def chain(*hooks: Hook) -> Hook:
    """One hook that applies several, in this order."""
    return _Chain(hooks)


@printed
@dataclass(eq=False)
class _Chain:
    hooks: tuple[Hook, ...]

    def __call__(self, x, sigma, step):
        for hook in self.hooks:
            x = hook(x, sigma, step)
        return x


def level_key(sigma: float) -> int:
    """The bit pattern of σ in float32, an int."""
    return (
        int(torch.tensor(sigma, dtype=torch.float32, device="cpu").view(torch.int32)) & 0xFFFFFFFF
    )


def check_noise(op: str, noise: float) -> float:
    """σ_y as a float."""
    return checks.number(op, "noise", noise, 0, SQUARE)


def fitted_observation(op: str, y: Tensor, like: Tensor, of: str = "x") -> Tensor:
    """y as (B, *) or (1, *) in the dtype and on the device of `like`."""
    checks.check_float(op, "the observation", y)
    if y.shape == like.shape[1:]:
        y = y[None]
    if y.shape[1:] != like.shape[1:] or len(y) not in (1, len(like)):
        want = tuple(like.shape[1:])
        raise ValueError(
            f"{op}: the observation must have the shape of {of}, {want} or {tuple(like.shape)}; "
            f"got {tuple(y.shape)}."
        )

    return y.to(like.device, like.dtype)
