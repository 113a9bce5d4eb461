"""The Metropolis-adjusted Langevin algorithm: Langevin proposals, accepted so that the law is exact
at every step size."""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastscore import random
from fastscore.models.energy import EnergyScore
from fastscore.modes import Evaluation, networks
from fastscore.ops import checks
from fastscore.ops.functions import outside_inference
from fastscore.sampling.run import (
    State,
    begin,
    check_count,
    check_updates,
    epsilon,
    without_gradients,
)
from fastscore.sampling.score import single_values

# Of proposals, at the best acceptance in high dimensions (Roberts & Rosenthal 1998).
_REFUSED = 1 - 0.574
_FALSE_ALARM = 1e-3
_WRAPPERS = (AveragedModel, DataParallel, DistributedDataParallel)


def mala(
    log_prob: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    steps: int,
    step_size: float | Tensor | None = None,
    step_lr: float | Tensor | None = None,
    temperature: float = 1.0,
    project: Callable[..., Tensor] | None = None,
    diagnostics: bool = False,
    start: int = 0,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    burn_in: int = 0,
) -> Iterator[State]:
    """Run the Metropolis-adjusted Langevin algorithm on p^(1/T) ∝ e^(f/T); yields a `State` after
    each step.

        y = x + (ε/2) s(x) + √(T ε) z,    s = ∇f
        log α = (f(y) - f(x) - ½ (s(x) + s(y)) · (y - x + (ε/4) (s(y) - s(x)))) / T
        x ← y if log u < log α

    p^(1/T) is invariant for every ε; a proposal that is not finite is refused.

    Args:
        log_prob: f, called f(x): the unnormalised log-density of each sample, (B,) or (B, 1),
            differentiable; or a `models.EnergyScore`, averaged (`state.ema`), compiled or not.
        x: start, (B, *), not modified. steps: how many. step_size: ε > 0, a float, 0-d or (B,); or
            step_lr: η = ε/2.
        temperature: T > 0. project: project(y, 0.0, step) -> y, called on x at the start, on every
            proposal and at the end; the law is then no longer exact.
        diagnostics: fill `State.diagnostics`: acceptance (min(1, α)), accepted (0 or 1),
            acceptance_rate (the mean of accepted since this call's start), x_norm, score_norm and
            snr, each (B,).
        start: steps done already; x is the state after them. seed: of the run; first_sample: global
            number of x[0].
        burn_in: n, of the steps: in the first n each chain's ε, from step_size on, follows
            log ε ← log ε + k^-0.6 (min(1, α) - 0.574) in step k; then it is fixed, and only from
            there on is the law invariant. `State.diagnostics` tells "step_size", (B,), the ε of the
            next step: to go on after the burn-in, give that as step_size.

    Noise: z from the stream LANGEVIN as in `langevin`, u from its substream 1, element n for sample
    n.

    Warns, once its last state was handed over, if chains never moved in so many steps that at an
    acceptance of 0.574, the best in high dimensions, that would happen to one of the B chains with
    a probability below 1e-3 (17 steps for 1,000 chains): their start is far out
    or ε is too large. Nothing is said of shorter runs.

    Raises:
        ValueError: f(x) has another shape or does not depend on x, steps is negative, ε or T is no
            positive number, burn_in is beyond steps, or a run that goes on has one.

    Source: Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions and their
    discrete approximations".
    """
    op = "mala"
    f = _energy(log_prob)
    run = begin(
        op,
        f,
        x,
        temperature=temperature,
        project=project,
        diagnostics=diagnostics,
        seed=seed,
        first_sample=first_sample,
    )
    if run.root_temperature == 0:
        raise ValueError(f"{op}: temperature must be positive; got {temperature}.")
    steps = check_updates(op, "steps", steps)
    start = check_count(op, "start", start, steps)
    burn_in = check_count(op, "burn_in", burn_in, steps)
    if burn_in and start:
        raise ValueError(
            f"{op}: burn_in is for the beginning of a run; got start={start}. "
            "Go on from a state after it, with its diagnostics['step_size']."
        )
    return _mala(run, f, x, start, steps, epsilon(op, step_size, step_lr, x), burn_in)


