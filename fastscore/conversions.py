"""What a network may predict, and how each prediction becomes another.

    x = α x₀ + σ z,    z ~ N(0, I)

| prediction | what it is | from it, the score |
|---|---|---|
| score | s = ∇ₓ log p(x) | |
| noise | ẑ = E[z given x], "ε-prediction" | -ẑ/σ |
| denoiser | D = E[x₀ given x], "sample", "x₀-prediction" | (α D - x)/σ² |
| v | v = (α ẑ - σ D)/√(α² + σ²) | -(σ x/(α² + σ²) + α v/√(α² + σ²))/σ |

VE, and every network of this package: α = 1. VP: α² + σ² = 1, and v = α ẑ - σ D. The v above does not change when x is rescaled, so
a VP network's v is also k-diffusion's v at noise level σ/α.

Each function is named `<from>_to_<to>` and called (prediction, x, sigma, alpha=1.0): prediction and x (B, *) of one shape and dtype, any
float (half precision is computed in float32 and cast once); sigma and alpha positive, a float, 0-d or (B,). Gradients flow to all that
require them. TypeError and ValueError, in one sentence, for anything else.

Sources: Song et al. 2021 (arXiv:2011.13456); Salimans & Ho 2022, appendix D (arXiv:2202.00512) for v; Tweedie's formula.
"""

from torch import nn

from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import function, named

_SMALLEST = 1e-30   # σ and α; their reciprocals are finite in float32
KINDS = ("score", "noise", "denoiser", "v")


def score_to_noise(score, x, sigma, alpha=1.0):
    """ẑ = -σ s"""
    return _convert("score_to_noise", score, x, sigma, alpha)


def score_to_denoiser(score, x, sigma, alpha=1.0):
    """D = (x + σ² s)/α, Tweedie's formula

    >>> score_to_denoiser(torch.tensor([-2.0]), torch.tensor([3.0]), 1.0)
    tensor([1.])
    """
    return _convert("score_to_denoiser", score, x, sigma, alpha)


def score_to_v(score, x, sigma, alpha=1.0):
    """v = -(σ x/ρ + ρ σ s)/α,    ρ² = α² + σ²"""
    return _convert("score_to_v", score, x, sigma, alpha)


def noise_to_score(noise, x, sigma, alpha=1.0):
    """s = -ẑ/σ"""
    return _convert("noise_to_score", noise, x, sigma, alpha)


def noise_to_denoiser(noise, x, sigma, alpha=1.0):
    """D = (x - σ ẑ)/α"""
    return _convert("noise_to_denoiser", noise, x, sigma, alpha)


def noise_to_v(noise, x, sigma, alpha=1.0):
    """v = (ρ ẑ - σ x/ρ)/α,    ρ² = α² + σ²"""
    return _convert("noise_to_v", noise, x, sigma, alpha)


def denoiser_to_score(denoised, x, sigma, alpha=1.0):
    """s = (α D - x)/σ²"""
    return _convert("denoiser_to_score", denoised, x, sigma, alpha)


def denoiser_to_noise(denoised, x, sigma, alpha=1.0):
    """ẑ = (x - α D)/σ"""
    return _convert("denoiser_to_noise", denoised, x, sigma, alpha)


def denoiser_to_v(denoised, x, sigma, alpha=1.0):
    """v = (α x - ρ² D)/(ρ σ),    ρ² = α² + σ²"""
    return _convert("denoiser_to_v", denoised, x, sigma, alpha)


def v_to_score(v, x, sigma, alpha=1.0):
    """s = -x/ρ² - α v/(ρ σ),    ρ² = α² + σ²"""
    return _convert("v_to_score", v, x, sigma, alpha)


def v_to_noise(v, x, sigma, alpha=1.0):
    """ẑ = σ x/ρ² + α v/ρ,    ρ² = α² + σ²"""
    return _convert("v_to_noise", v, x, sigma, alpha)


def v_to_denoiser(v, x, sigma, alpha=1.0):
    """D = α x/ρ² - σ v/ρ,    ρ² = α² + σ²"""
    return _convert("v_to_denoiser", v, x, sigma, alpha)


def _square(α, σ):
    return α * α + σ * σ


_FORMULAS = {
    "score_to_noise": lambda s, x, σ, α: -σ * s,
    "score_to_denoiser": lambda s, x, σ, α: (x + σ * σ * s) / α,
    "score_to_v": lambda s, x, σ, α: -σ * (x + _square(α, σ) * s) / (α * _square(α, σ) ** 0.5),
    "noise_to_score": lambda z, x, σ, α: -z / σ,
    "noise_to_denoiser": lambda z, x, σ, α: (x - σ * z) / α,
    "noise_to_v": lambda z, x, σ, α: (_square(α, σ) * z - σ * x) / (α * _square(α, σ) ** 0.5),
    "denoiser_to_score": lambda d, x, σ, α: (α * d - x) / σ / σ,
    "denoiser_to_noise": lambda d, x, σ, α: (x - α * d) / σ,
    "denoiser_to_v": lambda d, x, σ, α: (α * x - _square(α, σ) * d) / (σ * _square(α, σ) ** 0.5),
    "v_to_score": lambda v, x, σ, α: -x / _square(α, σ) - α * v / (σ * _square(α, σ) ** 0.5),
    "v_to_noise": lambda v, x, σ, α: σ * x / _square(α, σ) + α * v / _square(α, σ) ** 0.5,
    "v_to_denoiser": lambda v, x, σ, α: α * x / _square(α, σ) - σ * v / _square(α, σ) ** 0.5,
}


