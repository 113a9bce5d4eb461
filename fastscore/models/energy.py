"""Energy models: any scalar network as an unnormalised log-density, and its score."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from fastscore.compiling import eagerly
from fastscore.dual import transposed
from fastscore.dual.call import NoRule
from fastscore.dual.compiled import as_written
from fastscore.dual.jets import second_order
from fastscore.dual.norms import RightNorms
from fastscore.dual.number import Dual
from fastscore.dual.once import Once
from fastscore.dual.saved import derived
from fastscore.dual.sharded import check_once
from fastscore.messages import brief, shown
from fastscore.models import energy_chain
from fastscore.models.score_mlp import Trunk
from fastscore.ops import checks
from fastscore.ops.functions import outside_inference, released
from fastscore.scalars import function, named

_SMOOTH = ("silu", "gelu", "softplus", "tanh")


@contextlib.contextmanager
def _right_norms():
    with RightNorms(), sdpa_kernel(SDPBackend.MATH):
        yield


class EnergyMLP(Trunk):
    """An unnormalised log-density on vectors and small images, about unit scale.

    p(x) = e^f(x) / Z, and Z is never needed.

        f(x)    = g(x) - ½ ‖x‖²
        f(x, σ) = (c/σ) g(x/c, e(log σ)) - ½ ‖x/c‖²,    c = √(σ² + 1/4)          with sigmas

    g is the network of `ScoreMLP` with one output. It grows at most linearly, so e^f is integrable,
    and it starts at zero: untrained, the model is N(0, I), or N(0, c² I). The factor c/σ gives the
    score the size 1/σ that it has at noise σ.

    Args:
        dim, width, depth, sigmas: as in `ScoreMLP`.
        activation: silu, gelu, softplus or tanh; the losses take second derivatives of f, and their
            gradients third ones.

    Shapes: forward(x[, sigma]): x (B, *) with prod(*) = d; sigma a float, 0-d or (B,). Returns f,
        (B,).

    Raises:
        ValueError: as `ScoreMLP`, and for an activation that is not smooth.

    >>> score = EnergyScore(EnergyMLP(2, width=8, depth=1))
    >>> score(torch.tensor([[1.0, -2.0]])).tolist()
    [[-1.0, 2.0]]
    """

    def __init__(
        self,
        dim: int,
        width: int = 512,
        depth: int = 4,
        activation: str = "silu",
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        if not named(activation, _SMOOTH):
            smooth = ", ".join(_SMOOTH)
            raise ValueError(
                "EnergyMLP: activation must be smooth (the score is its derivative), one of "
                f"{smooth}; got {shown(activation)}."
            )
        super().__init__(dim, 1, width, depth, activation, sigmas)

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        sigma = self.check(x, sigma)
        u, e = self.inputs(x, sigma)
        quadratic = 0.5 * checks.per_sample_sum(u.square())
        g = self.network(u, e)[:, 0]
        return (
            g - quadratic
            if sigma is None
            else g * (1 + 0.25 / sigma[:, 0].square()).sqrt().to(x.dtype) - quadratic
        )


class EnergyScore(nn.Module):
    """The score of an energy model: s(x, ...) = ∇ₓ f(x, ...), by automatic differentiation.

    Every loss and sampler takes it like any other score. A constant added to f changes nothing. The
    plain sliced loss goes by one forward pass of first and second derivatives where f is made of
    operations that have rules for it (`along`), by double backprop elsewhere.

    Args:
        f: a module or function, called f(x, ...), the unnormalised log-density of each sample
            alone, (B,) or (B, 1).

    Shapes: forward(x, ...): x (B, *). Returns like x, differentiable in x and the parameters of f
    where gradients are enabled. It works in inference mode, too, which it leaves meanwhile.

    Raises:
        ValueError: f returns another shape, or does not depend on x.

    >>> EnergyScore(lambda x: 7 - 0.5 * x.square().sum(1))(torch.tensor([[1.0, -2.0]])).tolist()
    [[-1.0, 2.0]]
    """

    _chain = None   # whether f is layers and activations in a row, once it has been called

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        function("EnergyScore", "f", f)
        self.f = f
        # samples' shapes for which f has shown an operation without a second-order rule.
        self._without_rule = set()

    def extra_repr(self) -> str:
        return "" if isinstance(self.f, nn.Module) else f"f={brief(self.f)}"

    @outside_inference
    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "EnergyScore: torch.export cannot trace a gradient; export what "
                "torch.fx.experimental.proxy_tensor.make_fx(score)(x) returns, or the energy alone."
            )

        # Inside a transform or torch.compile tensors have no graph to walk.
        if not checks.readable():
            if isinstance(x, Dual):
                raise NoRule(
                    "fastscore.jvp: the gradient of an energy cannot be carried through with its "
                    "tangents."
                )
            return torch.func.grad(lambda x: self._value(x, arguments).sum())(x)
        if self._chain is not False and (s := self._by_hand(x, arguments)) is not None:
            return s

        x, wanted = self._leaf(x)
        # Forward mode over reverse mode needs the formulas that a graph is made of: fused ones, as
        # of SiLU, carry no tangent.
        create_graph = wanted or forward_ad._current_level >= 0
        if create_graph:
            return self._differentiable_gradient(x, arguments)

        with torch.enable_grad():
            return self._gradient(x, False, arguments)

    @eagerly("a score that is differentiated runs eagerly: a compiled graph has one backward pass")
    @as_written
    def _differentiable_gradient(self, x, arguments):
        check_once("the gradient of an energy's score", self.f)
        with torch.enable_grad():
            return self._gradient(x, True, arguments)

    @eagerly("products of an energy run eagerly: a compiled graph has one backward pass")
    @as_written
    @outside_inference
    def jvp(self, x: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """s(x), and ∇²f v_m for v (M, B, *), by one backward pass each."""
        if not checks.readable():
            return self._transformed(x, v, arguments)

        check_once("the derivative of an energy's score", self.f)
        x, wanted = self._leaf(x)
        wanted = wanted or (torch.is_grad_enabled() and v.requires_grad)
        with torch.enable_grad():
            s = self._gradient(x, True, arguments)
            if s.requires_grad:
                # Forward mode needs the formulas that a graph is made of.
                graph = wanted or forward_ad._current_level >= 0
                hv = [
                    torch.autograd.grad(s, x, d, True, graph, materialize_grads=True)[0] for d in v
                ]
            else:
                hv = [torch.zeros_like(x)] * len(v)

        hv = torch.stack(hv)
        return (s, hv) if wanted else (released(s), released(hv))

    @eagerly("products of an energy run eagerly: a compiled graph has one backward pass")
    @as_written
    @outside_inference
    def along(self, x: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """vᵀ∇f and vᵀ∇²f v for v (M, B, *): each (M, B), all that the plain sliced loss needs.

        One forward pass of first and second derivatives along v, where f is made of operations that
        `fastscore.dual.jets` has rules for; f is then called a second time only if it turns out not
        to be. Otherwise by `jvp`, which is right for every f.
        """
        kind = x.shape[1:], x.dtype, self.training
        if kind in self._without_rule or _needs_whole(self.f, x):
            return self._along_by_jvp(x, v, arguments)

        once = Once(x.device, self.f)
        try:
            with once.watched(), torch.enable_grad():
                _, slope, curvature = second_order(
                    lambda x: self.f(x, *arguments), x, v, straight=not _writes_in_place(self.f)
                )
        except Exception as error:
            once.undo()
            products = self._along_by_jvp(x, v, arguments)   # an error of f's own comes again
            if isinstance(error, NoRule):   # anything else says nothing about the next call
                self._without_rule.add(kind)
            return products

        wanted = self._leaf(x)[1] or (torch.is_grad_enabled() and v.requires_grad)
        return tuple(
            (t if wanted else t.detach()).to(checks.compute_dtype(v.dtype))
            for t in (slope, curvature)
        )

    def _transformed(self, x, v, arguments):
        """The same inside a transform of torch.func, whose tensors have no graph to walk."""
        s, pull = torch.func.vjp(torch.func.grad(lambda x: self._value(x, arguments).sum()), x)
        return s, torch.stack([pull(d)[0] for d in v])

    def _along_by_jvp(self, x, v, arguments):
        s, hv = self.jvp(x, v, *arguments)
        products = ((v * t).to(checks.compute_dtype(v.dtype)) for t in (s, hv))
        return tuple(t.flatten(2).sum(-1) if t.dim() > 2 else t for t in products)

    def _by_hand(self, x, arguments):
        """The score of a chain, whose gradient is one autograd Function.

        None where f is none, or another path is asked for.
        """
        if (
            not torch.is_grad_enabled()
            or type(x) is not torch.Tensor
            or x.dim() != 2
            or not x.numel()
        ):
            return None
        if (
            forward_ad._current_level >= 0
            or torch._C._len_torch_dispatch_stack()
            or torch.is_autocast_enabled(x.device.type)
        ):
            return None

        if not arguments and (steps := energy_chain.sequence(self.f)):
            with contextlib.suppress(RuntimeError):   # f's own error comes again
                if (s := energy_chain.score_of_sequence(steps, x)) is not None:
                    return s
        if not energy_chain.plain(self.f) or not (
            x.requires_grad or any(p.requires_grad for p in self.f.parameters())
        ):
            return None

        once = Once(x.device, self.f) if self._chain is None else None
        try:
            with once.watched() if once else contextlib.nullcontext():
                s = energy_chain.score(self.f, x, arguments)
        except Exception as error:   # on the other path an error of f's own comes again
            self._chain = False if isinstance(error, energy_chain.NoChain) else self._chain
            if once:
                once.undo()
            return None

        self._chain = True
        return s

    def _leaf(self, x):
        """x as a variable of its own where it is none yet.

        And whether the result shall be differentiable.
        """
        wanted = torch.is_grad_enabled() and (x.requires_grad or self._learns())
        # A view, for detach() would drop a forward-mode tangent.
        return (x if wanted and x.requires_grad else x.view_as(x).requires_grad_()), wanted

    def _learns(self):
        f = self.f
        return not isinstance(f, nn.Module) or any(p.requires_grad for p in f.parameters())

    def _gradient(self, x, create_graph, arguments):
        if create_graph:
            transposed.see_functions()
        with derived() if create_graph else contextlib.nullcontext():
            value = self._value(x, arguments, third=create_graph)
        if not value.requires_grad:
            raise ValueError(
                "EnergyScore: f(x) must depend on x through differentiable operations."
            )
        return torch.autograd.grad(
            value.sum(), x, create_graph=create_graph, materialize_grads=True
        )[0]

    def _value(self, x, arguments, third=True):
        # A loss takes third derivatives of f, which PyTorch gets wrong through its norms and lacks
        # for fused attention.
        f, compiling = self.f, torch.compiler.is_compiling()
        if not compiling and torch._C._len_torch_dispatch_stack():
            x = x.view_as(x)   # hooks of modes, as of FlopCounterMode, take a leaf for a parameter

        # Linear layers and activations have neither norms nor attention.
        if not third or compiling or energy_chain.sequence(f):
            value = f(x, *arguments)
        else:
            with _right_norms():
                value = f(x, *arguments)
        if not isinstance(value, torch.Tensor) or value.shape not in ((len(x),), (len(x), 1)):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"EnergyScore: f(x) must be one value per sample, ({len(x)},); got {got}."
            )

        return value


def _needs_whole(f, x):
    """Where the second-order rules do not hold (transforms, autocast), or a first attempt that
    fails would leave traces in f."""
    if not checks.readable() or forward_ad._current_level >= 0 or not x.numel():
        return True
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(x.device.type):
        return True
    return isinstance(f, nn.Module) and any(m.training and _remembers(m) for m in f.modules())


def _remembers(module):
    """Running statistics, or the iterations of a spectral norm."""
    spectral = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return (
        spectral
        or isinstance(module, _SpectralNorm)
        or (isinstance(module, _NormBase) and module.track_running_stats)
    )


def _writes_in_place(f):
    return isinstance(f, nn.Module) and any(
        getattr(m, "inplace", False) is True for m in f.modules()
    )
