"""An activation of a value and of its first, or first and second, derivatives, side by side in
memory, in one pass."""

import torch
from torch import Tensor

from fastscore import backend as _backend
from fastscore import direct
from fastscore.compiling import allow_in_graph
from fastscore.ops.activations import ACTIVATIONS, times_slope
from fastscore.ops.functions import contiguous, quick


def activate_dual(s: Tensor, name: str, backend: str | None = None) -> Tensor:
    """Activate a value u and carry its tangents along.

        y = f(u),    ẏ_m = f'(u) u̇_m

    Args:
        s: (1 + M, *), u and then its tangents, any float dtype; copied first where it is not
            contiguous.
        name: 'elu', 'silu', 'relu', 'gelu', 'gelu_tanh', 'softplus', 'tanh' or 'sigmoid'.

    Returns:
        (1 + M, *), y and its tangents. Differentiable, at every order.
    """
    chosen = _backend.choose(s.device, backend, cuda=False)  # a GPU runs the Triton kernels
    if _plain(s, chosen) or _backend.levels():  # the Function has neither forward mode nor vmap
        return activate_dual_ref(s, name)
    if _backend.derivative_possible(s):
        return _function(s, name, chosen)
    return activated(s, name, chosen)


def activated(s: Tensor, name: str, chosen: str) -> Tensor:
    """The same with the back end chosen, where no derivative is taken."""
    if chosen == "reference" or (chosen == "cpp" and s.dtype == torch.float64):  # `_plain`
        return activate_dual_ref(s, name)
    if chosen == "cpp" and (door := direct.door) is not None:
        y = door.activate(s, None, None, ACTIVATIONS[name].code, False)
        if y is not None:
            return y
    s = contiguous(s)
    out = torch.empty_like(s)
    _backend.call(chosen, "activate_dual", out, s, None, ACTIVATIONS[name].code)
    return out


def _plain(s, chosen):
    return chosen == "reference" or (chosen == "cpp" and s.dtype == torch.float64)


def activate_dual_ref(s: Tensor, name: str) -> Tensor:
    """The equations; its own derivatives are right at every order."""
    _, function, slopes = ACTIVATIONS[name]
    return torch.cat([function(s[:1]), times_slope(name, slopes(s[:1])[0], s[1:])])


def _gradient_ref(name, s, g):
    first, second = ACTIVATIONS[name].slopes(s[:1])
    straight = times_slope(name, first, g)
    if name == "relu":  # it does not bend
        return straight
    return torch.cat([straight[:1] + second * (s[1:] * g[1:]).sum(0, keepdim=True), straight[1:]])


def gradient(s: Tensor, g: Tensor, name: str, chosen: str, overwrite: bool = False) -> Tensor:
    """Cotangent of s for that of its activation: gu = f' gy + f'' Σ u̇ gẏ and gu̇ = f' gẏ; in the
    memory of g if that may be overwritten.

    No derivative is taken through the kernel. chosen: the back end that activated s; the thread of
    a backward pass knows of no other.
    """
    if _plain(s, chosen) or _backend._dual_level():  # the Function has no forward mode
        return _gradient_ref(name, s, g)
    if chosen == "cpp" and (door := direct.door) is not None:
        gs = door.activate(s, g, None, ACTIVATIONS[name].code, overwrite)
        if gs is not None:
            return gs
    s, g = contiguous(s), contiguous(g)
    # every element of g is read before its place is written
    gs = g if overwrite else torch.empty_like(s)
    _backend.call(chosen, "activate_dual", gs, s, g, ACTIVATIONS[name].code)
    return gs


@quick
class _ActivateDual(torch.autograd.Function):
    """Cotangents: gu = f' gy + f'' Σ u̇ gẏ and gu̇ = f' gẏ."""

    @staticmethod
    def forward(s, name, backend):
        return activated(s, name, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, ctx.name, ctx.backend = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: plain PyTorch
            return _gradient_ref(ctx.name, s, g), None, None
        return gradient(s, g, ctx.name, ctx.backend), None, None


@allow_in_graph
def _function(s, name, backend):
    return _ActivateDual.apply(s, name, backend)


def activate_jet(s: Tensor, directions: int, name: str, backend: str | None = None) -> Tensor:
    """Activate u along the curves that pass through it with velocities u'_m and accelerations
    u''_m.

        y = f(u),    y'_m = f'(u) u'_m,    y''_m = f'(u) u''_m + f''(u) u'_m²

    Args:
        s: (1 + 2M, *), u, then all u'_m, then all u''_m; or (1 + M, *) where u'' = 0. Any float
            dtype; copied first where not contiguous.
        directions: M.
        name: 'elu', 'silu', 'relu', 'gelu', 'gelu_tanh', 'softplus', 'tanh' or 'sigmoid'.

    Returns:
        (1 + 2M, *): y, y' and y''. Differentiable, at every order.
    """
    chosen = _backend.choose(s.device, backend, cuda=False)  # a GPU runs the Triton kernels
    if _plain(s, chosen) or _backend.levels():  # the Function has neither forward mode nor vmap
        return activate_jet_ref(s, directions, name)
    if _backend.derivative_possible(s):
        return _jet_function(s, directions, name, chosen)
    return _run_jet(s, directions, name, chosen)


def activate_jet_ref(s: Tensor, directions: int, name: str) -> Tensor:
    """The equations; its own derivatives are right at every order."""
    _, function, slopes = ACTIVATIONS[name]
    u, u1, u2 = split(s, directions)
    first, second = slopes(u)
    y2 = torch.zeros_like(u1) if name == "relu" else second * u1.square()
    return torch.cat(
        [
            function(u),
            times_slope(name, first, u1),
            y2 if u2 is None else y2 + times_slope(name, first, u2),
        ]
    )


def split(s: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """u (1, *), u' (M, *), and u'' (M, *) or None."""
    parts = s.split([1] + [directions] * ((len(s) - 1) // directions))
    return parts if len(parts) == 3 else (*parts, None)


@quick
class _ActivateJet(torch.autograd.Function):
    """Cotangents: gu'' = f' g'',  gu' = f' g' + 2 f'' u' g'',  gu = f' g + Σ_m f'' u' g' + (f'' u''
    + f''' u'²) g''."""

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
        if torch.is_grad_enabled():  # somebody differentiates the gradient: plain PyTorch
            y = activate_jet_ref(s, ctx.directions, ctx.name)
            return *torch.autograd.grad(y, s, g, create_graph=True), None, None, None
        return _jet_gradient(s, g, ctx.directions, ctx.name, ctx.backend), None, None, None


def _jet_gradient(s, g, directions, name, backend):
    code = ACTIVATIONS[name].code
    if backend == "cpp" and (door := direct.door) is not None:
        gs = door.activate(s, g, directions, code, False)
        if gs is not None:
            return gs
    s, g = contiguous(s), contiguous(g)
    gs = torch.empty_like(s)
    _backend.call(backend, "activate_jet", gs, s, g, directions, code)
    return gs


@allow_in_graph
def _jet_function(s, directions, name, backend):
    return _ActivateJet.apply(s, directions, name, backend)


def _run_jet(s, directions, name, backend):
    code = ACTIVATIONS[name].code
    if backend == "cpp" and (door := direct.door) is not None:
        y = door.activate(s, None, directions, code, False)
        if y is not None:
            return y
    s = contiguous(s)
    out = s.new_empty(1 + 2 * directions, *s.shape[1:])
    _backend.call(backend, "activate_jet", out, s, None, directions, code)
    return out
