"""The sliced losses along random signs.

Drawn beside x, projected and reduced in one pass over one stack, and drawn again for the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastscore import backend as backends
from fastscore import dual, random
from fastscore.ops import checks
from fastscore.ops.functions import Direct, contiguous
from fastscore.ops.rademacher_project import (
    project,
    project_stack,
    signed_stack,
    signs,
    spread_stack,
)


def signed_mean(
    op: str,
    f: Callable[..., Tensor],
    x: Tensor,
    projections: int,
    variance_reduced: bool,
    seed: int | Tensor | None,
    step: int | Tensor,
    offset: int,
) -> Tensor:
    """(B,): the mean over M of vᵀJv + ½(vᵀs)², or of vᵀJv, + ½‖s‖², of s = f(x), along signs.

    Projection and reduction read s and Jv once, and the signs are never stored for the backward
    pass.
    """
    chosen = backends.choose(x.device, cuda=False)   # a GPU runs the Triton kernels
    key, *numbers = random.noise_key(op, seed, step, random.PROJECTION, 0, offset, x.device)
    numbers = tuple(numbers)

    def directions():
        return signs(x, projections, key, numbers, chosen)

    start = signed_stack(x, projections, key, numbers, chosen)
    stack = dual.stacked_jvp(f, x, directions() if start is None else directions, start)
    if stack.dtype != x.dtype:
        dtype = checks.compute_dtype(x.dtype)
        stack = stack if checks.compute_dtype(stack.dtype) == dtype else stack.to(dtype)

    noise = key, numbers, chosen
    if torch.compiler.is_compiling() or backends.levels():
        return _mean(*project(stack[0], stack[1:], *noise), variance_reduced)
    if backends.derivative_possible(stack):
        return _Reduced.apply(stack, noise, variance_reduced)

    return _mean(*project_stack(stack, *noise), variance_reduced)


def _mean(vjv, vs, ss, variance_reduced):
    if not variance_reduced:
        return (vjv + 0.5 * vs.square()).mean(0)
    return torch.add(vjv[0] if len(vjv) == 1 else vjv.mean(0), ss, alpha=0.5)


class _Reduced(Direct):
    """The loss of a stack (1 + M, B, *) of s and Jv, whose gradient is one stack as well.

    Cotangents: g v_m / M of Jv_m; g s, or g Σ_m (v_mᵀs) v_m / M, of s.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor, noise: tuple, variance_reduced: bool) -> Tensor:
        ctx.noise = noise
        ctx.variance_reduced = variance_reduced
        sums = project_stack(stack, *noise)
        ctx.save_for_backward(*((stack,) if variance_reduced else (stack, sums[1])))
        return _mean(*sums, variance_reduced)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        stack, *projected = ctx.saved_tensors
        if torch.is_grad_enabled():   # somebody differentiates the gradient
            sums = project(stack[0], stack[1:], *ctx.noise)
            loss = _mean(*sums, ctx.variance_reduced)
            return *torch.autograd.grad(loss, stack, g, create_graph=True), None, None

        directions = len(stack) - 1
        each = g[None] if directions == 1 else (g / directions).expand(directions, -1)
        each = contiguous(each)
        g_vs, g_ss = (None, 0.5 * g) if ctx.variance_reduced else (each * projected[0], None)
        return spread_stack(stack, each, g_vs, g_ss, *ctx.noise), None, None
