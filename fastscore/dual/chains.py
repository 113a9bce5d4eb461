"""Linear layers and activations in a row, as one autograd Function: on small networks their nodes cost as much as their products."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastscore import backend as _backend
from fastscore.dual.call import NoRule
from fastscore.dual.functions import activate_stack, add_bias, in_half, linear_in_half
from fastscore.ops.activate import activated
from fastscore.ops.activate import gradient as activation_gradient
from fastscore.ops.functions import Direct


class Step(NamedTuple):
    """y = W s + b on the value and W s on its tangents; or, with a name, an activation."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    name: str | None = None


class Pending:
    """A stack that is not computed yet: `step` of `source`, a stack or another Pending. `holder`: a weak reference to its owner.

    `version`: of the tensor that it holds, its source or its result. Writes to dual numbers compute first what waits; those by way of a
    detached alias do not.
    """

    __slots__ = ("device", "dtype", "grad_mode", "holder", "result", "shape", "source", "step", "version", "versions")

    def __init__(self, source, step, shape):
        self.source, self.step, self.shape, self.dtype, self.device = source, step, shape, source.dtype, source.device
        self.holder, self.result, self.grad_mode, self.versions = None, None, torch.is_grad_enabled(), _versions(step)
        self.version = None if isinstance(source, Pending) else source._version

    def stack(self):
        """Compute it, with all that leads to it and that nobody else holds."""
        steps, source, version = [], self, None
        while isinstance(source, Pending):
            if source.result is not None:
                source, version = source.result, source.version
            elif source is not self and (holder := source.holder()) is not None:
                holder.stack   # noqa: B018  somebody may ask for it, too
            else:
                if source.versions != _versions(source.step):
                    raise RuntimeError("fastscore.jvp: f changed the parameters of a linear layer in place after it had used them.")
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
    if torch.is_autocast_enabled(pending.device.type) or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return False
    return pending.grad_mode == torch.is_grad_enabled()


@contextlib.contextmanager
def _as_noted(pending):
    """The modes in which a chain was noted down: without autocast and without hooks on what autograd saves, which may have begun since."""
    device = pending.device.type
    off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    with saved_as_they_are(), torch.set_grad_enabled(pending.grad_mode), off:
        yield


@contextlib.contextmanager
def saved_as_they_are():
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
    raise NoRule("fastscore.jvp: f wrote into the input of a linear layer, through a detached tensor, after it had used it.")


def _versions(step):
    weight, bias, _ = step
    if weight is None:
        return None
    return weight._version, None if bias is None else bias._version


def linear(source, weight, bias):
    """A linear layer on a stack or on what waits; None where it cannot wait: tensors that do not fit, another level than reverse mode."""
    dtype, device = source.dtype, source.device
    if type(source) is not Pending and (type(source) is not torch.Tensor or source.is_inference()):   # a level inside another; no versions
        return None
    for t in (weight, bias):
        if t is not None and (type(t) not in _PLAIN or t.dtype != dtype or t.device != device or t.is_inference()):
            return None
    sizes = weight.shape
    if len(sizes) != 2 or source.shape[-1] != sizes[1] or (bias is not None and bias.shape != sizes[:1]):
        return None
    if torch.is_autocast_enabled(device.type) or _backend.levels() or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return None
    return Pending(source, Step(weight, bias), (*source.shape[:-1], sizes[0]))


_PLAIN = (torch.nn.Parameter, torch.Tensor)


def run(s, steps):
    """All steps on the stack s (1 + M, *)."""
    parameters = [t for step in steps for t in step[:2]]
    activated = any([step.name is not None for step in steps])
    chosen = _backend.choose(s.device, cuda=False) if activated else None   # the back end of both passes
    if _backend.derivative_possible(s, *parameters):
        return _Chain.apply(s, [step.name for step in steps], chosen, *parameters)
    return _values(s, steps, chosen)[-1]


