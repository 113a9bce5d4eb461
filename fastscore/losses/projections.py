"""What the projected losses share.

Directions, the derivative of the score along them, and the reduction.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastscore import dual, precision, random, scalars
from fastscore.losses.signed import signed_mean
from fastscore.models.energy import EnergyScore
from fastscore.ops import checks
from fastscore.ops.functions import in_words
from fastscore.tensors import dense

DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")


def directions(
    op: str,
    x: Tensor,
    projections: int = 1,
    distribution: str = "rademacher",
    v: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
) -> Tensor:
    """v (M, B, *) with E[v vᵀ] = I, or the given ones; zero where the mask is."""
    check_data(op, x)
    check_projections(op, projections, distribution)
    check_key(op, seed, step, offset, x)
    if v is None:
        seed = random.draw_seed() if seed is None else seed
        drawn = [_draw(x, distribution, seed, step, m, offset) for m in range(projections)]
        v = torch.stack(drawn) if projections > 1 else drawn[0][None]
    else:
        v = _given(op, v, x, projections, seed)

    return v if mask is None else observed(v, _checked(op, mask, x))


def observed(t: Tensor, mask: Tensor) -> Tensor:
    """t, and 0 where it is missing, whatever stands there.

    A score may overflow where nothing was observed.
    """
    return t.masked_fill(mask == 0, 0)


def check_data(op: str, x: Tensor, score: Callable[..., Tensor] = len) -> None:
    """Of a loss; without a score, whatever is callable stands for it."""
    if not callable(score):
        scalars.function(op, "score", score)
    checks.check_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (B, *); got a 0-d tensor.")


def check_key(
    op: str, seed: int | Tensor | None, step: int | Tensor, offset: int, x: Tensor
) -> None:
    """Refuse a noise key in the name of the loss, not in that of the op that draws."""
    random.noise_key(op, 0 if seed is None else seed, step, random.PROJECTION, 0, offset, x.device)


def check_projections(op: str, projections: int, distribution: str) -> None:
    if type(projections) is not int or not 1 <= projections <= 65536:
        checks.integer(op, "projections", projections, 1, 65536)
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"{op}: distribution must be one of {', '.join(DISTRIBUTIONS)}; "
            f"got {checks.shown(distribution)}."
        )


def _draw(x, distribution, seed, step, m, offset):
    key = {
        "seed": seed,
        "step": step,
        "stream": random.PROJECTION,
        "substream": m,
        "offset": offset,
        "device": x.device,
    }
    if distribution == "rademacher":
        return random.rademacher(x.shape, dtype=x.dtype, **key)

    z = random.normal(x.shape, dtype=checks.compute_dtype(x.dtype), **key)
    if distribution == "sphere":
        flat = z.flatten(1) if z.dim() > 1 else z[:, None]
        z = (torch.nn.functional.normalize(flat, dim=1) * math.sqrt(flat.shape[1])).view(x.shape)

    return z.to(x.dtype)


def _given(op, v, x, projections, seed):
    checks.check_float(op, "v", v)
    if seed is not None:
        raise ValueError(f"{op}: give either v or a seed; got both.")
    if (v.shape != x.shape and v.shape[1:] != x.shape) or not len(v):
        raise ValueError(
            f"{op}: v must have the shape of x, {tuple(x.shape)}, or (M, *) of it; "
            f"got {tuple(v.shape)}."
        )
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(
            f"{op}: v must be {x.dtype} on {x.device} like x; got {v.dtype} on {v.device}."
        )

    checks.check_as_real(op, "v", v, x)
    v = v[None] if v.shape == x.shape else v
    if projections not in (1, len(v)):
        raise ValueError(f"{op}: v holds {len(v)} directions, but projections is {projections}.")

    return v


def _checked(op, mask, x):
    """The mask."""
    checks.check_tensor(op, "mask", mask)
    if mask.shape != x.shape or mask.device != x.device:
        raise ValueError(
            f"{op}: mask must be like x, {tuple(x.shape)} on {x.device}; "
            f"got {tuple(mask.shape)} on {mask.device}."
        )
    if mask.dtype not in (torch.bool, torch.uint8, torch.int32, torch.int64, *checks.FLOATS):
        raise TypeError(f"{op}: mask must be of bool, integer or float numbers; got {mask.dtype}.")

    checks.check_as_real(op, "mask", mask, x)
    if (
        mask.device.type == "cpu"
        and checks.readable()
        and not bool(((mask == 0) | (mask == 1)).all())
    ):
        raise ValueError(f"{op}: mask must hold 0 (missing) and 1 (observed) only.")

    return mask


def check_score(op: str, s: Tensor, x: Tensor, name: str = "score(x)") -> None:
    """A score of x's shape; its dtype is its own (autocast)."""
    if type(s) is dual.Dual and type(x) is dual.Dual:   # each look at a number costs a microsecond
        with torch._C.DisableTorchFunctionSubclass():
            if s.dtype in checks.FLOATS and s.shape == x.shape and s.device == x.device:
                return
    elif (
        type(s) is type(x) is torch.Tensor
        and s.dtype == x.dtype
        and dense(s)
        and s.shape == x.shape
        and s.device == x.device
    ):
        return   # as every step of a sampler has it

    checks.check_float(op, name, s)
    if s.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of x, {tuple(x.shape)}; got {tuple(s.shape)}."
        )
    if s.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}; got {s.device}.")


