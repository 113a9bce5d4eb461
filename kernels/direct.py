"""Triton's launchers for calls that come past PyTorch's dispatcher (csrc/door.cpp).

The door has looked at the arguments, and names in one signature all that a launch depends on but
addresses and the numbers that Triton does not specialise on. The first call under a signature goes
through the launcher and keeps its launch; the others fill their tensors and numbers in.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastscore.kernels import LAUNCHERS as RAW
from fastscore.kernels.launch import recorded


class Plan(NamedTuple):
    """A kept launch: run(*grid, stream, *after, <what varies>, *middle, <seed, step>, *rest).

    memory: the shape of its temporary tensor.
    """

    device: int
    run: Any
    grid: tuple[int, ...]
    after: tuple
    middle: tuple
    rest: tuple
    memory: torch.Size | None


_plans: dict[bytes, Plan] = {}
_MOST = 4096   # signatures; a run has a handful
_hooks = triton.knobs.runtime


def _stream(plan: Plan | None) -> int | None:
    """The current stream, where the launch may be the kept one: not on another device, nor past the
    hooks of a profiler."""
    if plan is None or _heard(_hooks.launch_enter_hook) or _heard(_hooks.launch_exit_hook):
        return None
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    return driver.get_current_stream(device) if device == plan.device else None


def _heard(hook) -> bool:
    return bool(getattr(hook, "calls", hook))


@contextlib.contextmanager
def _keeping(
    signature: bytes, varying: tuple, at: int | None = None, memory: torch.Size | None = None
) -> Iterator[None]:
    """Keep what is launched within, if it is one kernel whose arguments begin with `varying`; two
    that vary, too, stand at `at`, if any do."""
    with recorded() as launches:
        yield

    if len(launches) != 1:
        return
    device, compiled, grid, args = launches[0]
    if not all(a is b for a, b in zip(args, varying)):
        return
    if len(_plans) >= _MOST:
        _plans.clear()
    after = (compiled.function, compiled.packed_metadata, None, None, None)
    middle = args[len(varying) : at]
    rest = () if at is None else args[at + 2 :]
    _plans[signature] = Plan(device, compiled.run, grid, after, middle, rest, memory)


def noisy_update(
    signature, out, x, d, drift_each, drift, diffusion_each, diffusion, seed, step, stream, offset
):
    plan = _plans.get(signature)
    queue = _stream(plan)
    if queue is not None:
        plan.run(
            *plan.grid, queue, *plan.after, out, x, d, drift_each, drift, diffusion_each, diffusion,
            *plan.middle, seed, step, *plan.rest,
        )  # fmt: skip
        return

    varying = (out, x, d, drift_each, drift, diffusion_each, diffusion)
    with _keeping(signature, varying, at=10):
        RAW["noisy_update"](*varying, None, seed, step, stream, offset)


def noise_reduce(signature, out, score, sigma_each, sigma, seed, step, stream, offset, reduction):
    plan = _plans.get(signature)
    queue = _stream(plan)
    if queue is not None:
        plan.run(
            *plan.grid, queue, *plan.after, out, score, sigma_each, sigma,
            *plan.middle, seed, step, *plan.rest,
        )  # fmt: skip
        return

    varying = (out, score, sigma_each, sigma)
    with _keeping(signature, varying, at=7):
        RAW["noise_reduce"](*varying, None, seed, step, stream, offset, reduction)


def normalise(
    signature: bytes,
    y: Tensor,
    x: Tensor,
    given: Tensor | list[Tensor],
    labels: Tensor | None,
    groups: int,
    alpha: bool,
    beta: bool,
    eps: float,
    activation: int,
) -> None:
    """given: a table of rows, picked by the labels; or columns γ, α, β, each (C,) or (B, C)."""
    flat = False
    if labels is not None:
        coef = given
    elif flat := max(map(Tensor.dim, given)) == 1:
        coef = torch.cat(given)
    else:
        coef = torch.cat([c.expand(len(x), -1) for c in given], 1)

    plan = _plans.get(signature)
    queue = _stream(plan)
    if queue is not None:
        stats = coef.new_empty(plan.memory)
        if (stats.data_ptr() | coef.data_ptr()) % 16 == 0:   # as those of the kept launch
            plan.run(*plan.grid, queue, *plan.after, y, stats, x, coef, labels, *plan.middle)
            return

    stats = coef.new_empty((1, *x.shape[:2], 2))
    coef = coef[None] if flat else coef
    varying = (y, stats, x, coef, labels)
    aligned = (stats.data_ptr() | coef.data_ptr()) % 16 == 0
    kept = _keeping(signature, varying, memory=stats.shape)
    with kept if aligned else contextlib.nullcontext():
        numbers = (groups, alpha, beta, eps, activation)
        RAW["normalise"](y, None, stats, x, None, coef, None, labels, *numbers)


LAUNCHERS = (noisy_update, noise_reduce, RAW["fill"], normalise)   # in the order of csrc/plain.h
