"""The autograd Functions of the stack (1 + M, *).

What is quicker or leaner as one step than as torch operations.
"""

from typing import Any

import torch
from torch import Tensor

from fastscore import backend as _backend
from fastscore.ops import normalise as core
from fastscore.ops.activate import activate_dual as activate_stack  # noqa: F401
from fastscore.ops.functions import Direct, quick, save, saved


@quick
class _AddBias(torch.autograd.Function):
    """y[:count] += bias, in place, without the copies of a view's gradient."""

    @staticmethod
    def forward(y: Any, bias: Any, count: Any) -> Any:
        y[:count] += bias
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, bias, ctx.count = inputs
        ctx.shape = bias.shape
        ctx.mark_dirty(y)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g, g[: ctx.count].sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None, None


def add_bias(y: Any, bias: Any, count: Any) -> Any:
    """Add a bias to the first `count` entries of y, a fresh result that nobody else holds."""
    if _backend.levels():   # our Functions here have neither forward mode nor vmap
        return torch.cat([y[:count] + bias, y[count:]])
    if _backend.derivative_possible(y, bias):
        return _AddBias.apply(y, bias, count)
    y[:count] += bias
    return y


def in_half(s: Tensor) -> Any:
    """Whether a layer rounds its result to half precision, where a bias that is added afterwards is
    rounded once more.

    Then the values, close to each other, are rounded alike: their mean, which is the gradient of a
    score's last bias, is off by up to 2^-9 of them, where roundings at random come to 2^-9 / √(3
    N).
    """
    return s.dtype in (torch.bfloat16, torch.float16) or (
        s.dtype == torch.float32 and torch.is_autocast_enabled(s.device.type)
    )


def linear_in_half(s: Tensor, weight: Any, bias: Any) -> Any:
    """F.linear of a stack, whose bias, of the value alone, goes into the product before it is
    rounded."""
    rows = s.flatten(0, -2)
    n = len(rows) // len(s)
    start = torch.cat([bias.expand(n, -1), bias.new_zeros(len(rows) - n, len(bias))])
    return torch.addmm(start, rows, weight.t()).unflatten(0, s.shape[:-1])


class _SoftmaxStack(Direct):
    """p = softmax(x), ṗ = p (ẋ - c) with c = Σ p ẋ, in place. Cotangents, with k = Σ p gṗ:

        gẋ = p gṗ - p k,    gx = q - p Σ q  with  q = p gp + Σ_m ṗ (gṗ - k)

    A multiple of p in q drops out of gx, which is why c does not stand in it.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, dim: Any) -> Any:
        out, tangents = torch.empty_like(s), s[1:]
        p, tp = out[0], out[1:]
        torch.softmax(s[0], dim, out=p)
        torch.mul(p, tangents, out=tp)
        tp.addcmul_(p, tp.sum(dim, keepdim=True), value=-1)
        ctx.dim = dim
        ctx.save_for_backward(s, out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        s, out = ctx.saved_tensors
        if _plainly(g):
            return *_plain_gradients(
                lambda s: _softmax_stack_ref(s, ctx.dim), (s,), (True,), g
            ), None

        p, tp, gp, gtp = out[0], out[1:], g[0], g[1:]
        gs = torch.empty_like(out)
        q, gtx = gs[0], gs[1:]
        torch.mul(p, gtp, out=gtx)
        k = gtx.sum(ctx.dim, keepdim=True)
        gtx.addcmul_(p, k, value=-1)
        total = _for_sums(q)
        torch.mul(p, gp, out=total)
        for m in range(len(tp)):
            total.addcmul_(tp[m], gtp[m] - k[m])

        total.addcmul_(p, total.sum(ctx.dim, keepdim=True), value=-1)
        if total is not q:
            q.copy_(total)

        return gs, None


def _softmax_stack_ref(s, dim):
    p, tangents = s[0].softmax(dim), s[1:]
    along = dim if dim < 0 else dim + 1
    return torch.cat([p[None], p * (tangents - (p * tangents).sum(along, keepdim=True))])


def softmax_stack(s: Tensor, dim: Any) -> Any:
    """softmax of a value and of its tangents along a dimension of the value."""
    dim -= s.dim() - 1 if dim >= 0 else 0   # the same in value and stack
    if _by_hand(s):
        return _SoftmaxStack.apply(s, dim)
    return _softmax_stack_ref(s, dim)


class _MatmulStack(Direct):
    """Products of stacks of matrices (1 + M, B, n, k) and (1 + M, B, k, m).

    y = a b, ẏ = ȧ b + a ḃ, each written once, in its place.

    Cotangents: ga = gy bᵀ + Σ gẏ ḃᵀ,  gȧ = gẏ bᵀ, and so for b.
    """

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any) -> Any:
        ctx.save_for_backward(a, b)
        return _products(a, b)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        a, b = ctx.saved_tensors
        if _plainly(g):
            return _plain_gradients(_matmul_stack_ref, (a, b), ctx.needs_input_grad, g)
        ga = _correlations(g, b.mT, left_stays=False) if ctx.needs_input_grad[0] else None
        gb = _correlations(a.mT, g, left_stays=True) if ctx.needs_input_grad[1] else None
        return ga, gb


def _products(a, b):
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    torch.bmm(a[0], b[0], out=out[0])
    for m in range(1, len(a)):
        y = torch.bmm(a[m], b[0], out=out[m])
        torch.baddbmm(y, a[0], b[m], out=y)   # FlopCounterMode does not know baddbmm_
    return out


def _correlations(left, right, left_stays):
    """The sum of left_m right_m over value and tangents, and for each tangent left_0 right_m or
    left_m right_0."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    value = torch.bmm(left[0], right[0], out=out[0])
    total = _for_sums(value)
    if total is not value:
        total.copy_(value)
    for m in range(1, len(left)):
        torch.bmm(*((left[0], right[m]) if left_stays else (left[m], right[0])), out=out[m])
        if total is value:
            torch.baddbmm(total, left[m], right[m], out=total)
        else:
            total += left[m].bmm(right[m])
    if total is not value:
        value.copy_(total)

    return out


