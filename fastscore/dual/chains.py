"""Linear layers and activations in a row, as one autograd Function.

On small networks their nodes cost as much as their products.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastscore import backend as _backend
from fastscore.dual.call import NoRule
from fastscore.dual.functions import activate_stack, add_bias, in_half, linear_in_half
from fastscore.ops.activate import activated
from fastscore.ops.activate import gradient as activation_gradient
from fastscore.ops.functions import Direct, without_autocast


class Step(NamedTuple):
    """y = W s + b on the value and W s on its tangents; or, with a name, an activation."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    name: str | None = None


class Pending:
    """A stack that is not computed yet: `step` of `source`, a stack or another Pending.

    `holder`: a weak reference to its owner.

    `version`: of the tensor that it holds, its source or its result. Writes to dual numbers compute
    first what waits; those by way of a detached alias do not.
    """

    device: Any
    dtype: Any
    grad_mode: bool
    holder: Any
    result: Any
    shape: Any
    source: Any
    step: Any
    versions: tuple[Any, ...]

    __slots__ = (
        "device", "dtype", "grad_mode", "holder", "result", "shape", "source", "step", "version",
        "versions",
    )

    def __init__(self, source: Any, step: Any, shape: Any) -> None:
        weight, bias, _ = step
        self.source = source
        self.step = step
        self.shape = shape
        self.dtype = source.dtype
        self.device = source.device
        self.holder = None
        self.result = None
        self.grad_mode = torch.is_grad_enabled()
        self.version = None if type(source) is Pending else source._version
        self.versions = (
            None if weight is None else (weight._version, None if bias is None else bias._version)
        )

    def stack(self) -> Any:
        """Compute it, with all that leads to it and that nobody else holds."""
        steps, source, version = [], self, None
        while type(source) is Pending:
            if source.result is not None:
                source, version = source.result, source.version
            elif source is not self and (holder := source.holder()) is not None:
                holder.stack   # noqa: B018  somebody may ask for it, too
            else:
                weight, bias, _ = source.step
                if weight is not None and source.versions != (
                    weight._version,
                    None if bias is None else bias._version,
                ):
                    raise RuntimeError(
                        "fastscore.jvp: f changed the parameters of a linear layer in place after "
                        "it had used them."
                    )
                steps.append(source.step)
                source, version = source.source, source.version
        if source._version != version:
            _refuse()

        steps.reverse()
        if _noted_now(self):
            self.result = run(source, steps)
        else:
            with _as_noted(self):
                self.result = run(source, steps)

        self.version = self.result._version
        return self.result


def _noted_now(pending):
    """Whether the modes are those in which the chain was noted down."""
    if torch.is_autocast_enabled(
        pending.device.type
    ) or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return False
    return pending.grad_mode == torch.is_grad_enabled()


@contextlib.contextmanager
def _as_noted(pending):
    """The modes in which a chain was noted down.

    Without autocast and without hooks on what autograd saves, which may have begun since.
    """
    device = pending.device.type
    off = (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )
    with saved_as_they_are(), torch.set_grad_enabled(pending.grad_mode), off:
        yield


@contextlib.contextmanager
def saved_as_they_are() -> Iterator[Any]:
    """Without hooks on what autograd saves."""
    hooks = []
    while found := torch._C._autograd._top_saved_tensors_default_hooks(False):
        hooks.append(found)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in hooks[::-1]:
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def _refuse():
    raise NoRule(
        "fastscore.jvp: f wrote into the input of a linear layer, through a detached tensor, after "
        "it had used it."
    )


def linear(source: Any, weight: Any, bias: Any) -> Any:
    """A linear layer on a stack or on what waits.

    None where it cannot wait: tensors that do not fit, another level than reverse mode.
    """
    dtype, device = source.dtype, source.device
    # a level inside another; no versions.
    if type(source) is not Pending and (type(source) is not torch.Tensor or source.is_inference()):
        return None

    for t in (weight, bias):
        if t is not None and (
            type(t) not in _PLAIN or t.dtype != dtype or t.device != device or t.is_inference()
        ):
            return None
    if weight is None:
        return None

    sizes = weight.shape
    if (
        len(sizes) != 2
        or source.shape[-1] != sizes[1]
        or (bias is not None and bias.shape != sizes[:1])
    ):
        return None
    if torch.is_autocast_enabled(
        device.type
    ) or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return None

    # `backend.levels()`
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return None

    return Pending(source, Step(weight, bias), (*source.shape[:-1], sizes[0]))