def derivatives(
    op: str, score: Callable[..., Tensor], x: Tensor, v: Tensor, arguments: tuple[Any, ...] = ()
) -> tuple[Tensor, Tensor]:
    """s(x) and J v (M, B, *).

    An energy brings its own rule, everything else goes through dual numbers.
    """
    score = _as_energy(score)
    if isinstance(score, EnergyScore):
        return score.jvp(x, v, *arguments)

    return dual.jvp(_checked_score(op, score, x, arguments), x, v)


def _as_energy(score):
    """What torch.compile made of an energy's score, as that score, whose own rules run eagerly
    anyway."""
    written = getattr(score, "_orig_mod", None) if isinstance(score, torch.nn.Module) else None
    return written if isinstance(written, EnergyScore) else score


def called(op: str, score: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Any:
    """What the score returns; PyTorch's refusals of its tensors in one sentence of ours."""
    try:
        return score(x, *arguments)
    except RuntimeError as error:
        told = in_words(error)
        if told is not None:
            raise told from error
        precision.explain(op, score, x, error)
        raise


def _checked_score(op, score, x, arguments):
    def f(x):
        s = called(op, score, x, *arguments)
        check_score(op, s, x)
        carried = type(s) is type(x) is dual.Dual
        # detach(), a no_grad block or numpy: the trace would silently be zero.
        if not carried and _cut_off(s, x):
            raise ValueError(
                f"{op}: score(x) must depend on x through differentiable operations; "
                "it is cut off from x."
            )

        return s

    f.asks = score   # all that may draw or remember, to `dual.once`
    return f


def _cut_off(s, x):
    if isinstance(x, dual.Dual):
        return not isinstance(s, dual.Dual)
    if forward_ad._current_level < 0 or forward_ad.unpack_dual(x).tangent is None:
        return False
    return forward_ad.unpack_dual(s).tangent is None


def sliced_estimate(
    op: str,
    score: Callable[..., Tensor],
    x: Tensor,
    projections: int,
    variance_reduced: bool,
    distribution: str,
    v: Tensor | None = None,
    mask: Tensor | None = None,
    arguments: tuple[Any, ...] = (),
    **key: Any,
) -> Tensor:
    """(B,): the sliced loss; signs are drawn twice instead of kept."""
    score = _as_energy(score)
    check_projections(op, projections, distribution)
    if (
        distribution == "rademacher"
        and v is None
        and mask is None
        and not isinstance(score, EnergyScore)
    ):
        if type(variance_reduced) is not bool:
            variance_reduced = checks.flag(op, "variance_reduced", variance_reduced)
        f = _checked_score(op, score, x, arguments)
        return signed_mean(op, f, x, projections, variance_reduced, **key)

    v = directions(op, x, projections, distribution, v, mask, **key)
    variance_reduced = checks.flag(op, "variance_reduced", variance_reduced)
    return sliced_mean(op, score, x, v, mask, variance_reduced, arguments)


def sliced_mean(
    op: str,
    score: Callable[..., Tensor],
    x: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    variance_reduced: bool = True,
    arguments: tuple[Any, ...] = (),
) -> Tensor:
    """(B,): the mean over M of vᵀJv + ½(vᵀs)², or of vᵀJv, + ½‖s‖²."""
    score = _as_energy(score)
    if isinstance(score, EnergyScore) and not variance_reduced:
        slope, curvature = score.along(x, v, *arguments)   # vᵀ∇f and vᵀ∇²f v, (M, B)
        return (curvature + 0.5 * slope.square()).mean(0)
    s, js = derivatives(op, score, x, v, arguments)
    trace, rest = reduce(s, js, v, mask, variance_reduced)
    return (trace + rest).mean(0)


def reduce(
    s: Tensor, js: Tensor, v: Tensor, mask: Tensor | None = None, variance_reduced: bool = True
) -> tuple[Tensor, Tensor]:
    """vᵀJv (M, B); and ½‖s‖² over observed coordinates (B,), or ½(vᵀs)² (M, B).

    In the compute dtype.
    """
    dtype = checks.compute_dtype(v.dtype)
    s, js, v = (t.to(dtype) for t in (s, js, v))
    if mask is not None:
        s, js = observed(s, mask), observed(js, mask)
    if variance_reduced:
        return dot(v, js), 0.5 * checks.per_sample_sum(s.square())
    return dot(v, js), 0.5 * dot(v, s).square()


def dot(v: Tensor, t: Tensor) -> Tensor:
    """(M, B, *) with (M, B, *) or (B, *) -> (M, B)."""
    return (v * t).flatten(2).sum(-1) if v.dim() > 2 else v * t