def _convert(name, prediction, x, sigma, alpha, op=None):
    """The checks, in the name of op, and the formula in the compute dtype."""
    op, formula = op or name, _FORMULAS[name]
    checks.check_float(op, "x", x)
    checks.check_like(op, "the prediction", prediction, x)
    wide = checks.compute_dtype(x.dtype)
    σ, α = (checks.expand(checks.coefficient(op, n, c, x, minimum=_SMALLEST), x) for n, c in (("sigma", sigma), ("alpha", alpha)))
    return formula(prediction.to(wide), x.to(wide), σ, α).to(x.dtype)


def convert(prediction, x, sigma, alpha=1.0, *, kind, to):
    """Convert a prediction by the names of both kinds: "score", "noise", "denoiser" or "v".

    Raises:
        ValueError: an unknown kind.
    """
    check_kind("convert", kind)
    check_kind("convert", to)
    return prediction if kind == to else _convert(f"{kind}_to_{to}", prediction, x, sigma, alpha, "convert")


def check_kind(op, kind):
    if not named(kind, KINDS):
        raise ValueError(f"{op}: a prediction must be one of {', '.join(KINDS)}; got {shown(kind)}.")


class Converted(nn.Module):
    """A network of one kind that serves as another: called (x, sigma), like the network it holds, in the VE convention.

    Args:
        network: called network(x, sigma) with sigma (B,); a Module is registered, so parameters, modes and devices follow.
        kind: what it predicts. to: what this returns, the score unless told otherwise.

    Raises:
        ValueError: an unknown kind.

    >>> score = Converted(lambda x, sigma: torch.zeros_like(x), kind="denoiser")   # a point mass at 0
    >>> score(torch.tensor([[3.0]]), torch.tensor([2.0]))
    tensor([[-0.7500]])
    """

    def __init__(self, network, *, kind, to="score"):
        super().__init__()
        function("Converted", "network", network)
        check_kind("Converted", kind)
        check_kind("Converted", to)
        self.network, self.kind, self.to_kind = network, kind, to

    def forward(self, x, sigma):
        return convert(self.network(x, sigma), x, sigma, kind=self.kind, to=self.to_kind)


def score_of_noise(network):
    """score(x, sigma) of a network that predicts the noise."""
    return Converted(network, kind="noise")


def score_of_denoiser(network):
    """score(x, sigma) of a network that predicts the clean sample."""
    return Converted(network, kind="denoiser")


def score_of_v(network):
    """score(x, sigma) of a network that predicts v."""
    return Converted(network, kind="v")


class Rescaled(nn.Module):
    """The score of y when a network knows that of u = a y + b.

        s_y(y, σ) = a s_u(a y + b, |a| σ)

    For images in [0, 1] and a network of images in [-1, 1]: Rescaled(score, 2, -1); its ladder is then that of [0, 1].

    Args:
        score: called score(u, sigma). scale: a, not 0. shift: b, a float, or a tensor that broadcasts to y.

    Raises:
        ValueError: scale is 0.
    """

    def __init__(self, score, scale, shift=0.0):
        super().__init__()
        function("Rescaled", "score", score)
        scale, shift = checks.number("Rescaled", "scale", scale), checks.values("Rescaled", "shift", shift)
        if not scale:
            raise ValueError("Rescaled: scale must not be 0.")
        self.score, self.scale, self.shift = score, scale, shift

    def forward(self, y, sigma):
        return self.scale * self.score(self.scale * y + self.shift, abs(self.scale) * sigma)


def vp_to_ve(score, alphas_cumprod):
    """s_ve = √ᾱ s_vp: the score in x = x₀ + σ z, σ² = (1 - ᾱ)/ᾱ, of a score in √ᾱ x. alphas_cumprod: ᾱ in (0, 1), a float, 0-d or (B,)."""
    return _by_root("vp_to_ve", score, alphas_cumprod, lambda s, α: s * α)


def ve_to_vp(score, alphas_cumprod):
    """s_vp = s_ve/√ᾱ: the inverse of `vp_to_ve`."""
    return _by_root("ve_to_vp", score, alphas_cumprod, lambda s, α: s / α)


def _by_root(op, score, alphas_cumprod, formula):
    checks.check_float(op, "score", score)
    root = checks.expand(checks.coefficient(op, "alphas_cumprod", alphas_cumprod, score, minimum=_SMALLEST), score) ** 0.5
    return formula(score.to(checks.compute_dtype(score.dtype)), root).to(score.dtype)
