"""Linear inverse problems: the likelihood of y = A x₀ + σ_y n at noise σ, and its score."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastscore.dual.number import Dual
from fastscore.guidance.bayes import add, called, check_scale, gradient
from fastscore.guidance.conjugate import conjugate_gradient
from fastscore.guidance.hooks import check_noise, fitted_observation
from fastscore.guidance.linear import LinearOperator, check_adjoint, check_operator, range_of, solve
from fastscore.messages import printed
from fastscore.ops import checks
from fastscore.ops.functions import ordinary, outside_inference
from fastscore.scalars import choice, function

METHODS = ("flat", "denoiser", "moments")


def linear_inverse(
    score: Callable[..., Tensor],
    operator: LinearOperator,
    observation: Tensor,
    noise: float = 0.0,
    *,
    method: str = "denoiser",
    prior_variance: float = 0.25,
    iterations: int = 1,
    scale: float = 1.0,
) -> Callable[..., Tensor]:
    """The score of x_σ = x₀ + σ z given y = A x₀ + σ_y n.

        ∇ log p(x_σ | y) = s(x_σ) + scale · ∇ log p(y | x_σ),
        p(y | x_σ) = ∫ N(y; A x₀, σ_y² I) p(x₀ | x_σ) dx₀

    p(x₀ | x_σ) is not known; each method puts a Gaussian in its place. With x̂ = x + σ² s(x), which
    is E[x₀ | x_σ]:

        "flat"        N(x, σ² I)       exact for a flat prior; the network is not differentiated
        "denoiser"    N(x̂, r² I),
        1/r² = 1/σ² + 1/τ²: exact for a prior N(μ, τ² I); one backward pass
        "moments"     N(x̂, σ² ∂x̂/∂x)
        the covariance by Tweedie's formula: exact for every Gaussian prior, once `iterations` of
        conjugate
                                       gradients, one backward pass each, reach the number of
                                       observed values

    so that log p(y | x_σ) = -½ rᵀ (σ_y² I + A V Aᵀ)⁻¹ r + const with r = y - A E[x₀], V the
    covariance, which is held constant in the gradient. As σ falls below the prior's width and
    σ_y/‖A‖ all become exact: "flat" errs by O(σ²), "denoiser" by O(σ⁴). The curvature of "flat",
    and of "denoiser" where τ² is not below the prior's variance, is at most 1/σ², that of the prior
    at most the same: a step size that the prior bears twice over is stable.

    Args:
        score: called score(x, sigma), or score(x): then σ = 0, and noise must be positive.
        operator: A, with forward and adjoint (see `LinearOperator`). observation: y, a shape (*)
            for all samples, or (B, *).
        noise: σ_y >= 0. prior_variance: τ² of "denoiser"; 1/4 is the most that a value in [0, 1]
            can have.
        iterations: of "moments". With a trained network take few: its Jacobian is neither quite
            symmetric nor positive, and what many iterations solve is then no covariance (on 8x8
            digits 1 is stable, 5 are not).
        scale: a float or (B,); 1 is Bayes' rule.

    Returns:
        A function of the arguments of `score`. "flat" and "denoiser" are differentiable where
        gradients are enabled; "moments" is for samplers and refuses to be differentiated.

    Raises:
        ValueError: an operator without adjoint, negative noise, prior_variance or scale out of
            range, an unknown method; when called: y has another shape than A x, or, at the first
            call, ⟨A x, y⟩ = ⟨x, Aᵀ y⟩ does not hold.

    Source: flat: Jalal et al. 2021 (arXiv:2108.01368), with A Aᵀ; denoiser: Song et al. 2023,
        "Pseudoinverse-guided diffusion models"; moments: Finzi et al. 2023 (arXiv:2306.07526),
        Rozet et al. 2024 (arXiv:2405.13712).
    """
    op = "linear_inverse"
    check_operator(op, operator)
    function(op, "score", score)
    choice(op, "method", method, METHODS)
    noise = check_noise(op, noise)
    prior_variance = checks.number(op, "prior_variance", prior_variance, above=0)
    check_scale(op, scale)
    iterations = checks.integer(op, "iterations", iterations, 1, limit=2**31)
    likelihood, setting = {
        "flat": (_flat, None),
        "denoiser": (_denoiser, prior_variance),
        "moments": (_moments, iterations),
    }[method]
    return _LinearInverse(score, operator, observation, noise, scale, likelihood, setting)


@printed
@dataclass(eq=False)
class _LinearInverse:
    score: Callable
    operator: LinearOperator
    observation: torch.Tensor
    noise: float
    scale: float | torch.Tensor
    likelihood: Callable
    setting: float | int | None
    checked: bool = False

    @outside_inference
    def __call__(self, x, *arguments):
        if not self.checked and checks.readable():   # once, where numbers can be looked at
            check_adjoint("linear_inverse", self.operator, x)
            self.checked = True

        variance = _variance(x, arguments, self.noise)
        s, g = self.likelihood(
            self.score,
            self.operator,
            ordinary(self.observation),
            self.noise**2,
            self.setting,
            x,
            arguments,
            variance,
        )
        return add("linear_inverse", s, g, self.scale)


def _variance(x, arguments, noise):
    """σ² as (B, 1, ...), or 0."""
    if not arguments:
        if noise == 0:
            raise ValueError(
                "linear_inverse: noise must be positive where the score takes no sigma; got 0."
            )
        return x.new_zeros((1,) * x.dim(), dtype=checks.compute_dtype(x.dtype))
    if isinstance(arguments[0], torch.Tensor) and _tracked(arguments[0]):
        raise ValueError("linear_inverse: there is no derivative with respect to sigma; detach it.")

    sigma = checks.coefficient("linear_inverse", "sigma", arguments[0], x, minimum=0)
    sigma = sigma if isinstance(sigma, torch.Tensor) else checks.as_tensor(sigma, x)
    return sigma.square().reshape(-1, *[1] * (x.dim() - 1))


def _tracked(t):
    """Whether any mode would differentiate with respect to t.

    Conjugate gradients take σ as a constant.
    """
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_gradtrackingtensor(t)
    return (
        wrapped
        or (torch.is_grad_enabled() and t.requires_grad)
        or forward_ad.unpack_dual(t).tangent is not None
    )


def _residual(operator, y, x):
    ax = operator.forward(x)
    return range_of(operator, fitted_observation("linear_inverse", y, ax, "A x")) - ax


def _flat(score, operator, y, noise2, _, x, arguments, variance):
    r = _residual(operator, y, x)
    return called("linear_inverse", score, x, arguments), operator.adjoint(
        solve(operator, r, *_shaped(r, noise2, variance))
    )


def _denoiser(score, operator, y, noise2, tau2, x, arguments, variance):
    spread = variance * tau2 / (variance + tau2)   # r²

    def value(x):
        s = called("linear_inverse", score, x, arguments)
        r = _residual(operator, y, _denoised(x, s, variance))
        return -0.5 * (r * solve(operator, r, *_shaped(r, noise2, spread))).flatten(1).sum(1), s

    g, s = gradient("linear_inverse", value, x)
    return s, g


def _moments(score, operator, y, noise2, iterations, x, arguments, variance):
    dual = isinstance(x, Dual) or (
        checks.readable() and forward_ad.unpack_dual(x).tangent is not None
    )
    if not checks.readable() or dual or (torch.is_grad_enabled() and x.requires_grad):
        raise ValueError(
            'linear_inverse: method "moments" holds the covariance constant and cannot be '
            'differentiated; take "denoiser".'
        )

    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        s = called("linear_inverse", score, leaf, arguments)
        denoised = _denoised(leaf, s, variance)

    def pull(v):   # (∂x̂/∂x)ᵀ v
        return torch.autograd.grad(denoised, leaf, v, retain_graph=True)[0]

    with torch.no_grad():
        r = _residual(operator, y, denoised.detach())
        a, b = _shaped(r, noise2, variance)
        v = conjugate_gradient(
            lambda v: a * v + b * operator.forward(pull(operator.adjoint(v))),
            r,
            iterations=iterations,
        )
        return s.detach(), pull(operator.adjoint(v))


def _denoised(x, s, variance):
    return (x + variance * s).to(x.dtype)


def _shaped(r, noise2, variance):
    """σ_y² and the variance of x₀, to multiply r."""
    variance = variance.reshape(-1, *[1] * (r.dim() - 1))
    return torch.full_like(variance, noise2), variance