def _for_sums(t):
    """t itself, or where it is of half precision, which a sum over the tangents would be rounded
    to M times, memory like it in float32."""
    return (
        torch.empty_like(t, dtype=torch.float32)
        if t.dtype in (torch.bfloat16, torch.float16)
        else t
    )


# By is_grads_batched or vectorize=True, which take no out=
_BATCHED = torch._C._parse_dispatch_key("Batched")


def _plainly(g):
    """Whether a gradient is to be made of plain PyTorch.

    Somebody differentiates it, or takes many of them at once.
    """
    return torch.is_grad_enabled() or _backend.levels() or torch._C._dispatch_keys(g).has(_BATCHED)


def _plain_gradients(function, inputs, needed, g):
    """The gradients of function(*inputs) where they are needed, None elsewhere, with their graph
    if autograd keeps one."""
    if _backend.levels():  # whose own autograd it takes
        return tuple(
            found if n else None
            for found, n in zip(torch.func.vjp(function, *inputs)[1](g), needed)
        )

    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [t for t, n in zip(inputs, needed) if n]
        found = iter(torch.autograd.grad(function(*inputs), wanted, g, create_graph=differentiated))

    return tuple(next(found) if n else None for n in needed)


def _matmul_stack_ref(a, b):
    return torch.cat([a[:1] @ b[:1], a[1:] @ b[:1] + a[:1] @ b[1:]])


def matmul_stack(a: Any, b: Any) -> Any:
    """Matrix products of values, and of values and tangents.

    A and b have as many dimensions as each other.
    """
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2] or not _by_hand(a, b):
        return _matmul_stack_ref(a, b)
    flat = [t.reshape(len(t), -1, *t.shape[-2:]) for t in (a, b)]
    return _MatmulStack.apply(*flat).reshape(*a.shape[:-1], b.shape[-1])


def _by_hand(*stacks):
    """Whether a Function may stand for torch operations.

    Ours have no forward mode and no vmap, and autocast does not see into them.
    """
    if (
        any(type(s) is not torch.Tensor for s in stacks)
        or _backend.levels()
        or torch.is_autocast_enabled(stacks[0].device.type)
    ):
        return False
    if any(s.numel() == 0 for s in stacks):
        return False
    return _backend.derivative_possible(*stacks)


def add_to_value(s: Tensor, c: Any) -> Any:
    """The stack with c added to its value."""
    value, rest = s.split_with_sizes((1, len(s) - 1))
    return torch.cat([value + c, rest])


@quick
class _NormaliseStack(torch.autograd.Function):
    """ops.normalise on a stack.

    Value and tangents side by side in memory, going in and coming out.
    """

    @staticmethod
    def forward(s: Tensor, coef: Tensor, labels: Tensor | None, form: Any, backend: str) -> Any:
        found = core.run_stack_directly(s, coef, labels, form, backend, keep=True)
        if found is not None:
            return found

        s = _stack_layout(s)
        out = torch.empty_like(s)
        stats = core.run_forward(
            s[0], s[1:], coef, None, labels, form, backend, True, into=(out[0], out[1:])
        )[-1]
        return out, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        s, coef, labels, ctx.form, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, s, coef, labels, output[1])

    @staticmethod
    def backward(ctx: Any, g: Any, _: Any) -> Any:
        s, coef, labels, stats = saved(ctx)
        if g is None:
            return (None,) * 5

        if torch.is_grad_enabled():   # somebody differentiates the gradient: plain PyTorch
            gs, gcoef = _plain_gradient(s, coef, labels, g, ctx.form)
        else:
            s = _stack_layout(s)
            gs = torch.empty_like(s)
            *_, gcoef, _ = core.run_backward(
                s[0],
                s[1:],
                stats,
                coef,
                None,
                labels,
                g[0],
                g[1:],
                ctx.form,
                ctx.backend,
                into=(gs[0], gs[1:]),
            )

        return gs, gcoef, None, None, None


def _plain_gradient(s, coef, labels, g, form):
    gx, gt, gcoef, _ = core._gradient_ref(s[0], s[1:], coef, None, labels, g[0], g[1:], form)
    return torch.cat([gx[None], gt]), gcoef


def _stack_layout(s):
    """Each entry of the stack contiguous, or channels-last if the first is, and all of them one
    after another."""
    return core._in_layout_of(s, core._dense(s[0]))


def normalise_stack(s: Tensor, coef: Tensor, labels: Tensor | None, form: Any, backend: str) -> Any:
    chosen = _backend.choose(s.device, backend, cuda=False)
    if chosen == "reference" or _backend.levels():
        return torch.cat(
            [
                core.normalise_ref(s[0], coef, labels, form)[None],
                core._dual_ref(s[0], s[1:], coef, None, labels, form),
            ]
        )
    if _backend.derivative_possible(s, coef):
        return _NormaliseStack.apply(s, coef, labels, form, chosen)[0]

    out = core.run_stack_directly(s, coef, labels, form, chosen)
    if out is not None:
        return out

    s = _stack_layout(s)
    out = torch.empty_like(s)
    core.run_forward(s[0], s[1:], coef, None, labels, form, chosen, True, into=(out[0], out[1:]))
    return out
