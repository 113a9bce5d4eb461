"""What the autograd Functions share."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def quick(cls: type) -> type:
    """Apply it without binding arguments to the signature of `forward`, which costs more than most
    kernels on small tensors.

    All of them are given by position. Inside a transform torch binds them; the signature is kept
    for that.
    """
    cls.forward.__signature__ = inspect.signature(cls.forward)
    cls.apply = classmethod(_apply)
    return cls


def _apply(cls, *args):
    if torch._C._are_functorch_transforms_active():
        return torch.autograd.Function.apply.__func__(cls, *args)
    return super(torch.autograd.Function, cls).apply(
        *[unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in args]
    )


class Direct(torch.autograd.Function):
    """A Function that our own code alone applies: outside transforms, with one forward(ctx, ...),
    to ordinary tensors.

    Its apply is what is left of Function.apply then.
    """

    @classmethod
    def apply(cls, *args):
        return super(_SingleLevelFunction, cls).apply(
            *[unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in args]
        )


def without_autocast(backward: Callable) -> Callable:
    """backward(ctx, g) of a Function that is applied outside autocast alone, without autocast too.

    Inside, a product would round g to half precision, and a kernel takes it for what was saved.
    """

    @functools.wraps(backward)
    def call(ctx, g):
        device = g.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, g)
        with torch.autocast(device, enabled=False):
            return backward(ctx, g)

    return call


def contiguous(t: Tensor | None) -> Tensor | None:
    """t in C order and in memory; None stays None.

    The zeros that autograd passes as tangents have a shape and no memory. PyTorch gives an op one
    element of it, expanded, whatever strides they claim to have, and a kernel that reads them in
    order reads beyond it.
    """
    if t is None:
        return None
    if not torch.compiler.is_compiling() and t._is_zerotensor():
        return t.clone()
    return t.contiguous()


def without_memory(t: Tensor) -> bool:
    """Whether t is one of those zeros; in a compiled graph there are none."""
    return not torch.compiler.is_compiling() and t._is_zerotensor()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors, some of them None, for both modes; copies of those that were made in inference
    mode, which no graph may hold."""
    ctx.present = [t is not None for t in tensors]
    kept = [t for t in tensors if t is not None]
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        kept = [ordinary(t) for t in kept]
    ctx.save_for_backward(*kept)
    ctx.save_for_forward(*kept)


def saved(ctx: Any) -> list[Tensor | None]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if present else None for present in ctx.present]


def along(f: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    """J v of a function of plain PyTorch, by two reverse passes.

    A forward pass inside a jvp rule loses the tangents of the levels around it.
    """
    outputs, pull = torch.func.vjp(f, *primals)
    zeros = (
        torch.zeros_like(outputs)
        if isinstance(outputs, torch.Tensor)
        else tuple(map(torch.zeros_like, outputs))
    )
    return torch.func.vjp(pull, zeros)[1](tuple(tangents))[0]  # the transpose of the transpose


def released(t: Tensor) -> Tensor:
    """Without the graph of this call, but with the forward-mode tangent that detach() drops."""
    if not t.requires_grad:
        return t
    primal, tangent = forward_ad.unpack_dual(t)
    return (
        primal.detach()
        if tangent is None
        else forward_ad.make_dual(primal.detach(), tangent.detach())
    )


def in_words(error: Exception) -> RuntimeError | None:
    """PyTorch's refusal of tensors of inference mode as one sentence of ours; None for any other
    error."""
    message = str(error)
    if not message.startswith(
        ("Inference tensors cannot be saved", "Inplace update to inference tensor")
    ):
        return None
    return RuntimeError(
        "fastscore: the network (or what it closes over) has tensors made inside "
        "torch.inference_mode(), which can neither "
        "be differentiated through nor written to outside it; build or load it outside, or take "
        "copy.deepcopy(network), made outside."
    )


def outside_inference(method: Callable) -> Callable:
    """method(self, ...), which differentiates, outside inference mode, where nothing can be: called
    inside, it returns values.

    Tensors that were made there are cloned, for no graph may hold them.
    """

    @functools.wraps(method)
    def call(self, *arguments, **named):
        if torch.compiler.is_compiling():
            return method(self, *arguments, **named)
        try:
            if not (
                torch.is_inference_mode_enabled()
                or any(map(_made_in_inference, (*arguments, *named.values())))
            ):
                return method(self, *arguments, **named)
            wanted = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(wanted):
                return method(
                    self,
                    *map(ordinary, arguments),
                    **{name: ordinary(t) for name, t in named.items()},
                )
        except RuntimeError as error:
            told = in_words(error)
            if told is None:
                raise
            raise told from error

    return call


def ordinary(t: Any) -> Any:
    """t, or its clone where t was made in inference mode; to be called outside it."""
    return t.clone() if _made_in_inference(t) else t


def _made_in_inference(t):
    return isinstance(t, torch.Tensor) and t.is_inference()


def plain(f: Callable, *tensors: Tensor) -> Any:
    """f(*tensors), of plain PyTorch, where a derivative rule of a Function needs it.

    Inside such a rule forward mode of the levels around it reaches Functions and nothing else, so
    this is one: its derivatives are f's, by torch.func.vjp, wrapped again, and right at every
    order.
    """
    return _Plain.apply(f, *tensors)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(f, *tensors):
        def own(t):  # autograd accepts neither an input nor a view of one as a result
            return t.clone() if t._is_view() or any(t is given for given in tensors) else t

        outputs = f(*tensors)
        return own(outputs) if isinstance(outputs, torch.Tensor) else tuple(map(own, outputs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.f, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.single = isinstance(output, torch.Tensor)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors, f, single = ctx.saved_tensors, ctx.f, ctx.single

        def pull(*arguments):
            primals, g = arguments[: len(tensors)], arguments[len(tensors) :]
            return torch.func.vjp(f, *primals)[1](g[0] if single else tuple(g))

        return None, *plain(pull, *tensors, *cotangents)

    @staticmethod
    def jvp(ctx, _, *tangents):
        tensors, f = ctx.saved_tensors, ctx.f
        tangents = [torch.zeros_like(p) if t is None else t for p, t in zip(tensors, tangents)]
        return plain(lambda *a: along(f, a[: len(tensors)], a[len(tensors) :]), *tensors, *tangents)

    @staticmethod
    def vmap(info, in_dims, f, *tensors):
        outputs = plain(torch.vmap(f, in_dims[1:], randomness="error"), *tensors)
        return outputs, 0 if isinstance(outputs, torch.Tensor) else (0,) * len(outputs)