_PLAIN = (torch.nn.Parameter, torch.Tensor)


def run(s: Tensor, steps: Any) -> Any:
    """All steps on the stack s (1 + M, *)."""
    names, parameters = [], []
    for weight, bias, name in steps:
        names.append(name)
        parameters += (weight, bias)

    activated = names.count(None) < len(names)
    # The back end of both passes.
    chosen = _backend.choose(s.device, cuda=False) if activated else None
    if _backend.derivative_possible(s, *parameters):
        return _Chain.apply(s, names, chosen, *parameters)

    return _values(s, names, parameters, chosen)[-1]


class _Chain(Direct):
    """The cotangents go down the chain by hand.

    Each product is written in the order that BLAS is quick at.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, names: Any, backend: str, *parameters: Any) -> Any:
        values = _values(s, names, parameters, backend)
        needed = ctx.needs_input_grad
        ctx.names = names
        ctx.backend = backend
        ctx.kept = [0]
        kept = [s]
        for k, name in enumerate(names):
            if k and (name is not None or needed[3 + 2 * k]):
                ctx.kept.append(k)
                kept.append(values[k])

        ctx.save_for_backward(*parameters, *kept)
        return values[-1]

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Any) -> Any:
        saved, names = ctx.saved_tensors, ctx.names
        parameters = saved[: 2 * len(names)]
        kept = saved[2 * len(names) :]
        values = dict(zip(ctx.kept, kept))
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        pull = _differentiable if torch.is_grad_enabled() else _pull
        try:
            gs, *rest = pull(values, names, parameters, g, needed, ctx.backend)
        except RuntimeError as error:
            _backend.refuse_batched(error)
            raise

        return gs, None, None, *rest


def _values(s, names, parameters, backend):
    """s, and what every step makes of it."""
    values, half = [s], in_half(s)
    for k, name in enumerate(names):
        if name is not None:
            s = activated(s, name, backend)
        else:
            weight, bias = parameters[2 * k : 2 * k + 2]
            if bias is not None and half:
                s = linear_in_half(s, weight, bias)
            else:
                s = F.linear(s, weight)
                if bias is not None:
                    s[0].add_(bias)
        values.append(s)
    return values


def _pull(values, names, parameters, g, needed, backend):
    """Cotangents of s and of all weights and biases."""
    grads = [None] * len(needed)
    g = g.contiguous()
    last = len(names) - 1
    for k in range(last, -1, -1):
        name = names[k]
        further = True in needed[: 1 + 2 * k]
        if name is not None:
            # The last one's is the caller's.
            g = activation_gradient(values[k], g, name, backend, overwrite=k < last)
        else:
            weight = parameters[2 * k]
            if needed[1 + 2 * k]:
                grads[1 + 2 * k] = _gradient_of_weight(g.flatten(0, -2), values[k].flatten(0, -2))
            if needed[2 + 2 * k]:
                grads[2 + 2 * k] = g[:1].flatten(0, -2).sum(0)
            if further:
                narrow = _NARROW[0] < len(weight) <= _NARROW[1] and weight.device.type == "cpu"
                g = torch.matmul(g, weight.t().contiguous().t() if narrow else weight)
        if not further:
            break

    grads[0] = g if needed[0] else None
    return grads


def _differentiable(values, names, parameters, g, needed, backend):
    """The same, made of operations that can be differentiated again.

    On views, for the parameters may depend on s.
    """
    with torch.enable_grad():
        s = first = values[0].view_as(values[0])
        own = [None if p is None else p.view_as(p) for p in parameters]
        for name, weight, bias in zip(names, own[::2], own[1::2]):
            if name is not None:
                s = activate_stack(s, name, backend)
            else:
                s = F.linear(s, weight)
                s = s if bias is None else add_bias(s, bias, 1)
        inputs = [p for p, need in zip([first, *own], needed) if need]
        found = iter(torch.autograd.grad(s, inputs, g, create_graph=True))
    return [next(found) if need else None for need in needed]


# More than the first and at most the second: widths at which a BLAS of the CPU falls to a sixth of
# its rate where they are rows, and keeps it where they are columns.
_NARROW = 1, 8


def _gradient_of_weight(g, s):
    if _NARROW[0] < s.shape[1] <= _NARROW[1] and s.device.type == "cpu":
        return torch.mm(s.t(), g).t().contiguous()
    return torch.mm(g.t(), s)
