"""The autograd Functions of the stack (1 + M, *): what is quicker or leaner as one step than as torch operations."""

import torch

from fastscore import backend as _backend
from fastscore.ops import normalise as core
from fastscore.ops.activate_dual import activate_dual as activate_stack  # noqa: F401
from fastscore.ops.functions import quick, save, saved


@quick
class _AddBias(torch.autograd.Function):
    """y[:count] += bias, in place, without the copies of a view's gradient."""

    @staticmethod
    def forward(y, bias, count):
        y[:count] += bias
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, bias, ctx.count = inputs
        ctx.shape = bias.shape
        ctx.mark_dirty(y)

    @staticmethod
    def backward(ctx, g):
        return g, g[: ctx.count].sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None, None


def add_bias(y, bias, count):
    """Add a bias to the first `count` entries of y, a fresh result that nobody else holds."""
    if _backend.levels():   # our Functions here have neither forward mode nor vmap
        return torch.cat([y[:count] + bias, y[count:]])
    if _backend.derivative_possible(y, bias):
        return _AddBias.apply(y, bias, count)
    y[:count] += bias
    return y


def in_half(s):
    """Whether a layer rounds its result to half precision, where a bias that is added afterwards is rounded once more.

    Then the values, close to each other, are rounded alike: their mean, which is the gradient of a score's last bias, is off by up to 2^-9
    of them, where roundings at random come to 2^-9 / √(3 N).
    """
    return s.dtype in (torch.bfloat16, torch.float16) or (s.dtype == torch.float32 and torch.is_autocast_enabled(s.device.type))


def linear_in_half(s, weight, bias):
    """F.linear of a stack, whose bias, of the value alone, goes into the product before it is rounded."""
    rows = s.flatten(0, -2)
    n = len(rows) // len(s)
    start = torch.cat([bias.expand(n, -1), bias.new_zeros(len(rows) - n, len(bias))])
    return torch.addmm(start, rows, weight.t()).unflatten(0, s.shape[:-1])


def add_to_value(s, c):
    """The stack with c added to its value."""
    return torch.cat([s[:1] + c, s[1:]])


@quick
class _NormaliseStack(torch.autograd.Function):
    """ops.normalise on a stack: value and tangents side by side in memory, going in and coming out."""

    @staticmethod
    def forward(s, coef, labels, form, backend):
        s = _stack_layout(s)
        out = torch.empty_like(s)
        stats = core.run_forward(s[0], s[1:], coef, None, labels, form, backend, True, into=(out[0], out[1:]))[-1]
        return out, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, coef, labels, ctx.form, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, s, coef, labels, output[1])

    @staticmethod
    def backward(ctx, g, _):
        s, coef, labels, stats = saved(ctx)
        if g is None:
            return (None,) * 5
        if torch.is_grad_enabled():   # somebody differentiates the gradient: plain PyTorch
            gs, gcoef = _plain_gradient(s, coef, labels, g, ctx.form)
        else:
            s = _stack_layout(s)
            gs = torch.empty_like(s)
            *_, gcoef, _ = core.run_backward(
                s[0], s[1:], stats, coef, None, labels, g[0], g[1:], ctx.form, ctx.backend, into=(gs[0], gs[1:])
            )
        return gs, gcoef, None, None, None


def _plain_gradient(s, coef, labels, g, form):
    gx, gt, gcoef, _ = core._gradient_ref(s[0], s[1:], coef, None, labels, g[0], g[1:], form)
    return torch.cat([gx[None], gt]), gcoef


def _stack_layout(s):
    """Each entry of the stack contiguous, or channels-last if the first is, and all of them one after another."""
    return core._in_layout_of(s, core._dense(s[0]))


def normalise_stack(s, coef, labels, form, backend):
    chosen = _backend.choose(s.device, backend, cuda=False)
    if chosen == "reference" or _backend.levels():
        return torch.cat([core.normalise_ref(s[0], coef, labels, form)[None], core._dual_ref(s[0], s[1:], coef, None, labels, form)])
    if _backend.derivative_possible(s, coef):
        return _NormaliseStack.apply(s, coef, labels, form, chosen)[0]
    s = _stack_layout(s)
    out = torch.empty_like(s)
    core.run_forward(s[0], s[1:], coef, None, labels, form, chosen, True, into=(out[0], out[1:]))
    return out
