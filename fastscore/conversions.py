"""What a network may predict, and how each prediction becomes another.

    x = α x₀ + σ z,    z ~ N(0, I)

| prediction | what it is | from it, the score |
|---|---|---|
| score | s = ∇ₓ log p(x) | |
| noise | ẑ = E[z given x], "ε-prediction" | -ẑ/σ |
| denoiser | D = E[x₀ given x], "sample", "x₀-prediction" | (α D - x)/σ² |
| v | v = (α ẑ - σ D)/√(α² + σ²) | -(σ x/(α² + σ²) + α v/√(α² + σ²))/σ |

VE, and every network of this package: α = 1. VP: α² + σ² = 1, and v = α ẑ - σ D. The v above does
not change when x is rescaled, so a VP network's v is also k-diffusion's v at noise level σ/α.

Sources: Song et al. 2021 (arXiv:2011.13456); Salimans & Ho 2022, appendix D (arXiv:2202.00512) for
v; Tweedie's formula.
"""

from collections.abc import Callable

from torch import Tensor, nn

from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import function, named

__all__ = ["Converted", "Rescaled", "convert", "ve_to_vp", "vp_to_ve"]

KINDS = ("score", "noise", "denoiser", "v")
_SMALLEST = 1e-30   # σ and α; their reciprocals are finite in float32


def _square(α, σ):
    return α * α + σ * σ


# (from, to): the formula, of the prediction, x, σ and α; ρ² = _square(α, σ).
_FORMULAS = {
    ("score", "noise"): lambda s, x, σ, α: -σ * s,
    ("score", "denoiser"): lambda s, x, σ, α: (x + σ * σ * s) / α,
    ("score", "v"): lambda s, x, σ, α: -σ * (x + _square(α, σ) * s) / (α * _square(α, σ) ** 0.5),
    ("noise", "score"): lambda z, x, σ, α: -z / σ,
    ("noise", "denoiser"): lambda z, x, σ, α: (x - σ * z) / α,
    ("noise", "v"): lambda z, x, σ, α: (_square(α, σ) * z - σ * x) / (α * _square(α, σ) ** 0.5),
    ("denoiser", "score"): lambda d, x, σ, α: (α * d - x) / σ / σ,
    ("denoiser", "noise"): lambda d, x, σ, α: (x - α * d) / σ,
    ("denoiser", "v"): lambda d, x, σ, α: (α * x - _square(α, σ) * d) / (σ * _square(α, σ) ** 0.5),
    ("v", "score"): lambda v, x, σ, α: -x / _square(α, σ) - α * v / (σ * _square(α, σ) ** 0.5),
    ("v", "noise"): lambda v, x, σ, α: σ * x / _square(α, σ) + α * v / _square(α, σ) ** 0.5,
    ("v", "denoiser"): lambda v, x, σ, α: α * x / _square(α, σ) - σ * v / _square(α, σ) ** 0.5,
}


def convert(
    value: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    kind: str,
    to: str,
) -> Tensor:
    """Turn one kind of prediction at x = α x₀ + σ z into another.

        score      s = -ẑ/σ = (α D - x)/σ² = -x/ρ² - α v/(ρ σ),    ρ² = α² + σ²
        noise      ẑ = -σ s = (x - α D)/σ = σ x/ρ² + α v/ρ
        denoiser   D = (x + σ² s)/α = (x - σ ẑ)/α = α x/ρ² - σ v/ρ
        v          v = -(σ x/ρ + ρ σ s)/α = (ρ ẑ - σ x/ρ)/α = (α x - ρ² D)/(ρ σ)

    Args:
        value: the prediction, (B, *), any float dtype. Half precision is computed in float32 and
            rounded once.
        x: what the network saw, same shape and dtype.
        sigma: σ > 0, a float, 0-d or (B,).
        alpha: α > 0, likewise; 1 is the VE convention.
        kind: what value is: "score", "noise", "denoiser" or "v".
        to: what is returned, by the same names.

    Returns:
        Same shape and dtype as x, differentiable in every tensor.

    Raises:
        ValueError: an unknown kind, a shape that does not fit, or σ or α is not positive.
        TypeError: value and x are no float tensors of one dtype.

    >>> convert(torch.tensor([-2.0]), torch.tensor([3.0]), 1.0, kind="score", to="denoiser")
    tensor([1.])
    """
    _check_kind("convert", "kind", kind)
    _check_kind("convert", "to", to)
    checks.check_float("convert", "x", x)
    checks.check_like("convert", "value", value, x)
    sigma = checks.coefficient("convert", "sigma", sigma, x, minimum=_SMALLEST)
    alpha = checks.coefficient("convert", "alpha", alpha, x, minimum=_SMALLEST)
    if kind == to:
        return value

    wide = checks.compute_dtype(x.dtype)
    σ = checks.expand(sigma, x)
    α = checks.expand(alpha, x)
    return _FORMULAS[kind, to](value.to(wide), x.to(wide), σ, α).to(x.dtype)


