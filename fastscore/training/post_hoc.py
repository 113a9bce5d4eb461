"""Averages of weights whose width is chosen after training."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastscore.averages import PREFIX, Averaged, check_weights
from fastscore.messages import shown
from fastscore.scalars import integer, number

WIDEST = 0.28   # below √(1/12), where γ = 0: all weights alike
_NARROWEST = 1e-3
_LOOSE = 0.1   # relative distance of a profile from the one asked for


def power_averaged(model: torch.nn.Module, width: float) -> Averaged:
    """An average of a model's weights over a share of its training, whatever its length.

        w̄_t = ∫₀ᵗ p(τ) w_τ dτ,    p(τ) = (γ + 1)/t (τ/t)^γ
        w̄ ← β w̄ + (1 - β) w,    β = (1 - 1/t)^(γ + 1) at update t

    Two of them, of widths such as 0.05 and 0.1, whose `state_dict` is kept every few thousand
    updates, are enough for `post_hoc` to make the average of any width between and beyond.

    Args:
        width: σ_rel, the standard deviation of p over t, in 0.001..0.28; the exponential average of
            decay d over T updates has about 1/(T (1 - d)).

    Returns:
        What `averaged` returns, called and updated in the same way. `state_dict` holds `width` and
        `n_averaged`, the number of updates, as well.

    Raises:
        ValueError: width out of range, or weights without a shape.

    Source: Karras et al. 2024, section 3.1 (arXiv:2312.02696).

    >>> line = torch.nn.Linear(1, 1)
    >>> average = power_averaged(line, 0.1)
    >>> for t in range(1, 1001):
    ...     _ = torch.nn.init.constant_(line.weight, t)
    ...     average.update_parameters(line)
    >>> mean = (average.gamma + 1) / (average.gamma + 2)   # of p over t
    >>> abs(average.module.weight.item() - 1000 * mean) < 1
    True
    """
    check_weights("power_averaged", model)
    return _PowerAveraged(model, _width("power_averaged", width))


def post_hoc(
    model: torch.nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    width: float,
    *,
    step: int | None = None,
) -> torch.nn.Module:
    """The network of another width, from states of power averages along one training.

        Σ_i x_i w̄_i,    x = argmin ‖Σ_i x_i p_i - p‖² over [0, step]

    with p_i the profiles of the states and p the one of this width at this step.

    Args:
        model: the network that was trained; it stays as it is. states: `state_dict()` of its
            `power_averaged`, at several updates and of one width or more. width: σ_rel, as there.
        step: the update at which the average ends; the last of the states' unless given.

    Returns:
        A copy of the network in evaluation mode, its parameters combined in float64 and rounded to
        their dtypes, its buffers those of the state nearest to step.

    Raises:
        ValueError: there are no states, they are no states of power averages of this network,
            step is beyond the last, or they hold too little to make this average: ‖Σ x p - p‖ is
            above a tenth of ‖p‖.

    Source: Karras et al. 2024, section 3.2 and appendix C (arXiv:2312.02696).
    """
    width = _width("post_hoc", width)
    check_weights("post_hoc", model)
    times, widths = _profiles(states)
    last = int(max(times))
    step = last if step is None else integer("post_hoc", "step", step, 1, last)

    x, distance = _coefficients(times, widths, step, width)
    if distance > _LOOSE:
        raise ValueError(
            f"post_hoc: {len(states)} states, at updates {shown(sorted(set(times)))} and of widths "
            f"{shown(sorted(set(widths)))}, cannot make width {width:g} at update {step}: the "
            f"nearest profile is {100 * distance:.0f} % off; keep states more often, or of two "
            "widths."
        )
    nearest = min(range(len(states)), key=lambda i: (abs(times[i] - step), abs(widths[i] - width)))
    return _combined(model, states, x, nearest)


class _PowerAveraged(Averaged):
    def __init__(self, model, width):
        super().__init__(model, 0.0)
        self.gamma = gamma_of(width)
        self.register_buffer("width", torch.tensor(width, dtype=torch.float64, device="cpu"))

    def _decay(self, n):
        return (1 - 1 / (n + 1)) ** (self.gamma + 1)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.gamma = gamma_of(float(self.width))

    def _apply(self, fn, recurse=True):
        width = self.width
        super()._apply(fn, recurse)
        self._buffers["width"] = width   # no weight: it keeps its dtype and place
        return self


def gamma_of(width: float) -> float:
    """γ of the profile τ^γ with this relative width: σ² = (γ + 1)/((γ + 2)² (γ + 3))."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(max(r.real for r in roots if abs(r.imag) < 1e-9 * abs(r)))


def _width(op, width):
    return number(op, "width", width, _NARROWEST, WIDEST)


def _profiles(states):
    if isinstance(states, Mapping) or not isinstance(states, Sequence) or not states:
        raise ValueError(
            "post_hoc: states must be state_dicts of power averages, one or more; got "
            f"{shown(states)}."
        )
    times, widths = [], []
    for i, state in enumerate(states):
        if not isinstance(state, Mapping) or not {"width", "n_averaged"} <= state.keys():
            raise ValueError(
                f"post_hoc: states[{i}] is no state_dict of a power average; it lacks its width."
            )
        times.append(float(state["n_averaged"]))
        widths.append(_width("post_hoc", float(state["width"])))
    if not min(times):
        raise ValueError("post_hoc: a state holds no weights yet; its average was not updated.")
    return times, widths


def _coefficients(times, widths, step, width):
    """x, and ‖Σ x p - p‖ / ‖p‖."""
    t = np.array([*times, step])
    gamma = np.array([*(gamma_of(w) for w in widths), gamma_of(width)])
    products = _products(t[:, None], gamma[:, None], t[None], gamma[None])
    size = np.sqrt(np.diag(products))   # conditioned: profiles of unit norm
    products = products / size / size[:, None]

    a, b = products[:-1, :-1], products[:-1, -1]
    x = np.linalg.lstsq(a, b, rcond=1e-13)[0]
    distance = math.sqrt(max(x @ a @ x - 2 * x @ b + 1, 0.0))
    return x * size[-1] / size[:-1], distance


def _products(t, gamma, u, other):
    """∫ p q over the time that two profiles share, (γ + 1)/t (τ/t)^γ each."""
    least = np.minimum(t, u)
    powers = gamma * np.log(least / t) + other * np.log(least / u)
    return (gamma + 1) * (other + 1) / (gamma + other + 1) * least / (t * u) * np.exp(powers)


def _combined(model, states, x, nearest):
    average = Averaged(model, 0.0)
    for i, state in enumerate(states):
        found = {name: t.shape for name, t in state.items() if name.startswith("module.")}
        wanted = {name: t.shape for name, t in average.state_dict().items() if name in found}
        if found != wanted or len(found) != len(average.module.state_dict()):
            raise ValueError(f"post_hoc: states[{i}] is of another network than model.")

    whole = {n: t for n, t in states[nearest].items() if n.startswith("module.")}
    average.module.load_state_dict({n.removeprefix("module."): t for n, t in whole.items()})
    with torch.no_grad():
        for i, (name, p) in enumerate(average.module.named_parameters()):
            if not (p.dtype.is_floating_point or p.dtype.is_complex):
                continue
            wide = torch.complex128 if p.dtype.is_complex else torch.float64
            total = torch.zeros(p.shape, dtype=wide, device="cpu")
            for weight, state in zip(x, states):
                # In float32 where the parameter itself is narrower.
                kept = state.get(f"{PREFIX}{i}", state[f"module.{name}"])
                total += float(weight) * kept.detach().to("cpu", wide)
            p.copy_(total)
    return average.module
