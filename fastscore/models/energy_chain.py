"""The score of an energy that is linear layers and activations in a row, and its gradient, by hand:
small networks are mostly overhead.

    a_k = W_k h_{k-1} + b_k,    h_k = φ_k(a_k)                            forward
    p_k = φ'_k(a_k) g_k,    g_{k-1} = W_kᵀ p_k,    s = g_0                 the score
    q_k = W_k ḣ_{k-1},    ḣ_k = φ'_k(a_k) q_k,    ḣ_0 = u
    its gradient for a cotangent u of s, up ...
    ā_k = φ'_k h̄_k + φ''_k q_k g_k,    h̄_{k-1} = W_kᵀ ā_k                 ... and down
    W̄_k = p_kᵀ ḣ_{k-1} + ā_kᵀ h_{k-1},    b̄_k = Σ ā_k

Where somebody differentiates that gradient, autograd takes over.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from fastscore import backend as _backend
from fastscore.ops.activate import activated
from fastscore.ops.activate import gradient as activation_gradient
from fastscore.ops.activations import ACTIVATIONS
from fastscore.ops.functions import Direct, without_autocast

_ACTIVATIONS = {
    F.silu: "silu",
    F.gelu: "gelu",
    F.softplus: "softplus",
    F.elu: "elu",
    torch.tanh: "tanh",
    torch.Tensor.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.Tensor.sigmoid: "sigmoid",
}
_LEAVES = (nn.Linear, nn.SiLU, nn.GELU, nn.Softplus, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Identity)
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")
}
_METADATA |= {torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.__len__}


class NoChain(Exception):
    """f is something else than layers and activations in a row."""


class Step(NamedTuple):
    """a = W h + b, or with a name an activation; `value` is what it makes."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    name: str | None
    value: torch.Tensor


class Recorder(torch.Tensor):
    """x on its way through f: a value, and the steps that led to it.

    Whatever is no step of a chain raises.
    """

    @staticmethod
    def of(value: torch.Tensor, steps: list[Any]) -> "Recorder":
        recorder = torch.Tensor._make_subclass(Recorder, value)
        recorder.value = value
        recorder.steps = steps
        return recorder

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        h = args[0] if args else None
        if not isinstance(h, Recorder) or not torch.is_grad_enabled():
            raise NoChain
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            return _step(func, h, args[1:], kwargs)


def _step(func, h, rest, kwargs):
    value = h.value
    if func is F.linear and value.dim() == 2:
        weight, bias = (*rest, None)[:2] if rest else (kwargs.get("weight"), None)
        bias = kwargs.get("bias", bias)
        if (
            any(
                t is not None and (isinstance(t, Recorder) or t.dtype != value.dtype)
                for t in (weight, bias)
            )
            or weight.dim() != 2
        ):
            raise NoChain
        y = F.linear(value, weight, bias)
        return Recorder.of(y, (*h.steps, Step(weight, bias, None, y)))
    if func in _ACTIVATIONS and value.dim() == 2 and _usual(func, rest, kwargs):
        y = func(value)
        return Recorder.of(y, (*h.steps, Step(None, None, _ACTIVATIONS[func], y)))
    if value.dim() == 2 and value.shape[1] == 1 and _takes_the_column(func, rest, kwargs):
        return Recorder.of(value[:, 0], h.steps)

    raise NoChain


def _usual(func, rest, kwargs):
    """Whether an activation has the parameters that it has by default, and writes nothing."""
    usual = {"inplace": False, "beta": 1, "threshold": 20, "alpha": 1.0, "approximate": "none"}
    first = {
        F.softplus: ("beta", "threshold"),
        F.elu: ("alpha", "inplace"),
        F.silu: ("inplace",),
        F.gelu: ("approximate",),
    }.get(func, ())
    given = dict(zip(first, rest)) | kwargs
    return len(rest) <= len(first) and all(
        name in usual and usual[name] == value for name, value in given.items()
    )


def _takes_the_column(func, rest, kwargs):
    if kwargs:
        return False

    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        index = rest[0]
        return (
            isinstance(index, tuple)
            and len(index) == 2
            and index[0] in (slice(None), Ellipsis)
            and index[1] in (0, -1)
        )

    return (name, rest) in (
        ("squeeze", (-1,)),
        ("squeeze", (1,)),
        ("view", (-1,)),
        ("flatten", ()),
        ("reshape", (-1,)),
    )


def plain(f: Callable[..., Tensor]) -> bool:
    """Whether f is a module of linear layers and smooth activations alone, on which nobody else
    listens."""
    if not isinstance(f, nn.Module):
        return False
    for m in f.modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if type(m) not in _LEAVES and (
            not m._modules
            or (type(m).__module__.startswith("torch.") and type(m) is not nn.Sequential)
        ):
            return False
    return True


def sequence(f: Callable[..., Tensor]) -> Any:
    """[(weight, bias, name)] of a Sequential of nothing but linear layers and activations, on which
    nobody listens; None of another f.

    Such a chain can be read from its modules, without calling them one by one.
    """
    if type(f) is not nn.Sequential or any(_OF_ALL) or _listened_to(vars(f)):
        return None

    steps = []
    for m in f._modules.values():
        kind, own = type(m), vars(m)
        if _listened_to(own):
            return None
        if kind is nn.Linear:
            parameters = own["_parameters"]
            weight = parameters.get("weight")
            bias = parameters.get("bias")
            if (
                type(weight) is not nn.Parameter
                or type(bias) not in (nn.Parameter, type(None))
                or "bias" not in parameters
            ):
                return None
            steps.append((weight, bias, None))
        elif kind in _NAMED and all(
            [own.get(name) == usual for name, usual in _NAMED[kind][1].items()]
        ):
            steps.append((None, None, _NAMED[kind][0]))
        else:
            return None

    return steps or None


