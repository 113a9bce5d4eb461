"""What a network of score_sde is told of a noise level σ of x = x₀ + σ z."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.models.refinenet import ladder
from fastscore.ops import checks
from fastscore.scalars import LEVELS, named
from fastscore.schedules import geometric
from fastscore.schedules.rescaled import check_table, interpolate, sigmas_of

_NAME = "NCSNpp"
KINDS = ("ve", "vp", "subvp")
_TIMES = 999   # the label of t = 1
_T_MIN = 1e-3   # where score_sde's samplers of VP and sub-VP end
_SLACK = 1e-3   # of ln σ, as in `interpolate`


class Process:
    """The noising that a network was trained for, in the noise levels of images in [0, 1].

    VE: x₀ + σ z. VP and sub-VP: √ᾱ x₀ + b z, in the network's own data 2x - 1 where `centered`;
    of noise level b/√ᾱ, so that with L = -ln ᾱ = β_min t + (β_max - β_min) t²/2

        L = ln(1 + σ²)           b² = 1 - ᾱ    VP
        L = 2 arsinh(σ/2)        b = 1 - ᾱ     sub-VP
        t = 2 L/(β_min + √(β_min² + 2 (β_max - β_min) L))
    """

    continuous: bool
    centered: bool
    num_scales: int
    beta_min: float
    beta_max: float

    def __init__(
        self,
        sde: str,
        continuous: bool,
        centered: bool | None,
        num_scales: int,
        beta_min: float,
        beta_max: float,
    ) -> None:
        if not named(sde, KINDS):
            raise ValueError(f"{_NAME}: sde must be one of {', '.join(KINDS)}; got {shown(sde)}.")
        if sde == "subvp" and not continuous:
            raise ValueError(f"{_NAME}: a network of sde subvp is always continuous.")
        self.sde = sde
        self.continuous = bool(continuous)
        self.centered = sde != "ve" if centered is None else bool(centered)
        self.num_scales = checks.integer(_NAME, "num_scales", num_scales, 2, limit=LEVELS)
        self.beta_min = checks.number(_NAME, "beta_min", beta_min, 0, 170.0)
        self.beta_max = checks.number(_NAME, "beta_max", beta_max, self.beta_min, 170.0, above=0)
        if sde == "vp" and not continuous and self.beta_max >= num_scales:
            raise ValueError(
                f"{_NAME}: beta_max must be below num_scales, {num_scales}; got {beta_max}."
            )
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def takes_logarithm(self) -> bool:
        """Whether the network sees Fourier features of ln σ; else it is a time or a level."""
        return self.sde == "ve" and self.continuous

    def ladder(self, sigmas: Tensor | Sequence[float] | None) -> Tensor:
        """The levels that are given, or those at which score_sde's samplers evaluate the network,
        descending."""
        if sigmas is None and self.sde == "ve":
            sigmas = geometric(50.0, 0.01, self.num_scales)
        if sigmas is None:
            sigmas = (self._levels() / (2 if self.centered else 1)).float()
        found = ladder(_NAME, sigmas)
        if self.sde != "ve":
            self._check_range(found)
        return found

    def condition(self, sigma: Tensor, sigmas: Tensor) -> tuple[Tensor | float, Tensor]:
        """√ᾱ, and what the network's embedding takes, of noise levels (B,).

        sigmas: the ladder, for a network that knows its levels alone.
        """
        noise = 2 * sigma if self.centered else sigma
        if self.takes_logarithm:
            return 1.0, noise.log()
        if self.sde == "ve":
            return 1.0, self._level(sigma, sigmas)

        self._check_range(sigma)
        if not self.continuous:
            label = interpolate(noise, self._table(sigma.device)).to(sigma.dtype)
            return torch.rsqrt(1 + noise.square()), label

        L = torch.log1p(noise.square()) if self.sde == "vp" else 2 * torch.asinh(noise / 2)
        β, slope = self.beta_min, self.beta_max - self.beta_min
        t = 2 * L / (β + (β**2 + 2 * slope * L).sqrt())
        # On a GPU nobody looks.
        t = t.masked_fill(t > 1 + _SLACK, math.nan).clamp(max=1)
        return torch.exp(-L / 2), _TIMES * t

    def _level(self, sigma, sigmas):
        """The number of the level nearest to σ, which is one."""
        levels = sigmas.to(sigma.device, sigma.dtype).log()
        distance, label = (sigma.log()[:, None] - levels).abs().min(1)
        far = ~(distance.detach() <= _SLACK)   # NaN is far
        if sigma.device.type == "cpu" and checks.readable() and bool(far.any()):
            raise ValueError(
                f"{_NAME}: sigma must be one of the {len(sigmas)} levels from "
                f"{sigmas[0].item():g} to {sigmas[-1].item():g}, as the network knows no others; "
                f"got {sigma.detach()[far][0].item():g}."
            )
        return label.to(sigma.dtype)

    def _check_range(self, sigma):
        if sigma.device.type != "cpu" or not checks.readable() or not sigma.numel():
            return
        levels = self._levels()
        scale = 2 if self.centered else 1
        least = 0.0 if self.continuous else levels[-1].item() / scale
        most = levels[0].item() / scale
        low, high = (end.item() for end in torch.aminmax(sigma.detach()))
        if not (least * (1 - _SLACK) <= low and high <= most * (1 + _SLACK)):
            wrong = high if high > most else low
            raise ValueError(
                f"{_NAME}: sigma must lie in the process's range, {least:.4g} to {most:.4g}; got "
                f"{wrong:.4g}."
            )

    def _levels(self):
        """Of VP and sub-VP, in the network's data, float64 (num_scales,), descending."""
        if not self.continuous:
            return sigmas_of(self._alphas()).flip(0)
        t = torch.linspace(1, _T_MIN, self.num_scales, dtype=torch.float64, device="cpu")
        L = self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2
        return torch.expm1(L).sqrt() if self.sde == "vp" else 2 * torch.sinh(L / 2)

    def _alphas(self):
        """ᾱ of DDPM's steps, float64."""
        ends = self.beta_min / self.num_scales, self.beta_max / self.num_scales
        betas = torch.linspace(*ends, self.num_scales, dtype=torch.float64, device="cpu")
        return torch.cumprod(1 - betas, 0)

    def _table(self, device):
        if device not in self._tables:
            self._tables[device] = check_table(_NAME, self._alphas()).to(device)
        return self._tables[device]
