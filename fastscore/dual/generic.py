"""One operation without a rule, by stock forward mode."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastscore import backend as backends
from fastscore.dual import kept, transposed
from fastscore.dual.call import NoRule
from fastscore.dual.formulas import FORMULAS, WITHOUT_DERIVATIVE, refused
from fastscore.dual.number import Dual
from fastscore.dual.once import Draws
from fastscore.dual.stacks import shares_memory
from fastscore.dual.stock import differentiable_forms


def generic(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stock forward mode through one operation.

    Right for everything but the norms, which have rules of their own.
    """
    name = getattr(func, "__name__", str(func))
    if func in WITHOUT_DERIVATIVE:
        refused(WITHOUT_DERIVATIVE[func])()

    # Eigenvectors of complex matrices, and their phase.
    if func in (torch.linalg.eig, torch.linalg.eigh):
        raise NoRule(
            f"fastscore.jvp: {name} has tangents that depend on the phase of eigenvectors."
        )

    # Of complex numbers and of values without dimensions, too, which rules leave out.
    composed = FORMULAS.get(func)
    if composed is not None and (result := composed(*args, **kwargs)) is not NotImplemented:
        return result

    if backends._dual_level():
        raise NoRule(
            f"fastscore.jvp: {name} inside the forward mode of another level, and forward mode "
            "does not nest."
        )

    leaves, spec = tree_flatten((args, kwargs))
    leaves = [kept.value_of(a) for a in leaves]
    narrow = _narrow_dtype(leaves)
    places = [i for i, a in enumerate(leaves) if isinstance(a, Dual)]
    stacks = [leaves[i].stack for i in places]
    draws, form = Draws(stacks[0].device, leaves), []

    def plain(*duals):
        filled = list(leaves)
        for i, d in zip(places, duals):
            filled[i] = d

        arguments, keywords = tree_unflatten(filled, spec)
        outputs, spec_out = tree_flatten(func(*arguments, **keywords))
        transposed.check_nested(name, outputs)
        form[:] = spec_out, [o is None for o in outputs]
        if not all(isinstance(o, torch.Tensor | None) for o in outputs):
            raise NoRule(f"fastscore.jvp: {name} returns something else than tensors.")

        return tuple(o for o in outputs if o is not None)

    def along(m):
        draws.again()
        with draws.watched():
            return torch.func.jvp(plain, tuple(s[0] for s in stacks), tuple(s[m] for s in stacks))

    with torch._C.DisableTorchFunctionSubclass(), differentiable_forms(name):
        try:
            outputs = [along(m) for m in range(1, len(stacks[0]))]
        # It has no forward mode, or one with a fault; what f itself has done wrong comes again.
        except RuntimeError:
            outputs = None
        if outputs is None:
            draws.again()
            return transposed.transposed(name, func, tree_unflatten(leaves, spec)[0], kwargs)
        if narrow is not None:
            outputs = [
                [[_narrowed(t, narrow) for t in part] for part in output] for output in outputs
            ]
        values, (shape, missing) = outputs[0][0], form
        views = [len(stacks) == 1 and shares_memory(value, stacks[0]) for value in values]
        # a view stays one, of the whole stack.
        whole = torch.vmap(plain)(stacks[0]) if any(views) else None
        joined = (
            Dual(whole[k]) if views[k] else _joined(v, [t[k] for _, t in outputs])
            for k, v in enumerate(values)
        )
        joined = iter(list(joined))

    return tree_unflatten([None if none else next(joined) for none in missing], shape)


def _narrow_dtype(leaves):
    """The dtype of an operation on 0-d tensors, where a transform takes Python's numbers for
    tensors of their own, in float64.

    None where nothing has to be mended: no number, a dtype that was asked for, or a tensor that is
    wide by itself.
    """
    tensors = [
        a
        for a in leaves
        if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.is_complex())
    ]
    numbers = any(isinstance(a, float | complex | int) for a in leaves)
    if (
        not numbers
        or any(a.dim() for a in tensors)
        or any(isinstance(a, torch.dtype) for a in leaves)
    ):
        return None

    dtype = functools.reduce(torch.promote_types, (a.dtype for a in tensors))
    return None if dtype in (torch.float64, torch.complex128) else dtype


def _narrowed(t, dtype):
    if t.dtype not in (torch.float64, torch.complex128):
        return t
    if t.is_complex() == dtype.is_complex:
        return t.to(dtype)
    return t.to(dtype.to_complex() if t.is_complex() else dtype.to_real())


def _joined(value, tangents):
    if value.layout != torch.strided:
        raise NoRule("fastscore.jvp: a sparse result cannot be carried with its tangents.")
    return (
        Dual(torch.stack([value, *tangents]))
        if value.is_floating_point() or value.is_complex()
        else value
    )