class _Chain(Direct):
    """The cotangents go down the chain by hand; each product is written in the order that BLAS is quick at."""

    @staticmethod
    def forward(ctx, s, names, backend, *parameters):
        steps = _steps(names, parameters)
        values = _values(s, steps, backend)
        wanted = [step.name is not None or ctx.needs_input_grad[3 + 2 * k] for k, step in enumerate(steps)]
        ctx.names, ctx.backend, ctx.kept = names, backend, [0] + [k for k, kept in enumerate(wanted) if kept and k]
        ctx.present = [p is not None for p in parameters]
        ctx.save_for_backward(*(p for p in parameters if p is not None), *(values[k] for k in ctx.kept))
        return values[-1]

    @staticmethod
    def backward(ctx, g):
        saved = list(ctx.saved_tensors)
        parameters = [saved.pop(0) if present else None for present in ctx.present]
        values, needed = dict(zip(ctx.kept, saved)), [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        pull = _differentiable if torch.is_grad_enabled() else _pull
        try:
            gs, *rest = pull(values, _steps(ctx.names, parameters), g, needed, ctx.backend)
        except RuntimeError as error:
            _backend.refuse_batched(error)
            raise
        return gs, None, None, *rest


def _steps(names, parameters):
    return [Step(weight, bias, name) for name, weight, bias in zip(names, parameters[::2], parameters[1::2])]


def _values(s, steps, backend):
    """s, and what every step makes of it."""
    values = [s]
    for weight, bias, name in steps:
        s = activated(s, name, backend) if weight is None else _linear(s, weight, bias)
        values.append(s)
    return values


def _linear(s, weight, bias):
    if bias is not None and in_half(s):
        return linear_in_half(s, weight, bias)
    y = F.linear(s, weight)
    if bias is not None:
        y[0].add_(bias)
    return y


def _pull(values, steps, g, needed, backend):
    """Cotangents of s and of all weights and biases."""
    grads, g = [None] * len(needed), g.contiguous()
    for k in range(len(steps) - 1, -1, -1):
        weight, _, name = steps[k]
        further = any(needed[: 1 + 2 * k])
        if weight is None:
            g = activation_gradient(values[k], g, name, backend, overwrite=k < len(steps) - 1)   # the last one's is the caller's
        else:
            if needed[1 + 2 * k]:
                grads[1 + 2 * k] = _gradient_of_weight(g.flatten(0, -2), values[k].flatten(0, -2))
            if needed[2 + 2 * k]:
                grads[2 + 2 * k] = g[:1].flatten(0, -2).sum(0)
            g = _times(g, weight) if further else None
        if not further:
            break
    grads[0] = g if needed[0] else None
    return grads


def _differentiable(values, steps, g, needed, backend):
    """The same, made of operations that can be differentiated again: on views, for the parameters may depend on s."""
    with torch.enable_grad():
        s = first = values[0].view_as(values[0])
        own = [None if p is None else p.view_as(p) for step in steps for p in step[:2]]
        for weight, bias, name in _steps([step.name for step in steps], own):
            if weight is None:
                s = activate_stack(s, name, backend)
            else:
                s = F.linear(s, weight)
                s = s if bias is None else add_bias(s, bias, 1)
        inputs = [p for p, need in zip([first, *own], needed) if need]
        found = iter(torch.autograd.grad(s, inputs, g, create_graph=True))
    return [next(found) if need else None for need in needed]


def _narrow(n, device):
    """Widths at which a BLAS falls to a sixth of its rate where they are rows, and keeps it where they are columns."""
    return 1 < n <= 8 and device.type == "cpu"


def _times(g, weight):
    return torch.matmul(g, weight.t().contiguous().t() if _narrow(len(weight), g.device) else weight)


def _gradient_of_weight(g, s):
    return torch.mm(s.t(), g).t().contiguous() if _narrow(s.shape[1], s.device) else torch.mm(g.t(), s)
