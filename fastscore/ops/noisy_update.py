"""x' = x + a d + b z with the noise made on the fly: noisy_update, and its two named cases
langevin_step and perturb."""

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastscore import backend as _backend
from fastscore import direct, random
from fastscore.direct import LANGEVIN, PERTURB, UPDATE
from fastscore.ops import checks
from fastscore.ops.noisy_update_functions import in_plain_torch, run, update


def noisy_update(
    x: Tensor,
    direction: Tensor,
    drift: float | Tensor,
    diffusion: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = random.LANGEVIN,
    offset: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a scaled direction and scaled noise, without ever storing the noise.

        x' = x + a d + b z,    z ~ N(0, I)

    Args:
        x: state, (B, *), float32, float64, bfloat16 or float16, any strides; its memory format is
            kept.
        direction: d, same shape, dtype and device as x.
        drift, diffusion: a and b; floats, 0-d or (B,). All four inputs are differentiable.
        noise: z, same shape and dtype as x. If given, the call is deterministic, takes no seed and
            is plain PyTorch.
        seed, step, stream, offset: the noise key (see fastscore.random); seed and step may be int64
            tensors on the device. Count step up: the same key draws the same noise.
        out: where to write, x itself for an in-place step; only without gradients.
        backend: 'reference', 'cpp', 'triton' or 'cuda' instead of the automatic choice.

    Returns:
        x', like x. Computed in float32 (float64 for float64), rounded once.

    Raises:
        ValueError: shapes or devices differ, or a coefficient is not finite (checked for floats and
            CPU tensors).
        TypeError: a dtype differs or is no float dtype.

    >>> noisy_update(torch.ones(2), torch.ones(2), 0.5, 1.0, noise=torch.zeros(2))
    tensor([1.5000, 1.5000])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        y = door.noisy_update(
            UPDATE, x, direction, drift, diffusion, seed, step, stream, offset, out, noise
        )
        if y is not None:
            return y

    op = "noisy_update"
    checks.check_float(op, "x", x)
    a = checks.in_graph(checks.coefficient(op, "drift", drift, x), x)
    b = checks.in_graph(checks.coefficient(op, "diffusion", diffusion, x), x)
    checks.check_like(op, "direction", direction, x)
    key = (seed, step, stream, offset)
    return _checked_update(op, x, direction, a, b, noise, key, out, backend)


def noisy_update_ref(
    x: Tensor,
    direction: Tensor,
    drift: float | Tensor,
    diffusion: float | Tensor,
    noise: Tensor,
) -> Tensor:
    """The equation, in the dtype of x."""
    a, b = checks.expand(drift, x), checks.expand(diffusion, x)
    return x + a * direction + b * noise


def langevin_step(
    x: Tensor,
    score: Tensor,
    step_size: float | Tensor | None = None,
    *,
    step_lr: float | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = random.LANGEVIN,
    offset: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take one unadjusted Langevin step.

        x' = x + (ε/2) s + √ε z,    z ~ N(0, I)

    Args:
        x: state, (B, *), any float dtype and strides.
        score: s = ∇ log p(x), same shape, dtype and device as x.
        step_size: ε >= 0, a float, 0-d or (B,); or step_lr: η = ε/2, as in NCSN's code, torchebm
            and blackjax.
        noise, seed, step, stream, offset, out, backend: as in `noisy_update`.

    Raises:
        ValueError: shapes or devices differ, ε is negative or not finite, or not exactly one of
            step_size and step_lr is given.
        TypeError: dtypes differ.

    Source: Song & Ermon 2019, Algorithm 1, line 6 (arXiv:1907.05600).

    >>> langevin_step(torch.ones(1), -torch.ones(1), 0.5, noise=torch.zeros(1))
    tensor([0.7500])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        e = step_size if step_lr is None else None
        if step_size is None and type(step_lr) is float:
            e = 2 * step_lr
        y = door.noisy_update(LANGEVIN, x, score, e, None, seed, step, stream, offset, out, noise)
        if y is not None:
            return y

    op = "langevin_step"
    checks.check_float(op, "x", x)
    if (step_size is None) == (step_lr is None):
        found = "neither" if step_size is None else "both"
        raise ValueError(f"{op}: give either step_size (ε) or step_lr (η = ε/2); got {found}.")
    if step_lr is None:
        e = checks.coefficient(op, "step_size", step_size, x, minimum=0)
    else:
        e = 2 * checks.coefficient(op, "step_lr", step_lr, x, minimum=0)

    root = e.sqrt() if isinstance(e, Tensor) else math.sqrt(e)
    a, b = checks.in_graph(0.5 * e, x), checks.in_graph(root, x)
    checks.check_like(op, "score", score, x)
    key = (seed, step, stream, offset)
    return _checked_update(op, x, score, a, b, noise, key, out, backend)


def langevin_step_ref(x: Tensor, score: Tensor, step_size: float | Tensor, noise: Tensor) -> Tensor:
    """The equation, in the dtype of x."""
    e = checks.expand(step_size, x)
    return x + e / 2 * score + e**0.5 * noise


def perturb(
    x: Tensor,
    sigma: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add Gaussian noise of standard deviation σ.

        x̃ = x + σ z,    z ~ N(0, I), stream PERTURB

    Args:
        x: clean data, (B, *), any float dtype and strides.
        sigma: σ >= 0, a float, 0-d or (B,).
        noise, seed, step, offset, out, backend: as in `noisy_update`.

    Raises:
        ValueError: σ is negative or not finite, or shapes or devices differ.
        TypeError: dtypes differ.

    Source: Vincent 2011, "A connection between score matching and denoising autoencoders".

    >>> perturb(torch.ones(1), 0.5, noise=torch.ones(1))
    tensor([1.5000])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        stream = random.PERTURB
        y = door.noisy_update(PERTURB, x, None, 0.0, sigma, seed, step, stream, offset, out, noise)
        if y is not None:
            return y

    op = "perturb"
    checks.check_float(op, "x", x)
    b = checks.in_graph(checks.coefficient(op, "sigma", sigma, x, minimum=0), x)
    key = (seed, step, random.PERTURB, offset)
    return _checked_update(op, x, None, 0.0, b, noise, key, out, backend)


def perturb_ref(x: Tensor, sigma: float | Tensor, noise: Tensor) -> Tensor:
    """The equation, in the dtype of x."""
    return x + checks.expand(sigma, x) * noise


def _checked_update(op, x, d, a, b, noise, key, out, backend):
    """The update, where x, d and the coefficients have been checked."""
    chosen = _backend.choose(x.device, backend)
    if out is not None:
        _check_out(op, out, (x, d, noise, a, b))

    seed, step, stream, offset = key
    if noise is not None:
        checks.check_like(op, "noise", noise, x)
        if seed is not None:
            raise ValueError(f"{op}: give noise or seed, not both.")
        y = in_plain_torch(x, d, a, b, noise)
        return y if out is None else out.copy_(y)

    tensor, *numbers = random.noise_key(op, seed, step, stream, 0, offset, x.device)
    arguments = (x, d, a, b, tensor, tuple(numbers), chosen)
    if out is None:
        return update(*arguments)
    if is_compiling() or out.is_neg() or any(_overlaps(out, t) for t in (x, d, a, b)):
        return out.copy_(update(*arguments))
    return run(*arguments, out)


def _check_out(op, out, inputs):
    checks.check_like(op, "out", out, inputs[0])
    tensors = [t for t in (*inputs, out) if isinstance(t, Tensor)]
    if not is_compiling() and _backend.derivative_possible(*tensors):
        way = "call it under torch.no_grad() or without out"
        raise ValueError(f"{op}: out= cannot be differentiated; {way}.")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        what = "an inference tensor, which can be written to in inference mode alone"
        raise ValueError(f"{op}: out must not be {what}; clone it.")
    if not is_compiling() and out._is_zerotensor():
        what = "memory of its own; got an immutable tensor of zeros"
        raise ValueError(f"{op}: out must have {what}; clone it.")

    extent = 1
    steps = [(stride, size) for size, stride in zip(out.shape, out.stride()) if size > 1]
    for stride, size in sorted(steps):
        if stride < extent:
            found = f"got shape {tuple(out.shape)}, strides {out.stride()}"
            raise ValueError(f"{op}: out must not share memory between its elements; {found}.")
        extent = stride * (size - 1) + extent


def _overlaps(out, t):
    """Whether t lies in memory that out occupies without being the same view of it."""
    if not isinstance(t, Tensor) or t.device != out.device or not (t.numel() and out.numel()):
        return False

    places = [(v.data_ptr(), v.shape, v.stride(), v.dtype) for v in (t, out)]
    if places[0] == places[1]:
        return False
    (first, last), (begin, end) = _bytes(out), _bytes(t)
    return first < end and begin < last


def _bytes(t):
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
