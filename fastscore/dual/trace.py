"""The trace of a Jacobian from products along random signs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastscore import backend as _backend
from fastscore import random
from fastscore.dual.routes import jvp
from fastscore.ops import checks
from fastscore.ops.rademacher_project import project, project_ref, signs
from fastscore.scalars import function


def rademacher_jvp(
    f: Callable[..., Any],
    x: Tensor,
    *,
    projections: int = 1,
    v: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Evaluate f and unbiased estimates of the trace of its Jacobian, one per projection, in one
    forward pass.

        (f(x), v_mᵀ J v_m),    J = ∂f/∂x,    v_m ∈ {-1, 1}ⁿ independent,    E[vᵀJv] = tr J

    The variance is 2 Σ_{i≠j} A_ij² with A the symmetric part of J: none where J is diagonal.

    Args:
        f: any function or module of x alone, sample by sample, whose result has the shape of x.
        x: (B, *), any float dtype.
        projections: M. The signs of projection m are random.rademacher(x.shape, stream=PROJECTION,
            substream=m, ...).
        v: directions of your own, (M, B, *) or, for M = 1, (B, *). The call is then deterministic
            and takes no seed.
        seed, step, offset: the noise key (see fastscore.random).

    Returns:
        f(x), and vᵀJv: (M, B), float32 (float64 for float64). Both are differentiable in x and
        whatever parameters f holds.

    Raises:
        ValueError: f(x) has not the shape of x, v does not fit x, or v and seed are both given.
            TypeError: x is no float tensor.

    Source: Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix"; Song et
        al. 2019 (arXiv:1905.07088).

    >>> rademacher_jvp(lambda x: 3 * x, torch.zeros(2, 5), seed=0)[1]
    tensor([[15., 15.]])
    """
    op = "rademacher_jvp"
    function(op, "f", f)
    checks.check_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (B, *); got a 0-d tensor.")
    if v is not None:
        if seed is not None:
            raise ValueError(f"{op}: give v or seed, not both.")
        v = _directions(op, v, x)
        y, js = _products(op, f, x, v)
        return y, project_ref(None, js, v)[0]
    if not checks.whole(projections) or not 1 <= projections <= 65536:
        raise ValueError(
            f"{op}: projections must be an int in 1..65536; got {checks.shown(projections)}."
        )

    chosen = _backend.choose(x.device, backend, cuda=False)   # a GPU runs the Triton kernels
    key, *numbers = random.noise_key(op, seed, step, random.PROJECTION, 0, offset, x.device)
    y, js = _products(op, f, x, signs(x, projections, key, tuple(numbers), chosen))
    return y, project(None, js, key, tuple(numbers), chosen)[0]


def _directions(op, v, x):
    """(M, B, *)."""
    checks.check_float(op, "v", v)
    if v.shape == x.shape:
        return v[None]
    if v.dim() != x.dim() + 1 or v.shape[1:] != x.shape:
        raise ValueError(
            f"{op}: v must have the shape of x, {tuple(x.shape)}, or (M, *) of it; "
            f"got {tuple(v.shape)}."
        )
    return v


def _products(op, f, x, v):
    y, js = jvp(f, x, v)
    if y.shape != x.shape:
        raise ValueError(
            f"{op}: f(x) must have the shape of x, {tuple(x.shape)}; got {tuple(y.shape)}."
        )
    return y, js