def _energy(log_prob):
    """f of an `EnergyScore`, also of an averaged, parallel or compiled one; anything else is f
    itself."""
    inner = log_prob
    while isinstance(inner, nn.Module) and not isinstance(inner, EnergyScore):
        inner = getattr(inner, "_orig_mod", None) or (
            inner.module if isinstance(inner, _WRAPPERS) else None
        )
    return inner.f if isinstance(inner, EnergyScore) else log_prob


@without_gradients
def _mala(run, log_prob, x, start, steps, e, burn_in):
    if burn_in:
        e = torch.as_tensor(e, dtype=checks.compute_dtype(x.dtype), device=x.device).expand(len(x))
    a, b = run.langevin_coefficients(e)
    x = run.projected(x, 0.0, start)
    # The backward pass, too: a checkpoint calls the network again there.
    evaluation = Evaluation(networks(log_prob))

    def value_and_score(x):
        with evaluation:
            return _value_and_score(run, x)

    f, s = value_and_score(x)
    moves = torch.zeros_like(f)
    uniforms = run.key._replace(stream=random.LANGEVIN | 1 << 16, offset=run.first_sample)
    for step in range(start, steps):
        y = run.projected(run.noisy_update(x, s, a, b, step), 0.0, step)
        f2, s2 = value_and_score(y)
        ratio = _log_ratio(run, x, f, s, y, f2, s2, a)
        key = uniforms.at(step)
        u = random.filled(random.UNIFORM, tuple(f.shape), key, f.dtype, x.device, run.backend)
        accepted = u.log() < ratio  # false for NaN

        told = run.diagnose(x, s, a, b)
        if step < burn_in:
            acceptance = ratio.exp().clamp(max=1).nan_to_num(0.0)
            e = e * ((step + 1) ** -0.6 * (acceptance - (1 - _REFUSED))).exp()
            a, b = run.langevin_coefficients(e)
        each = checks.expand(accepted, x)
        x = torch.where(each, y, x)
        s = torch.where(each, s2, s)
        f = torch.where(accepted, f2, f)
        moves = moves + accepted
        if told is not None:
            told |= {"acceptance": ratio.exp().clamp(max=1), "accepted": accepted.to(f.dtype)}
            told["acceptance_rate"] = moves / (step + 1 - start)
            if burn_in:
                told["step_size"] = e

        if step + 1 == steps:
            x = run.projected(x, 0.0, steps)
        yield State(0, 0.0, x, step + 1, told)
    if len(x) and len(x) * _REFUSED ** (steps - start) < _FALSE_ALARM:
        _warn_of_rest(moves, steps - start)


def _warn_of_rest(moves, steps):
    rest = int((moves == 0).sum())
    if rest:
        warnings.warn(
            f"mala: {rest} of {len(moves)} chains never moved in {steps} steps; they start far "
            "out, or step_size is too large for them.",
            stacklevel=2,
        )


def _log_ratio(run, x, f, s, y, f2, s2, half):
    """log α, (B,). The proposal densities of both directions are one inner product: nothing is
    divided by ε."""
    x, s, y, s2 = (t.to(f.dtype) for t in (x, s, y, s2))
    inner = checks.per_sample_sum((s + s2) * (y - x + checks.expand(0.5 * half, x) * (s2 - s)))
    return (f2 - f - 0.5 * inner) / run.root_temperature**2


@outside_inference
def _value_and_score(run, x):
    """f(x) (B,) in the compute dtype, and ∇f like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = run.value(x)
        if (
            not isinstance(value, torch.Tensor)
            or value.shape not in ((len(x),), (len(x), 1))
            or not value.requires_grad
        ):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            hint = " (a score? Metropolis needs log p itself)" if got == tuple(x.shape) else ""
            end = f" for x{single_values(x)}" if x.dim() == 1 and not hint else "."
            raise ValueError(
                f"{run.op}: log_prob(x) must be one value per sample, ({len(x)},), that depends on "
                f"x; got {got}{hint}{end}"
            )
        (s,) = torch.autograd.grad(value.sum(), x)
    return value.detach().reshape(-1).to(checks.compute_dtype(x.dtype)), s
