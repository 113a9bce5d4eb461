"""An activation of a value and of its first, or first and second, derivatives, side by side in memory, in one pass."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from fastscore import backend as _backend
from fastscore.compiling import allow_in_graph
from fastscore.ops.functions import contiguous, quick

# name: f, and (f', f'') from u; numbered as in csrc/activation_cpu.h from 1 on
_SLOPES = {
    "elu": (F.elu, lambda u: _elu(u, u.clamp(max=0).exp())),
    "silu": (F.silu, lambda u: _silu(u, u.sigmoid())),
    "relu": (F.relu, lambda u: ((~(u <= 0)).to(u.dtype), torch.zeros_like(u))),   # PyTorch's mask: 1 for NaN
    "gelu": (F.gelu, lambda u: _gelu(u, _held(u, 40))),
    "softplus": (F.softplus, lambda u: (u.sigmoid(), u.sigmoid() * (1 - u.sigmoid()))),
    "tanh": (torch.tanh, lambda u: (1 - u.tanh().square(), -2 * u.tanh() * (1 - u.tanh().square()))),
    "sigmoid": (torch.sigmoid, lambda u: _sigmoid(u.sigmoid())),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), lambda u: _gelu_tanh(_held(u, 30))),
}
_CODES = {name: code for code, name in enumerate(_SLOPES, 1)}


def _elu(u, e):
    return torch.where(u > 0, torch.ones_like(u), e), torch.where(u > 0, torch.zeros_like(u), e)


def _silu(u, s):
    return s * (1 + u * (1 - s)), s * (1 - s) * (2 + u * (1 - 2 * s))


def _held(u, end):
    """u within ±end, beyond which the slopes of a gelu are flat; a power of u overflows float16 long before."""
    end = 8 if u.dtype == torch.float16 else end
    return u.clamp(-end, end)


def _gelu(u, v):
    """v is u where it matters: the density of ±8 is 5e-15, which float16 rounds to 0."""
    density = (v.square() * -0.5).exp() / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(u * -math.sqrt(0.5)) + v * density, density * (2 - v.square())


def _gelu_tanh(u):
    """Of u s(z) with the sigmoid of z = A (u + B u³), u held to where s is neither 0 nor 1."""
    a, b = math.sqrt(8 / math.pi), 0.044715
    z, z1, z2 = a * (u + b * u**3), a * (1 + 3 * b * u.square()), 6 * a * b * u
    s, below = z.sigmoid(), (-z).sigmoid()   # 1 - s would cancel
    w, odd = s * below, 1 - 2 * s
    return s + u * w * z1, 2 * w * z1 + u * w * (z2 + odd * z1.square())


def _sigmoid(s):
    return s * (1 - s), s * (1 - s) * (1 - 2 * s)


def activate_dual(s, name, backend=None):
    """Activate a value u and carry its tangents along.

        y = f(u),    ẏ_m = f'(u) u̇_m

    Args:
        s: (1 + M, *), u and then its tangents, any float dtype; copied first where it is not contiguous.
        name: 'elu', 'silu', 'relu', 'gelu', 'gelu_tanh', 'softplus', 'tanh' or 'sigmoid'.

    Returns:
        (1 + M, *), y and its tangents. Differentiable, at every order.
    """
    chosen = _backend.choose(s.device, backend, cuda=False)   # a GPU runs the Triton kernels
    if _plain(s, chosen) or _backend.levels():   # the Function has neither forward mode nor vmap
        return activate_dual_ref(s, name)
    if _backend.derivative_possible(s):
        return _function(s, name, chosen)
    return _run(s, name, chosen)


def activated(s, name, chosen):
    """The same with the back end chosen, where no derivative is taken."""
    if chosen == "reference" or (chosen == "cpp" and s.dtype == torch.float64):   # `_plain`
        return activate_dual_ref(s, name)
    s = s if s.is_contiguous() else contiguous(s)
    out = torch.empty_like(s)
    _backend.call(chosen, "activate_dual", out, s, None, _CODES[name])
    return out


def _plain(s, chosen):
    return chosen == "reference" or (chosen == "cpp" and s.dtype == torch.float64)


def activate_dual_ref(s, name):
    """The equations; its own derivatives are right at every order."""
    function, slopes = _SLOPES[name]
    return torch.cat([function(s[:1]), times_slope(name, slopes(s[:1])[0], s[1:])])


def times_slope(name, slope, g):
    """f' g. A mask, as of ReLU, takes nothing from what it hides, even if that is not finite."""
    return torch.where(slope > 0, g, g.new_zeros(())) if name == "relu" else slope * g


def _gradient_ref(name, s, g):
    first, second = _SLOPES[name][1](s[:1])
    straight = times_slope(name, first, g)
    if name == "relu":   # it does not bend
        return straight
    return torch.cat([straight[:1] + second * (s[1:] * g[1:]).sum(0, keepdim=True), straight[1:]])


def gradient(s, g, name, chosen, overwrite=False):
    """Cotangent of s for that of its activation: gu = f' gy + f'' Σ u̇ gẏ and gu̇ = f' gẏ; in the memory of g if that may be overwritten.

    No derivative is taken through the kernel. chosen: the back end that activated s; the thread of a backward pass knows of no other.
    """
    if _plain(s, chosen) or _backend._dual_level():   # the Function has no forward mode
        return _gradient_ref(name, s, g)
    s, g = contiguous(s), contiguous(g)
    gs = g if overwrite else torch.empty_like(s)   # every element of g is read before its place is written
    _backend.call(chosen, "activate_dual", gs, s, g, _CODES[name])
    return gs


@quick
class _ActivateDual(torch.autograd.Function):
    """Cotangents: gu = f' gy + f'' Σ u̇ gẏ and gu̇ = f' gẏ."""

    @staticmethod
    def forward(s, name, backend):
        return _run(s, name, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, ctx.name, ctx.backend = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        if torch.is_grad_enabled():   # somebody differentiates the gradient: plain PyTorch
            return _gradient_ref(ctx.name, s, g), None, None
        s, g = contiguous(s), contiguous(g)
        gs = torch.empty_like(s)
        _backend.call(ctx.backend, "activate_dual", gs, s, g, _CODES[ctx.name])
        return gs, None, None


@allow_in_graph
def _function(s, name, backend):
    return _ActivateDual.apply(s, name, backend)


def _run(s, name, backend):
    s = contiguous(s)
    out = torch.empty_like(s)
    _backend.call(backend, "activate_dual", out, s, None, _CODES[name])
    return out


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
        return _jet_function(s, directions, name, chosen)
    return _run_jet(s, directions, name, chosen)


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
        return _run_jet(s, directions, name, backend)

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
def _jet_function(s, directions, name, backend):
    return _ActivateJet.apply(s, directions, name, backend)


def _run_jet(s, directions, name, backend):
    s = contiguous(s)
    out = s.new_empty(1 + 2 * directions, *s.shape[1:])
    _backend.call(backend, "activate_jet", out, s, None, directions, _CODES[name])
    return out