def _check_kind(op, name, kind):
    if not named(kind, KINDS):
        raise ValueError(f"{op}: {name} must be one of {', '.join(KINDS)}; got {shown(kind)}.")


class Converted(nn.Module):
    """A network of one kind that serves as another: called (x, sigma), in the VE convention.

    Args:
        network: called network(x, sigma) with sigma (B,); a Module is registered, so parameters,
            modes and devices follow.
        kind: what it predicts: "score", "noise", "denoiser" or "v".
        to: what this returns, the score by default.

    Raises:
        ValueError: an unknown kind.

    >>> score = Converted(lambda x, sigma: torch.zeros_like(x), kind="denoiser")   # a point at 0
    >>> score(torch.tensor([[3.0]]), torch.tensor([2.0]))
    tensor([[-0.7500]])
    """

    kind: str
    to_kind: str

    def __init__(self, network: Callable[..., Tensor], *, kind: str, to: str = "score") -> None:
        super().__init__()
        function("Converted", "network", network)
        _check_kind("Converted", "kind", kind)
        _check_kind("Converted", "to", to)
        self.network = network
        self.kind = kind
        self.to_kind = to

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return convert(self.network(x, sigma), x, sigma, kind=self.kind, to=self.to_kind)


class Rescaled(nn.Module):
    """The score of y when a network knows that of u = a y + b.

        s_y(y, σ) = a s_u(a y + b, |a| σ)

    For images in [0, 1] and a network of images in [-1, 1]: Rescaled(score, 2, -1). Its ladder is
    then that of [0, 1].

    Args:
        score: called score(u, sigma).
        scale: a, not 0.
        shift: b, a float, or a tensor that broadcasts to y.

    Raises:
        ValueError: scale is 0.
    """

    scale: float
    shift: float | Tensor

    def __init__(
        self, score: Callable[..., Tensor], scale: float, shift: float | Tensor = 0.0
    ) -> None:
        super().__init__()
        function("Rescaled", "score", score)
        scale = checks.number("Rescaled", "scale", scale)
        if not scale:
            raise ValueError("Rescaled: scale must not be 0.")
        self.score = score
        self.scale = scale
        self.shift = checks.values("Rescaled", "shift", shift)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        return self.scale * self.score(self.scale * y + self.shift, abs(self.scale) * sigma)


def vp_to_ve(score: Tensor, alphas_cumprod: float | Tensor) -> Tensor:
    """The score in x = x₀ + σ z, σ² = (1 - ᾱ)/ᾱ, of a score in √ᾱ x.

        s_ve = √ᾱ s_vp

    Args:
        score: s_vp, (B, *), any float dtype.
        alphas_cumprod: ᾱ in (0, 1), a float, 0-d or (B,).
    """
    return _by_root("vp_to_ve", score, alphas_cumprod, lambda s, root: s * root)


def ve_to_vp(score: Tensor, alphas_cumprod: float | Tensor) -> Tensor:
    """The score in √ᾱ x of a score in x, s_vp = s_ve/√ᾱ: the inverse of `vp_to_ve`."""
    return _by_root("ve_to_vp", score, alphas_cumprod, lambda s, root: s / root)


def _by_root(op, score, alphas_cumprod, formula):
    checks.check_float(op, "score", score)
    ᾱ = checks.coefficient(op, "alphas_cumprod", alphas_cumprod, score, minimum=_SMALLEST)
    root = checks.expand(ᾱ, score) ** 0.5
    return formula(score.to(checks.compute_dtype(score.dtype)), root).to(score.dtype)
