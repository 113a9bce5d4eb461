"""The density of data from a noise-conditional score, by the probability-flow ODE."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastscore.likelihood import solvers
from fastscore.losses.exact import divergence
from fastscore.losses.projections import check_data, check_projections, derivatives, directions, dot
from fastscore.messages import shown
from fastscore.models.analytic import GaussianMixture
from fastscore.modes import evaluated
from fastscore.ops import checks
from fastscore.scalars import SQUARE, choice, function, named, offset
from fastscore.schedules.ladders import check_ladder

_OP = "log_density"
STEPS = 2**20   # of a grid
TRACES = ("exact", "rademacher")


def log_density(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    trace: str = "exact",
    projections: int = 1,
    chunk: int = 16,
    prior: GaussianMixture | Callable[[Tensor], Tensor] | None = None,
    method: str | None = None,
    steps: int | Tensor | Sequence[float] | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Tensor:
    """Compute log p_{σ_min}(x), the log-density of data with noise σ_min, from their score at every
    noise level.

        dx/dσ = -σ s(x, σ),    x(σ_min) = x
        log p_{σ_min}(x) = log p_{σ_max}(x(σ_max)) - ∫ σ tr J(σ) dσ,    J = ∂s/∂x at (x(σ), σ),
        σ from σ_min to σ_max

    The integral runs in log σ and in float64, whatever the dtype of x; the score is called in the
    dtype of x.

    Args:
        score: called score(x, sigma) with sigma (B,), or a `models.EnergyScore`. x: (B, *), any
            float dtype.
        sigma_min, sigma_max: noise of the density asked for, and noise at which the density is the
            prior; 0 < σ_min < σ_max.
        trace: "exact", d tangents through the network, `chunk` at a time; or "rademacher", the mean
            of vᵀJv over `projections` sign vectors, drawn once for the whole path: unbiased in the
            integral, and exact for every draw where J is diagonal.
        prior: log p_{σ_max}. None is the customary N(0, σ_max² I); a `models.GaussianMixture` (or
            `Gaussian`) of the *data*, to which the noise σ_max is added; or a callable, x (B, *) ->
            (B,).
        method: "dopri5", "dopri8", "bosh3", "fehlberg2" or "adaptive_heun" of torchdiffeq,
            adaptive, the default; or, with steps, "rk4" (then the default) or "heun".
        steps: an int, so many steps evenly in log σ; or a descending ladder from σ_max to σ_min:
            "heun" calls the score at these levels only, and a network without others
            (`models.NCSN`) needs it. With steps a sample never depends on its batch.
        atol, rtol: of the adaptive methods, on x and on the log-density per dimension, for the
            worst sample of the batch.
        seed, first_sample: the noise key of the signs (stream PROJECTION, substream the number of
            the projection); first_sample is the global number of x[0], so that splits of a batch
            agree.

    Returns:
        (B,) nats, float32 (float64 for float64). Differentiable in x and the parameters of score
        through the steps taken, which keeps every stage in memory: call it under torch.no_grad()
        for values alone.

    Raises:
        ValueError: an argument out of range, or a shape that does not fit. ImportError: an adaptive
            method without torchdiffeq.
        FloatingPointError: the adaptive solver met a value that is not finite.

    The customary prior is exact for the samples of the ODE started from it, but data with noise
    σ_max are not N(0, σ_max² I). Against their density the result is off by log N(x_T; 0, σ_max² I)
    - log p_{σ_max}(x_T), x_T = x(σ_max); for data N(μ, s² I), v = s² + σ_max²,

        bias = (d/2) log(v/σ_max²) + ‖x_T - μ‖²/(2v) - ‖x_T‖²/(2σ_max²),
        x_T = μ + (x - μ) √(v/(s² + σ_min²))

    The networks that score and prior hold run in evaluation mode, and are as they were afterwards;
    where the result is differentiated and parts of them are checkpointed, call eval() first, for a
    checkpoint calls its part again in the backward pass.

    A score that is no gradient (a network's hardly is) still gives the density of its own flow,
    exactly.

    Source: Song et al. 2021, section 4.3 and appendix D.2 (arXiv:2011.13456), at the
        variance-exploding noise σ.

    >>> gaussian = lambda x, sigma: -x / (1 + sigma[:, None] ** 2)
    >>> exact = log_density(gaussian, torch.zeros(1, 2), sigma_min=1.0, sigma_max=100.0, steps=64)
    >>> bool((exact + torch.log(torch.tensor(4 * torch.pi))).abs() < 2e-4)
    True
    """
    function(_OP, "score", score)
    check_data(_OP, x)
    if not x.numel():
        raise ValueError(f"{_OP}: x must hold samples; got {tuple(x.shape)}.")

    low, high = _range(sigma_min, sigma_max)
    method = _method(method, steps)
    jacobian_trace = evaluated(_trace(score, x, trace, projections, chunk, seed, first_sample))
    log_prior = evaluated(_prior(prior, high, x))
    rhs = _right_hand_side(jacobian_trace, x)
    if steps is None:
        atol, rtol = (
            checks.number(_OP, name, value, above=0)
            for name, value in (("atol", atol), ("rtol", rtol))
        )
        end, change = solvers.adaptive(_OP, rhs, x.double(), low, high, method, atol, rtol)
    else:
        end, change = solvers.fixed(rhs, x.double(), _grid(steps, low, high), method)

    return (log_prior(end) + x[0].numel() * change).to(checks.compute_dtype(x.dtype))


def _right_hand_side(jacobian_trace, x):
    """dx/d log σ = -σ² s, and -σ² tr J / d, per dimension so that one tolerance serves both."""
    dtype, d = checks.compute_dtype(x.dtype), x[0].numel()

    def rhs(state, sigma):
        if isinstance(sigma, float):
            each = torch.full((len(x),), sigma, dtype=dtype, device=x.device)
        else:
            each = sigma.to(dtype).expand(len(x))
        s, trace = jacobian_trace(state.to(x.dtype), each)
        return -(sigma**2) * s.double(), -(sigma**2) / d * trace.double()

    return rhs


def _trace(score, x, trace, projections, chunk, seed, first_sample):
    """(x, sigma) -> s(x, σ), tr J or the mean of vᵀJv (B,)."""
    choice(_OP, "trace", trace, TRACES)
    check_projections(_OP, projections, "rademacher")
    chunk = checks.integer(_OP, "chunk", chunk, 1)
    begin = offset(_OP, first_sample, x[0].numel())
    if trace == "exact":
        if projections != 1:
            raise ValueError(
                f"{_OP}: projections belong to trace='rademacher'; got {projections} with the "
                "exact trace."
            )
        return lambda x, sigma: divergence(_OP, score, x, chunk, (sigma,))

    # once: the integrand stays a smooth function.
    v = directions(_OP, x, projections, seed=seed, offset=begin)

    def estimate(x, sigma):
        s, js = derivatives(_OP, score, x, v, (sigma,))
        dtype = checks.compute_dtype(x.dtype)
        return s, dot(v.to(dtype), js.to(dtype)).mean(0)

    return estimate


def _range(sigma_min, sigma_max):
    low, high = (
        checks.number(_OP, n, v, most=SQUARE)
        for n, v in (("sigma_min", sigma_min), ("sigma_max", sigma_max))
    )
    if not 0 < low < high:
        raise ValueError(f"{_OP}: 0 < sigma_min < sigma_max must hold; got {low:g} and {high:g}.")
    return low, high


def _method(method, steps):
    known = solvers.ADAPTIVE if steps is None else tuple(solvers.FIXED)
    if method is None:
        method = "dopri5" if steps is None else "rk4"
    if not named(method, known):
        given = "without steps" if steps is None else "with steps"
        raise ValueError(
            f"{_OP}: {given}, method must be one of {', '.join(known)}; got {shown(method)}."
        )
    return method


def _grid(steps, low, high):
    """Ascending σ, as floats.

    The ends are those of the ladder itself, so that a network of fixed levels knows them.
    """
    if checks.whole(steps):
        if not 1 <= steps <= STEPS:
            bound = "at least 1" if steps < 1 else f"at most {STEPS}"
            raise ValueError(f"{_OP}: steps must be {bound}; got {shown(steps)}.")
        return [low * (high / low) ** (k / steps) for k in range(steps)] + [high]

    try:
        sigmas = check_ladder(_OP, steps).tolist()[::-1]
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{_OP}: steps must be an int or a ladder; {str(error).removeprefix(f'{_OP}: ')}"
        ) from None
    if len(sigmas) < 2 or abs(sigmas[0] / low - 1) > 1e-6 or abs(sigmas[-1] / high - 1) > 1e-6:
        raise ValueError(
            f"{_OP}: a ladder of steps must go from sigma_max to sigma_min, {high:g} to {low:g}; "
            f"got {shown(sigmas[::-1])}."
        )

    return sigmas


def _prior(prior, sigma, x):
    """x (B, *) in float64 -> log p_{σ_max}(x), (B,)."""
    if prior is None:
        return lambda end: (
            -0.5
            * (
                checks.per_sample_sum(end.square()) / sigma**2
                + x[0].numel() * math.log(2 * math.pi * sigma**2)
            )
        )
    if isinstance(prior, GaussianMixture):
        if prior.dim != x[0].numel():
            raise ValueError(
                f"{_OP}: the prior must be of {x[0].numel()} dimensions like x; got {prior.dim}."
            )
        return lambda end: prior.log_prob(end, sigma)
    if not callable(prior):
        raise TypeError(
            f"{_OP}: prior must be None, a GaussianMixture or a callable; got "
            f"{type(prior).__name__}."
        )

    def checked(end):
        value = prior(end.to(x.dtype))
        if not isinstance(value, torch.Tensor) or value.shape != end.shape[:1]:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{_OP}: prior(x) must be one value per sample, ({len(end)},); got {got}."
            )
        return value.double()

    return checked