# Of all modules.
_OF_ALL = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)
_NAMED = {
    nn.SiLU: ("silu", {"inplace": False}),
    nn.Tanh: ("tanh", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
}
_VALUE_OF = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "softplus": F.softplus,
}
_LISTENERS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_compiled_call_impl",
    "forward",
)


def _listened_to(own):
    """Whether a module with these attributes has hooks, is compiled or has got another forward."""
    return bool([name for name in _LISTENERS if own.get(name)])


def score_of_sequence(steps: Any, x: Tensor) -> Tensor | None:
    """∇f(x), differentiable.

    None for what is no chain after all, or where nothing wants a gradient.

    Raises:
        RuntimeError: layers do not fit.
    """
    wanted, h, values = x.requires_grad, x.detach(), []
    with torch.no_grad():
        for weight, bias, name in steps:
            if weight is None:
                h = _VALUE_OF[name](h)
            else:
                wanted = wanted or weight.requires_grad or (bias is not None and bias.requires_grad)
                if weight.dtype != h.dtype or (bias is not None and bias.dtype != h.dtype):
                    return None
                h = F.linear(h, weight, bias)
            values.append(h)
    if not wanted or h.shape != (len(x), 1):
        return None

    return _Score.apply(
        x, [step[2] for step in steps], values, *[t for step in steps for t in step[:2]]
    )


def score(f: Callable[..., Tensor], x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """∇f(x) of a chain, differentiable; f is called once.

    Raises:
        NoChain: f turned out to be something else.
    """
    with torch.enable_grad():
        y = f(Recorder.of(x.detach(), ()), *arguments)
    if not isinstance(y, Recorder) or not y.steps or y.shape not in ((len(x),), (len(x), 1)):
        raise NoChain
    parameters = [t for step in y.steps for t in (step.weight, step.bias)]
    return _Score.apply(
        x, [step.name for step in y.steps], [step.value for step in y.steps], *parameters
    )


class _Score(Direct):
    @staticmethod
    def forward(ctx, x, names, values, *parameters):
        weights = parameters[::2]
        inputs = (x, *values[:-1])   # of every step
        chosen = _backend.choose(x.device, cuda=False)   # of both passes
        cotangents, g = [], torch.ones_like(values[-1])
        for k in range(len(names) - 1, -1, -1):
            cotangents.append(g)  # of the step's value
            g = (
                activation_gradient(inputs[k][None], g[None], names[k], chosen)[0]
                if names[k]
                else g @ weights[k]
            )

        ctx.names = names
        ctx.backend = chosen
        ctx.present = [p is not None for p in parameters]
        ctx.save_for_backward(
            x, *values[:-1], *cotangents[::-1], *(p for p in parameters if p is not None)
        )
        return g

    @staticmethod
    @without_autocast
    def backward(ctx, u):
        names, n = ctx.names, len(ctx.names)
        inputs = ctx.saved_tensors[:n]
        cotangents = ctx.saved_tensors[n : 2 * n]
        rest = iter(ctx.saved_tensors[2 * n :])
        parameters = [next(rest) if present else None for present in ctx.present]
        if torch.is_grad_enabled():   # somebody differentiates the gradient
            return _differentiable(ctx, inputs[0], names, parameters, u)

        return _gradient(
            ctx.needs_input_grad, names, ctx.backend, inputs, cotangents, parameters, u
        )


def _gradient(needs, names, backend, inputs, cotangents, parameters, u):
    weights = parameters[::2]
    grads = [None] * len(parameters)
    stacks, t = [None] * len(names), u
    for k, name in enumerate(names):   # up: tangents along u
        if name is None:
            if needs[3 + 2 * k]:
                grads[2 * k] = cotangents[k].t() @ t
            if k < len(names) - 1:
                t = t @ weights[k].t()
        else:
            stacks[k] = torch.stack([inputs[k], t])
            if k < len(names) - 1:
                t = activated(stacks[k], name, backend)[1]

    g = None   # down: the cotangents of the values, zero above the last activation
    for k in range(len(names) - 1, -1, -1):
        if names[k] is not None:
            g = torch.zeros_like(cotangents[k]) if g is None else g
            g = activation_gradient(
                stacks[k], torch.stack([g, cotangents[k]]), names[k], backend, overwrite=True
            )[0]
        elif g is not None:
            if needs[3 + 2 * k]:
                grads[2 * k].addmm_(g.t(), inputs[k])
            if parameters[2 * k + 1] is not None and needs[4 + 2 * k]:
                grads[2 * k + 1] = g.sum(0)
            g = g @ weights[k] if any(needs[: 3 + 2 * k]) else None

    return g if needs[0] else None, None, None, *grads


def _differentiable(ctx, x, names, parameters, u):
    with torch.enable_grad():
        x = x.view_as(x)
        own = [None if p is None else p.view_as(p) for p in parameters]
        h = x
        for k, name in enumerate(names):
            h = ACTIVATIONS[name].function(h) if name else F.linear(h, own[2 * k], own[2 * k + 1])
        (s,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        inputs = [
            t
            for t, need in zip([x, *own], [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]])
            if need
        ]
        found = torch.autograd.grad(s, inputs, u, create_graph=True, allow_unused=True)

    found = iter(found)
    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
    gx, *rest = [next(found) if need else None for need in needed]
    return gx, None, None, *rest
