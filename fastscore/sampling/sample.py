"""Run a sampler, named by a word, to its end."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastscore import random
from fastscore.modes import networks
from fastscore.sampling.consistent import consistent_annealed
from fastscore.sampling.langevin import annealed_langevin, langevin
from fastscore.sampling.mala import mala
from fastscore.sampling.predictor_corrector import predictor_corrector
from fastscore.sampling.probability_flow import probability_flow
from fastscore.sampling.run import State, check_count, number
from fastscore.sampling.start import First, draw_start, start_law
from fastscore.scalars import choice
from fastscore.schedules.ladders import check_ladder
from fastscore.tensors import home, valued

SAMPLERS: dict[Any, Any] = {
    f.__name__: f
    for f in (
        annealed_langevin,
        consistent_annealed,
        predictor_corrector,
        probability_flow,
        langevin,
        mala,
    )
}
# these start from N(0, σ_1² I) on any ladder
GAUSSIAN = ("predictor_corrector", "probability_flow")
CHECK_EVERY = 100  # steps between two looks at the state of a sampler without levels


def states(
    score: Callable[..., Tensor],
    *,
    sampler: str = "annealed_langevin",
    x: Tensor | None = None,
    shape: Iterable[int] | None = None,
    initial_law: str | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    check_finite: bool = True,
    **options: Any,
) -> Iterator[State]:
    """The states of a sampler, from the initial draw on. Arguments and errors as in `sample`."""
    return _begun(
        score,
        sampler,
        x,
        shape,
        initial_law,
        seed,
        first_sample,
        dtype,
        device,
        check_finite,
        options,
    )[1]


def default_law(sampler: str, sigma: float | None) -> str:
    """The law that a sampler starts from unless told otherwise, σ_1 or None being sigma."""
    return "gaussian" if sampler in GAUSSIAN else start_law(sigma)


def _begun(
    score, sampler, x, shape, initial_law, seed, first_sample, dtype, device, check_finite, options
):
    """The start, and the states that follow it."""
    choice("sample", "sampler", sampler, SAMPLERS)
    if (x is None) == (shape is None):
        raise ValueError("sample: give either x or shape.")
    if x is None and options.get("start"):
        raise ValueError(
            "sample: start needs the state after that many updates as x; got a shape, whose draw "
            "is the state after none."
        )
    first_sample = check_count("sample", "first_sample", first_sample)
    seed = random.draw_seed() if seed is None else seed
    if x is None:
        ladder = options.get("sigmas")
        sigma = options.get("sigma") if ladder is None else check_ladder("sample", ladder)[0].item()
        sigma = None if sigma is None else number("sample", "sigma", sigma)
        law = default_law(sampler, sigma) if initial_law is None else initial_law
        device = _device_of(score) if device is None else device
        x = draw_start(
            "sample", "initial_law", shape, law, sigma, seed, first_sample, dtype, device
        )
    first = First()
    # A run that goes on stands where its earlier part brought it.
    with (
        first.watching() if check_finite and not options.get("start") else contextlib.nullcontext()
    ):
        run = SAMPLERS[sampler](score, x, seed=seed, first_sample=first_sample, **options)
    _warn_beyond(score, options.get("sigmas"))
    if check_finite and shape is None and not bool(x.isfinite().all()):
        raise ValueError("sample: the start x must be finite; it holds NaN or infinite values.")
    return x, _checked(run, first) if check_finite else run


def _device_of(score):
    """That of the networks that score holds; the default one where it holds none, or networks on
    several."""
    devices = {
        t.device
        for net in networks(score)
        for t in itertools.chain(net.parameters(), net.buffers())
    }
    if torch.device("meta") in devices:
        raise ValueError(
            "sample: the network must have weights; some of it is on the meta device (to_empty, "
            "then load_state_dict)."
        )
    return devices.pop() if len(devices) == 1 else home()


def _warn_beyond(score, sigmas):
    """A network that knows its own ladder answers outside it, too, but was never trained there."""
    known = None if sigmas is None else _range(score)
    if known is None:
        return
    low, high = (float(v) for v in valued("sample", "sigmas", sigmas).aminmax())
    if high > 1.01 * known[1] or low < 0.99 * known[0]:
        warnings.warn(
            f"sample: sigmas reach from {high:g} to {low:g}, but the network was made for "
            f"{known[1]:g} to {known[0]:g}; "
            "train it on the ladder that it is sampled with.",
            stacklevel=4,
        )


def _range(score):
    """(smallest, largest) σ that a network of ours was made for, averaged or wrapped in
    DistributedDataParallel; None where unknown."""
    net = getattr(score, "module", score)
    sigmas = getattr(net, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.numel():
        return float(sigmas.min()), float(sigmas.max())
    return getattr(net, "sigma_range", None)


def _checked(run, first):
    """The same states, looked at once per level (the host waits for the device there) or every
    hundredth step, and at the end."""
    state, level = None, None
    for state in run:
        if state.level != level or state.step % CHECK_EVERY == 0:
            _check(state, first)
        level = state.level
        yield state
    if state is not None:
        _check(state, first)


def _check(state, first):
    if not first.judge(state.x.isfinite().all()):
        where = f"level {state.level} (σ = {state.sigma:g}, step {state.step})"
        raise FloatingPointError(
            f"sample: the state is not finite after {where}; choose a smaller step_size, or look "
            "at the score."
        )


def sample(
    score: Callable[..., Tensor],
    *,
    sampler: str = "annealed_langevin",
    x: Tensor | None = None,
    shape: Iterable[int] | None = None,
    initial_law: str | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    check_finite: bool = True,
    **options: Any,
) -> Tensor:
    """Run a sampler to its end and return the samples.

    Args:
        score: as the sampler calls it; networks in it run in evaluation mode (see
            `fastscore.sampling`).
        sampler: "annealed_langevin" (default) or another name of `fastscore.sampling`.
        x: start, (B, *); or shape: its shape, then x is drawn from initial_law, "uniform" in [0, 1]
            or "gaussian", N(0, σ_1² I), in dtype, on device (the network's unless given). Unless
            given, the law is gaussian for predictor_corrector and probability_flow, and
            `start_law` of σ_1 for the others: gaussian where σ_1 > 1.146, else uniform; of
            `langevin` at a sigma that σ is σ_1, without one, and for `mala`, the law is uniform.
            `start_like` draws an x from the mean and the variance of data.
        seed, first_sample: sample(n=64) equals two calls of 32 with first_sample 0 and 32, noise
            bit for bit.
        check_finite: look at the state after each level (every 100 steps where there are none),
            which waits for the device; and warn where
            the first score at a σ says that the start lies far outside: σ² ‖s‖²/d, on average over
                the batch, is above 4 (a little more
            for a few elements; for independent starts of the right law it is so once in a million
            runs at most).
        options: the sampler's other arguments.

    Raises:
        ValueError: the sampler or the law is unknown, or not exactly one of x and shape is given;
            and what the sampler refuses.
        FloatingPointError: the state is not finite; the level and the step are named.
    """
    x, run = _begun(
        score,
        sampler,
        x,
        shape,
        initial_law,
        seed,
        first_sample,
        dtype,
        device,
        check_finite,
        options,
    )
    for state in run:
        x = state.x
    return x
