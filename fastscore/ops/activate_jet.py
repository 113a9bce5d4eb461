"""An activation of a value and of its first and second derivatives along directions, side by side in memory, in one pass."""

import torch

from fastscore import backend as _backend
from fastscore.compiling import allow_in_graph
from fastscore.ops.activate import _CODES, _SLOPES, _plain, times_slope
from fastscore.ops.functions import contiguous, quick


def activate_jet(s, directions, name, backend=None):
    """Activate u along the curves that pass through it with velocities u'_m and accelerations u''_m.

        y = f(u),    y'_m = f'(u) u'_m,    y''_m = f'(u) u''_m + f''(u) u'_m²

    Args:
        s: (1 + 2M, *), u, then all u'_m, then all u''_m; or (1 + M, *) where u'' = 0. Any float dtype; copied first where not contiguous.
        directions: M.
        name: 'elu', 'silu', 'relu', 'gelu', 'gelu_tanh', 'softplus', 'tanh' or 'sigmoid'.

    Returns:
        (1 + 2M, *): y, y' and y''. Differentiable, at every order.
    """
    chosen = _backend.choose(s.device, backend, cuda=False)   # a GPU runs the Triton kernels
    if _plain(s, chosen) or _backend.levels():   # the Function has neither forward mode nor vmap
        return activate_jet_ref(s, directions, name)
    if _backend.derivative_possible(s):
        return _function(s, directions, name, chosen)
    return _run(s, directions, name, chosen)


def activate_jet_ref(s, directions, name):
    """The equations; its own derivatives are right at every order."""
    function, slopes = _SLOPES[name]
    u, u1, u2 = split(s, directions)
    first, second = slopes(u)
    y2 = torch.zeros_like(u1) if name == "relu" else second * u1.square()
    return torch.cat([function(u), times_slope(name, first, u1), y2 if u2 is None else y2 + times_slope(name, first, u2)])


def split(s, directions):
    """u (1, *), u' (M, *), and u'' (M, *) or None."""
    parts = s.split([1] + [directions] * ((len(s) - 1) // directions))
    return parts if len(parts) == 3 else (*parts, None)


@quick
class _ActivateJet(torch.autograd.Function):
    """Cotangents: gu'' = f' g'',  gu' = f' g' + 2 f'' u' g'',  gu = f' g + Σ_m f'' u' g' + (f'' u'' + f''' u'²) g''."""

    @staticmethod
    def forward(s, directions, name, backend):
        return _run(s, directions, name, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, ctx.directions, ctx.name, ctx.backend = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        if torch.is_grad_enabled():   # somebody differentiates the gradient: plain PyTorch
            y = activate_jet_ref(s, ctx.directions, ctx.name)
            return *torch.autograd.grad(y, s, g, create_graph=True), None, None, None
        s, g = contiguous(s), contiguous(g)
        gs = torch.empty_like(s)
        _backend.call(ctx.backend, "activate_jet", gs, s, g, ctx.directions, _CODES[ctx.name])
        return gs, None, None, None


@allow_in_graph
def _function(s, directions, name, backend):
    return _ActivateJet.apply(s, directions, name, backend)


def _run(s, directions, name, backend):
    s = contiguous(s)
    out = s.new_empty(1 + 2 * directions, *s.shape[1:])
    _backend.call(backend, "activate_jet", out, s, None, directions, _CODES[name])
    return out
